"""What a PostgreSQL DatabaseWrapper needs for native code: the seam to Django's database wrappers.

For backends other than the one shipped, put the mixin first:

    class DatabaseWrapper(NativeBackendMixin,
    django.contrib.gis.db.backends.postgis.base.DatabaseWrapper): pass

Synchronous code gets the class itself, unchanged but for two checks. Native code gets
`native_class`, a subclass that is in Django's own pooled mode with asyncorm's pool in place of
psycopg_pool's synchronous one.

Names of Django (5.2 to 6.1) used beyond the documented backend API, and why:

- `BaseDatabaseWrapper.connect`, `.ensure_connection`, `._commit`, `.on_commit`,
  `.run_and_clear_commit_hooks`: overridden as said at each.
- `DatabaseWrapper.pool`, `._configure_connection`, `.ensure_timezone`, `.close_pool`: Django's
  pooled mode.
- `needs_rollback`, `rollback_exc`, `run_on_commit`, `execute_wrappers`, `queries_log`,
  `force_debug_cursor`: attributes of the wrapper that native code shares otherwise than synchronous
  code does; made properties.
- `._prepare_cursor`: puts Django's cursor wrapper around one that runs COPY.
- `_thread_ident`: a loop, and with it its wrappers, may run in another thread later.
- `isolation_level`: set by `get_new_connection()`, which a wrapper taking over a configured
  connection does not call.
"""

from __future__ import annotations

import _thread
import asyncio
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import psycopg
from django.conf import settings
from django.core.checks import register
from django.db import connections
from django.db.backends.postgresql.psycopg_any import IsolationLevel
from django.db.backends.utils import debug_transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import (
    DatabaseError,
    InterfaceError,
    InternalError,
    OperationalError,
)
from psycopg.errors import ReadOnlySqlTransaction
from psycopg.pq import ConnStatus, TransactionStatus

from .. import between, bridge, checks, fate, observers, pools, sessions, written
from .._pool.connection import PooledConnection
from .._sessions import engines, scopes
from .._sessions.blocks import Block
from .._sessions.session import UNKNOWN, Session
from .._transactions.on_commit import on_commit
from .._wire.cursors import InTurn
from .._wire.locks import ENDED
from .._wire.settings import reported
from .._wire.statement import text_of
from ..driver import Connection
from ..observe.found import cursors_are_patched
from ..roles import ASK
from ..session_state import leaves_state


