"""The lock of a connection that tasks and threads share: a block's, across event loops."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

import anyio
from django.db import InterfaceError
from django.db.transaction import TransactionManagementError

from .. import conf
from ..pages import see


class ThreadLock:
    """The lock of a block that tasks and threads share, first come first served.

    Tasks use it as any block's lock (`acquire_nowait()`, `acquire()`, `release()`, `value`) and
    wait without blocking their loop. A thread may take it again while it holds it.

    Args:
        session: on the synchronous connection that they share (callers.py).
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._mutex = threading.Lock()
        self._holder: int | None = None  # the thread that took it, for itself or for a task
        self._depth = 0  # how often a thread took it for itself
        self._lent = 0  # to synchronous code, while the holder's loop is not running
        self._waiting: deque[tuple[Callable[[], None], int, int]] = deque()

    def _take(self, wake: Callable[[], None] | None, depth: int) -> bool:
        thread = threading.get_ident()
        with self._mutex:
            if self._holder is None:
                self._holder, self._depth = thread, depth
                return True
            if depth and self._depth and self._holder == thread:
                self._depth += 1
                return True
            if depth and self._holder == thread:
                if self._session.root is None:  # the loop is not running: between two tests
                    self._session.stop_statement()
                    self._lent += 1
                    return True
                raise InterfaceError(
                    f"Synchronous code used the connection of {self._session} on the event loop's "
                    "thread while a native statement or block has it."
                    + see("transactions#synchronous-code-that-waits-for-a-coroutine")
                )
            if wake is not None:
                self._waiting.append((wake, thread, depth))
            return False

    def _give_up(self, wake: Callable[[], None]) -> None:
        with self._mutex:
            for entry in self._waiting:
                if entry[0] is wake:
                    self._waiting.remove(entry)
                    return
        self.release()  # it was handed over meanwhile

    @property
    def value(self) -> int:
        """1 when it is free, as a semaphore's."""
        return int(self._holder is None)

    def acquire_nowait(self) -> None:
        """Take it for a task, if it is free."""
        if not self._take(None, 0):
            raise anyio.WouldBlock

    async def acquire(self) -> None:
        """Take it for a task, in turn."""
        loop = asyncio.get_running_loop()
        turn = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(turn.set)

        if not self._take(wake, 0):
            try:
                await turn.wait()
            except BaseException:
                self._give_up(wake)
                raise

    def acquire_thread(self) -> None:
        """Take it for synchronous code of this thread, in turn."""
        turn = threading.Event()
        wake = turn.set
        if self._take(wake, 1):
            return
        timeout = conf.get("LOCK_TIMEOUT")
        while not turn.wait(timeout):
            session = self._session
            if monotonic() - session.active >= timeout and not session.waits_for_server:
                self._give_up(wake)
                raise TransactionManagementError(
                    f"A thread waited {timeout:g} s for the connection of {session}: a native "
                    "block has it and does nothing. Probably that block waits for this thread."
                    + see("transactions#synchronous-code-that-waits-for-a-coroutine")
                )

    def release(self) -> None:
        """Give it back, to the one who has waited longest."""
        with self._mutex:
            if self._lent and self._holder == threading.get_ident() and self._session.root is None:
                self._lent -= 1
                return
            if self._depth > 1:
                self._depth -= 1
                return
            while self._waiting:
                wake, self._holder, self._depth = self._waiting.popleft()
                try:
                    wake()
                    return
                except RuntimeError:  # its loop is closed
                    continue
            self._holder, self._depth = None, 0
