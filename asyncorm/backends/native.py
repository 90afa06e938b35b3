"""The wrapper of native code: Django's, in its own pooled mode, with asyncorm's pool."""

from __future__ import annotations

import _thread
import inspect
import threading
from asyncio import _get_running_loop, sleep
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from threading import get_ident
from time import monotonic
from typing import Any
from weakref import WeakSet

import psycopg
from django.conf import settings
from django.db import connections
from django.db.backends.postgresql.psycopg_any import IsolationLevel
from django.db.backends.utils import debug_transaction
from django.db.utils import InterfaceError, InternalError, OperationalError
from psycopg.errors import ReadOnlySqlTransaction
from psycopg.pq import ConnStatus, TransactionStatus

from .. import bridge, fate, observers, sessions, written
from .._pool.connection import PooledConnection
from .._sessions.session import UNKNOWN, Session
from .._wire.locks import ENDED
from ..driver import Connection
from ..growth import AGAIN
from ..pages import see
from ..roles import ASK
from .cursors import cursors_are_patched
from .synchronous import SynchronousWrapper

_settings = vars(settings)


class _Errors(fate.Errors):
    """Django's errors, and CommitUnknown; that of a refused write says if the role changed."""

    def __exit__(self, exc_type: Any, exc: BaseException | None, traceback: Any) -> None:
        if exc_type is None:
            return
        wrapper = self.wrapper
        if exc_type is ReadOnlySqlTransaction and wrapper.refused_write():
            wrapper.errors_occurred = True
            raise InternalError(
                f"{str(exc).strip()}\nThe server of database {wrapper.alias!r} has become a "
                "standby, or read-only: nothing was written. Its connections are replaced, so the "
                "next statement goes to the server that is the primary by then."
                + see("distributed#several-hosts-patroni-and-the-like")
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

    def __set_name__(self, owner: object, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: NativeWrapper, owner: object) -> Any:
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

    def __set__(self, wrapper: Any, value: object) -> None:
        if wrapper.unpooled:  # BaseDatabaseWrapper.__init__ among others
            wrapper.__dict__[self.name] = value
        elif wrapper.session is not None:
            own = wrapper.session.django_wrapper = _own(wrapper.alias)
            setattr(own, self.name, value)


class _Wrappers(_Shared):
    """`execute_wrappers`: those of the task's wrapper, after any that were put on this very one."""

    def __get__(self, wrapper: NativeWrapper, owner: object) -> Any:
        mine = wrapper.__dict__.setdefault(self.name, [])  # a connection_created receiver may
        if wrapper.unpooled:
            return mine
        own = _known(wrapper)
        if own is not None:
            mine = [*mine, *own.execute_wrappers] if mine else own.execute_wrappers
        if theirs := observers.handed(wrapper.alias).wrappers:
            mine = [*mine, *theirs]
        return [*sessions.everywhere, *mine] if sessions.everywhere else mine


def _known(wrapper: SynchronousWrapper) -> Any:
    """Django's own wrapper of the task, if there is one; looked up once for each operation."""
    session = wrapper.session
    if session is None or session.kept:  # several tasks may share it
        return _djangos(wrapper.alias)
    if session.django_wrapper is UNKNOWN:
        session.django_wrapper = _djangos(wrapper.alias)
    return session.django_wrapper


def _djangos(alias: str) -> Any:
    local = connections._connections.local  # type: ignore[attr-defined]
    try:
        if _here.local is local and _get_running_loop() is not None:
            storage = _here.storages.get(None)
            mine = storage is not None and storage.thread_id == get_ident()
            own = storage.data.get(alias) if mine else None
        else:
            found = local._get_storage()
            own = found._storage().data.get(alias)
            storages = getattr(found, "_data", None)
            if type(storages) is ContextVar:
                _here.local, _here.storages = local, storages
    except AttributeError:  # in a synchronous thread, and in other versions of asgiref
        own = getattr(local, alias, None)
    # One of native code may have been put there, to hand it to a thread.
    return None if isinstance(own, NativeWrapper) else own


class _Here(threading.local):
    """Where asgiref keeps what a Local has on this thread's event loops, looked up once."""

    local: Any = None
    storages: Any = None


_here = _Here()


def _own(alias: str) -> Any:
    """Django's own wrapper of the task; made if there is none, without a connection."""
    local = connections._connections.local  # type: ignore[attr-defined]
    own = _djangos(alias)
    if own is None:
        own = connections.create_connection(alias)
        if not hasattr(local, alias):
            setattr(local, alias, own)
    return own


class NativeWrapper(SynchronousWrapper):
    """The DatabaseWrapper of native code; used only as a base of `native_class`, before Django's.

    Attributes:
        session: whose connection it is for now.
        hooks_due: a transaction was committed and its on_commit() callbacks are still to be run.
        acts_in_cursors: the class makes its own cursors, and may keep on the wrapper what it does
            by (a tenant's schema): no operation gets a wrapper that another one has used.
    """

    acts_in_cursors = False
    session: Session | None = None
    native_class = None
    run_on_commit: list[Any]

    queries_log = _Shared()
    force_debug_cursor: Any = _Shared(default=False)
    execute_wrappers: Any = _Wrappers()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Set by get_new_connection(), which one that takes over a configured connection does not
        # call.
        level = self.settings_dict["OPTIONS"].get("isolation_level", IsolationLevel.READ_COMMITTED)
        if level in set(IsolationLevel):  # get_new_connection() raises for others
            self.isolation_level = IsolationLevel(level)

    @cached_property
    def native_pool(self) -> _Pool:
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
        return None if self.unpooled else self.native_pool

    @property
    def watched(self) -> bool:
        """The same, asking once for Django's own wrapper of the task."""
        if self.unpooled:
            return super().watched
        state = self.__dict__
        debug = _settings.get("DEBUG")  # what `settings` has found once
        if debug is None:
            debug = settings.DEBUG
        if debug or "cursor" in state or cursors_are_patched():
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
        """Django's: not that of SynchronousWrapper, which is for synchronous wrappers.

        Nothing in a coroutine, as there.
        """
        if self.session is not None and not bridge.in_native_code() and bridge.loop_runs():
            return
        super(SynchronousWrapper, self).ensure_connection()

    def close_if_unusable_or_obsolete(self) -> None:
        """Django's, as ensure_connection(), outside transaction blocks."""
        if self.session is None or self.session.root is None:
            super(SynchronousWrapper, self).close_if_unusable_or_obsolete()

    def connect(self) -> None:
        """Check out a connection; Django configures it and sends its signal if it is new."""
        session = self.session
        if session is None:
            if not self.unpooled:
                raise InterfaceError(ENDED)
            self.Database = _unpooled  # type: ignore[assignment]
            super().connect()
            return
        self._thread_ident = _thread.get_ident()  # the loop may run in another thread by now
        since = 0.0
        while (error := self._connect(session)) is not None:
            since = since or monotonic()
            if not session.pool.bears(error, since):
                raise error
            bridge.wait_for(bridge.running(), sleep(AGAIN))

    def _connect(self, session: Session) -> psycopg.OperationalError | None:
        """What it says if a new connection was made and lost again at once."""
        try:
            conn = session.attach()
            if conn.configured:
                session.use(conn)
                return None
            self.native_pool.fresh = conn
            conn._pool = self.native_pool  # type: ignore[assignment]
            try:
                with conn.lock:
                    super().connect()
            except psycopg.OperationalError as exc:
                if not conn.closed:
                    raise
                self.connection = None
                session.drop_taken()
                return exc
            session.pool.begin(conn)
            self.close_at = None  # the pool's max_lifetime; CONN_MAX_AGE is for synchronous code
            session.taken = None
            return None
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
        if session is not None and self.connection.deferred:
            if not name and self.plain:
                # What Django's would do beside that, bind() of the driver does with the connection
                # that runs the statement.
                cursor = self.connection.cursor()
                session.note(cursor)
                return cursor
            self.connection.materialize()
        cursor = super().create_cursor(name)
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
            return super().execute_wrapper(wrapper)
        own = _own(self.alias)
        if self.session is not None:
            self.session.django_wrapper = own
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
        if conn is None or conn.deferred:  # it travelled, nobody knows on which
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
        if conn is None or not conn.may_commit:  # nothing will be sent
            super()._commit()
            return
        try:
            if settles is None:
                super()._commit()
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
                        f"back, as the server says. {exc}" + see("transactions#a-lost-connection")
                    ) from exc
            if runner is not None:
                runner.cancelled = None  # or it would be raised in place of this error
            raise unknown from exc

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Django's, with the savepoints of the caller's own block."""
        block = self.session.innermost() if self.session is not None else None
        if block is not None and block.ended:
            raise block.outlived_error()
        if block is None or not callable(func) or not self.in_atomic_block:
            # Not that of SynchronousWrapper, which is for synchronous wrappers.
            super(SynchronousWrapper, self).on_commit(
                _awaiting(func) if callable(func) and bridge.in_native_code() else func, robust
            )
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
            super().set_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)

    def run_and_clear_commit_hooks(self) -> None:
        """Django's, later when a block is being left; what a callback returns is awaited."""
        if self.session is None or self.session.acting is None:
            self.run_on_commit = [
                (sids, _awaiting(func), robust) for sids, func, robust in self.run_on_commit
            ]
        super().run_and_clear_commit_hooks()

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
            raise InterfaceError(
                "A native connection was used outside native code." + see("debugging#it-raises")
            )
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
