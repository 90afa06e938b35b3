"""Native synchronous views begin in the order of their requests, a few at once.

A view holds the loop while it computes. Sixty-four that took turns at each query would all end
late; each that waits until others have ended is not later for it. Who waits holds nothing, and not
for ever: where the loop has nothing else to do, or those under way don't get on, the next one
begins. One that awaits something is not under way meanwhile: it may wait for another request.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from .. import bridge
from .._sessions import scopes

AT_ONCE = 8
_IDLE = 0.0005  # seconds of work in a turn of the loop that leave time for one more view
_PATIENCE = 1.0  # seconds after which one more begins, whatever the others do
_KEY = "view"  # among an operation's resources; no alias is looked up by it


class _Line:
    """The native synchronous views of one event loop: those under way, and those that wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.under_way = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._looked = self._moved = 0.0

    def begin(self, may_wait: bool) -> None:
        """Have the running view be under way, as soon as it is its turn."""
        if may_wait and (self._waiting or self.under_way >= AT_ONCE):
            turn = self.loop.create_future()
            self._waiting.append(turn)
            if len(self._waiting) == 1:
                self._moved = monotonic()
                self._looked = 0.0
                self.loop.call_soon(self._look)
            try:
                bridge.await_(turn)
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self.end()
                raise
        else:
            self.under_way += 1

    def end(self) -> None:
        """One is not under way any more."""
        self.under_way -= 1
        if self.under_way < AT_ONCE:
            self._next()

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                self.under_way += 1
                self._moved = monotonic()
                turn.set_result(None)
                return

    def _look(self) -> None:
        """In each turn of the loop, while anybody waits."""
        now = monotonic()
        if now - self._looked < _IDLE or now - self._moved > _PATIENCE:
            self._next()
        self._looked = now
        if self._waiting:
            self.loop.call_soon(self._look)


class _UnderWay:
    """A view's place (bridge.Resource), until the rest of its request's operation ends."""

    def __init__(self, line: _Line) -> None:
        self.line = line

    def suspend(self) -> Callable[[BaseException | None], None]:
        self.line.end()
        return self._resume

    def _resume(self, failure: BaseException | None) -> None:
        self.line.begin(may_wait=False)  # it may hold what the others wait for

    def release(self) -> None:
        self.line.end()


class _Lines(threading.local):
    line: _Line | None = None


_lines = _Lines()


def begin() -> None:
    """Wait for the turn of the view that the running operation is about to call.

    Not with a transaction, or something set in a session: another view may wait for that.
    """
    runner = bridge.current()
    if runner is None or _KEY in runner.resources:
        return
    loop = asyncio.get_running_loop()
    line = _lines.line
    if line is None or line.loop is not loop:
        line = _lines.line = _Line(loop)
    held: Any = runner.resources.values()
    line.begin(may_wait=not scopes.in_block() and not any(_is_needed(each) for each in held))
    runner.resources[_KEY] = _UnderWay(line)


def _is_needed(session: Any) -> bool:
    return getattr(session, "wrapper", None) is not None and session.is_needed
