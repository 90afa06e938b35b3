"""A plan's statement, awaited by a coroutine: without an operation, so without a greenlet.

What would serve the task's operation serves the coroutine: the connection that the task has, a free
one of the pool, or in a crowd one that runs the statements of several tasks together. Whatever is
not certain to be the same there is left to an operation.
"""

from __future__ import annotations

from asyncio import _get_running_loop, sleep
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from django.db import OperationalError
from greenlet import getcurrent
from psycopg.errors import ReadOnlySqlTransaction

from .. import _events, bridge, limits, pools, sessions, verifying
from .._sessions.blocks import Block
from .._sessions.crowding import queue_of, shares, travels
from .._sessions.scopes import Scope, find_scope
from .._sessions.session import Session
from .._wire.locks import NO_LOCK
from .._wire.statement import Command
from ..backends.cursors import has_djangos_cursors
from ..bridge import Runner
from ..driver import SLICE, Connection
from ..turns import Turns
from ..wrappers import Wrapper
from .execute import Lost, NotServed, Planned, told
from .plan import Plan

Found: TypeAlias = tuple[Plan, list[Any], int]  # with the parameters, and the offset

UNSERVED: Any = object()  # it has to be an operation


async def awaited(
    alias: str,
    find: Callable[[Any], Found | None],
    mode: object = None,
    *,
    writes: bool = False,
) -> Any:
    """Execute a plan: what its maker makes of the rows, or how many there were if it has none.

    Args:
        find: returns the plan, given a wrapper, and None if there is none; for an error of its own,
            too, it is to be an operation.
        mode: how the items fetch what was deferred.
        writes: it changes rows: an error breaks the transaction block, as in Django.

    Returns:
        UNSERVED if nothing was done, and it has to be an operation.

    Raises:
        django.db.Error: as Django's cursor does.
        TransactionManagementError: the task has outlived its block.
    """
    lost = None
    while True:
        place = place_of(alias, writes)
        if place is None or (found := _found(find, place.wrapper)) is None:
            return UNSERVED
        bridge.check()
        plan, params, offset = found
        try:
            return await _made(place, Planned(plan, params, offset, place.wrapper), mode)
        except NotServed:
            return UNSERVED
        except Exception as exc:
            if writes:
                _mark_for_rollback(place.wrapper, exc)
            if place.kept or not isinstance(exc, OperationalError):
                raise
            lost = Lost(plan, exc, lost)
            if not lost.may_repeat(place.pool):
                raise
        finally:
            bridge.release(place)
        if lost.pause:
            await sleep(lost.pause)


def _found(find: Callable[[Any], Found | None], wrapper: Wrapper) -> Found | None:
    try:
        found = None if wrapper.watched else find(wrapper)
    except verifying.StatementCacheError:
        raise
    except Exception:  # Django says what is wrong
        return None
    if found is not None and found[0].maker is not None and found[0].maker.calls_others:
        return None
    return found


def _mark_for_rollback(wrapper: Wrapper, exc: Exception) -> None:
    """As Django does with `mark_for_rollback_on_error()`."""
    if wrapper.in_atomic_block:
        wrapper.needs_rollback = True
        wrapper.rollback_exc = exc


async def _made(place: _Place, planned: Planned, mode: object) -> Any:
    """What `awaited()` gives; other tasks have a turn now and then while items are made."""
    wrapper, maker = planned.wrapper, planned.plan.maker
    with wrapper.wrap_database_errors:
        loaded = await (_told(place, planned) if _events.statements else place.run(planned))
        if maker is None:
            return loaded
        if loaded.size <= SLICE:
            return maker.make_part(loaded, next(loaded.parts), wrapper.alias, wrapper, mode)
        made: list[Any] = []
        turns = Turns()
        for part in loaded.parts:
            await turns.given()
            made += maker.make_part(loaded, part, wrapper.alias, wrapper, mode)
        return made


async def _told(place: _Place, planned: Planned) -> Any:
    """What `Planned` gives, with listeners told of it."""
    wrapper = planned.wrapper
    with told(planned.plan, planned.params, planned.offset, wrapper) as statement:
        try:
            return await place.run(_events.followed(planned, statement))
        except Exception:
            with wrapper.wrap_database_errors:  # they hear of Django's error
                raise


class _Place(Protocol):
    """Where a statement of the current task is executed.

    Attributes:
        wrapper: for what depends on Django's.
        pool: whose connections serve it.
        kept: a connection that is lost is not replaced.
    """

    @property
    def pool(self) -> Any: ...

    @property
    def wrapper(self) -> Any: ...

    @property
    def kept(self) -> bool: ...

    async def run(self, command: Command) -> Any:
        """What the command wants of its result; nobody else has the connection until `release()`.

        Raises:
            NotServed: it has to be an operation; nothing was sent.
        """

    def release(self) -> None:
        """Give the connection back, if there is one."""