class _OfBlock:
    """An attribute that each block has for itself: tasks share the wrapper but not the block."""

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = name
        self.plain = f"_plain_{name}"

    def __get__(self, wrapper: Any, owner: Any) -> Any:
        if wrapper is None:
            return self
        block = self._block(wrapper.session)
        return wrapper.__dict__.get(self.plain) if block is None else getattr(block, self.name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        block = self._block(wrapper.session)
        if block is None:
            wrapper.__dict__[self.plain] = value
        elif not block.ended or wrapper.session.holder is bridge.current():
            # Not by a task that outlives the block, while that is being left.
            setattr(block, self.name, value)

    @staticmethod
    def _block(session: Session | None) -> Block | None:
        return None if session is None or session.root is None else session.innermost()


class _Class:
    """`native_class` of a backend class: the subclass made from that very class."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        return _native_class(owner)  # one for each class, made once


@cache
def _native_class(cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}  # repr() shows these
    names["acts_in_cursors"] = not has_djangos_cursors(cls)
    return type(f"Native{cls.__name__}", (NativeWrapper, cls), names)


_CURSORS = ("cursor", "_cursor", "_prepare_cursor", "make_cursor", "create_cursor")
_OWNERS = ("asyncorm", "psycopg", "typing", "builtins")


@cache
def has_djangos_cursors(*classes: Any) -> bool:
    """Whether nobody has put cursors of another kind in the place of Django's.

    Args:
        classes: a wrapper's, and classes of cursors.
    """
    wrapper, *factories = classes
    owners = [cls for cls in wrapper.__mro__ if not vars(cls).keys().isdisjoint(_CURSORS)]
    owners += [cls for factory in factories for cls in factory.__mro__]
    return all(
        cls.__module__.startswith("django.db.backends.")
        or cls.__module__.partition(".")[0] in _OWNERS
        for cls in owners
    )


class NativeBackendMixin:
    """Adds the native side to a DatabaseWrapper class for PostgreSQL (see the module)."""

    native_class = _Class()
    session: Any = None  # shared with native code (callers.py)
    hooks_due = False
    connection: Any
    execute_wrappers: Any = observers.ExecuteWrappers()
    force_debug_cursor: Any = observers.ForceDebugCursor()
    needs_rollback = _OfBlock()
    rollback_exc = _OfBlock()

    @property
    def plain(self) -> bool:
        """Whether nobody's code but Django's and ours is in it."""
        cls: Any = type(self)
        if not _is_plain(cls):
            return False
        cursor = self.__dict__.get("cursor")  # Django's test cases put back what they replaced
        return cursor is None or getattr(cursor, "__func__", None) is cls.cursor

    @property
    def watched(self) -> bool:
        """Whether somebody wants to see the statements."""
        # A cursor() put on the wrapper itself: tests that forbid queries, mocks.
        return bool(
            self.execute_wrappers
            or self.queries_logged  # type: ignore[attr-defined]
            or "cursor" in self.__dict__
            or cursors_are_patched()
        )

    @property
    def queries(self) -> list[dict[str, str]]:
        """Django's; in a thread that works for a coroutine, what that ran natively comes last."""
        log = self.queries_log  # type: ignore[attr-defined]
        if len(log) == log.maxlen:  # as Django, whose warning would name this file
            warnings.warn(
                f"Limit for query logging exceeded, only the last {log.maxlen} queries will be "
                "returned.",
                stacklevel=2,
            )
        return [*log, *observers.logged(self.alias, log)]  # type: ignore[attr-defined]

    def ensure_connection(self) -> None:
        """Django's, except on a running loop's thread and beside a native transaction.

        On the thread of a running loop it does nothing: CaptureQueriesContext and assertNumQueries
            call it there, and statements are refused anyway (SynchronousOnlyOperation).
        """
        if bridge.in_native_code():  # on a synchronous connection (callers.py)
            if self.connection is None and self.session is not None:
                self.session.connect()
            super().ensure_connection()  # type: ignore[misc]
        elif not bridge.loop_runs() or os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE"):
            scopes.refuse_beside_block(self.alias)  # type: ignore[attr-defined]
            super().ensure_connection()  # type: ignore[misc]

    def create_cursor(self, name: str | None = None) -> Any:
        """Django's; one that native code in a test's transaction leaves open does no harm."""
        cursor = super().create_cursor(name)  # type: ignore[misc]
        native = self.session is not None and bridge.in_native_code()
        if name and native and isinstance(cursor, psycopg.Cursor):
            cursor.__class__ = _stream_class(type(cursor))  # type: ignore[arg-type]
        return cursor

    def connect(self) -> None:
        """Django's; what statements leave in the session is noticed from now on."""
        super().connect()  # type: ignore[misc]
        conn: Any = self.connection
        if not isinstance(conn, Connection):
            if not hasattr(conn, "began_with"):  # Django's pool gives it out as it came back
                conn.touched, conn.began_with = False, reported(conn.pgconn)
                conn.alias = self.alias  # type: ignore[attr-defined]
                conn.cursor_factory = _noticing(conn.cursor_factory)
            if self.session is not None:
                self.session.bind()

    @property
    def has_state(self) -> bool:
        """Whether what runs on another connection would miss something of this one: an open
        transaction, wrappers, what statements have set in the server session."""
        conn: Any = self.connection
        return bool(
            self.in_atomic_block  # type: ignore[attr-defined]
            or self.execute_wrappers
            or self.force_debug_cursor
            or not self.plain
            or (
                conn is not None
                and not conn.closed
                and (
                    not self.autocommit  # type: ignore[attr-defined]
                    or conn.touched
                    or reported(conn.pgconn) != conn.began_with
                )
            )
        )

    def run_and_clear_commit_hooks(self) -> None:
        """Django's, later when native code is leaving a block (_transactions/)."""
        if self.session is not None and self.session.acting is not None:
            self.hooks_due = True
            return
        self.hooks_due = False
        super().run_and_clear_commit_hooks()  # type: ignore[misc]

    def _commit(self) -> None:
        """Django's; who wants to know of writes is told."""
        try:
            super()._commit()  # type: ignore[misc]
        finally:
            if written.listeners:
                written.tell(self.alias)  # type: ignore[attr-defined]

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Django's; what a callback of native code returns is awaited in a test, too.

        In a coroutine, where this connection is not asked, it is asyncorm's.
        """
        alias: str = self.alias  # type: ignore[attr-defined]
        if engines.refuses_synchronous_code(alias) and (
            not self.in_atomic_block or scopes.block_of_coroutine(alias) is not None  # type: ignore[attr-defined]
        ):
            on_commit(func, alias, robust)
            return
        native = bridge.in_native_code() or bridge.loop_runs()
        if callable(func) and native and self.session is not None:
            func = self.session.hook(func)
        super().on_commit(func, robust)  # type: ignore[misc]

    def close(self) -> None:
        """Django's, and what the thread keeps between loops that it waits for."""
        super().close()  # type: ignore[misc]
        if self.native_class is not None:  # else this wrapper is of a loop
            between.close(self.alias)  # type: ignore[attr-defined]

    def close_if_unusable_or_obsolete(self) -> None:
        """Django's, but a request does not end the test that it belongs to.

        Django's test clients disconnect close_old_connections(), which gathered requests of
        AsyncClient undo for each other; and threads of a test have its connection here. Nor does
        it end the transaction block of the coroutine that makes it.
        """
        if self.session is None and scopes.block_of_coroutine(self.alias) is None:  # type: ignore[attr-defined]
            super().close_if_unusable_or_obsolete()  # type: ignore[misc]
            between.close(self.alias, only_old=True)  # type: ignore[attr-defined]

    def ensure_timezone(self) -> bool:
        """Django's, and new native connections (the settings TIME_ZONE or USE_TZ changed)."""
        pools.discard_pools(self.alias)  # type: ignore[attr-defined]
        return super().ensure_timezone()  # type: ignore[misc, no-any-return]

    def close_pool(self) -> None:
        """Django's, and native connections: a test database is about to be dropped or cloned."""
        pools.discard_pools(self.alias, now=True)  # type: ignore[attr-defined]
        between.close(self.alias)  # type: ignore[attr-defined]
        super().close_pool()  # type: ignore[misc]


# What a class has whose body is empty.
_EMPTY = frozenset(
    ("__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__")
)


@cache
def _is_plain(cls: Any) -> bool:
    return all(
        f"{base.__module__}.".startswith(_KNOWN) or vars(base).keys() <= _EMPTY
        for base in cls.__mro__[:-1]
    )


_KNOWN = ("django.db.backends.", "django.contrib.gis.db.backends.", "asyncorm.")


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
        if not conn.touched and leaves_state(text_of(query)):
            conn.touched = True


@cache
def _noticing(cls: Any) -> Any:
    if issubclass(cls, _Noticing):
        return cls
    return type(cls.__name__, (_Noticing, cls), {"__slots__": (), "__module__": cls.__module__})


class _Errors(fate.Errors):
    """Django's errors, and CommitUnknown; that of a refused write says if the role changed."""

    wrapper: Any

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if exc_type is None:
            return
        wrapper = self.wrapper
        if exc_type is ReadOnlySqlTransaction and wrapper.refused_write():
            wrapper.errors_occurred = True
            raise InternalError(
                f"{str(exc).strip()}\nThe server of database {wrapper.alias!r} has become a "
                "standby, or read-only: nothing was written. Its connections are replaced, so the "
                "next statement goes to the server that is the primary by then."
            ).with_traceback(traceback) from exc
        super().__exit__(exc_type, exc, traceback)


class _Pool:
    """The pool as Django's pooled mode sees it: hands out what the session checked out."""

    def __init__(self, wrapper: NativeWrapper) -> None:
        self.wrapper = wrapper
        self.fresh: Connection | None = None

    def open(self) -> None:
        """Opened on first checkout."""

    def getconn(self) -> Connection:
        """The connection that `NativeWrapper.connect()` is about to configure."""
        conn, self.fresh = self.fresh, None
        assert conn is not None
        self.wrapper.connection = conn  # assume_role composes its SQL with a cursor of the wrapper
        self.wrapper._configure_connection(conn)
        return conn

    def putconn(self, conn: Connection) -> None:
        """DatabaseWrapper.close(): one that is in a transaction is not given to others."""
        session = self.wrapper.session
        if session is not None and session.root is not None:
            conn.terminate()
        if session is not None:
            session.put(conn)


class _Shared:
    """An attribute of Django's own wrapper of the task: what is there sees native statements."""

    def __init__(self, default: Any = None) -> None:
        self.default = default

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: Any, owner: Any) -> Any:
        if wrapper.unpooled:
            return wrapper.__dict__[self.name]
        own = _known(wrapper)
        captured = observers.handed(wrapper.alias).captured
        if captured is not None and (own is None or not own.force_debug_cursor):
            own = captured
        if own is None:
            if self.default is not None:
                return self.default
            own = _own(wrapper.alias)
        value = getattr(own, self.name)
        if self.name == "queries_log":
            observers.note_log(wrapper.alias, value)
        return value

    def __set__(self, wrapper: Any, value: Any) -> None:
        if wrapper.unpooled:  # BaseDatabaseWrapper.__init__ among others
            wrapper.__dict__[self.name] = value
        elif wrapper.session is not None:
            own = wrapper.session.own = _own(wrapper.alias)
            setattr(own, self.name, value)


