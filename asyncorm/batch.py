"""`asyncorm.batch()`: several operations on one connection, in few network round trips."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from asgiref.sync import iscoroutinefunction
from django.db import DEFAULT_DB_ALIAS
from django.db.models.manager import BaseManager
from django.db.models.query import QuerySet, RawQuerySet

from . import bridge, sessions
from ._sessions import engines, scopes
from ._sessions.blocks import Block
from .limits import Kept, Parallelism
from .pages import see


async def batch(
    *operations: Any, using: str | None = None, return_exceptions: bool = False
) -> list[Any]:
    """Run operations at once, on one connection; their results, in order::

        authors, total, newest = await asyncorm.batch(
            Author.objects.filter(active=True),
            Book.objects.count,
            lambda: Book.objects.latest("published"),
        )

    Each runs natively, as a task of its own. When every one of them waits for a result, what they
    have sent goes out together: so there are as many round trips as the longest of them has
    statements. Outside a transaction each statement stands alone, and one that fails fails its own
    operation only. Inside `connection()` they use that connection. Inside `atomic()` the operations
    are child tasks of the block: after an error of one, the others' next statements are refused,
    unless it happened in a nested block. An operation that begins a transaction of its own, or
    needs the session otherwise, has the connection to itself meanwhile.

    Args:
        operations: querysets (their results as a list), callables (synchronous ORM code, or
            coroutine functions) and awaitables.
        using: the database alias that they share a connection of; the default one by default. What
            they do on others runs as usual.
        return_exceptions: give exceptions as results. Otherwise the first of them, in the order of
            the operations, is raised when all have ended.

    Raises:
        TypeError: an operation is none of these.
        django.db.NotSupportedError: the alias has another engine.
    """
    alias = using or DEFAULT_DB_ALIAS
    try:
        results = await _batch(operations, alias)
    finally:
        for operation in operations:  # those that have not begun
            if inspect.iscoroutine(operation):
                operation.close()
    if not return_exceptions:
        for result in results:
            if isinstance(result, BaseException):
                raise result
    return results


async def _batch(operations: tuple[Any, ...], alias: str) -> list[Any]:
    if engines.native_class(alias) is None:
        raise engines.refuse_foreign(alias)
    calls = [_call(operation) for operation in operations]
    scope = scopes.find_scope(alias)
    kept = None
    if scope is None:
        await sessions.warm(alias)
    elif scope.block is None:  # inside connection()
        session: Any = scope.session
        await bridge.run(lambda: sessions.require(alias).wrapper.ensure_connection())
        kept = Kept(session)
    with _gathered(None if scope is None else scope.block):
        with Parallelism(1, alias, batching=True, kept=kept):
            tasks = [asyncio.create_task(call()) for call in calls]
        results = asyncio.gather(*tasks, return_exceptions=True)
        try:
            await asyncio.wait((results,))  # it would pass on each of the cancellations of anyio
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return results.result()


def _call(operation: object) -> Callable[[], Coroutine[Any, Any, Any]]:
    if isinstance(operation, QuerySet | RawQuerySet):
        return lambda: bridge.run(list, operation)
    if isinstance(operation, BaseManager):
        return lambda: bridge.run(list, operation.all())
    if not callable(operation) and not inspect.isawaitable(operation):
        raise TypeError(
            f"batch() takes querysets, callables and awaitables, not {operation!r}."
            + see("parallelism#batch-several-operations-in-one-round-trip")
        )

    async def call() -> Any:
        result = operation
        if iscoroutinefunction(operation):
            result = operation()
        elif callable(operation):
            result = await bridge.run(operation)
        return await result if inspect.isawaitable(result) else result

    return call


@contextmanager
def _gathered(block: Block | None) -> Iterator[None]:
    if block is None:
        yield
        return
    block.batching += 1
    try:
        yield
    finally:
        block.batching -= 1
