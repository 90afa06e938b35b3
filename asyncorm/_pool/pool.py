"""psycopg_pool's pool, plus what it does not offer: a checkout and a return that need no task
switch, the reason of a failed connection told to those who wait, an immediate close.

What psycopg_pool does not document of what is used here is in internals.py, with the reasons.
"""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from asyncio import CancelledError, Task
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from time import monotonic
from typing import Any

import psycopg
from psycopg import pq
from psycopg_pool.pool_async import AddConnection, ReturnConnection

from .. import conf
from .._wire.cancelling import CANCEL_TIMEOUT
from .._wire.texts import traces
from ..growth import GrowingPool, is_away
from ..roles import ASK, STANDBY_WANTED, Role, contradicts
from ..upkeep import Cancelled
from .connection import MADE, PooledConnection

logger = logging.getLogger("psycopg.pool")


STOP_TIMEOUT = 1.0  # seconds for the server to stop what runs while the pool is closed
_ELSEWHERE = 10.0  # seconds for which standbys are refused where a primary was and is looked for
_IDLE = pq.TransactionStatus.IDLE
_ACTIVE = pq.TransactionStatus.ACTIVE
_MOST_NAMES = 1000
# Of these functions and operators' functions those that may set something in the session. One that
# is not volatile does by what it calls only: its body tells, as aggregates' parts do. Those in C
# are PostgreSQL's and its extensions'; their names tell, also which execute the SQL that they get.
_CALLED = """
    SELECT lanname NOT IN ('internal', 'c', 'sql', 'plpgsql')
        OR (provolatile = 'v' AND (lanname IN ('sql', 'plpgsql')
            OR proname ~ 'set|connect|lock|session|config|seed|load|open'))
        OR proname ~ '_to_xml|^ts_stat$|^ts_rewrite$|^crosstab|^connectby$|^xpath_table$',
        CASE WHEN prokind = 'a' THEN (
                SELECT concat_ws('(', aggtransfn, aggfinalfn, aggcombinefn, aggserialfn,
                    aggdeserialfn, aggmtransfn, aggminvtransfn, aggmfinalfn, '')
                FROM pg_catalog.pg_aggregate WHERE aggfnoid = p.oid)
            WHEN lanname IN ('internal', 'c') THEN ''
            WHEN prosrc = '' THEN pg_catalog.pg_get_functiondef(p.oid) ELSE prosrc END
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = prolang
    WHERE proname = ANY(%(names)s) OR p.oid IN (
        SELECT oprcode FROM pg_catalog.pg_operator WHERE oprname = ANY(%(names)s))"""
_DYNAMIC = re.compile(r"\bexecute\b", re.IGNORECASE)  # what, nobody can tell
_HARMLESS_FOR = 60.0  # seconds after which functions are looked at again: they may be others


