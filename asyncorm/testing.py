"""Helpers for tests: no thread hops, queries by task, the timeline of a failing test.

The fixtures of pytest_asyncorm.py are these. Of Django's private names,
`BaseDatabaseWrapper._cursor` is replaced while `native_only()` is open: every cursor comes from it.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import wraps
from inspect import isawaitable
from typing import Any
from unittest import mock

from asgiref.sync import SyncToAsync
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from . import bridge
from .timeline import timeline

__all__ = ["count_queries", "native_only", "on_commit_callbacks", "timeline_on_failure"]

logger = logging.getLogger("asyncorm")


# No thread


@contextmanager
def native_only(allow: Iterable[str] = ()) -> Iterator[None]:
    """Fail where code on an event loop goes to a thread, or queries synchronously on the loop.

    It watches every task of the process while it is open. Host name look-ups are allowed, which
    asyncio does in a thread.

    Args:
        allow: beginnings of the names of modules whose functions may go to a thread, for instance
            "django.core.files".

    Raises:
        AssertionError: at the hop, and again at the end if something caught it.
    """
    allowed = tuple(allow)
    seen: list[AssertionError] = []

    def refuse(func: Callable[..., Any], what: str) -> None:
        while hasattr(func, "func"):  # functools.partial
            func = func.func
        if not bridge.loop_runs() or func is socket.getaddrinfo:
            return
        if isinstance(getattr(func, "__self__", None), SyncToAsync):
            return  # it was looked at when it was called
        # Not the repr(): that of a queryset's method queries.
        name = f"{getattr(func, '__module__', '')}.{getattr(func, '__qualname__', type(func))}"
        if allowed and name.startswith(allowed):
            return
        seen.append(AssertionError(f"{what}: {name}"))
        raise seen[-1]

    def watched(method: Callable[..., Any], what: str, target: Callable[..., Any]) -> Any:
        @wraps(method)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            refuse(target(*args), what)
            return method(*args, **kwargs)

        return replacement

    def hop(self: SyncToAsync[..., Any], *args: Any) -> Any:
        return self.func

    def submitted(self: object, func: Callable[..., Any], *args: Any) -> Any:
        return func

    def query(self: BaseDatabaseWrapper, *args: Any) -> Any:
        return socket.getaddrinfo if bridge.in_native_code() else self

    with ExitStack() as stack:
        for owner, name, target, what in (
            (SyncToAsync, "__call__", hop, "sync_to_async() left the event loop"),
            (ThreadPoolExecutor, "submit", submitted, "The event loop used a thread"),
            (BaseDatabaseWrapper, "_cursor", query, "A synchronous query on the event loop"),
        ):
            method = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, watched(method, what, target)))
        yield
    if seen:
        raise seen[0]


# Queries


@contextmanager
def count_queries() -> Iterator[Counter[str]]:
    """How many queries each task made: at the end, by the task's name.

    Native queries on all aliases, and in a test's transaction those of synchronous code, too.
    `asyncorm.timeline()` has the queries themselves.
    """
    counts: Counter[str] = Counter()
    with timeline() as seen:
        try:
            yield counts
        finally:
            counts.update(span.task for span in seen.queries)


@contextmanager
def timeline_on_failure() -> Iterator[None]:
    """Add the timeline of the queries to an exception, where test runners show it."""
    with timeline() as seen:
        try:
            yield
        except Exception as exc:
            exc.add_note(f"asyncorm:\n{seen}")
            raise


# on_commit()


@asynccontextmanager
async def on_commit_callbacks(
    using: str | None = None, execute: bool = False
) -> AsyncIterator[list[Callable[[], Any]]]:
    """TestCase.captureOnCommitCallbacks() that awaits what callbacks return.

    Args:
        using: a database alias; the default one by default.
        execute: call the callbacks at the end, those that they register included.
    """
    callbacks: list[Callable[[], Any]] = []
    hooks: list[Any] = connections[using or DEFAULT_DB_ALIAS].run_on_commit
    taken = len(hooks)
    yield callbacks
    while len(hooks) > taken:
        _, callback, robust = hooks[taken]
        taken += 1
        callbacks.append(callback)
        if execute:
            try:
                result = callback()
                if isawaitable(result):
                    await result
            except Exception:
                if not robust:
                    raise
                logger.exception("Error calling %r in on_commit().", callback)
