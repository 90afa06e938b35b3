"""When a pool asks a server that refused it again, and for how long tasks wait for that.

psycopg_pool repeats each refused attempt by itself. Here the tasks that wait decide: nobody asks
while nobody waits, one attempt at a time is made for all of them, and its pace is kind to a server
that is full.
"""

from __future__ import annotations

import logging
import random
import re
from asyncio import TimerHandle
from contextvars import Context
from time import monotonic
from typing import Any, TypeVar

from psycopg import AsyncConnection

from .upkeep import UpkeptPool

C = TypeVar("C", bound=AsyncConnection[Any])

logger = logging.getLogger("psycopg.pool")

# libpq tells no SQLSTATE of a connection that was refused, only the server's words. Those of a
# server that speaks another language count as lasting.
_LASTING = re.compile(
    r"authentication failed|does not exist|no pg_hba\.conf entry|no password supplied"
    r"|not permitted to log in"
)
_FULL = re.compile(
    r"too many (?:clients|connections)|connection slots are reserved|no more connections allowed"
)
_PASSING = re.compile(
    r"the database system is |terminating connection (?:due|because)"
    r"|(?:session|server) is (?:not )?(?:read-only|in hot standby)"
)
_AWAY = re.compile(
    r"Connection refused|No such file or directory|timeout expired|timed out|No route to host"
    r"|unreachable"
)
_CUT = re.compile(  # OpenSSL has words of its own
    r"closed the connection unexpectedly|reset by peer|SSL .*unexpected eof|SSL .*EOF detected"
)
_NO_SERVER = re.compile(r"cannot connect to server|server login (?:has been failing|failed)")

AGAIN = 0.2  # seconds until what a pooler without a server refused is tried again
RESTART = 1.0  # seconds for which nothing need listen, where only one server is known
# The first and the longest wait before the next attempt, in seconds.
_PACE = 0.05, 0.2
_SLOW_PACE = 1.0, 2.0  # for what is not over soon
_SLOWEST_PACE = 1.0, 8.0  # of a pool that has other connections
_SHED_EVERY = 1.0
_SHED_FOR = 30.0


def is_full(exc: BaseException | None) -> bool:
    """Whether a connection was refused since there are too many."""
    return exc is not None and _FULL.search(str(exc)) is not None


def is_away(exc: BaseException) -> bool:
    """Whether a connection was refused for a reason that passes by itself, sooner or later."""
    text = str(exc)
    found = (each.search(text) for each in (_FULL, _PASSING, _CUT, _NO_SERVER, _AWAY))
    return _LASTING.search(text) is None and any(found)


def has_no_server(exc: BaseException | None) -> bool:
    """Whether a pooler said that it has no server: what it was sent has reached none."""
    return exc is not None and _NO_SERVER.search(str(exc)) is not None


class GrowingPool(UpkeptPool[C]):
    """psycopg_pool's pool with another way of growing.

    Attributes:
        several_hosts: another server may take the place of one that is away.
        stood_in: others have what it has; nobody waits for one that is away.
    """

    live: set[C]

    def __init__(
        self, *args: Any, several_hosts: bool = False, stood_in: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.several_hosts = several_hosts
        self.stood_in = stood_in
        self._had_one = False
        self._away_since: float | None = None
        self._pause = 0.0  # the last one between two attempts
        self._refused_at = float("-inf")
        self._again: TimerHandle | None = None
        self._full_until = 0.0
        self._shedding: TimerHandle | None = None

    @property
    def rest(self) -> float:
        """For how many seconds the server is not asked, since it has refused a connection."""
        pause = self._pause if self.live else min(self._pause, _SLOW_PACE[1])
        return self._refused_at + pause - monotonic()

    def passes(self, exc: BaseException) -> bool:
        """Whether what kept the server from giving a connection passes by itself."""
        text = str(exc)
        if _LASTING.search(text):
            return False
        if _FULL.search(text):
            return True
        if self.stood_in:
            return False
        if _PASSING.search(text):
            return True
        if _CUT.search(text) or _NO_SERVER.search(text):  # by a proxy that has no server now
            return self.several_hosts or self._had_one
        if not _AWAY.search(text):
            return False
        if self._away_since is None:
            self._away_since = monotonic()
        return self.several_hosts or (self._had_one and monotonic() < self._away_since + RESTART)

    async def _add_connection(self, attempt: object, growing: bool = False) -> None:
        try:
            conn = await self._connect()
        except Exception as exc:
            logger.warning("error connecting in %r: %s", self.name, exc)
            await self._refused(exc, growing)
            return
        except BaseException:  # cancelled
            if growing:
                self._growing = False
            self._lose_one()
            raise
        self._had_one, self._away_since, self._pause = True, None, 0.0
        try:
            await self._add_to_pool(conn)
        except BaseException:  # cancelled
            self._lose(conn)
            raise
        finally:
            if growing:
                self._growing = False
        if growing and (self._nconns < self._min_size or self._waiting):
            self._maybe_grow_pool()

    async def _return_connection(self, conn: C, from_getconn: bool) -> None:
        try:
            await super()._return_connection(conn, from_getconn)
        except BaseException:  # psycopg_pool would lose it
            self._lose(conn)
            raise

    def _lose(self, conn: C) -> None:
        self.discard(conn)
        self._lose_one()

    def _lose_one(self) -> None:
        # Who still waits, or comes later, is served all the same.
        self._nconns -= 1
        if self._waiting and not self._closed:
            self._maybe_grow_pool()

    async def _refused(self, exc: Exception, growing: bool) -> None:
        self._nconns -= 1
        if growing:
            self._growing = False
        if is_full(exc):
            self._shed()
        passes = self.passes(exc)
        if (self.live or passes) and self.rest <= 0:
            soon = passes and not is_full(exc)
            first, longest = _PACE if soon else _SLOWEST_PACE if self.live else _SLOW_PACE
            self._pause = min(max(2 * self._pause, first), longest) * random.uniform(0.8, 1.2)
            self._refused_at = monotonic()
        if self._waiting:
            self._maybe_grow_pool()
        else:
            await self.reconnect_failed()

    def _maybe_grow_pool(self) -> None:
        if (rest := self.rest) <= 0:
            super()._maybe_grow_pool()
            return
        if self._again is not None:
            if self._again.when() <= self._loop.time() + rest:
                return
            self._again.cancel()
        self._again = self._loop.call_later(rest, self._try_again, context=Context())

    def _try_again(self) -> None:
        self._again = None
        if self._waiting and not self._closed:
            self._maybe_grow_pool()

    # Others need connections, too

    def _shed(self) -> None:
        """The server is full: give up what has not been needed for a second, for some time."""
        self._full_until = monotonic() + _SHED_FOR
        if self._shedding is None:
            self._nconns_min = len(self._pool)
            self._shed_later()

    def _shed_later(self) -> None:
        self._shedding = self._loop.call_later(_SHED_EVERY, self._give_up_idle, context=Context())

    def _give_up_idle(self) -> None:
        self._shedding = None
        if self._closed:
            return
        spare = min(self._nconns_min, len(self._pool), self._nconns - self._min_size)
        for _ in range(spare):
            self._nconns -= 1
            self.discard(self._pool.popleft())
        self._nconns_min = len(self._pool)
        if monotonic() < self._full_until:
            self._shed_later()

    def discard(self, conn: C) -> None:
        """Close a connection that nobody has."""
        raise NotImplementedError
