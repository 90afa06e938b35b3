"""Plans are executed: on the operation's connection, with others' statements, or by a cursor.

Where somebody watches the statements (execute wrappers, DEBUG, CaptureQueriesContext), and where a
value is not of its column's usual type, a cursor of Django's executes Django's SQL.
"""

from __future__ import annotations

from asyncio import sleep
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

from django.db import OperationalError
from psycopg.pq import Format
from psycopg.pq.abc import PGresult

from .. import _events, bridge, conf
from .._wire.statement import LostConnection, Statement
from ..backends.cursors import has_djangos_cursors
from ..driver import SLICE, Connection
from ..growth import AGAIN, has_no_server
from ..turns import Turns
from ..wrappers import Wrapper
from .plan import Plan, djangos

_TIMESTAMPTZ, _TEXT_FORMAT = 1184, Format.TEXT


def direct(wrapper: Wrapper) -> Connection | None:
    """The connection, if nobody would notice that a statement is sent without Django's cursor."""
    conn = None if wrapper.watched else _connection(wrapper)
    return conn if conn is not None and serves(conn, wrapper) else None


def _connection(wrapper: Wrapper) -> Connection | None:
    wrapper.ensure_connection()
    conn = wrapper.connection
    return conn if isinstance(conn, Connection) else None


def serves(conn: Connection, wrapper: Wrapper) -> bool:
    """Whether a statement means the same there as in a cursor of the wrapper."""
    return has_djangos_cursors(type(wrapper), conn.cursor_factory) and (  # type: ignore[arg-type]
        conn.deferred or _same_zone(conn, wrapper)  # the one that runs it is looked at, too
    )


class NotServed(_events.Unserved):
    """A connection's cursors are not like those that the wrapper would have: use one."""


class Planned:
    """A plan's statement for whichever connection runs it (a `Command`).

    It gives the loaded rows, or how many there were where the plan has no maker.
    """

    __slots__ = ("offset", "params", "plan", "text", "wrapper")

    def __init__(self, plan: Plan, params: list[Any], offset: int, wrapper: Wrapper) -> None:
        self.plan = plan
        self.text = plan.text
        self.params = params
        self.offset = offset
        self.wrapper = wrapper

    def bind(self, conn: Connection) -> Statement:
        plan, params, offset = self.plan, self.params, self.offset
        if not serves(conn, self.wrapper):
            raise NotServed
        statement = plan.bound(conn, [*params, offset] if offset else params)
        return statement or conn.bound(*djangos(plan, params, offset))

    def read(self, conn: Connection, result: PGresult) -> Any:
        maker = self.plan.maker
        return int(result.command_tuples or 0) if maker is None else maker.load(result, conn)


def _run(plan: Plan, params: list[Any], offset: int, wrapper: Wrapper) -> tuple[Any, Any]:
    """What `Planned` gives, or else None and Django's cursor; again if the connection was lost with
    a statement that only reads."""
    lost = None
    while True:
        try:
            return _run_once(plan, params, offset, wrapper)
        except OperationalError as exc:
            session = wrapper.session
            lost = Lost(plan, exc, lost)
            if session is None or not lost.may_repeat(session.pool) or not session.give_up_lost():
                raise
        if lost.pause:
            bridge.wait_for(bridge.running(), sleep(lost.pause))


class Lost:
    """An execution that failed: whether it is repeated since it lost its connection.

    Attributes:
        pause: seconds until then.
    """

    def __init__(self, plan: Plan, exc: Exception, before: Lost | None) -> None:
        self.since: float = monotonic() if before is None else before.since
        self._plan = plan
        self._exc: Any = exc if isinstance(exc, LostConnection) else exc.__cause__
        self.pause = AGAIN if getattr(self._exc, "opened", 0.0) > self.since else 0.0

    def may_repeat(self, pool: Any) -> bool:
        """On the pool's other connections, which what broke the first one may have broken, too, and
        once on one that is newer; and where a pooler has no server as long as a new connection is
        waited for."""
        exc = self._exc
        if not (isinstance(exc, LostConnection) and self._plan.only_reads):
            return False
        if not conf.get("RETRY_READS"):
            return False
        return not self.pause or (has_no_server(exc) and pool.bears(exc, self.since))


