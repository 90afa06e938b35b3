"""Cursors: whose they are, what their statements leave behind, those that stay open, and COPY.

Who replaces methods of Django's cursors is to see each statement, so that all are executed there;
but for those that are known and told otherwise (Sentry), which see them at production's speed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any

import django
import psycopg
from django.db.backends import utils
from django.db.backends.postgresql.base import Cursor, DatabaseWrapper
from django.db.transaction import TransactionManagementError
from django.db.utils import DatabaseError

from .. import bridge, written
from .._sessions.session import Session
from .._wire.cursors import InTurn
from .._wire.statement import text_of
from ..driver import Connection
from ..session_state import leaves_state

# What of a wrapper makes cursors.
CURSORS = ("cursor", "_cursor", "_prepare_cursor", "make_cursor", "create_cursor")
_OWNERS = ("asyncorm", "psycopg", "typing", "builtins")


@cache
def has_djangos_cursors(*classes: Any) -> bool:
    """Whether nobody has put cursors of another kind in the place of Django's.

    Args:
        classes: a wrapper's, and classes of cursors.
    """
    wrapper, *factories = classes
    owners = [cls for cls in wrapper.__mro__ if not vars(cls).keys().isdisjoint(CURSORS)]
    owners += [cls for factory in factories for cls in factory.__mro__]
    return all(
        cls.__module__.startswith("django.db.backends.")
        or cls.__module__.partition(".")[0] in _OWNERS
        for cls in owners
    )


_ORIGINAL = os.path.dirname(django.__file__), os.path.dirname(psycopg.__file__)
_of_outer = attrgetter("__init__", "execute", "executemany", "_execute", "_execute_with_wrappers")
_of_wrapper = attrgetter(*CURSORS, "ensure_connection")
_of_inner = attrgetter("execute", "executemany", "fetchmany")
_functions: tuple[Any, ...] = ()
_patched = False


def cursors_are_patched() -> bool:
    """Whether somebody whom nobody else tells of statements has put functions in the place of those
    of Django's cursors, or of what connects for them.

    Tools that record queries do, and tests, pytest-django's among them: they are to see each of
    them.
    """
    global _functions, _patched
    # Another class may be there.
    now = (*_of_outer(utils.CursorWrapper), *_of_wrapper(DatabaseWrapper), *_of_inner(Cursor))
    if now != _functions:
        known = list(map(_is_known, now))
        _patched = not all(known) or not _follow_sentry("sentry" in known)
        _functions = now
    return _patched


def _is_known(function: object) -> str | None:
    """Whose function it is, "django" or "sentry" around Django's; None if that is not known."""
    owner = "django"
    while type(function) is FunctionType:
        name = function.__code__.co_filename
        if name.startswith(_ORIGINAL):
            return owner
        package = sys.modules.get("sentry_sdk")
        if package is None or not name.startswith(os.path.dirname(str(package.__file__))):
            return None
        owner = "sentry"
        function = getattr(function, "__wrapped__", None)
    return None


def _follow_sentry(there: bool) -> bool:
    """Have Sentry told of statements without a cursor, or no more; False if that cannot be done."""
    if not there and "asyncorm.observe.sentry" not in sys.modules:
        return True
    try:
        sentry: Any = import_module("asyncorm.observe.sentry")
    except ImportError:  # another version of it
        return False
    if there:
        return bool(sentry.follow())
    sentry.unfollow()
    return True


