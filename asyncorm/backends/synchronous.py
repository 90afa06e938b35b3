"""The wrapper that synchronous code has: Django's, which minds what native code shares with it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from inspect import getattr_static, isfunction
from types import MethodType
from typing import TYPE_CHECKING, Any

import psycopg
from django.core.exceptions import SynchronousOnlyOperation
from django.db.transaction import mark_for_rollback_on_error
from django.utils.functional import cached_property

from .. import between, bridge, observers, pools, written
from .._pool import options
from .._sessions import engines, scopes
from .._sessions.blocks import Block
from .._sessions.session import Session
from .._transactions.on_commit import on_commit
from .._wire.settings import reported
from ..driver import Connection
from .cursors import CURSORS, cursors_are_patched, noticing, stream_class

if TYPE_CHECKING:  # it is mixed into that
    from django.db.backends.postgresql.base import DatabaseWrapper as _Django
else:
    _Django = object


_MARKING = mark_for_rollback_on_error.__wrapped__.__code__  # type: ignore[attr-defined]


def _is_refused() -> bool:
    """Whether what fails was refused in a coroutine: the transaction knows nothing of it."""
    return bridge.current() is None and isinstance(sys.exception(), SynchronousOnlyOperation)


class _OfBlock:
    """An attribute that each block has for itself: tasks share the wrapper but not the block."""

    def __init__(self, default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: object, name: str) -> None:
        self.name = name
        self.plain = f"_plain_{name}"

    def __get__(self, wrapper: Any, owner: Any) -> Any:
        if wrapper is None:
            return self
        block = self._block(wrapper.session)
        if block is not None:
            return getattr(block, self.name)
        return wrapper.__dict__.get(self.plain, self.default)

    def __set__(self, wrapper: Any, value: object) -> None:
        block = self._block(wrapper.session)
        if block is None:
            wrapper.__dict__[self.plain] = value
        elif value and sys._getframe(1).f_code is _MARKING and _is_refused():
            return
        elif not block.ended or wrapper.session.holder is bridge.current():
            # Not by a task that outlives the block, while that is being left.
            setattr(block, self.name, value)

    @staticmethod
    def _block(session: Session | None) -> Block | None:
        return None if session is None or session.root is None else session.innermost()


class SynchronousWrapper(_Django):
    """What a DatabaseWrapper does for synchronous code; only as the base of NativeBackendMixin."""

    native_class: Any = None
    session: Any = None  # shared with native code (callers.py)
    hooks_due = False
    _connection_pools: dict[str, Any]
    _configure_connection: Callable[[Any], bool]
    opened_in: int  # the thread that has connected it
    execute_wrappers: Any = observers.ExecuteWrappers()
    force_debug_cursor: Any = observers.ForceDebugCursor()
    needs_rollback = _OfBlock(default=False)
    rollback_exc = _OfBlock(default=None)

    @property
    def plain(self) -> bool:
        """Whether nobody's code but Django's and ours is in it."""
        cls: Any = type(self)
        if not _is_plain(cls):
            return False
        return "cursor" not in self.__dict__ or _is_of_class(self, {"cursor"})

    @property
    def watched(self) -> bool:
        """Whether somebody wants to see the statements."""
        # A cursor() put on the wrapper itself: tests that forbid queries, mocks.
        return bool(
            self.execute_wrappers
            or self.queries_logged
            or "cursor" in self.__dict__
            or cursors_are_patched()
        )

    @property
    def is_altered(self) -> bool:
        """Whether statements may depend on what was put on the wrapper itself, on its `ops` or
        `features`."""
        state = self.__dict__
        if not state.keys().isdisjoint(_OF_CLASS) and not _is_of_class(self, _OF_CLASS):
            return True
        now = state["ops"].__dict__, state["features"].__dict__
        if now == state.get("_as_made"):
            return False
        if not (_is_as_made(self.ops, self) and _is_as_made(self.features, self)):
            return True
        state["_as_made"] = now[0].copy(), now[1].copy()
        return False

    @property
    def queries(self) -> list[dict[str, str]]:
        """Django's; what native code and the thread of the same task have logged comes last."""
        log = self.queries_log
        if len(log) == log.maxlen:  # as Django, whose warning would name this file
            warnings.warn(
                f"Limit for query logging exceeded, only the last {log.maxlen} queries will be "
                "returned.",
                stacklevel=2,
            )
        return [*log, *observers.logged(self.alias, log)]

    def ensure_connection(self) -> None:
        """Django's, except on a running loop's thread and beside a native transaction.

        On the thread of a running loop it does nothing: CaptureQueriesContext and assertNumQueries
            call it there, and statements are refused anyway (SynchronousOnlyOperation).
        """
        if bridge.in_native_code():  # on a synchronous connection (callers.py)
            if self.connection is None and self.session is not None:
                self.session.connect()
            super().ensure_connection()
        elif not bridge.loop_runs() or os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE"):
            scopes.refuse_beside_block(self.alias)
            super().ensure_connection()
            observers.note_use(self)

    def is_usable(self) -> bool:
        """Django's; a broken block, which refuses statements, has the server asked all the same."""
        block = self._broken()
        if block is None:
            return super().is_usable()
        runner = bridge.running()
        block.acquire()
        try:
            with self.session.acting_for(runner, block):
                return super().is_usable()
        finally:
            block.lock.release()

    def _broken(self) -> Block | None:
        if self.session is None or not bridge.in_native_code() or self.session.root is None:
            return None
        block: Block | None = self.session.innermost()
        acting = self.session.holder is bridge.current()
        return block if block is not None and block.needs_rollback and not acting else None

    def create_cursor(self, name: str | None = None) -> Any:
        """Django's; on a connection that is shared with native code, one that the event loop closes
        waits for nobody there."""
        cursor = super().create_cursor(name)
        if name and self.session is not None and isinstance(cursor, psycopg.Cursor):
            cursor.__class__ = stream_class(type(cursor), bridge.in_native_code())  # type: ignore[arg-type]
        return cursor

    @property
    def pool(self) -> Any:
        """Django's; `check` and `configure`, which it gives the pool itself, may be in OPTIONS."""
        option = self.settings_dict["OPTIONS"].get("pool")
        if option and option is not True and self.alias not in self._connection_pools:
            return self._pool_of(option)
        return super().pool

    def _pool_of(self, option: dict[str, Any]) -> Any:
        settings_dict = self.settings_dict
        options.validate(self.alias, settings_dict)
        others = {key: value for key, value in option.items() if key not in ("check", "configure")}
        self.settings_dict = {
            **settings_dict,
            "OPTIONS": {**settings_dict["OPTIONS"], "pool": others or True},
        }
        try:
            pool: Any = super().pool
        finally:
            self.settings_dict = settings_dict
        if pool is not None:
            if (check := option.get("check")) is not None:
                pool._check = check
            if (configure := option.get("configure")) is not None:
                djangos = self._configure_connection
                pool._configure = lambda conn: (djangos(conn), configure(conn))
        return pool

    def connect(self) -> None:
        """Django's; what statements leave in the session is noticed from now on."""
        options.validate(self.alias, self.settings_dict)
        super().connect()
        conn: Any = self.connection
        if not isinstance(conn, Connection):
            between.note(self)
            if not hasattr(conn, "began_with"):  # Django's pool gives it out as it came back
                conn.session_dirty, conn.began_with = False, reported(conn.pgconn)
                conn.alias = self.alias
                conn.cursor_factory = noticing(conn.cursor_factory)
            if self.session is not None:
                self.session.bind()

    @property
    def has_connection(self) -> bool:
        """Whether it is connected."""
        return self.connection is not None

    @property
    def has_state(self) -> bool:
        """Whether what runs on another connection would miss something of this one: an open
        transaction, wrappers, what statements have set in the server session."""
        return bool(
            self.execute_wrappers
            or self.force_debug_cursor
            or not self.plain
            or self.is_altered
            or self.has_server_state
        )

    @property
    def has_server_state(self) -> bool:
        """The same, of what is on the server: an open transaction, the session's settings."""
        conn: Any = self.connection
        return bool(
            self.in_atomic_block
            or (
                conn is not None
                and not conn.closed
                and (not self.autocommit or not _is_as_begun(conn))
            )
        )

    def run_and_clear_commit_hooks(self) -> None:
        """Django's, later when native code is leaving a block (_transactions/)."""
        if self.session is not None and self.session.acting is not None:
            self.hooks_due = bool(self.run_on_commit)
            return
        self.hooks_due = False
        super().run_and_clear_commit_hooks()

    def _commit(self) -> None:
        """Django's; who wants to know of writes is told."""
        try:
            super()._commit()  # type: ignore[misc]
        finally:
            if written.listeners:
                written.tell(self.alias)

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Django's; what a callback of native code returns is awaited in a test, too.

        In a coroutine, where this connection is not asked, it is asyncorm's.
        """
        alias: str = self.alias
        if engines.refuses_synchronous_code(alias) and (
            not self.in_atomic_block or scopes.block_of_coroutine(alias) is not None
        ):
            on_commit(func, alias, robust)
            return
        native = bridge.in_native_code() or bridge.loop_runs()
        if callable(func) and native and self.session is not None:
            func = self.session.hook(func)
        super().on_commit(func, robust)

    def close(self) -> None:
        """Django's, and what the thread keeps between loops that it waits for."""
        super().close()
        if self.native_class is not None:  # else this wrapper is of a loop
            between.close(self.alias)

    def close_if_unusable_or_obsolete(self) -> None:
        """Django's, but a request does not end the test that it belongs to.

        Django's test clients disconnect close_old_connections(), which gathered requests of
        AsyncClient undo for each other; and threads of a test have its connection here. Nor does
        it end the transaction block of the coroutine that makes it.
        """
        if self.session is None and scopes.block_of_coroutine(self.alias) is None:
            super().close_if_unusable_or_obsolete()
            between.close(self.alias, only_old=True)

    def ensure_timezone(self) -> bool:
        """Django's, and new native connections (the settings TIME_ZONE or USE_TZ changed)."""
        pools.discard_pools(self.alias)
        conn: Any = self.connection
        begins = conn is not None and hasattr(conn, "began_with") and _is_as_begun(conn)
        changed: bool = super().ensure_timezone()
        if begins:  # with what Django has set: nothing that native connections would not have
            conn.session_dirty, conn.began_with = False, reported(conn.pgconn)
        return changed

    def close_pool(self) -> None:
        """Django's, and native connections: a test database is about to be dropped or cloned."""
        pools.discard_pools(self.alias, now=True)
        between.close(self.alias)
        super().close_pool()