def _run_once(plan: Plan, params: list[Any], offset: int, wrapper: Wrapper) -> tuple[Any, Any]:
    if not wrapper.watched:
        with suppress(NotServed):
            if not _events.statements:
                return _sent(plan, params, offset, wrapper), None
            with told(plan, params, offset, wrapper) as statement:
                return _sent(plan, params, offset, wrapper, statement), None
    return None, _executed(wrapper.cursor(), plan, params, offset)


def _executed(cursor: Any, plan: Plan, params: list[Any], offset: int) -> Any:
    """A cursor of Django's with the statement executed, or else closed."""
    try:
        cursor.execute(*djangos(plan, params, offset))
    except BaseException:
        cursor.close()
        raise
    return cursor


def _sent(
    plan: Plan,
    params: list[Any],
    offset: int,
    wrapper: Wrapper,
    statement: _events.Statement | None = None,
) -> Any:
    """What `Planned` gives.

    Raises:
        NotServed: it needs a cursor.
    """
    session = wrapper.session
    queue = None if session is None else session.shared(plan.text)
    runs: Any = queue if queue is not None else _connection(wrapper)
    if runs is None:
        raise NotServed
    wrapper.validate_no_broken_transaction()
    planned: Any = Planned(plan, params, offset, wrapper)
    if statement is not None:
        planned = _events.followed(planned, statement)
    with wrapper.wrap_database_errors:
        return runs.run(planned)


def told(plan: Plan, params: list[Any], offset: int, wrapper: Any) -> _events.Statement:
    """A plan's statement for those who listen."""
    sql, values = djangos(plan, params, offset)
    return _events.statement(wrapper.alias, sql, values, wrapper.in_atomic_block, "hit")


def _same_zone(conn: Connection, wrapper: Wrapper) -> bool:
    """Whether the connection loads timestamps in the zone that Django now wants them in."""
    loader = conn.adapters.get_loader(_TIMESTAMPTZ, _TEXT_FORMAT)
    return bool(getattr(loader, "timezone", "") == wrapper.timezone)


def items(
    plan: Plan, params: list[Any], offset: int, wrapper: Wrapper, mode: object = None
) -> list[Any]:
    """Execute a plan and return what its maker makes of the rows.

    Raises:
        django.db.Error: as Django's cursor does.
    """
    maker = plan.maker
    assert maker is not None
    loaded, cursor = _run(plan, params, offset, wrapper)
    if cursor is None:
        with wrapper.wrap_database_errors:
            if loaded.size <= SLICE:
                return maker.make_part(loaded, next(loaded.parts), wrapper.alias, wrapper, mode)
            conn = wrapper.connection
            alone = isinstance(conn, Connection) and not conn.deferred
            turn = conn.give_turn if alone else Turns().give
            return maker.made(loaded, turn, wrapper.alias, wrapper, mode)
    made: list[Any] = []
    with cursor:
        while True:
            loaded = cursor.fetchmany(SLICE)
            made += maker.make_loaded(loaded, wrapper.alias, wrapper, mode)
            if len(loaded) < SLICE:
                return made


def chunks(
    plan: Plan, params: list[Any], offset: int, wrapper: Wrapper, mode: object, size: int
) -> Iterator[list[Any]]:
    """The same from a server-side cursor of Django's, `size` rows at a time."""
    maker = plan.maker
    assert maker is not None
    cursor = _executed(wrapper.chunked_cursor(), plan, params, offset)
    try:
        while True:
            conn = direct(wrapper)
            if conn is None or conn is not cursor.cursor.connection:
                loaded = cursor.fetchmany(size)
                made = maker.make_loaded(loaded, wrapper.alias, wrapper, mode)
            else:
                with wrapper.wrap_database_errors:
                    with conn.lock:
                        rows = maker.load(conn.fetch(cursor.cursor.name, size), conn)
                    made = maker.made(rows, conn.give_turn, wrapper.alias, wrapper, mode)
            if not made:
                return
            yield made
    finally:
        cursor.close()


def count_of(plan: Plan, params: list[Any], offset: int, wrapper: Wrapper) -> int:
    """Execute a plan and return how many rows were found or changed."""
    count, cursor = _run(plan, params, offset, wrapper)
    if cursor is None:
        return int(count)
    with cursor:
        return int(cursor.rowcount)