class _Free:
    """A connection of the pool that nobody has; in a session's place as its lock."""

    __slots__ = ("_conn", "_source", "alias", "pool", "wrapper")

    kept = False
    exclusive = True
    root = None

    def __init__(self, source: limits.Source, pool: pools.Pool, wrapper: Any) -> None:
        self.alias: str = wrapper.alias
        self.pool = pool
        self.wrapper = wrapper
        self._source = source
        self._conn: Connection | None = None

    def __str__(self) -> str:
        return "an operation"

    async def run(self, command: Command) -> Any:
        # No call between its leaving the pool and its being noted: an error would lose it.
        self._conn = conn = self._source.take()
        if conn is None or not conn.configured:
            raise NotServed
        conn.lock = self
        if _events.checkouts:
            _events.checked_out(self.alias, conn, self)
        try:
            return await conn.awaited(command, last=True)
        except ReadOnlySqlTransaction as exc:  # an operation finds out what became of the server
            raise NotServed from exc

    def release(self) -> None:
        conn = self._conn
        if conn is not None:
            conn.lock = NO_LOCK
            if _events.checkouts:
                _events.checked_in(conn)
            try:
                self._source.checkin(conn)
            finally:
                conn.told = None
            self._conn = None


class Crowd:
    """Whichever connection comes free, with the statements of others."""

    __slots__ = ("_source", "pool", "wrapper")

    kept = False

    def __init__(self, source: limits.Source, pool: pools.Pool, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.pool = pool
        self._source = source

    def takes(self, text: str) -> bool:
        """Whether a statement may go with those of others."""
        return travels(self._source, text)

    async def run(self, command: Command) -> Any:
        if not self.takes(command.text):
            raise NotServed
        return await queue_of(self._source, self.pool, Session).submit(command)

    def release(self) -> None:
        """There is nothing to give back."""


class _Held:
    """The connection of the task's transaction block, or of its `connection()`."""

    __slots__ = ("_block", "_holds", "_session", "pool", "wrapper")

    kept = True
    exclusive = True

    def __init__(self, session: Session, block: Block | None) -> None:
        self.wrapper = session.wrapper
        self.pool = session.pool
        self._session = session
        self._block = block
        self._holds = False

    async def run(self, command: Command) -> Any:
        session, block = self._session, self._block
        if block is not None:
            if (queue := block.queue_for(command.text)) is not None:
                return await queue.submit(command)
            if not block.lock.value:  # to wait for it has its own rules
                raise NotServed
            block.lock.acquire_nowait()
        session.hold(self, block)
        try:
            value = await session.wrapper.connection.awaited(command)
        except BaseException as exc:
            session.__exit__(type(exc), exc, exc.__traceback__)
            raise
        self._holds = True
        return value

    def release(self) -> None:
        if self._holds:
            self._holds = False
            self._session.__exit__(None, None, None)
        if self._block is None:  # it may have been left meanwhile
            self._session.release()


def place_of(alias: str, writes: bool = False) -> _Place | None:
    """What would serve an operation of the current task; None if it has to be one.

    Raises:
        TransactionManagementError: the task has outlived its block.
    """
    if _get_running_loop() is None or type(getcurrent()) is Runner:
        return None
    if (scope := find_scope(alias)) is not None:
        return _held(scope)
    if alias in sessions.test_sessions:
        return None
    pool = pools.find(alias)
    if pool is None or pool.connections is None or pool.start is None or pool.outdated:
        return None
    wrapper = pool.stand_in()
    if not has_djangos_cursors(type(wrapper), pool.start.cursor_factory):  # type: ignore[arg-type]
        return None
    source = limits.source(pool)
    if source.batching:
        return Crowd(source, pool, wrapper)
    if source.has_free:
        return _Free(source, pool, wrapper)
    return Crowd(source, pool, wrapper) if not writes and shares() else None


def _held(scope: Scope) -> _Held | None:
    session, block = scope.session, scope.block
    assert session is not None
    if session.synchronous or session.over or session.fate is not None:
        return None
    if session.wrapper.is_altered:
        return None
    conn = session.wrapper.connection
    if type(conn) is not Connection or not session.on_this_loop:
        return None
    if block is None:
        free = session.pinned and session.root is None and session.holder is None
        free = free and not session.abandoned  # which an operation closes
        return _Held(session, None) if free else None
    if type(block) is not Block or block.ended or block.needs_rollback:
        return None
    return _Held(session, block)