class _Wrappers(_Shared):
    """`execute_wrappers`: those of the task's wrapper, after any that were put on this very one."""

    def __get__(self, wrapper: Any, owner: Any) -> Any:
        mine = wrapper.__dict__.setdefault(self.name, [])  # a connection_created receiver may
        if wrapper.unpooled:
            return mine
        own = _known(wrapper)
        if own is not None:
            mine = [*mine, *own.execute_wrappers] if mine else own.execute_wrappers
        if theirs := observers.handed(wrapper.alias).wrappers:
            mine = [*mine, *theirs]
        return [*sessions.everywhere, *mine] if sessions.everywhere else mine


def _known(wrapper: Any) -> Any:
    """Django's own wrapper of the task, if there is one; looked up once for each operation."""
    session = wrapper.session
    if session is None or session.kept:  # several tasks may share it
        return _djangos(wrapper.alias)
    if session.own is UNKNOWN:
        session.own = _djangos(wrapper.alias)
    return session.own


def _djangos(alias: str) -> Any:
    own = getattr(connections._connections.local, alias, None)  # type: ignore[attr-defined]
    # One of native code may have been put there, to hand it to a thread.
    return None if isinstance(own, NativeWrapper) else own


def _own(alias: str) -> Any:
    """Django's own wrapper of the task; made if there is none, without a connection."""
    local = connections._connections.local  # type: ignore[attr-defined]
    own = _djangos(alias)
    if own is None:
        own = connections.create_connection(alias)
        if not hasattr(local, alias):
            setattr(local, alias, own)
    return own


