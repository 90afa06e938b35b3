"""Native code inside a test's transaction: it runs on the test's own server session.

Django's TestCase, and with it pytest-django's `db`, opens a transaction on a synchronous connection
and rolls it back at the end. While that transaction is open, native code uses the same connection
instead of a pool's, whichever loop or thread it runs in: what either side writes the other sees,
and all of it is rolled back. Statements of concurrent tasks take turns then, as in any transaction
block; tests that need real parallelism use TransactionTestCase, or `transaction=True`.

`lifecycle.enter()` calls `begin()` when Django marks a transaction as a test case's
(`Atomic._from_testcase`).
"""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
from django.db import connections

from . import sessions
from ._sessions import engines
from ._sessions.blocks import Block, PlainBlock
from .callers import SynchronousSession, ThreadBlock
from .wrappers import Wrapper


class _CaseBlock(PlainBlock):
    """The test case's transaction."""

    of_test_case = True

    def __init__(self, session: TestSession) -> None:
        super().__init__(session, None, session.origin)
        self.lock = session.case_lock  # type: ignore[assignment]


class TestSession(SynchronousSession):
    """The session of a test case: Django's own wrapper, shared by all tasks and threads."""

    def __init__(self, wrapper: Wrapper) -> None:
        self._base: Block | None = None
        super().__init__(wrapper, "the test case")

    def end(self) -> None:
        """Give the connection back to synchronous code alone.

        Tasks that the test left running cannot use it any more, nor get into the next test.
        """
        self.stop_statement()
        block = self._base
        while block is not None:
            block.ended = True
            inner, block.inner = block.inner, None
            if inner is not None:
                block.lock.release()
            block = inner
        # Django pops the last of these: what is left open goes with the outermost, which is left.
        del self.wrapper.atomic_blocks[1:]
        self.wrapper.savepoint_ids.clear()
        self.part()

    @property
    def is_lost(self) -> bool:
        return self.over

    @property
    def root(self) -> Block | None:  # type: ignore[override]
        """The test case's transaction, as the block that operations outside any other are in."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None
        if self._base is None or self._loop is not loop:
            self._base = _CaseBlock(self)
            self._loop = loop
        return self._base

    def begun_by(self, origin: str) -> ThreadBlock:
        """As a block in the test case's transaction."""
        return ThreadBlock(self, _CaseBlock(self), origin)


def begin(alias: str) -> None:
    """A test case's transaction was entered: native code runs in the outermost one from now on."""
    wrapper: Any = connections[alias]
    if (
        alias not in sessions.test_sessions
        and engines.native_class(alias) is not None
        and isinstance(wrapper.connection, psycopg.Connection)
    ):
        sessions.test_sessions[alias] = TestSession(wrapper)


def end(alias: str) -> None:
    """The outermost transaction of the test case was left."""
    session = sessions.test_sessions.pop(alias, None)
    if session is not None:
        session.end()
