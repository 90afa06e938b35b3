"""Reads elsewhere what the router has sent to a replica that is gone, or had to cancel it.

Not what `using()` has sent there, nor inside of blocks; as with RETRY_READS, only statements that
are known to only read: the replica may have been promoted meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from django.db import InterfaceError, OperationalError, connections
from django.db.models.query import QuerySet
from psycopg.errors import SerializationFailure

from .. import bridge, conf, elsewhere, fate, patches, sessions, written
from .._pool.refusals import Unreachable
from .._sessions.scopes import find_scope
from .._wire.statement import Unanswered, Unsent
from .._wire.texts import only_reads
from .watching import Watcher

_WHY = "reads whose replica is gone are repeated on another server (ReplicaRouter)"

# The server that the router has chosen last, those that it must not choose, and the statement that
# synchronous code has executed last on a replica.
chosen: ContextVar[str | None] = ContextVar("asyncorm_replica", default=None)
avoided: ContextVar[frozenset[str | None]] = ContextVar("asyncorm_avoided", default=frozenset())
_text: ContextVar[str] = ContextVar("asyncorm_replica_text", default="")

_watchers: dict[str, Watcher] = {}


def follow(watcher: Watcher) -> None:
    """Repeat from now on what is lost on a watcher's replicas."""
    _watchers.update(dict.fromkeys(watcher.replicas, watcher))
    elsewhere.gone, elsewhere.again, elsewhere.stood_in = gone, again, _watchers
    if _executed not in written.listeners:
        written.listeners.append(_executed)
    if not patches.replaced_by_us(QuerySet, "count"):
        for name in ("_fetch_all", "aggregate", "count", "exists"):
            original = getattr(QuerySet, name)
            patches.replace(QuerySet, name, by := _repeated(original), _WHY)
            elsewhere.replaced(original, by)


def _repeated(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read(self: QuerySet[Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except (OperationalError, InterfaceError) as exc:
            if self._result_cache is not None:  # it was something that belongs to the rows
                raise
            return again(self, exc, lambda: original(self, *args, **kwargs))

    return read


def again(queryset: QuerySet[Any], exc: Exception, read: Callable[[], Any]) -> Any:
    """`elsewhere.again`."""
    before = avoided.get()
    try:
        while gone(queryset, exc):
            avoided.set(avoided.get() | {chosen.get()})
            try:
                return read()
            except (OperationalError, InterfaceError) as another:
                exc = another
        raise exc
    finally:
        avoided.set(before)


def gone(queryset: Any, exc: Exception) -> bool:
    """`elsewhere.gone`."""
    alias = chosen.get()
    watcher = _watchers.get(alias) if alias is not None else None
    if (
        alias is None
        or watcher is None
        or alias in avoided.get()
        or queryset._db is not None  # using()
        or queryset._for_write
        or not conf.get("RETRY_READS")
    ):
        return False
    native = bridge.in_native_code() or bridge.loop_runs()
    is_cancelled = isinstance(exc.__cause__, SerializationFailure)
    is_lost = not is_cancelled and (_is_lost if native else _is_lost_synchronously)(alias, exc)
    if not (is_cancelled or is_lost):
        return False
    if not (_is_free if native else _is_free_synchronously)(alias) or not _is_ours(queryset):
        return False
    if is_lost:
        watcher.leave(alias, str(exc).strip())
    return True


def _is_ours(queryset: Any) -> bool:
    """Whether ours chose for this queryset: no router of others was asked before it."""
    before = chosen.get()
    chosen.set(None)
    queryset.db  # noqa: B018
    ours = chosen.get() is not None
    chosen.set(before)
    return ours


def _is_lost(alias: str, exc: BaseException | None) -> bool:
    while exc is not None and not isinstance(exc, fate.CommitUnknown):
        if isinstance(exc, Unanswered):
            return only_reads(exc.text)
        if isinstance(exc, Unreachable | Unsent):
            return True
        exc = exc.__cause__
    return False


def _is_lost_synchronously(alias: str, exc: Exception) -> bool:
    conn = connections[alias].connection
    return conn is None or (conn.closed and only_reads(_text.get()))


def _is_free(alias: str) -> bool:
    """Whether nothing was kept in the connection that would be missed elsewhere."""
    if alias in sessions.test_sessions or find_scope(alias) is not None:
        return False
    runner = bridge.current()
    session: Any = None if runner is None else runner.resources.get(alias)
    if session is None or session.wrapper is None:
        return True
    if session.is_needed:
        return False
    session.give_up_lost()
    return True


def _is_free_synchronously(alias: str) -> bool:
    wrapper: Any = connections[alias]
    conn = wrapper.connection
    if wrapper.in_atomic_block or (
        conn is not None and (conn.session_dirty or not wrapper.autocommit)
    ):
        return False
    if conn is not None and conn.closed:
        wrapper.close()
    return True


def _executed(alias: str, text: str | None) -> None:
    if alias in _watchers and text is not None:
        _text.set(text)