class NativeWrapper:
    """The DatabaseWrapper of native code; used only as a base of `native_class`, before Django's.

    Attributes:
        session: whose connection it is for now.
        hooks_due: a transaction was committed and its on_commit() callbacks are still to be run.
        acts_in_cursors: the class makes its own cursors, and may keep on the wrapper what it does
            by (a tenant's schema): no operation gets a wrapper that another one has used.
    """

    hooks_due = False
    acts_in_cursors = False
    session: Session | None = None
    native_class = None
    alias: str
    settings_dict: dict[str, Any]
    connection: Any
    run_on_commit: list[Any]
    run_commit_hooks_on_set_autocommit_on: bool
    in_atomic_block: bool
    errors_occurred: bool
    closed_in_transaction: bool
    plain: bool
    _configure_connection: Callable[[Any], bool]

    queries_log = _Shared()
    force_debug_cursor: Any = _Shared(default=False)
    execute_wrappers: Any = _Wrappers()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        level = self.settings_dict["OPTIONS"].get("isolation_level", IsolationLevel.READ_COMMITTED)
        if level in set(IsolationLevel):  # get_new_connection() raises for others
            self.isolation_level = IsolationLevel(level)

    @cached_property
    def _native_pool(self) -> _Pool:
        return _Pool(self)

    @property
    def unpooled(self) -> bool:
        """Whether the program made the wrapper itself, as by `connection.copy()`: no session ever
        used it, and it has a connection of its own.
        """
        return "session" not in self.__dict__

    @property
    def pool(self) -> _Pool | None:
        """Django's pooled mode, with our pool."""
        return None if self.unpooled else self._native_pool

    @property
    def watched(self) -> bool:
        """The same, asking once for Django's own wrapper of the task."""
        if self.unpooled:
            return super().watched  # type: ignore[misc, no-any-return]
        state = self.__dict__
        if settings.DEBUG or "cursor" in state or cursors_are_patched():
            return True
        own = _known(self)
        return bool(
            state.get("execute_wrappers")
            or (own is not None and (own.execute_wrappers or own.force_debug_cursor))
            or observers.handed(self.alias) is not observers.NOTHING
        )

    def close_pool(self) -> None:
        """ensure_timezone() has new connections made by itself."""

    def ensure_connection(self) -> None:
        """Django's: not that of NativeBackendMixin, which is for synchronous wrappers.

        Nothing in a coroutine, as there.
        """
        if self.session is not None and not bridge.in_native_code() and bridge.loop_runs():
            return
        super(NativeBackendMixin, self).ensure_connection()  # type: ignore[misc]

    def close_if_unusable_or_obsolete(self) -> None:
        """Django's, as ensure_connection(), outside transaction blocks."""
        if self.session is None or self.session.root is None:
            super(NativeBackendMixin, self).close_if_unusable_or_obsolete()  # type: ignore[misc]

    def connect(self) -> None:
        """Check out a connection; Django configures it and sends its signal if it is new."""
        session = self.session
        if session is None:
            if not self.unpooled:
                raise InterfaceError(ENDED)
            self.Database = _unpooled
            super().connect()  # type: ignore[misc]
            return
        self._thread_ident = _thread.get_ident()
        try:
            conn = session.attach()
            if conn.configured:
                self.connection = conn
                conn._pool = self._native_pool  # type: ignore[assignment]
                self.autocommit = True
                self.health_check_done = True
                self.closed_in_transaction = self.errors_occurred = False
                self.close_at = None
                session.taken = None
                return
            self._native_pool.fresh = conn
            conn._pool = self._native_pool  # type: ignore[assignment]
            with conn.lock:
                super().connect()  # type: ignore[misc]
            session.pool.begin(conn)
            self.close_at = None  # the pool's max_lifetime; CONN_MAX_AGE is for synchronous code
            session.taken = None
        except RecursionError:
            self.connection = None  # the end of the operation gives it back: no depth for it here
            raise
        except BaseException:
            self.connection = None
            session.drop_taken()
            raise

    def create_cursor(self, name: str | None = None) -> Any:
        """Django's; the session keeps its connection while server-side cursors are open."""
        session = self.session
        if session is not None and self.connection.unsettled:
            if not name and self.plain:
                # What Django's would do beside that, bind() of the driver does with the connection
                # that runs the statement.
                cursor = self.connection.cursor()
                session.note(cursor)
                return cursor
            self.connection.settle()
        cursor = super().create_cursor(name)  # type: ignore[misc]
        if session is not None:
            if not name:
                session.note(cursor)
            else:
                if session.cursors is None:
                    session.cursors = WeakSet()
                session.cursors.add(cursor)
        return cursor

    def execute_wrapper(self, wrapper: Callable[..., Any]) -> Any:
        """Django's, on Django's own wrapper of the task."""
        if self.unpooled:
            return super().execute_wrapper(wrapper)  # type: ignore[misc]
        own = _own(self.alias)
        if self.session is not None:
            self.session.own = own
        return observers.entering(own, wrapper)

    @cached_property
    def wrap_database_errors(self) -> _Errors:
        """Django's, which looks at refused writes, and at what may have been written."""
        return _Errors(self)

    def refused_write(self) -> bool:
        """Whether the write that was just refused was so since the server's role has changed."""
        conns = None if self.session is None else self.session.pool.connections
        if conns is None:
            return False
        conn = self.connection
        if conn is None or conn.unsettled:  # it travelled, nobody knows on which
            return any(conns.refused_write(each, None) for each in list(conns.live))
        if conn.pooled is None:
            return False
        free = conn.pgconn.transaction_status == TransactionStatus.IDLE
        return conns.refused_write(conn.pooled, self._is_read_only if free else None)

    def _is_read_only(self) -> bool:
        try:
            with self.connection.cursor() as cursor:
                return bool(cursor.execute(ASK).fetchone()[0])
        except psycopg.Error:
            return False

    def _commit(self) -> None:
        """Django's; if the connection is lost, it says so or finds out what became of it."""
        session, conn = self.session, self.connection
        settles = None if session is None else session.fate
        if conn is None or conn.pgconn.status != ConnStatus.OK:  # nothing will be sent
            super()._commit()  # type: ignore[misc]
            return
        try:
            if settles is None:
                super()._commit()  # type: ignore[misc]
            else:
                try:
                    with debug_transaction(self, "COMMIT"), self.wrap_database_errors:
                        settles.commit(conn)
                finally:
                    if written.listeners:
                        written.tell(self.alias)
        except OperationalError as exc:
            if conn.pgconn.status == ConnStatus.OK:
                raise
            runner = bridge.current()
            unknown = fate.CommitUnknown(
                "The connection was lost during COMMIT: the transaction may or may not have "
                f"been committed. {exc}"
            )
            if settles is not None and runner is not None:
                session.detach()  # type: ignore[union-attr]
                committed = settles.settle(runner, unknown)
                if committed:
                    return
                if committed is False:
                    raise OperationalError(
                        "The connection was lost during COMMIT, and the transaction was rolled "
                        f"back, as the server says. {exc}"
                    ) from exc
            if runner is not None:
                runner.cancelled = None  # or it would be raised in place of this error
            raise unknown from exc

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Django's, with the savepoints of the caller's own block."""
        block = self.session.innermost() if self.session is not None else None
        if block is None or not callable(func):
            # Not that of NativeBackendMixin, which is for synchronous wrappers.
            super(NativeBackendMixin, self).on_commit(  # type: ignore[misc]
                _awaiting(func) if callable(func) and bridge.in_native_code() else func, robust
            )
        elif block.ended:
            raise block.outlived_error()
        else:
            self.run_on_commit.append((set(block.sids), func, robust))

    def set_autocommit(
        self, autocommit: bool, force_begin_transaction_with_broken_autocommit: bool = False
    ) -> None:
        """Django's, but the end of a block whose connection is lost does not wait for another."""
        session = self.session
        if (
            autocommit
            and (self.connection is None or self.connection.closed)
            and session is not None
            and session.acting is not None
        ):
            self.autocommit = True
            if self.run_commit_hooks_on_set_autocommit_on:  # it was committed all the same
                self.run_commit_hooks_on_set_autocommit_on = False
                self.run_and_clear_commit_hooks()
            else:
                self.run_on_commit = []
        else:
            super().set_autocommit(  # type: ignore[misc]
                autocommit, force_begin_transaction_with_broken_autocommit
            )

    def run_and_clear_commit_hooks(self) -> None:
        """Django's, later when a block is being left; what a callback returns is awaited."""
        session = self.session
        if session is not None and session.acting is not None:
            self.hooks_due = True
            return
        self.hooks_due = False
        self.run_on_commit = [
            (sids, _awaiting(func), robust) for sids, func, robust in self.run_on_commit
        ]
        super().run_and_clear_commit_hooks()  # type: ignore[misc]

    def forget(self) -> None:
        """Be as new: the session that used the wrapper is over."""
        if (
            self.in_atomic_block
            or self.run_on_commit
            or self.errors_occurred
            or self.closed_in_transaction
        ):
            self.in_atomic_block = False
            self.savepoint_ids: list[Any] = []
            self.atomic_blocks: list[Any] = []
            self.run_on_commit = []
            self.closed_in_transaction = False
            self.errors_occurred = False
        self.__dict__.pop("_plain_needs_rollback", None)
        self.__dict__.pop("_plain_rollback_exc", None)


