"""Helpers for tests: no thread hops, queries by task, the timeline of a failing test.

The fixtures of pytest_plugin.py are these. Of Django's private names,
`BaseDatabaseWrapper._cursor` is replaced while `native_only()` is open: every cursor comes from it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import isawaitable
from typing import Any
from unittest import mock

from asgiref.sync import SyncToAsync
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from . import bridge, sessions

__all__ = ["Queries", "Query", "count_queries", "native_only", "on_commit_callbacks"]

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

    def refuse(func: Any, what: str) -> None:
        while hasattr(func, "func"):  # functools.partial
            func = func.func
        if not _on_a_loop() or func is socket.getaddrinfo:
            return
        if isinstance(getattr(func, "__self__", None), SyncToAsync):
            return  # it was looked at when it was called
        # Not the repr(): that of a queryset's method queries.
        name = f"{getattr(func, '__module__', '')}.{getattr(func, '__qualname__', type(func))}"
        if allowed and name.startswith(allowed):
            return
        seen.append(AssertionError(f"{what}: {name}"))
        raise seen[-1]

    def watched(method: Any, what: str, target: Callable[..., Any]) -> Any:
        @wraps(method)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            refuse(target(*args), what)
            return method(*args, **kwargs)

        return replacement

    def hop(self: Any, *args: Any) -> Any:
        return self.func

    def submitted(self: Any, func: Any, *args: Any) -> Any:
        return func

    def query(self: Any, *args: Any) -> Any:
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


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# Queries by task


@dataclass(frozen=True)
class Query:
    """One statement of native code, or of synchronous code in a test's transaction.

    Attributes:
        sql: with its placeholders.
        task: the name of the asyncio task, or of the thread.
        connection: the process id of the server's end.
        began: seconds since `count_queries()` began.
        seconds: how long it took.
    """

    sql: str
    task: str
    connection: int
    began: float
    seconds: float


class Queries(list[Query]):
    """What was recorded, in the order in which statements ended; str() draws the timeline."""

    @property
    def by_task(self) -> dict[str, list[Query]]:
        """The same for each task, by its name."""
        found: dict[str, list[Query]] = {}
        for query in self:
            found.setdefault(query.task, []).append(query)
        return found

    def __str__(self) -> str:
        ordered = sorted(self, key=lambda query: query.began)
        total = max((query.began + query.seconds for query in self), default=0.0)
        lines = [
            f"{len(self)} queries of {len(self.by_task)} tasks on "
            f"{len({query.connection for query in self})} connections, {total * 1000:.1f} ms"
        ]
        if len(ordered) > _SHOWN:
            lines.append(f"(the last {_SHOWN} of them)")
        width = max((len(query.task) for query in ordered), default=0)
        for query in ordered[-_SHOWN:]:
            place = round(query.began / total * _BAR)
            length = max(1, round(query.seconds / total * _BAR))
            bar = " " * min(place, _BAR - 1) + "#" * length
            sql = " ".join(query.sql.split())
            lines.append(
                f"|{bar[:_BAR]:<{_BAR}}| {query.seconds * 1000:8.1f} ms  {query.task:<{width}}  "
                f"{query.connection}  {sql if len(sql) <= 120 else sql[:117] + '...'}"
            )
        return "\n".join(lines)


_BAR = 30  # characters
_SHOWN = 200  # queries in a timeline


@contextmanager
def count_queries() -> Iterator[Queries]:
    """Record the queries of every task: `len(queries)`, `queries.by_task`, `print(queries)`.

    Native queries on all aliases, and in a test's transaction those of synchronous code, too.
    """
    queries = Queries()
    start = time.perf_counter()

    def record(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        began = time.perf_counter()
        try:
            return execute(sql, params, many, context)
        finally:
            task = sessions.current_task_or_none()
            conn = context["connection"].connection
            queries.append(
                Query(
                    str(sql),
                    threading.current_thread().name if task is None else task.get_name(),
                    0 if conn is None else conn.pgconn.backend_pid,
                    began - start,
                    time.perf_counter() - began,
                )
            )

    def everywhere() -> list[list[Any]]:
        cases = sessions.test_sessions.values()
        return [sessions.everywhere, *(session.wrapper.execute_wrappers for session in cases)]

    for wrappers in everywhere():
        wrappers.append(record)
    try:
        yield queries
    finally:
        for wrappers in everywhere():
            wrappers.remove(record)


@contextmanager
def timeline_on_failure() -> Iterator[None]:
    """Add the timeline of the queries to an exception, where test runners show it."""
    with count_queries() as queries:
        try:
            yield
        except Exception as exc:
            exc.add_note(f"asyncorm: {queries}")
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
