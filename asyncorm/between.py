"""The connection that a thread keeps between loops that live for one call.

`async_to_sync()` makes an event loop for its coroutine, waits and closes it, and the loop's pools
close with it. One connection of such a loop goes to the thread that waited, and the next loop that
this thread waits for begins with it. It lives as long as Django's own connection of the thread
would: `close()` and `connections.close_all()` end it, `close_old_connections()` when it is
CONN_MAX_AGE old (with 0 in any case), and the end of the thread.

Of asgiref `AsyncToSync.loop_thread_executors` is used: it has the loops that are made so. Without
it nothing is kept.
"""

from __future__ import annotations

import sys
import threading
import weakref
from asyncio import AbstractEventLoop
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any

from asgiref.sync import AsyncToSync
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from .pages import see


class Kept:
    """A connection that nobody has, of no loop; closed with this object, unless a pool takes it.

    Args:
        conn: the pool's.
        start: what the connections of its pool had at their start.
        settings: what they were made from; where that has changed, it is of no use.
        close_at: the earliest time for `close_old_connections()` (time.monotonic()); None for
            never.
    """

    def __init__(
        self, conn: Any, start: Any, settings: tuple[Any, ...], close_at: float | None
    ) -> None:
        self.conn = conn
        self.start = start
        self.settings = settings
        self.close_at = close_at

    @property
    def has_connection(self) -> bool:
        """Whether nobody has taken it."""
        return self.conn is not None

    def release(self) -> Any:
        """The connection, for a pool."""
        conn, self.conn = self.conn, None
        return conn

    def close(self) -> None:
        """Close it; not in a child process that was forked."""
        if (conn := self.release()) is not None:
            conn.twin.terminate()

    __del__ = close  # the thread has ended


class _Thread(threading.local):
    """What a thread keeps, by alias."""

    def __init__(self) -> None:
        self.kept: dict[str, Kept] = {}


_thread = _Thread()


# Django's wrappers that were connected, and what is kept; each knows its thread.
_holders: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def note(holder: Any) -> None:
    """This thread has a connection, as long as the holder's `has_connection` says so."""
    holder.opened_in = threading.get_ident()
    _holders[id(holder)] = holder


def other_threads_have() -> bool:
    """Whether any thread but this one has a connection of synchronous code, or a kept one."""
    me = threading.get_ident()
    holders = (reference() for reference in _holders.valuerefs())
    return any(
        holder is not None and holder.has_connection and holder.opened_in != me
        for holder in holders
    )


class Exchange:
    """What a thread gives to the loop that it waits for, and gets back."""

    def __init__(self) -> None:
        self._kept, _thread.kept = _thread.kept, {}
        self._closed = set[str]()
        self._thread = threading.get_ident()
        self._is_over = False

    def take(self, alias: str, settings: tuple[Any, ...]) -> Kept | None:
        """The connection of an alias, if there is one of these settings."""
        kept = self._kept.pop(alias, None)
        if kept is None or kept.settings == settings:
            return kept
        kept.close()
        return None

    def give(self, alias: str, kept: Kept) -> None:
        """Leave a connection to the thread."""
        if self._is_over or alias in self._kept or alias in self._closed:
            kept.close()
        else:
            self._kept[alias] = kept

    def close(self, alias: str) -> None:
        """A thread closes its connections while the loop runs: if it is the one that waits, none
        of that is left to it."""
        if self._thread != threading.get_ident():
            return
        self._closed.add(alias)
        if (kept := self._kept.pop(alias, None)) is not None:
            kept.close()

    def end(self) -> None:
        """The thread goes on."""
        self._is_over = True
        returned, self._kept = self._kept, {}
        for alias, kept in returned.items():
            if alias in connections.settings and alias not in _thread.kept:
                connections[alias]  # from now on `connections.all()` has it, for who closes all
                _thread.kept[alias] = kept
                note(kept)
            else:
                kept.close()


_exchange: ContextVar[Exchange | None] = ContextVar("asyncorm_exchange", default=None)


@contextmanager
def exchanging() -> Iterator[None]:
    """This thread waits for a coroutine inside.

    Raises:
        django.core.exceptions.ImproperlyConfigured: it cannot, since gevent has patched it.
    """
    outer = _exchange.get()
    exchange = Exchange()
    _exchange.set(exchange)
    try:
        yield
    except RuntimeError as exc:
        if "event loop" in str(exc):  # one runs in this thread, for another greenlet
            refuse_gevent()
        raise
    finally:
        _exchange.set(outer)
        exchange.end()


def of_loop(loop: AbstractEventLoop) -> Exchange | None:
    """That of the thread that waits for a loop; None if none does, as for `asyncio.run()`."""
    # A thread that works for a loop waits for coroutines on that one.
    return _exchange.get() if is_short(loop) else None


def is_short(loop: AbstractEventLoop) -> bool:
    """Whether a loop lives for one call of `async_to_sync()`."""
    return loop in getattr(AsyncToSync, "loop_thread_executors", ())


def close(alias: str, only_old: bool = False) -> None:
    """Close what the thread keeps.

    Args:
        alias: of this database.
        only_old: if it is CONN_MAX_AGE old.
    """
    exchange = _exchange.get()
    if exchange is not None and not only_old:
        exchange.close(alias)
    kept = _thread.kept.get(alias)
    if kept is None:
        return
    if not only_old or (kept.close_at is not None and monotonic() >= kept.close_at):
        del _thread.kept[alias]
        kept.close()


def refuse_gevent() -> None:
    """Raise where greenlets share the thread of an event loop, which asyncio has one of at most.

    Raises:
        django.core.exceptions.ImproperlyConfigured: gevent has patched the process.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        raise ImproperlyConfigured(
            "gevent has patched this process (monkey.patch_all()): its greenlets share one thread, "
            "and asyncio runs one event loop in a thread, so asynchronous code fails as soon as "
            "two greenlets want it. Use another pool (celery worker --pool prefork or threads, "
            "gunicorn's gthread), or the synchronous ORM here." + see("short-loops#gevent")
        )