def _is_as_begun(conn: Any) -> bool:
    """Whether statements have left the session of an open connection as Django made it."""
    return not conn.closed and not conn.session_dirty and reported(conn.pgconn) == conn.began_with


# Not of a wrapper itself: what SQL is made of, and what makes cursors.
_OF_CLASS = {"operators", "pattern_ops", "data_types", "chunked_cursor", *CURSORS} - {"cursor"}


def _is_of_class(wrapper: Any, names: set[str]) -> bool:
    """Whether what a wrapper has of these itself is its class's: so Django's test cases put back
    what they replaced."""
    for name in names & vars(wrapper).keys():
        found = getattr(type(wrapper), name)
        if isfunction(found):
            found = MethodType(found, wrapper)
        if vars(wrapper)[name] != found:
            return False
    return True


def _is_as_made(part: Any, wrapper: Any) -> bool:
    """Whether `ops` or `features` have nothing of their own but what they find themselves."""
    new = type(part)(wrapper)
    try:
        return all(
            name == "_cache" or _may_ask(part, name) or value == getattr(new, name)
            for name, value in vars(part).items()
        )
    except Exception:  # it has no such
        return False


def _may_ask(part: Any, name: str) -> bool:
    """Whether it is a property that a backend of others finds out once, perhaps by a statement (as
    PostGIS its version)."""
    found = getattr_static(type(part), name, None)
    return isinstance(found, cached_property) and not found.func.__module__.startswith(
        "django.db.backends."
    )


# What a class has whose body is empty.
_EMPTY = frozenset(
    ("__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__")
)


@cache
def _is_plain(cls: type) -> bool:
    return all(
        f"{base.__module__}.".startswith(_KNOWN) or vars(base).keys() <= _EMPTY
        for base in cls.__mro__[:-1]
    )


_KNOWN = ("django.db.backends.", "django.contrib.gis.db.backends.", "asyncorm.")
