"""One connection pool for each (event loop, alias), opened on first use, closed with the loop."""

from __future__ import annotations

import asyncio
import logging
import os
from asyncio import get_running_loop
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import Context
from functools import partial
from operator import itemgetter
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg_pool import PoolClosed, PoolTimeout

from . import between, bridge, conf, elsewhere
from ._pool import refusals, registry
from ._pool.callbacks import natively
from ._pool.connection import PooledConnection
from ._pool.options import pool_options
from ._pool.pool import ConnectionPool
from ._pool.refusals import Asking, PoolRefusal, Retired, Unreachable, holders
from ._pool.registry import (
    add,
    close_pools,
    discard_pools,
    everywhere,
    find,
    pool_stats,
    total_stats,
)
from ._wire.lazy import DeferredConnection, Start
from .driver import Connection
from .growth import is_away
from .pages import see

__all__ = [
    "Pool", "Retired", "add", "close_pools", "discard_pools", "everywhere", "find", "pool_options",
    "pool_stats", "total_stats",
]  # fmt: skip

logger = logging.getLogger("asyncorm")

_MAX_IDLE = 32  # wrappers that are kept beyond a burst
_where = itemgetter("NAME", "USER", "PASSWORD", "HOST", "PORT")


def host_of(settings: dict[str, Any]) -> str:
    """The name of the server of an alias, or of several; empty for the local one."""
    named = settings.get("HOST") or settings["OPTIONS"].get("host")
    return str(named or os.environ.get("PGHOST", ""))