class ConnectionPool(GrowingPool[PooledConnection]):
    """psycopg_pool's pool, with a checkout that costs no task switch when a connection is free.

    Attributes:
        harmless: functions of the database that leave nothing in the session, of those called.
        live: every open connection, in the pool or not.
        connect_error: why the last attempt to connect failed; None after one that worked.
        target: the role that servers have to have (`target_session_attrs`), None if it is not said.
    """

    def __init__(self, target: str | None = None, **kwargs: Any) -> None:
        self.harmless: set[str] = set()
        self.live: set[PooledConnection] = set()
        self.connect_error: BaseException | None = None
        self.target = target
        self._had_primary = False
        self._primary_until = 0.0
        self._pruning = False
        super().__init__("", connection_class=PooledConnection, open=False, **kwargs)

    async def _connect(self, timeout: float | None = None) -> PooledConnection:
        self.live = {conn for conn in self.live if not conn.closed}
        try:
            conn = await self._make(timeout)
        except CancelledError as exc:
            traceback.clear_frames(exc.__traceback__)  # closes the half-open connection now
            raise Cancelled from None
        except Exception as exc:
            self.connect_error = exc
            if not self.passes(exc) and (not self.live or (self.stood_in and is_away(exc))):
                await self._fail_waiting(exc)
            raise
        self.connect_error = None
        conn.home = self
        self.live.add(conn)
        return conn

    async def _make(self, timeout: float | None) -> PooledConnection:
        made: list[PooledConnection] = []
        MADE.set(made)
        try:
            conn = await super()._connect(timeout)
            self._look_at_role(conn)
            return conn
        except BaseException:  # of `configure`, too: psycopg_pool drops it, and its reader keeps it
            for conn in made:
                conn.twin.terminate()
            raise
        finally:
            MADE.set(None)  # timers that were cancelled keep the context

    def _look_at_role(self, conn: PooledConnection) -> None:
        if not conn.began.in_recovery:
            self._had_primary = True
        elif monotonic() < self._primary_until:
            raise psycopg.OperationalError("A write was refused, and the server is in hot standby")

    async def _fail_waiting(self, exc: BaseException) -> None:
        # Tell those who wait what the server said, at once rather than after the pool's timeout.
        while self._waiting:
            error = psycopg.OperationalError(str(exc))
            error.__cause__ = exc
            await self._waiting.popleft().fail(error)

    def fill(self, min_size: int) -> None:
        """Have at least `min_size` connections (`resize()` would go beyond max_size)."""
        self._min_size = min_size
        for _ in range(self._nconns, min_size):
            self._nconns += 1
            self.run_task(AddConnection(self))

    def discard(self, conn: PooledConnection) -> None:
        """Close a connection that nobody has."""
        self.live.discard(conn)
        conn.twin.terminate()

    def take(self) -> PooledConnection | None:
        """A free connection, the one used last, or None: then `await getconn()`."""
        if self._check or self._closed:
            return None
        pool = self._pool
        while pool:
            conn = pool[-1]
            if conn.alive():
                if len(pool) <= self._nconns_min:
                    self._nconns_min = len(pool) - 1
                self._stats[self._REQUESTS_NUM] += 1
                conn._pool = self
                pool.pop()  # no call after it: an error (of recursion) would lose the connection
                return conn
            self._return(conn, from_getconn=True)
            pool.pop()
        return None

    async def getconn(self, timeout: float | None = None) -> PooledConnection:
        """psycopg_pool's, but who gives up waiting is not left in the queue, to be counted."""
        try:
            return await super().getconn(timeout)
        except (Exception, CancelledError):
            if not self._pruning:  # once for a storm of cancellations
                self._pruning = True
                self._loop.call_soon(self._prune)
            raise

    def _prune(self) -> None:
        self._pruning = False
        self._waiting = deque(client for client in self._waiting if client.error is None)

    def _return(self, conn: PooledConnection, from_getconn: bool) -> None:
        """Have the pool's workers take a connection back; an error means that they will not."""
        self._loop.call_soon(self.run_task, ReturnConnection(self, conn, from_getconn))

    def give(self, conn: PooledConnection) -> None:
        """Take back a connection from `take()` or `getconn()`."""
        if self._closed:
            conn._pool = None
            conn.twin.terminate()
        elif not self.is_clean(conn):
            if conn.pgconn.transaction_status == _ACTIVE:
                conn.twin.terminate()
            self._return(conn, from_getconn=False)
        else:
            if not self._hand_over(conn):
                self._pool.append(conn)
            conn._pool = None

    def adopt(self, conn: PooledConnection) -> bool:
        """Take in a connection of a pool that is gone, if it still works."""
        conn.home = self
        if not self.is_clean(conn) or not conn.alive():
            conn.twin.terminate()
            return False
        conn.lock = asyncio.Lock()  # that of another loop
        self._had_one = True
        self._had_primary = not conn.began.in_recovery
        self.live.add(conn)
        self._nconns += 1
        self._pool.append(conn)
        return True

    def part_with_one(self) -> PooledConnection | None:
        """A connection that nobody has, and that can be used again; it is not the pool's any more.

        None if there is none.
        """
        while self._pool:
            conn = self._pool.pop()
            if self.is_clean(conn) and conn.alive():
                self._nconns -= 1
                self.live.discard(conn)
                conn.home = None
                conn.twin.wire.park()
                return conn
        return None

    def is_clean(self, conn: Any) -> bool:
        """Whether a connection can be used again as it is."""
        return (
            not self._reset
            and not self._closed
            and conn.pgconn.transaction_status == _IDLE
            and conn._expire_at > monotonic()
            and conn._created_at > self._drained_at
        )

    def _hand_over(self, conn: PooledConnection) -> bool:
        """Give a connection to the one who has waited longest, without a turn of the loop."""
        while self._waiting:
            handing = self._waiting[0].set(conn)
            try:
                handing.send(None)
            except StopIteration as done:
                self._waiting.popleft()
                if done.value:
                    return True
            else:  # its lock is taken just now: leave it to the pool's workers
                handing.close()
                self.run_task(ReturnConnection(self, conn, from_getconn=False))
                return True
        return False

    async def reset(self, conn: PooledConnection) -> None:
        """Undo on the server what was left in the session, then take the connection back."""
        was_closed = conn.closed  # by whoever ends what ran there, as when the loop ends
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT):
                if await self._has_called_harmless(conn):
                    self.give(conn)
                    return
                await conn.execute("DISCARD ALL")
                changed = contradicts(Role.of(conn.pgconn), conn.began, self.target)
                if conn.wrote_in_vain and not changed:
                    conn.wrote_in_vain = False
                    changed = await (await conn.execute(ASK)).fetchone() == (True,)
            conn.renew()
            if changed:
                self.role_changed(conn)
        except Exception as exc:
            if not was_closed:
                logger.warning("A session was not reset, and is closed: %r", exc)
            conn.twin.terminate()
        self.give(conn)

    async def _has_called_harmless(self, conn: PooledConnection) -> bool:
        """Whether nothing can be left by the functions that were called, and there is no other
        reason for a reset."""
        twin = conn.twin
        called, twin.called = twin.called, frozenset()
        if not called or twin.session_dirty or conf.get("RESET_ALWAYS"):
            return False
        if not await self._is_harmless(conn, called):
            return False
        if not self.harmless:
            self._loop.call_later(_HARMLESS_FOR, self.harmless.clear, context=Context())
        if len(self.harmless) < _MOST_NAMES:
            self.harmless |= called
        return True

    async def _is_harmless(self, conn: PooledConnection, names: frozenset[str]) -> bool:
        """Whether functions and operators, and all that these call, leave the session alone."""
        looked = frozenset(self.harmless)
        while names := names - looked:
            if "" in names:  # it is not known which
                return False
            rows = await (await conn.execute(_CALLED, {"names": list(names)})).fetchall()
            looked |= names
            names = frozenset()
            for harmful, body in rows:
                left = traces(body)
                if harmful or left is True or _DYNAMIC.search(body):
                    return False
                names |= left or frozenset()
        return True

    def was_reset(self, conn: PooledConnection, task: Task[None]) -> None:
        """The task of `reset()` has ended: one that was cancelled has not taken it back."""
        if task.cancelled() or task.exception() is not None:
            self._lose(conn)

    # The server's role

    def refused_write(self, conn: PooledConnection, ask: Callable[[], bool] | None) -> bool:
        """A write was refused on a connection; whether the reason is that its server's role has
        changed. The next one then gets another connection.

        Args:
            ask: asks the server whether it is read-only; None if it cannot be asked now.
        """
        now, began = Role.of(conn.pgconn), conn.began
        if self.target in STANDBY_WANTED or (began.in_recovery and not self._had_primary):
            return False
        changed = now.in_recovery or (contradicts(now, began, None) and not conn.twin.touched)
        if not changed and (now.in_recovery is None or now.read_only is not began.read_only):
            if ask is None:
                conn.wrote_in_vain = conn.twin.session_dirty = True
            else:
                changed = ask()
        if changed:
            self.role_changed(conn)
        return bool(changed)

    def role_changed(self, conn: PooledConnection) -> None:
        """The server of a connection is not the one that is wanted: neither are those before."""
        if self._had_primary and self.target is None:
            # A proxy may need a moment to see that, too.
            self._primary_until = monotonic() + _ELSEWHERE
        if conn.home is not None:
            self.retire_all()

    def retire_all(self) -> None:
        """Use none of the connections any more, those in use when they are given back."""
        self._drained_at = monotonic()
        for conn in self.live:
            conn.home = None
        while self._pool:
            self._nconns -= 1
            self.discard(self._pool.pop())
        self._nconns_min = 0
        self.fill(self._min_size)

    async def shut(self) -> None:
        """Close everything, connections in use too, even if the pool's tasks are cancelled."""
        try:
            with suppress(CancelledError, Exception):
                await self.close()
            # From now on they begin nothing, and what they have begun nobody wants.
            workers = [*self._workers]
            for worker in workers:
                worker.cancel()
            if workers:  # a callback of the user's may do what it likes with that
                await asyncio.wait(workers, timeout=CANCEL_TIMEOUT)
            busy = [conn for conn in self.live if conn.pgconn.transaction_status == _ACTIVE]
            if busy:
                with suppress(CancelledError, Exception):
                    async with asyncio.timeout(STOP_TIMEOUT):
                        await asyncio.gather(*(conn.twin.silence() for conn in busy))
        finally:
            self.terminate()

    def terminate(self) -> None:
        """Close every connection at once, without a loop."""
        self._closed = True
        self.dismiss()
        for conn in self.live:
            conn._pool = None
            conn._closed = True
            conn.twin.terminate()
        self.live.clear()

    @property
    def waiting(self) -> int:
        """How many tasks wait for a connection."""
        return len(self._waiting)

    @property
    def free(self) -> int:
        """How many connections nobody has."""
        return len(self._pool)

    @property
    def opened(self) -> int:
        """How many connections there are, those that are being opened included."""
        return int(self._nconns)
