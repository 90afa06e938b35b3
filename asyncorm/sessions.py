"""Which session the code that runs now uses: its block's, that of the operation, a test's.

An operation outside a transaction has one of its own. Transaction blocks and
`asyncorm.connection()` put theirs into a scope, where the tasks started inside find it.
"""

from __future__ import annotations

from typing import Any, cast

from django.db import DEFAULT_DB_ALIAS
from django.db.transaction import TransactionManagementError

from . import bridge, limits, pools
from ._sessions.engines import native_class, pool_of, refuse_foreign
from ._sessions.scopes import find_scope
from ._sessions.session import Session
from .bridge import Runner
from .pages import see

# Execute wrappers of native code in every task: what tells those who listen (cursor_events.py).
everywhere: list[Any] = []

# Sessions on synchronous connections (callers.py), whose execute wrappers those are put among.
sharing: set[Any] = set()

# Sessions of test cases, by alias (testcase.py): native code in a test's transaction uses them.
test_sessions: dict[str, Any] = {}


def session_for(alias: str, runner: Runner) -> Session | None:
    """The session that `runner` uses for `alias`; None when the ENGINE is not ours."""
    override = runner.session_override
    if override is not None and override.alias == alias:
        return cast(Session, override)
    if (scope := find_scope(alias)) is not None:
        assert scope.session is not None
        if not scope.session.on_this_loop:
            raise TransactionManagementError(
                f"Database {alias!r} was used on another event loop inside the transaction block "
                f"that began at {scope.block and scope.block.origin}: it would not be part of the "
                "transaction. Await the coroutine on the block's own loop, or use "
                "asyncorm.detached() to work outside the block."
                + see("transactions#tasks-inside-a-block")
            )
        if scope.session.over and scope.block is not None:
            raise scope.block.outlived_error()
        if scope.block is None and scope.session.root is not None:
            scope.session.await_closing(runner)
        return scope.session
    session: Session | None
    if test_sessions and (session := test_sessions.get(alias)) is not None:
        return cast(Session, session)
    session = runner.resources.get(alias)
    if session is None or session.wrapper is None:
        cls = native_class(alias)
        if cls is None:
            return None
        pool = pool_of(alias, cls)
        session = runner.resources[alias] = Session(alias, pool, limits.source(pool))
    return cast(Session, session)


def require(alias: str | None) -> Session:
    """`session_for()` the running operation.

    Raises:
        django.db.NotSupportedError: the alias has another engine.
    """
    session = session_for(alias or DEFAULT_DB_ALIAS, bridge.running())
    if session is None:
        raise refuse_foreign(alias or DEFAULT_DB_ALIAS)
    return session


async def warm(alias: str) -> None:
    """Have a connection open, if none is yet."""
    pool = pools.find(alias)
    if pool is None or not pool.is_open:
        await bridge.run(lambda: require(alias).wrapper.ensure_connection())
