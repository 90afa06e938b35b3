"""Transactions that begin and end without an operation, so without a greenlet.

Where a connection is free a transaction begins with nothing but Python: BEGIN goes with its first
statement. Where it ends well it sends COMMIT. What Django does around that is done here, on the
same attributes, as long as all of it is Django's own and nobody is to see it; otherwise, and where
COMMIT does not go well, `lifecycle` has Django do it.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `BaseDatabaseWrapper.atomic_blocks`, `.savepoint_ids`, `.in_atomic_block`, `.commit_on_exit`,
  `.closed_in_transaction`, `.errors_occurred`: what its `Atomic` keeps of a transaction.
"""

from __future__ import annotations

from asyncio import _get_running_loop
from functools import cache
from operator import attrgetter
from typing import Any

import psycopg
from greenlet import getcurrent
from psycopg.pq import TransactionStatus

from .. import bridge, grounds, limits, pools, sessions, written
from .._sessions import scopes
from .._sessions.blocks import Block
from .._sessions.session import Session
from ..bridge import Runner
from ..driver import Connection
from .lifecycle import close_block, enter_django, exit_django

# What Django calls for a transaction, of a wrapper's class: left out where it is all Django's own.
_CALLED = (
    "connect", "ensure_connection", "get_autocommit", "set_autocommit", "_set_autocommit",
    "commit", "_commit", "validate_no_atomic_block", "validate_thread_sharing",
    "close_if_health_check_failed", "run_and_clear_commit_hooks",
)  # fmt: skip
_called = attrgetter(*_CALLED)
_of_psycopg = attrgetter("commit", "autocommit")
_psycopgs = _of_psycopg(psycopg.Connection)
_seen: dict[type, tuple[Any, bool]] = {}
_GOOD = TransactionStatus.INTRANS, TransactionStatus.IDLE


def free_session(alias: str) -> Session | None:
    """A session with a free connection, for a transaction that begins without an operation.

    None where that would wait for something, or others are to see what Django does.

    Raises:
        TransactionManagementError: the task has outlived its block.
    """
    bridge.check()
    if (
        _get_running_loop() is None
        or type(getcurrent()) is Runner
        or alias in sessions.test_sessions
        or scopes.find_scope(alias) is not None
    ):
        return None
    pool = pools.find(alias)
    if pool is None or pool.outdated or (wrapper := pool.stand_in()) is None or wrapper.watched:
        return None
    source = limits.source(pool)
    if source.batching or not source.has_free:
        return None
    session = Session(alias, pool, source)
    try:
        if _is_plain(session.wrapper) and session.attach_free():
            return session
    except BaseException:
        session.close()
        raise
    session.close()
    return None


@cache
def _djangos(cls: type) -> type:
    """The class that our wrapper's overrides call."""
    return next(each for each in cls.__mro__ if each.__module__.startswith("django."))


def _is_plain(wrapper: Any) -> bool:
    """Whether what Django does of a transaction, with a wrapper of native code, is all its own."""
    if not wrapper.__dict__.keys().isdisjoint(_CALLED):
        return False
    cls: Any = type(wrapper)
    now = _called(cls) + _called(_djangos(cls))
    seen = _seen.get(cls)
    if seen is None or seen[0] != now:
        djangos = (*now, enter_django, exit_django)
        seen = _seen[cls] = now, wrapper.plain and not any(map(grounds.is_anothers, djangos))
    return seen[1] and _of_psycopg(psycopg.Connection) == _psycopgs


def commits_alone(block: Block) -> bool:
    """Whether a transaction that ends well has nothing left to do but COMMIT, and nobody else is to
    see what Django does for that."""
    session = block.session
    wrapper, conn = session.wrapper, session.wrapper.connection
    return (
        type(block) is Block
        and block.parent is None
        and not (block.needs_rollback or block.cancelled is not None)
        and block.lock.value == 1
        and (block.queue is None or not block.queue.active)
        and not (session.fate or session.holder or session.synchronous or session.over)
        and session.loop is _get_running_loop()
        and type(conn) is Connection
        and conn.pgconn.transaction_status in _GOOD
        and not conn._pipeline
        and wrapper.in_atomic_block
        and wrapper.atomic_blocks == [block.atomic]
        and wrapper.commit_on_exit
        and not (wrapper.autocommit or wrapper.savepoint_ids or wrapper.closed_in_transaction)
        and not (wrapper.run_on_commit or written.listeners or wrapper.watched)
        and _is_plain(wrapper)
    )


async def commit_block(block: Block) -> BaseException | None:
    """Leave a transaction that `commits_alone()`, without an operation.

    Returns:
        what `leave_block()` is to go on after: COMMIT has failed, or a cancellation arrived.
    """
    session = block.session
    wrapper, conn = session.wrapper, session.wrapper.connection
    block.lock.acquire_nowait()
    block.ended = True
    session.act(block, block)
    wrapper.atomic_blocks.pop()
    wrapper.in_atomic_block = False
    try:
        arrived: BaseException | None = await conn.committed()
    except BaseException:  # the coroutine was closed, and the connection is
        _committed(block)
        raise
    if arrived is None:
        conn._autocommit = True
        if block.event is not None:
            block.event.end(rolled_back=False)
        _committed(block)
    else:
        wrapper.atomic_blocks.append(block.atomic)
        wrapper.in_atomic_block = True
    return arrived


def _committed(block: Block) -> None:
    session = block.session
    session.wrapper.autocommit = True
    session.wrapper.errors_occurred = False
    session.act(None, None)
    close_block(None, block)
    block.lock.release()
    bridge.release(session)
