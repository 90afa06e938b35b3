"""Native code inside a test's transaction: it runs on the test's own server session.

Django's TestCase, and with it pytest-django's `db`, opens a transaction on a synchronous connection
and rolls it back at the end. While that transaction is open, native code uses the same connection
instead of a pool's, whichever loop or thread
it runs in: what either side writes the other sees, and all of it is rolled back. Statements of
    concurrent tasks take turns then, as in any transaction block; tests that need real parallelism
    use TransactionTestCase, or `transaction=True`.

`transactions.enter()` calls `begin()` when Django marks a transaction as a test case's
(`Atomic._from_testcase`).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import psycopg
from django.db import InterfaceError, connections
from greenlet import getcurrent

from . import bridge, driver, sessions
from .bridge import Runner
from .sessions import Block, Session


class _Turns:
    """A lock that tasks and threads share: tasks wait for it without blocking their loop."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._owner: Any = None
        self._thread = 0
        self._depth = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def _try(self, owner: Any, wake: Callable[[], None] | None) -> bool:
        with self._mutex:
            if self._owner is None or self._owner is owner:
                self._owner, self._thread = owner, threading.get_ident()
                self._depth += 1
                return True
            if wake is not None:
                self._waiting.append(wake)
            return False

    def acquire_in(self, runner: Runner) -> None:
        """Take it for a native operation."""
        while not self._try(runner, None):
            bridge.wait_for(runner, self._turn(runner))

    async def _turn(self, runner: Runner) -> None:
        loop = asyncio.get_running_loop()
        turn = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(turn.set)

        if self._try(runner, wake):
            self.release()
        else:
            await turn.wait()

    def acquire(self) -> None:
        """Take it for synchronous code of this thread."""
        owner = threading.current_thread()
        turn = threading.Event()
        while not self._try(owner, turn.set):
            if self._thread == threading.get_ident():
                raise InterfaceError(
                    "Synchronous code used the test's connection on the event loop's thread "
                    "while a native statement runs on it."
                )
            turn.wait()
            turn.clear()

    def release(self) -> None:
        """Give it back and wake those who wait."""
        with self._mutex:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            waiting, self._waiting = self._waiting, deque()
        for wake in waiting:
            wake()


class _CaseBlock(Block):
    """The test case's transaction, whose rollback flag is also that of synchronous code."""

    of_test_case = True

    @property
    def needs_rollback(self) -> bool:
        return bool(self.session.wrapper.__dict__.get("_plain_needs_rollback"))

    @needs_rollback.setter
    def needs_rollback(self, value: bool) -> None:
        self.session.wrapper.__dict__["_plain_needs_rollback"] = value


class TestSession(Session):
    """The session of a test case: Django's own wrapper, shared by all tasks and threads."""

    def __init__(self, alias: str, wrapper: Any) -> None:
        self.alias = alias
        self.wrapper = wrapper
        self.pinned = True
        self.keeper = None
        self.origin = "the test case"
        self.holder = self.acting = self._held = None
        self.active = 0.0
        self._depth = 0
        self._turns = _Turns()
        self._base: Block | None = None
        self._loop: Any = None
        self._conn = conn = wrapper.connection
        self._lock, conn.lock = conn.lock, self
        handlers = conn.pgconn.notice_handler, conn.pgconn.notify_handler
        # The same server session once more, for its way of waiting.
        self._native = driver.Connection.over(conn.pgconn, {})
        conn.pgconn.notice_handler, conn.pgconn.notify_handler = handlers
        conn.wait = self._wait
        wrapper.session = self
        wrapper.inc_thread_sharing()

    def end(self) -> None:
        """Give the connection back to synchronous code alone."""
        self.wrapper.session = None
        self.wrapper.dec_thread_sharing()
        self._conn.lock = self._lock
        del self._conn.wait

    def _wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        # psycopg's Connection.wait(), in native code as well as in synchronous code.
        if bridge.in_native_code():
            return self._native.wait(gen)
        return type(self._conn).wait(self._conn, gen, *args, **kwargs)

    def terminate(self) -> None:
        """Close the connection at once; the transaction is lost, as at the test's end."""
        self._native.terminate()

    @property
    def waits_for_server(self) -> bool:
        return self._native.waiting

    @property
    def root(self) -> Block | None:  # type: ignore[override]
        """The test case's transaction, as the block that operations outside any other are in."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None
        if self._base is None or self._loop is not loop:
            self._base = _CaseBlock(self, None, self.origin)
            self._loop = loop
        return self._base

    def innermost(self) -> Block | None:
        if self.acting is not None and self.holder is getcurrent():
            return self.acting
        scope = sessions.find_scope(self.alias, detached=False)
        return scope.block if scope is not None and scope.session is self else self.root

    def release(self) -> None:
        """The session ends with the test case."""

    def __enter__(self) -> None:
        runner = bridge.current()
        if runner is None:
            self._turns.acquire()
            return
        super().__enter__()
        try:
            self._turns.acquire_in(runner)
        except BaseException:
            super().__exit__(None, None, None)
            raise

    def __exit__(self, *exc: Any) -> None:
        self._turns.release()
        if bridge.in_native_code():
            super().__exit__(*exc)

    def __del__(self) -> None:
        pass


def begin(alias: str) -> None:
    """A test case's transaction was entered: native code runs in the outermost one from now on."""
    wrapper = connections[alias]
    if (
        alias not in sessions.test_sessions
        and sessions.native_class(alias) is not None
        and isinstance(wrapper.connection, psycopg.Connection)
    ):
        sessions.test_sessions[alias] = TestSession(alias, wrapper)


def end(alias: str) -> None:
    """The outermost transaction of the test case was left."""
    session = sessions.test_sessions.pop(alias, None)
    if session is not None:
        session.end()