class _Unpooled:
    """psycopg, for a wrapper without a pool, with a `connect()` that waits on the loop."""

    def connect(self, **params: Any) -> Connection:
        runner = bridge.current()
        if runner is None:
            raise InterfaceError("A native connection was used outside native code.")
        return bridge.wait_for(runner, PooledConnection.unpooled(**params))

    def __getattr__(self, name: str) -> Any:
        return getattr(psycopg, name)


_unpooled = _Unpooled()


def _awaiting(func: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> None:
        result = func()
        if inspect.isawaitable(result):
            bridge.await_(result)

    # Django logs a failed callback's __qualname__, or what it is.
    call.__qualname__ = getattr(func, "__qualname__", None) or repr(func)
    return call


@cache
def _stream_class(cls: Any) -> Any:
    return type(cls.__name__, (_Stream, cls), {"__slots__": (), "__module__": cls.__module__})


class _Stream(InTurn):
    """A server-side cursor that may be finalised by the garbage collector, outside native code."""

    __slots__ = ()

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """psycopg's; a cancelled one closes the cursor, which Django does after errors only."""
        try:
            return super().execute(*args, **kwargs)
        except asyncio.CancelledError:
            self.close()
            raise

    def transaction_ended(self) -> None:
        """The server has closed the cursor, unless it was declared WITH HOLD."""
        cursor: Any = self
        if not cursor.withhold:
            cursor._closed = True

    def close(self) -> None:
        """psycopg's; without native code around, the session closes it later."""
        cursor: Any = self
        session = cursor._conn.lock
        if not isinstance(session, Session):
            cursor._closed = True  # with the session that it belonged to
        elif session.serves(runner := bridge.current()):
            try:
                # A cancelled task does not wait for others: the transaction's end closes it, too.
                if runner is None:
                    super().close()  # type: ignore[misc]
                elif runner.cleaning_until is None or not session.busy:
                    with session.wrapper.wrap_database_errors, bridge.shield(runner):
                        super().close()  # type: ignore[misc]
            except TransactionManagementError:
                pass  # the transaction has ended or is aborted, and the cursor goes with it
            except DatabaseError:
                if runner is None or runner.cleaning_until is None:  # else the connection is closed
                    raise
            finally:
                cursor._closed = True  # or it would keep the connection
        elif not cursor._closed:
            cursor._closed = True
            session.abandon(cursor.name)


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
        if getattr(wrapper.connection, "unsettled", False):  # not psycopg's own, in a test
            wrapper.connection.settle()
        cursor = wrapper.create_cursor()
    with wrapper._prepare_cursor(_CopyCursor(cursor, transfer)) as copying:
        return copying.execute(statement)  # type: ignore[no-any-return]


register(checks.check_installed, "asyncorm")  # here, where the app may not be