class _Noticing:
    """A cursor class's part that notices what its statements leave in the server session."""

    __slots__ = ()

    def execute(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        self._notice(query)
        try:
            return super().execute(query, *args, **kwargs)  # type: ignore[misc]
        finally:
            if written.listeners:
                written.tell(self._conn.alias, text_of(query))

    def executemany(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        self._notice(query)
        try:
            return super().executemany(query, *args, **kwargs)  # type: ignore[misc]
        finally:
            if written.listeners:
                written.tell(self._conn.alias, text_of(query))

    def stream(self: Any, query: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self._notice(query)
        try:
            yield from super().stream(query, *args, **kwargs)  # type: ignore[misc]
        finally:
            if written.listeners:
                written.tell(self._conn.alias, text_of(query))

    @contextmanager
    def copy(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            with super().copy(statement, *args, **kwargs) as copy:  # type: ignore[misc]
                yield copy
        finally:
            if written.listeners:
                written.tell(self._conn.alias, text_of(statement))

    def _notice(self: Any, query: Any) -> None:
        conn = self._conn
        if not conn.session_dirty and leaves_state(text_of(query)):
            conn.session_dirty = True


@cache
def noticing(cls: type) -> Any:
    if issubclass(cls, _Noticing):
        return cls
    return type(cls.__name__, (_Noticing, cls), {"__slots__": (), "__module__": cls.__module__})


@cache
def stream_class(cls: type, native: bool = True) -> Any:
    base = _Stream if native else _Finalised
    return type(cls.__name__, (base, cls), {"__slots__": (), "__module__": cls.__module__})


class _Finalised:
    """A server-side cursor that may be finalised by the garbage collector, outside native code."""

    __slots__ = ()

    def close(self) -> None:
        """psycopg's; without native code around, the session closes it later."""
        cursor: Any = self
        session = cursor._conn.lock
        if not isinstance(session, Session):
            if not isinstance(cursor._conn, Connection):  # a caller's, which is not lent any more
                super().close()  # type: ignore[misc]
            cursor._closed = True  # with the session that it belonged to
        elif session.serves(runner := bridge.current()):
            try:
                # A cancelled task does not wait for others: the transaction's end closes it, too.
                if runner is None:
                    super().close()  # type: ignore[misc]
                elif runner.cleaning_until is None or not session.busy:
                    with session.wrapper.wrap_database_errors, bridge.shield(runner):
                        super().close()  # type: ignore[misc]
                elif session.synchronous and not cursor._closed:  # its transaction goes on
                    session.abandon(cursor.name)
            except TransactionManagementError:
                pass  # the transaction has ended or is aborted, and the cursor goes with it
            except DatabaseError:
                if runner is None or runner.cleaning_until is None:  # else the connection is closed
                    raise
            finally:
                cursor._closed = True  # or it would keep the connection
        elif not cursor._closed:
            cursor._closed = True
            (getattr(cursor._conn, "lender", None) or session).abandon(cursor.name)


class _Stream(_Finalised, InTurn):
    """One of native code's."""

    __slots__ = ()

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """psycopg's; a cancelled one closes the cursor, which Django does after errors only."""
        try:
            return super().execute(*args, **kwargs)
        except asyncio.CancelledError:
            self.close()
            raise

    def __del__(self) -> None:
        """Where an error had the frame that had it, the operation is over, which waits for that."""
        cursor: Any = self
        try:
            super().__del__()  # type: ignore[misc]
        finally:
            session = cursor._conn.lock
            if isinstance(session, Session) and not session.serves(bridge.current()):
                self.close()

    def transaction_ended(self) -> None:
        """The server has closed the cursor, unless it was declared WITH HOLD."""
        cursor: Any = self
        if not cursor.withhold:
            cursor._closed = True


class _CopyCursor:
    """A cursor that runs a COPY where others run a statement."""

    def __init__(self, cursor: Any, transfer: Callable[[Any, str], int]) -> None:
        self.cursor = cursor
        self.transfer = transfer
        self._query: Any = None  # where Django's query log looks

    def execute(self, statement: str) -> int:
        self._query = SimpleNamespace(query=statement.encode())
        # Not only around the statement: nothing else may use the connection until COPY has ended.
        with self.cursor.connection.lock:
            return self.transfer(self.cursor, statement)

    def close(self) -> None:
        self.cursor.close()


def copy(wrapper: Any, statement: str, transfer: Callable[[Any, str], int]) -> int:
    """Run a COPY statement as Django runs any: `execute_wrapper`s and the query log see it.

    Args:
        transfer: called with psycopg's cursor and the statement; returns the number of rows.
    """
    wrapper.ensure_connection()
    with wrapper.wrap_database_errors:
        if getattr(wrapper.connection, "deferred", False):  # not psycopg's own, in a test
            wrapper.connection.materialize()
        cursor = wrapper.create_cursor()
    with wrapper._prepare_cursor(_CopyCursor(cursor, transfer)) as copying:
        return copying.execute(statement)  # type: ignore[no-any-return]
