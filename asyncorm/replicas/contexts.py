"""Takes a context's position after it has written, and gives it to another one."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

from django.db import DatabaseError, InterfaceError, connections
from django.db.transaction import TransactionManagementError

from .. import bridge, sessions
from ..contexts import EitherWay
from ..pages import see
from . import positions
from .positions import Need, Position
from .router import ReplicaRouter, routers

logger = logging.getLogger("asyncorm")


def position() -> Any:
    """What the current context has written, or has to see, for `after()` elsewhere: a short string.

        await task.adelay(book.pk, after=await asyncorm.replicas.position())

    Call it after COMMIT, which is asked for one statement on the primary; it is not, and the string
    may be empty, where nothing was written. In a coroutine it is awaited, in synchronous code not.

    Raises:
        django.db.transaction.TransactionManagementError: a transaction is open, which nobody else
            sees yet. Use on_commit().
        django.db.Error: the primary cannot be asked.
    """
    if bridge.loop_runs() and not bridge.in_native_code():
        return bridge.run(_position)
    return _position()


def _position() -> str:
    need = positions.now()
    for each in routers():
        if each.primary in need.wrote and not each.mirrors and _in_transaction(each):
            raise TransactionManagementError(
                "position() was called inside a transaction, which others do not see before its "
                "COMMIT. Call it behind the block, or in on_commit()."
                + see("replicas#tasks-websockets-other-services")
            )
    return taken(need)


def _in_transaction(router: ReplicaRouter) -> bool:
    return router.primary not in sessions.test_sessions and router.in_block()


def taken(need: Need, lenient: bool = False) -> str:
    """The position behind all that a context has written.

    Args:
        lenient: where it cannot be asked for, one that has the primary serve.

    Raises:
        django.db.Error: the primary cannot be asked.
    """
    found: dict[str, Position] = {}
    for each in routers():
        alias = each.primary
        if alias in need.wrote and not each.mirrors:
            try:
                found[alias] = need.keep(alias, *_ask(alias))
            except (DatabaseError, InterfaceError) as exc:
                if not lenient:
                    raise
                logger.warning("The position of %r cannot be asked for: %s", alias, exc)
                found[alias] = positions.UNKNOWN
        elif (kept := need.current(alias)) is not None:
            found[alias] = kept
    return positions.dump(found)


def _ask(alias: str) -> tuple[Position, float]:
    covers = monotonic()
    with connections[alias].cursor() as cursor:
        cursor.execute(positions.ASK_PRIMARY)
        standby, server, lsn, _ = cursor.fetchone()
    return (positions.UNKNOWN if standby else Position(server, lsn)), covers


class after(EitherWay[None]):
    """Run what is inside as a piece of work of its own, whose reads see what a position has.

        with asyncorm.replicas.after(position):
            ...

    `with` and `async with` are the same. What is written inside is seen inside, and around it; what
    only others write does not keep it from the replicas. Requests are such pieces of work by
    themselves, with ReplicaMiddleware.

    Args:
        position: what `position()` gave, in whichever process; None or "" for none.
    """

    def __init__(self, position: str | None = None) -> None:
        self._positions = positions.load(position)
        self._before: list[Need] = []

    def __enter__(self) -> None:
        self._before.append(positions.enter(positions.inner(self._positions)))

    def __exit__(self, *exc: object) -> None:
        positions.enter(self._before.pop())


def stats() -> dict[str, Any]:
    """For each primary how many reads it served, and its replicas; each with its reads, its lag in
    seconds at most, and why it is not read (None: it is, while it lags less than `max_lag`)."""
    found = {}
    for each in routers():
        watcher = each.watcher
        replicas = {
            alias: {"reads": replica.reads, "lag": watcher.lag(replica), "problem": replica.problem}
            for alias, replica in watcher.replicas.items()
        }
        found[each.primary] = {"reads": watcher.reads, "away": watcher.away, "replicas": replicas}
    return found
