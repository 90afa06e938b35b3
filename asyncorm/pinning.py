"""`connection()` keeps a connection for a task, `detached()` works outside of what is kept."""

from __future__ import annotations

import weakref
from asyncio import Task
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager, AsyncContextDecorator
from contextvars import copy_context
from typing import Any, TypeVar

from django.db import NotSupportedError

from . import bridge, generators
from ._sessions.callsite import caller
from ._sessions.leaving import can_wait, discard_all, later, run_in, start_task, unpin
from ._sessions.scopes import Scope, current_scope, current_task_or_none
from ._sessions.session import Session
from .pages import see
from .sessions import require

T = TypeVar("T")


async def pin(using: str | None) -> tuple[Session, bool]:
    """A session that outlives operations, and whether it is new or that of what is around."""

    origin = caller()

    def find() -> tuple[Session, bool]:
        session = require(using)
        new = not (session.root is not None or session.pinned)
        if new:
            session.pinned = True
            task = current_task_or_none()
            session.keeper, session.origin = None if task is None else weakref.ref(task), origin
            generators.enter(session)
        return session, new

    return await bridge.run(find)


class _Connection(AsyncContextDecorator):
    """What `connection()` returns: a context manager and a decorator of coroutine functions."""

    def __init__(self, using: str | None) -> None:
        self.using = using
        self._scope: Scope | None = None

    def _recreate_cm(self) -> _Connection:  # for each call of a decorated function
        return _Connection(self.using)

    async def __aenter__(self) -> None:
        session, new = await pin(self.using)
        if not new:
            return
        try:
            if session.wrapper.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
                await run_in(session, _refuse_pooler, session)
        except BaseException:
            await unpin(session)
            raise
        self._scope = Scope(session.alias, session)
        self._scope.push()

    async def __aexit__(
        self, exc_type: object, exc: BaseException | None, traceback: object
    ) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        assert scope.session is not None
        scope.pop()
        if can_wait(exc):
            await unpin(scope.session, discard_all)
        else:
            later(scope.session, unpin(scope.session, discard_all))


def _refuse_pooler(session: Session) -> None:
    """Raise when something between us and the server answers in its place, as PgBouncer does."""
    wrapper = session.wrapper
    wrapper.ensure_connection()
    with wrapper.wrap_database_errors, wrapper.connection.cursor() as cursor:
        pid = cursor.execute("SELECT pg_backend_pid()").fetchone()[0]
    if pid != wrapper.connection.pgconn.backend_pid:
        raise NotSupportedError(
            f"asyncorm.connection() cannot keep a server session of database {session.alias!r}: "
            "there is a pooler before the server, and by DISABLE_SERVER_SIDE_CURSORS it pools "
            "transactions. Use asyncorm.atomic() with SET LOCAL and pg_advisory_xact_lock(), or "
            "an alias that connects to the server itself." + see("pgbouncer#what-does-not-work")
        )


def connection(using: str | None = None) -> AbstractAsyncContextManager[None]:
    """Keep one connection for this task: for session state, temporary tables, advisory locks.

    The task's operations outside transactions, and the transactions that it begins, run on one
    server session until the end, when the session is reset (PostgreSQL's DISCARD ALL). Child tasks
    do not inherit it. Inside `atomic()` or another `connection()` it changes nothing, since the
    task has one connection there.

    Args:
        using: a database alias; the default one by default.

    Raises:
        django.db.NotSupportedError: the alias has another engine, or is behind a pooler that keeps
            no server session (DISABLE_SERVER_SIDE_CURSORS is set).
    """
    return _Connection(using)


class _Detached(AsyncContextDecorator):
    """What `detached()` returns: a context manager and a decorator of coroutine functions."""

    def __init__(self) -> None:
        self._scope: Scope | None = None

    def _recreate_cm(self) -> _Detached:
        return _Detached()

    async def __aenter__(self) -> None:
        self._scope = Scope(None, None)
        self._scope.push()

    async def __aexit__(self, *exc: object) -> None:
        if self._scope is not None:
            self._scope.pop()


def detached() -> AbstractAsyncContextManager[None]:
    """Work outside any transaction block or kept connection, on purpose.

    What runs inside, child tasks included, checks out connections of its own and commits on its
    own.
    """
    return _Detached()


def detached_task(coro: Coroutine[Any, Any, T]) -> Task[T]:
    """Start `coro` as a task outside any transaction block or kept connection, on purpose.

    It may outlive the block that it was started in; nothing of it is rolled back with the block.
    """
    context = copy_context()
    context.run(current_scope.set, None)
    return start_task(coro, context)
