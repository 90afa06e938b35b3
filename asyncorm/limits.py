"""At most so many connections at once for the operations of a context.

A `Limit` stands between sessions and their pool, or between them and a wider limit.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import anyio
import psycopg
from django.db import DEFAULT_DB_ALIAS
from django.db.backends.base.base import BaseDatabaseWrapper

from . import bridge, conf, generators
from ._pool.refusals import Asking, PoolDeadlock, deadlocked, holders
from .contexts import EitherWay
from .driver import Connection
from .generators import Place
from .pages import see
from .pools import Pool

Source: TypeAlias = "Pool | Limit"


class Limit:
    """Up to `size` connections of a pool, in order of arrival.

    They are kept while anything here runs or waits, and go back when nothing does.

    Attributes:
        size: how many.
        batching: statements wait for the end of the loop's turn, to travel with others.
        queue: statements that wait for a connection; set by crowding.queue_of().
    """

    queue: Any = None

    @property
    def keeps_state(self) -> bool:
        """Whether who gives a connection back meets what he has set in its session again."""
        return self.parent.keeps_state

    def __init__(self, parent: Source | Kept, size: int, batching: bool = False) -> None:
        self.parent = parent
        self.size = size
        self.batching = batching
        self.limits: WeakKeyDictionary[Parallelism, Limit] = WeakKeyDictionary()
        self.asking: set[Any] = set()
        self._turns = anyio.Semaphore(size, max_value=size, fast_acquire=True)
        self._kept: list[Connection] = []
        self._out: set[Any] = set()  # what is pooled: a session that is reset has another twin

    @property
    def alias(self) -> str:
        """The database alias."""
        return self.parent.alias

    @property
    def waiting(self) -> int:
        """How many operations wait for their turn here."""
        return self._turns.statistics().tasks_waiting

    @property
    def room(self) -> int:
        """How many connections more are to be had without waiting for anybody."""
        return min(self._turns.value, len(self._kept) + self.parent.room)

    @property
    def has_free(self) -> bool:
        """Whether there is one that nobody has, and that may be had."""
        return self._turns.value > 0 and (bool(self._kept) or self.parent.has_free)

    def take(self) -> Connection | None:
        """A connection if one is to be had at once."""
        try:
            self._turns.acquire_nowait()
        except anyio.WouldBlock:
            return None
        conn = None
        try:
            conn = self._keep_or_take()
        finally:
            if conn is None:
                self._turns.release()
        return conn

    def get(self, wrapper: BaseDatabaseWrapper) -> Connection:
        """A connection, waited for if need be.

        Raises:
            psycopg.OperationalError: none to be had; the message says why and what to do.
        """
        runner = bridge.running()
        try:
            self._turns.acquire_nowait()
        except anyio.WouldBlock:
            bridge.wait_for(runner, self._turn())
        try:
            conn = self._keep_or_take()
            if conn is None:
                conn = self.parent.get(wrapper)
                self._out |= {conn.pooled}  # no call: an error (of recursion) would lose it
        except BaseException:
            self._turns.release()
            raise
        return conn

    async def _turn(self) -> None:
        with self.asked() as suspicion:
            if suspicion is not None:
                await suspicion()
            try:
                await self._turns.acquire()
            except BaseException:  # what was kept for this task may be for nobody now
                self._give_back()
                raise

    def _keep_or_take(self) -> Connection | None:
        while self._kept:
            conn = self._kept[-1]
            if conn.pooled is not None and conn.pooled.alive():
                self._kept.pop()
                break
            self.parent.checkin(conn)
            self._kept.pop()
        else:
            taken = self.parent.take()
            if taken is None:
                return None
            conn = taken
        self._out |= {conn.pooled}  # no call, as in get()
        return conn

    def checkin(self, conn: Connection) -> None:
        """Take a connection back, for others who wait here or for the pool."""
        self._out.discard(conn.pooled)
        if (self._out or self.waiting) and self.pool.is_clean(conn):
            self._kept.append(conn)
        else:
            self.parent.checkin(conn)
            self._give_back()
        self._turns.release()

    def _give_back(self) -> None:
        """Give back what is kept if nothing runs or waits here."""
        if not self._out and not self.waiting:
            while self._kept:
                self.parent.checkin(self._kept.pop())

    @property
    def pool(self) -> Pool:
        """The pool whose connections these are."""
        return self.parent if isinstance(self.parent, Pool) else self.parent.pool

    def asked(self) -> Asking:
        """The current task waits for a connection inside."""
        return Asking(self.asking, self._deadlock)

    def _deadlock(self) -> PoolDeadlock | None:
        sessions = [conn.twin.lock for conn in self._out]
        if not deadlocked(sessions, self.size, self.asking):
            return None
        return PoolDeadlock(
            f"Deadlock on database {self.alias!r}: each of the {self.size} connections that "
            "asyncorm.parallelism() allows here is held by a task that waits for another one: "
            f"{holders(sessions)}. Allow more, or do not use a second connection while holding one."
        )


class Kept:
    """The connection that a task keeps by `connection()`, lent to the operations of a `batch()`."""

    size = 1
    waiting = 0
    batching = False
    keeps_state = True
    queue: Any = None

    def __init__(self, session: Any) -> None:
        self.session = session
        self.pool: Pool = session.pool
        self.alias: str = session.alias
        self._lent = False

    @property
    def room(self) -> int:
        """How many connections more are to be had without waiting for anybody."""
        return int(self.has_free)

    @property
    def has_free(self) -> bool:
        """Whether it is to be had at once."""
        return not self._lent

    def take(self) -> Connection | None:
        """The connection, None if it is lent or lost."""
        conn = self.session.wrapper.connection
        if self._lent or conn is None or conn.closed:
            return None
        self._lent = True
        conn.lender = self.session
        return cast("Connection", conn)

    def get(self, wrapper: BaseDatabaseWrapper) -> Connection:
        """The same.

        Raises:
            psycopg.OperationalError: it is lost.
        """
        conn = self.take()
        if conn is None:
            raise psycopg.OperationalError(
                f"The connection that the task keeps since {self.session.origin} is lost."
                + see("transactions#a-lost-connection")
            )
        return conn

    def checkin(self, conn: Connection) -> None:
        """Take it back, in whatever state."""
        self._lent = False
        conn.lock, conn.lender = self.session, None
        conn._pool = self.session.wrapper.pool


class Parallelism(EitherWay[None]):
    """What `parallelism()` returns: a context manager, synchronous and asynchronous.

    One that is entered in several tasks is one limit for all of them.
    """

    def __init__(
        self, size: int, using: str | None = None, batching: bool = False, kept: Kept | None = None
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"parallelism() takes a number of connections, not {size!r}."
                + see("parallelism#parallelismn-at-most-so-many-connections")
            )
        if size < 1:
            raise ValueError(
                "parallelism() takes a positive number of connections."
                + see("parallelism#parallelismn-at-most-so-many-connections")
            )
        self.size = size
        self.alias = using or DEFAULT_DB_ALIAS
        self.batching = batching
        self.kept = kept

    def within(self, parent: Source) -> Limit:
        """The limit for the pool of one loop, or for a part of it."""
        limit: Limit | None = parent.limits.get(self)
        if limit is None:
            limit = parent.limits[self] = Limit(self.kept or parent, self.size, self.batching)
        return limit

    def __enter__(self) -> None:
        entered = _Entered(self, _open(_current.get()))
        generators.enter(entered)
        _current.set(entered)

    def __exit__(self, *exc: object) -> None:
        entered = _current.get()
        # Else it was entered in another context, or its generator was dropped.
        if entered is not None and entered.parallelism is self:
            generators.leave(entered)
            _current.set(entered.outer)


class _Entered:
    """A `parallelism()` that a context is in.

    Attributes:
        left: the asynchronous generator that it was entered in was dropped.
    """

    left = False
    places: tuple[Place, ...] = ()

    def __init__(self, parallelism: Parallelism, outer: _Entered | None) -> None:
        self.parallelism = parallelism
        self.outer = outer

    def dropped(self, place: Place) -> None:
        """Its consumer is outside at once (generators.Entry)."""
        self.left = True
        generators.leave(self)  # who closes the generator does not find it in his context
        _current.set(_open(_current.get()))


def _open(entered: _Entered | None) -> _Entered | None:
    while entered is not None and entered.left:
        entered = entered.outer
    return entered


_current: ContextVar[_Entered | None] = ContextVar("asyncorm_parallelism", default=None)


def source(pool: Pool) -> Source:
    """Where the current context gets connections of a pool."""
    return _within(pool, _current.get())


def _within(pool: Pool, entered: _Entered | None) -> Source:
    if entered is not None and entered.left:
        entered = _open(entered)
    if entered is None:
        if pool.top is None:
            size = conf.get("PARALLELISM")
            pool.top = pool if size is None else Limit(pool, size)
        return cast("Source", pool.top)
    outer = _within(pool, entered.outer)
    return entered.parallelism.within(outer) if entered.parallelism.alias == pool.alias else outer


def parallelism(n: int, using: str | None = None) -> Parallelism:
    """Let the operations of the tasks started inside use at most `n` connections at once::

        async with asyncorm.parallelism(2):
            await asyncio.gather(*(book.asave() for book in books))

    Operations that find all of them in use wait in order of arrival, and 1 behaves like the single
    connection that Django has: strictly one after another. The connections are kept while any
    operation inside runs or waits. Inside another `parallelism()` the narrower limit holds. One
    object that several tasks enter is one limit for all of them. Without it, the setting
    `ASYNCORM["PARALLELISM"]` and the pool's size are the limits.

    Args:
        n: a positive number of connections.
        using: a database alias; the default one by default.

    Raises:
        TypeError, ValueError: n is not a positive integer.
    """
    return Parallelism(n, using)
