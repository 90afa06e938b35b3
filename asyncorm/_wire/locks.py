"""In the place of a session, as the lock of a connection that none holds."""

from __future__ import annotations

from typing import Any

import psycopg
from greenlet import getcurrent

ENDED = (
    "This cursor or connection belongs to an operation that has ended and given its server "
    "connection back."
)


class _NoLock:
    def __str__(self) -> str:  # among the holders of a pool's connections
        return "nobody, on its way to the next"

    def __enter__(self) -> None:
        raise psycopg.InterfaceError(ENDED)

    def queue_for(self, text: str) -> None:
        raise psycopg.InterfaceError(ENDED)

    def materialize(self) -> None:
        raise psycopg.InterfaceError(ENDED)

    def __exit__(self, *exc: object) -> None: ...


NO_LOCK = _NoLock()


class OwnLock:
    """The lock of a connection that no session holds: one statement at a time."""

    def __init__(self) -> None:
        self._holder: Any = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._holder is not None and self._holder is not getcurrent():
            raise psycopg.InterfaceError("Two tasks used one connection at the same time.")
        self._holder = getcurrent()
        self._depth += 1

    def queue_for(self, text: str) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
