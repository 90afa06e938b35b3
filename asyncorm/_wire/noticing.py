"""Notices what is left in a server session, and in psycopg's connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from .settings import kept, reported

if TYPE_CHECKING:
    from .._pool.connection import PooledConnection

_OK = pq.ConnStatus.OK


class NoticingConnection(psycopg.Connection[Any]):
    """A connection that knows whether its session is as it was at first.

    Attributes:
        touched: a statement may have set something in the session, as far as its text tells.
        called: functions and operators that may have left something in the session.
        held: cursors WITH HOLD that have not been closed.
        configured: whether Django has set time zone, role and so on.
        pooled: the pool's connection underneath, None when there is none.
        watched: what the next statement leaves is noted by who executes it.
        told: what `reported()` gives, while it stays so; None: to be asked for.
    """

    pooled: PooledConnection | None
    configured = False
    touched = False
    called: frozenset[str] = frozenset()
    watched = False
    told: tuple[bytes | None, ...] | None = None
    held: set[str]
    _start: tuple[Any, ...] | None = None

    def begin(self) -> None:
        """Take the session as it is now for that of a new connection: Django has configured it."""
        self.configured = True
        self.touched = False
        self.called = frozenset()
        self._start = self._settings()

    def _settings(self) -> tuple[Any, ...]:
        """What is set in the session, of what can be seen without asking the server."""
        handlers = (*self._notice_handlers, *self._notify_handlers)
        standby = self.pgconn.parameter_status(b"in_hot_standby")
        told = reported(self.pgconn) if self.told is None else self.told
        return told, standby, kept(self), handlers

    @property
    def session_dirty(self) -> bool:
        """Whether something is left in the session that nobody else may see: by a statement, as far
        as its text tells or the server told, or in psycopg's connection; by a function, perhaps."""
        if self.touched or self.called or self.held:
            return True
        if self._start is None or self.pgconn.status != _OK:
            return False
        return self._settings() != self._start

    @session_dirty.setter
    def session_dirty(self, value: bool) -> None:
        self.touched = value

    def note(self, traces: bool | frozenset[str]) -> None:
        """A statement that leaves something is about to be sent."""
        if traces is True:
            self.touched = True
        elif traces:
            home = None if self.pooled is None else self.pooled.home
            self.called |= traces if home is None else traces - home.harmless

    def declaring(self, name: str, withhold: bool, traces: bool | frozenset[str]) -> None:
        """A server-side cursor is about to be declared."""
        self.note(traces)
        if withhold:
            self.held.add(name)

    def started(self) -> Any:
        """A generator that begins a transaction where one is due, for a statement that is noted."""
        self.watched = True
        return self._start_query()

    def _start_query(self) -> Any:
        watched, self.watched = self.watched, False
        if not watched:  # by a cursor that somebody has made himself: of what, nobody knows
            self.touched = True
        yield from super()._start_query()