class Pool:
    """The connections of one alias on one event loop, and the wrappers that Django sees them
    through.

    Attributes:
        alias: the database alias.
        wrappers: idle wrappers; building one is costly.
        asking: tasks that wait for a connection.
        current: not discarded; sessions leave one that is at their next checkout.
        queue: statements that wait for a connection; set by crowding.queue_of().
        limits: those of `parallelism()` that were entered (limits.py).
        top: itself, or the limit that the PARALLELISM setting puts on it (limits.py).
        start: what its connections have at their start; None before the first.
        pipelines, statements_pipelined: how many statements went together with others, in how many
            round trips.
    """

    current = True
    batching = False  # statements do not wait for others when a connection is free
    keeps_state = False  # what is set in the session of a connection is undone when it comes back
    queue: Any = None
    top: Any = None

    def __init__(
        self, alias: str, settings_dict: dict[str, Any], make_wrapper: Callable[[], Any]
    ) -> None:
        between.refuse_gevent()
        self.alias = alias
        self.settings_dict = settings_dict
        self.where = _where(settings_dict)
        self.loop = get_running_loop()
        self.wrappers: list[Any] = []
        self.make_wrapper = make_wrapper
        self.options = pool_options(alias, settings_dict)
        self.connections: ConnectionPool | None = None
        self.retired = False
        self._opening: asyncio.Lock | None = None
        self._closer: AsyncGenerator[None, None] | None = None
        self.asking: set[asyncio.Task[Any] | None] = set()
        self._warned = float("-inf")
        self.limits: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self.pipelines = 0
        self.statements_pipelined = 0
        self.start: Start | None = None
        self._stand_in: Any = None
        self._exchange = between.of_loop(self.loop)

    @property
    def outdated(self) -> bool:
        """Whether the settings now name another database (tests rename it)."""
        return bool(self.where != _where(self.settings_dict))

    def take_wrapper(self) -> Any:
        """An idle DatabaseWrapper for native code, without a connection."""
        return self.wrappers.pop() if self.wrappers else self._new_wrapper()

    def give_wrapper(self, wrapper: Any) -> None:
        """Take back a wrapper; those that only a burst needed are dropped."""
        if not wrapper.acts_in_cursors and len(self.wrappers) < max(self.size, _MAX_IDLE):
            self.wrappers.append(wrapper)

    def take(self) -> Connection | None:
        """A free connection, None if there is none now."""
        if self.connections is None or (conn := self.connections.take()) is None:
            return None
        return conn.twin

    def get(self, wrapper: BaseDatabaseWrapper) -> Connection:
        """A connection for the running operation, waited for if need be.

        Raises:
            psycopg.OperationalError: none to be had; the message says why and what to do.
        """
        return bridge.wait_for(bridge.running(), self._checkout(wrapper)).twin

    @property
    def is_open(self) -> bool:
        """Whether there has been a connection."""
        return self.start is not None

    @property
    def has_free(self) -> bool:
        """Whether there is one that nobody has."""
        return self.connections is not None and self.connections.free > 0

    @property
    def is_full(self) -> bool:
        """Whether it has all the connections that it may have, and somebody has each of them."""
        conns = self.connections
        if conns is None or conns.free:
            return False
        return sum(not conn.closed for conn in conns.live) >= self.size

    @property
    def room(self) -> int:
        """How many connections more are to be had without waiting for anybody."""
        conns = self.connections
        if conns is None or conns.waiting:
            return 0
        return conns.free if conns.rest > 0 else conns.free + self.size - conns.opened

    def begin(self, conn: Connection) -> None:
        """A new connection is ready: what it has is what all of the pool's have at their start."""
        conn.begin()
        if self.start is None:
            self.start = Start.of(conn)

    def defer(self) -> DeferredConnection | None:
        """Something that stands for a connection; None if there was none yet."""
        return None if self.start is None else DeferredConnection(self.start)

    def stand_in(self) -> Any:
        """A wrapper for statements without a session: nothing runs on it.

        None if there was no connection yet.
        """
        if self._stand_in is None and self.start is not None:
            self._stand_in = self._new_wrapper()
            self._stand_in.session = None
        return self._stand_in

    def _new_wrapper(self) -> Any:
        wrapper = self.make_wrapper()
        if self.start is not None:  # it would ask a connection
            wrapper.__dict__["pg_version"] = self.start.server_version
        return wrapper

    def checkin(self, conn: Connection) -> None:
        """Give a connection back; one that is not idle is rolled back or replaced."""
        assert conn.pooled is not None
        if self.connections is None or self.loop.is_closed():
            conn.terminate()
        elif conn.session_dirty or conf.get("RESET_ALWAYS"):
            self.loop.call_soon(self._reset, conn.pooled)
        else:
            self.connections.give(conn.pooled)

    def _reset(self, conn: PooledConnection) -> None:
        if self.connections is None:
            conn.twin.terminate()
        else:
            task = self._in_background(self.connections.reset(conn))
            task.add_done_callback(partial(self.connections.was_reset, conn))

    def is_clean(self, conn: Connection) -> bool:
        """Whether the next operation may have a connection without its being given back."""
        return (
            not conn.session_dirty
            and self.connections is not None
            and self.connections.is_clean(conn.pooled)
            and not conf.get("RESET_ALWAYS")
        )

    async def _checkout(self, wrapper: Any) -> PooledConnection:
        try:
            conns = self.connections or await self._open(wrapper)
            session = wrapper.session
            with self.asked(session.pipelining and session.source is self) as suspicion:
                if suspicion is not None:
                    await suspicion()
                task = asyncio.current_task()
                cancels = task.cancelling() if task is not None else 0
                with self._warning_if_slow():
                    conn = await conns.getconn()
                    while not conn.alive():  # lost before who had it gave it to this task
                        conns.give(conn)
                        conn = await conns.getconn()
                if task is not None and task.cancelling() > cancels:
                    # Python 3.11's wait_for() forgets a cancellation that comes with the
                    # connection.
                    conns.give(conn)
                    await asyncio.sleep(0)  # that of anyio comes again, as its scope knows it
                    raise asyncio.CancelledError
                return conn
        except PoolRefusal:
            raise
        except PoolTimeout:
            raise refusals.exhausted(self, conns) from conns.connect_error
        except PoolClosed as exc:
            raise (Retired if self.retired else psycopg.OperationalError)(
                f"The native pool of database {self.alias!r} was closed while this task waited "
                "for a connection." + see("debugging#it-raises")
            ) from exc
        except psycopg.OperationalError as exc:
            raise Unreachable(
                f"Cannot connect to database {self.alias!r} ({self.description}): "
                f"{str(exc).strip()}\n"
                f"Check that the server runs and that DATABASES[{self.alias!r}] is right."
                + see("deployment#when-things-fail")
            ) from exc

    def bears(self, exc: psycopg.Error, since: float) -> bool:
        """Whether a new connection that was lost at once is made again (a pooler has no server).

        Args:
            since: when the first one was lost.
        """
        conns = self.connections
        over = monotonic() > since + self.options["timeout"]
        return conns is not None and not over and is_away(exc) and conns.passes(exc)

    @property
    def waiting(self) -> int:
        """How many operations wait for a connection, or for their statement to be sent on one."""
        if self.connections is None:
            return 0
        waiting = self.connections.waiting
        if self.queue is not None:
            waiting += self.queue.waiting - min(
                self.queue.pending - len(self.queue.starting), waiting
            )
        return waiting

    def asked(self, admitted: bool = False) -> Asking:
        """The current task waits for a connection, or for its statement to be sent on one.

        Args:
            admitted: for statements that wait already, in the pool's own queue.

        Raises:
            psycopg.OperationalError: as many wait already as `max_waiting` allows.
        """
        most = self.options.get("max_waiting", 0)
        if most and not admitted and self.waiting >= most and not self.connections.free:  # type: ignore[union-attr]
            raise refusals.full_of(self, most)
        return Asking(self.asking, partial(refusals.deadlock_of, self))

    @contextmanager
    def _warning_if_slow(self) -> Iterator[None]:
        seconds = conf.get("SLOW_CHECKOUT")
        if seconds is None:
            yield
            return

        def warn() -> None:
            if self.loop.time() < self._warned + seconds:
                return  # one of many that wait: a line for each would make it worse
            self._warned = self.loop.time()
            logger.warning(
                "A task has waited %g s for one of the %d connections of database %r, and %d more "
                "wait. Held by: %s.", seconds, self.size, self.alias,
                self.connections.waiting - 1 if self.connections else 0,
                holders(self.sessions()) or "nobody, there is none",
            )  # fmt: skip

        handle = self.loop.call_later(seconds, warn)
        try:
            yield
        finally:
            handle.cancel()

    def sessions(self) -> Iterator[Any]:
        """Who has a connection now."""
        live = () if self.connections is None else self.connections.live
        return (conn.twin.lock for conn in live if not conn.closed)

    @property
    def size(self) -> int:
        """The most connections the pool may have."""
        return int(self.options["max_size"])

    @property
    def host(self) -> str:
        """The name of the server, or of several; empty for the local one."""
        return host_of(self.settings_dict)

    @property
    def description(self) -> str:
        """Where the server is, for messages; no password."""
        get = self.settings_dict.get
        host = self.host or "local socket"
        return (
            f"host {host!r}, port {get('PORT') or 'default'}, database {get('NAME')!r}, "
            f"user {get('USER') or 'default'!r}"
        )

    async def _open(self, wrapper: BaseDatabaseWrapper) -> ConnectionPool:
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self.connections is not None:
                return self.connections
            if not self.current:
                raise PoolClosed
            options = {**self.options}
            min_size = options.pop("min_size")
            options.pop("max_waiting", None)  # see asked()
            callbacks = {
                name: natively(name, options.pop(name, None), options["timeout"])
                for name in ("check", "configure", "reset")
            }
            if self.settings_dict["CONN_HEALTH_CHECKS"] and callbacks["check"] is None:
                callbacks["check"] = ConnectionPool.check_connection
            pool = ConnectionPool(
                kwargs=self._params(wrapper.get_connection_params()),
                # One connection at first, by growth; filled to min_size if the loop lives on.
                min_size=0,
                # A failed attempt is not repeated in the background, but where tasks wait
                # (growth.py; psycopg #1315).
                reconnect_timeout=0.0,
                several_hosts="," in self.host,
                stood_in=self.alias in elsewhere.stood_in,
                target=self.settings_dict["OPTIONS"].get("target_session_attrs"),
                **callbacks,
                **{"name": f"asyncorm-{self.alias}", **options},
            )
            pool.start()
            self._closer = self._close_with_loop()
            await self._closer.__anext__()
            self._begin_with_kept(pool)
            self.connections = pool
            if min_size:
                self.loop.call_later(conf.get("FILL_DELAY"), self._fill, min_size)
            return pool

    def _begin_with_kept(self, pool: ConnectionPool) -> None:
        """Take over the connection of the thread that waits for the loop, if it has kept one."""
        if self._exchange is None:
            return
        kept = self._exchange.take(self.alias, self._made_from())
        if kept is not None and pool.adopt(kept.release()):
            self.start = kept.start

    def _leave_one(self) -> None:
        """Leave a connection to the thread that waits for the loop."""
        pool = self.connections
        if self._exchange is None or pool is None or self.start is None:
            return
        if self.current and not self.outdated and (conn := pool.part_with_one()) is not None:
            age = self.settings_dict["CONN_MAX_AGE"]
            close_at = None if age is None else conn._created_at + age
            self._exchange.give(
                self.alias, between.Kept(conn, self.start, self._made_from(), close_at)
            )

    def _made_from(self) -> tuple[Any, ...]:
        return os.getpid(), registry.discarded, self.settings_dict, self.where

    def _params(self, first: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Each connection asks Django's wrapper anew how to connect: passwords are rotated."""
        unused = [first]
        return lambda: unused.pop() if unused else self.make_wrapper().get_connection_params()

    def _fill(self, min_size: int) -> None:
        if self.connections is not None and not self.connections.closed:
            self.connections.fill(min_size)

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        # asyncio.run() cancels all tasks, the pool's among them, and only then closes asynchronous
        # generators.
        try:
            yield
        finally:
            self._closer = None
            self._leave_one()
            await self.close()

    async def close(self) -> None:
        """Close every connection of the pool and forget it."""
        registry.forget(self)
        async with self._opening or nullcontext():  # or it would be open a moment later
            pool, self.connections = self.connections, None
        if pool is not None:
            await pool.shut()
        closer, self._closer = self._closer, None
        if closer is not None:
            await closer.aclose()

    def retire(self) -> None:
        """Close the connections, those in use as soon as they are given back.

        Who waits for one is told by Retired.
        """
        self.retired = True
        self._in_background(self._retire())

    async def _retire(self) -> None:
        async with self._opening or nullcontext():  # or nobody would close it once it is open
            if self.connections is not None:
                await self.connections.close()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work, context=Context())
        registry.background.add(task)
        task.add_done_callback(registry.background.discard)
        return task

    def abandon(self) -> None:
        """Close every connection at once, for a pool whose loop is already closed."""
        registry.forget(self)
        if self.connections is not None:
            self.connections.terminate()
            self.connections = None

    def stats(self) -> dict[str, int]:
        """psycopg_pool's statistics: numbers only."""
        if self.connections is None:
            return {
                "pool_min": self.options["min_size"],
                "pool_max": self.size,
                "pool_size": 0,
                "pool_available": 0,
            }
        return {
            **self.connections.get_stats(),
            "requests_waiting": self.waiting,
            "pipelines": self.pipelines,
            "statements_pipelined": self.statements_pipelined,
            "pool_min": self.options["min_size"],
            "pool_max": self.size,
        }
