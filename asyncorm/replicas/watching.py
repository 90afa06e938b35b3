"""Knows how far each replica is, by asking the primary and the replicas several times a second.

No clocks are compared: the primary's position at a time of ours says what a replica that has
replayed it contains, namely all that was committed until then. Of what is known the router decides
in memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from asyncio import AbstractEventLoop
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from time import monotonic
from typing import Any

import psycopg

from .. import between
from .._pool.connection import connect_beside
from .._sessions.leaving import start_task
from .positions import ASK_PRIMARY, Need, Position

logger = logging.getLogger("asyncorm")

# A standby's timeline is that of its last restart point, of what it has flushed, or (for members of
# pg_monitor) of what it receives; the highest is the latest to be known.
ASK_REPLICA = """
    SELECT pg_is_in_recovery(), concat(system_identifier, '.', greatest(
        (SELECT timeline_id FROM pg_control_checkpoint()),
        (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
        (SELECT received_tli FROM pg_stat_wal_receiver))),
    coalesce((pg_last_wal_replay_lsn() - '0/0')::bigint, 0)
    FROM pg_control_system()
"""
_CONNECT_TIMEOUT = 3.0
_ANSWER_TIMEOUT = 1.0


class Replica:
    """What is known of one.

    Attributes:
        replayed: up to where; of which server.
        fresh: until when (`monotonic()`) it has everything.
        problem: why it cannot be used, None if nothing speaks against it.
        reads: how many were sent there.
        left: when somebody last found it gone; what it was asked before does not count.
        promoted: when it was first asked and no standby any more.
    """

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.server = ""
        self.replayed = 0
        self.fresh = float("-inf")
        self.problem: str | None = "not asked yet"
        self.reads = 0
        self.left = float("-inf")
        self.promoted = float("inf")


class Watcher:
    """Watches one primary and its replicas, for all loops and threads of the process.

    It runs as a task of the first loop that asks, or in a thread of its own where there is none, or
    one that lives for one call.

    Attributes:
        server: the primary's cluster and timeline.
        first: the primary's position when it was first seen: replicas are to have that.
        away: the primary does not answer. What a replica had until then is all there is.
        reads: how many were sent to the primary.
    """

    def __init__(self, primary: str, replicas: Sequence[str], max_lag: float) -> None:
        self.primary = primary
        self.replicas = {alias: Replica(alias) for alias in replicas}
        self.max_lag = max_lag
        self.interval = min(max(max_lag / 10, 0.25), 1.0)
        self.reads = 0
        self.forget()
        _watchers.add(self)

    def forget(self) -> None:
        """Know nothing, and not run."""
        self.server = ""
        self.first = 0
        self.away = False
        self._latest: tuple[float, int] | None = None  # when asked for, the program's position
        # Positions on disk and the last time at which each was asked for.
        self._positions: list[int] = []
        self._times: list[float] = []
        self._loop: AbstractEventLoop | None = None
        self._starting = threading.Lock()
        for replica in self.replicas.values():
            replica.problem = "not asked yet"

    # What the router asks

    def needed(self, need: Need) -> int | None:
        """Up to where a replica has to be for a context; None: only the primary will do."""
        alias = self.primary
        if self._latest is None:
            return None
        if not need.covered(alias):
            asked, lsn = self._latest
            if asked <= need.wrote[alias]:
                return None
            need.keep(alias, Position(self.server, lsn), asked)
        position = need.current(alias)
        if position is None:
            return self.first
        return max(position.lsn, self.first) if position.server == self.server else None

    def fits(self, replica: Replica, needed: int) -> bool:
        """Whether a replica may be read: it is up, has what is needed, and does not lag."""
        return (
            replica.problem is None
            and replica.server == self.server
            and replica.replayed >= needed
            and self.lag(replica) < self.max_lag
        )

    def lag(self, replica: Replica) -> float:
        """For how many seconds at most it may lack what was committed."""
        until = self._latest[0] if self.away and self._latest is not None else monotonic()
        return max(until - replica.fresh, 0.0)

    # How it is run

    def ensure(self) -> None:
        """Have it run, if it does not."""
        if (loop := self._loop) is not None and not loop.is_closed():
            return
        with self._starting:
            if (loop := self._loop) is not None and not loop.is_closed():
                return
            loop = asyncio._get_running_loop()
            if loop is None or between.is_short(loop):
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._run_in_thread,
                    args=(self._loop,),
                    name="asyncorm replicas",
                    daemon=True,
                ).start()
            else:
                self._loop = loop
                start_task(self._run(loop), Context())

    def _run_in_thread(self, loop: AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._run(loop))

    async def _run(self, loop: AbstractEventLoop) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(self.primary, ASK_PRIMARY, self._see_primary))
                for alias in self.replicas:
                    group.create_task(self._follow(alias, ASK_REPLICA, self._see_replica))
        finally:
            if self._loop is loop:
                self._loop = None

    async def _follow(
        self, alias: str, question: str, see: Callable[[str, float, Any], None]
    ) -> None:
        while True:
            conn = None
            try:
                conn = await self._within(_CONNECT_TIMEOUT, alias, connect_beside(alias))
                while True:
                    asked = monotonic()
                    row = await self._within(_ANSWER_TIMEOUT, alias, _ask(conn, question))
                    see(alias, asked, row)
                    await asyncio.sleep(self.interval)
            except Exception as exc:
                self._lose(alias, str(exc).strip() or type(exc).__name__)
            finally:
                if conn is not None:
                    await conn.close()
            await asyncio.sleep(self.interval)

    async def _within(self, seconds: float, alias: str, awaitable: Awaitable[Any]) -> Any:
        # psycopg has the server cancel a statement first, for which a server that hangs takes long.
        late = f"no answer within {seconds:g} s"
        handle = asyncio.get_running_loop().call_later(seconds, self._lose, alias, late)
        try:
            async with asyncio.timeout(seconds):
                return await awaitable
        except TimeoutError as exc:
            raise TimeoutError(late) from exc
        finally:
            handle.cancel()

    # What it sees

    def _see_primary(self, alias: str, asked: float, row: Sequence[Any]) -> None:
        standby, server, written, flushed = row
        if standby:
            raise psycopg.OperationalError(f"database {alias!r} is a standby, or read-only")
        if server != self.server:
            if self.server:
                logger.warning("The primary of %r is another server, or was promoted.", alias)
            self.server, self.first = server, written
            self._positions, self._times = [], []
        if self.away:
            self.away = False
            logger.warning("The primary of %r answers again.", alias)
        if self._positions and self._positions[-1] >= flushed:
            self._times[-1] = asked
        else:
            self._positions.append(flushed)
            self._times.append(asked)
        self._latest = asked, written
        if self._times[0] < asked - 2 * self.max_lag - 60:
            keep = bisect_right(self._times, asked - 2 * self.max_lag)
            self._positions, self._times = self._positions[keep:], self._times[keep:]

    def _see_replica(self, alias: str, asked: float, row: Sequence[Any]) -> None:
        standby, server, replayed = row
        replica = self.replicas[alias]
        if asked < replica.left:
            return
        replica.promoted = float("inf") if standby else min(replica.promoted, asked)
        if not standby and replica.problem is None and not self._answered_since(replica.promoted):
            return  # it has what the next primary has, until that one answers
        replica.server, replica.replayed = server, replayed
        problem = None
        if not standby:
            problem = "it is no standby (any more)"
        elif server != self.server:
            problem = "it does not follow the primary (yet)" if self.server else "no primary yet"
        else:
            at = bisect_right(self._positions, replayed)
            replica.fresh = self._times[at - 1] if at else float("-inf")
        self._judge(replica, problem)

    def _answered_since(self, moment: float) -> bool:
        return self._latest is not None and self._latest[0] > moment

    def leave(self, alias: str, why: str) -> None:
        """Not have a replica read until it answers again; from whichever thread."""
        replica = self.replicas[alias]
        replica.left = monotonic()
        self._judge(replica, why)

    def _lose(self, alias: str, why: str) -> None:
        if alias in self.replicas:
            self._judge(self.replicas[alias], why)
        elif not self.away:
            self.away = True
            logger.warning("The primary of %r does not answer: %s", alias, why)

    def _judge(self, replica: Replica, problem: str | None) -> None:
        before, replica.problem = replica.problem, problem
        if problem is not None and problem != before and problem != "no primary yet":
            logger.warning("Replica %r is not read: %s", replica.alias, problem)
        elif problem is None and before is not None:
            logger.info("Replica %r is read.", replica.alias)


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A child process has neither the task nor the thread of its parent."""
    for watcher in list(_watchers):
        watcher.forget()


os.register_at_fork(after_in_child=_leave_to_parent)


async def _ask(conn: psycopg.AsyncConnection[Any], question: str) -> Any:
    cursor = await conn.execute(question.encode())
    return await cursor.fetchone()
