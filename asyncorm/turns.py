"""Turns of the loop for other tasks while some take large results apart: only one of these works in
each turn, for about a millisecond, however many there are.
"""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop, Future, get_running_loop
from collections import deque
from time import monotonic

from . import bridge

BUSY = 0.001  # seconds of work, or of input that needs no waiting, before other tasks get a turn


class _Line(threading.local):
    """Those who wait for their turn on the loop of a thread."""

    def __init__(self) -> None:
        self.loop: AbstractEventLoop | None = None
        self.waiting: deque[Future[None]] = deque()

    def join(self) -> Future[None]:
        loop = get_running_loop()
        if self.loop is not loop:
            self.loop = loop
            self.waiting.clear()
        future: Future[None] = loop.create_future()
        self.waiting.append(future)
        if len(self.waiting) == 1:
            loop.call_soon(self.next)
        return future

    def next(self) -> None:
        """One a turn: the others wait for the next."""
        while self.waiting and self.waiting[0].done():  # cancelled
            self.waiting.popleft()
        if self.waiting:
            self.waiting.popleft().set_result(None)
        if self.waiting:
            get_running_loop().call_soon(self.next)


_line = _Line()


async def turn() -> None:
    """Let other tasks run."""
    await _line.join()


class Turns:
    """Lets other tasks run now and then, for who works without a connection.

    First before it begins: what it works on may have come together with that of many others.
    """

    def __init__(self) -> None:
        self._began = float("-inf")

    def give(self) -> None:
        """Let them run if it is due: from native code."""
        runner = bridge.current()
        if runner is not None and not runner.shield_depth and monotonic() - self._began >= BUSY:
            bridge.wait_for(runner, turn())
            self._began = monotonic()

    async def given(self) -> None:
        """The same, from a coroutine."""
        if monotonic() - self._began >= BUSY:
            await turn()
            self._began = monotonic()
