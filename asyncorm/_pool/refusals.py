"""Tasks that get no connection: the errors, and what they say."""

from __future__ import annotations

import asyncio
from asyncio import Task
from collections import Counter
from collections.abc import Callable, Container, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg

from ..growth import is_full
from ..pages import see
from ..tasks import current_and_represented

if TYPE_CHECKING:
    from ..pools import Pool


_FULL = (
    "The server refuses more connections: give it a larger max_connections, or the pools of all "
    "processes a smaller max_size."
)
_AWAY = "Was waited for, since this passes by itself: is the server started, or promoted?"


def holders(sessions: Iterable[Any]) -> str:
    """Who holds connections, for messages."""
    return "; ".join(f"{n} x {text}" for text, n in Counter(map(str, sessions)).most_common(5))


def deadlocked(sessions: Iterable[Any], size: int, asking: Container[Any]) -> bool:
    """Whether nobody who holds a connection can give it back before getting another.

    Args:
        sessions: that hold connections.
        size: how many connections there are to hold.
        asking: tasks that wait for a connection.
    """
    held = 0
    for session in sessions:
        if getattr(session, "task", None) not in asking or getattr(session, "closing", False):
            return False
        held += 1
    return held >= size


Suspicion: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def _suspicion(error: Callable[[], PoolDeadlock | None]) -> Suspicion:
    """What raises PoolDeadlock if `error()` still gives one after a turn of the loop.

    What is about to be closed had its chance to give its connection back then.
    """

    async def look_again() -> None:
        await asyncio.sleep(0)
        if (still := error()) is not None:
            raise still

    return look_again


class Asking:
    """The current task waits inside for a connection, or for its statement to be sent on one.

    Entering gives what to await first if who has the connections seems to wait for one, too; it
    raises PoolDeadlock.

    Args:
        asking: the tasks that do.
        error: gives what to raise, if it still does after a turn of the loop.
    """

    __slots__ = ("_asking", "_error", "_tasks")

    def __init__(
        self, asking: set[Task[Any] | None], error: Callable[[], PoolDeadlock | None]
    ) -> None:
        self._asking = asking
        self._error = error

    def __enter__(self) -> Suspicion | None:
        self._tasks = current_and_represented()
        self._asking.update(self._tasks)
        try:
            return None if self._error() is None else _suspicion(self._error)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        self._asking.difference_update(self._tasks)


class PoolRefusal(psycopg.OperationalError):
    """A task may not wait for a connection: the message says why."""


class Unreachable(psycopg.OperationalError):
    """There is no connection, and none can be made: the message says why."""


class Retired(psycopg.OperationalError):
    """The pool was replaced, as settings changed, while a task waited for a connection of it."""


class PoolDeadlock(PoolRefusal):
    """Every connection is held by a task that waits for another one."""


def deadlock_of(pool: Pool) -> PoolDeadlock | None:
    """The error of a task that asks for a connection while all who have one ask, too."""
    if not deadlocked(pool.sessions(), pool.size, pool.asking):
        return None
    return PoolDeadlock(
        f"Deadlock on the native pool of database {pool.alias!r}: each of its {pool.size} "
        f"connections is held by a task that waits for another one: "
        f"{holders(pool.sessions())}. Raise OPTIONS['pool']['max_size'], or do not use a "
        "second connection while holding one." + see("debugging#it-hangs")
    )


def full_of(pool: Pool, most: int) -> PoolRefusal:
    """The error of a task that may not even wait."""
    return PoolRefusal(
        f"The native pool of database {pool.alias!r} is exhausted: all {pool.size} "
        f"connections are in use and {pool.waiting} tasks wait already, as many as "
        "OPTIONS['pool']['max_waiting'] allows." + see("deployment#pools")
    )


def exhausted(pool: Pool, conns: Any) -> psycopg.OperationalError:
    """The error of a task that has waited as long as it may."""
    seconds = pool.options["timeout"]
    reason = conns.connect_error
    if not conns.live:
        if reason is None:
            return Unreachable(
                f"Cannot connect to database {pool.alias!r} ({pool.description}): no answer "
                f"within {seconds:g} s. Check that the "
                f"server can be reached; OPTIONS['connect_timeout'] makes it fail sooner."
                + see("deployment#when-things-fail")
            )
        return Unreachable(
            f"Cannot connect to database {pool.alias!r} ({pool.description}) for {seconds:g} "
            f"s: {str(reason).strip()}\n{_FULL if is_full(reason) else _AWAY}"
        )
    advice = (
        f"Raise OPTIONS['pool']['max_size'] in DATABASES[{pool.alias!r}], or hold connections "
        "for less time." + see("deployment#pools")
    )
    size = pool.size
    if is_full(reason):
        size, advice = len(conns.live), _FULL
    return psycopg.OperationalError(
        f"The native pool of database {pool.alias!r} is exhausted: all {size} "
        f"connections were in use for {seconds:g} s and {pool.waiting} more tasks "
        f"wait. Held by: {holders(pool.sessions())}. {advice}"
    )
