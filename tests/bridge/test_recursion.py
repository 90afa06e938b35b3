"""At whichever depth a RecursionError strikes, the pool loses no connection."""

import asyncio
import contextlib
import gc
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from django.db import connections
from django.db.models.lookups import Exact

import asyncorm
from asyncorm import await_, grounds, native
from tests.project.shop.models import Tag
from tests.support import all_given_back, database

pytestmark = pytest.mark.usefixtures("shop_data", "_uncollected")


@pytest.fixture
def _uncollected() -> Iterator[None]:
    """What other tests have left is not finalized at the limit, where that fails."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def alias() -> Iterator[str]:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2, "timeout": 5}}) as name:
        yield name


def deep(depth: int, function: Callable[[], Any]) -> Any:
    return deep(depth - 1, function) if depth else function()


async def deep_coroutine(depth: int, function: Callable[[], Awaitable[Any]]) -> Any:
    return await (deep_coroutine(depth - 1, function) if depth else function())


def count(using: str) -> int:
    return Tag.objects.using(using).count()


def count_and_wait(using: str) -> int:
    """The connection is given back at that depth."""
    found = Tag.objects.using(using).count()
    await_(asyncio.sleep(0))
    return found


def new_connection(using: str) -> None:
    """It is configured at that depth."""
    connections[using].ensure_connection()
    connections[using].connection.terminate()


async def at_each_depth(
    operation: Callable[[int], Awaitable[Any]],
    alias: str,
    end: Callable[[], Awaitable[Any]] | None = None,
) -> None:
    errors = 0
    limit = sys.getrecursionlimit()
    for depth in range(limit - 200, limit):
        try:
            await operation(depth)
        except RecursionError:
            errors += 1
    assert 0 < errors < 200, "some have ended, some have not"
    assert sys.getrecursionlimit() == limit
    if end is not None:
        await end()
    stats = await all_given_back(alias)
    assert stats["pool_size"] <= 2
    async with asyncio.timeout(10):
        counts = await asyncio.gather(*[native(count)(alias) for _ in range(8)])
    assert counts == [6] * 8
    assert (await all_given_back(alias))["pool_size"] <= 2
    await asyncorm.close_pools(alias)


@pytest.mark.parametrize("function", [count, count_and_wait, new_connection])
async def test_in_native_code(function: Any, alias: str) -> None:
    await native(count)(alias)
    await at_each_depth(lambda depth: native(deep)(depth, lambda: function(alias)), alias)


@pytest.mark.parametrize("function", [count, count_and_wait])
async def test_in_a_limit(function: Any, alias: str) -> None:
    async with asyncorm.parallelism(1, using=alias):
        await native(count)(alias)
        await at_each_depth(lambda depth: native(deep)(depth, lambda: function(alias)), alias)


async def test_in_a_block(alias: str) -> None:
    async def in_block(depth: int) -> None:
        async with asyncorm.atomic(using=alias):
            await native(deep)(depth, lambda: count(alias))

    await at_each_depth(in_block, alias)


async def test_in_nested_coroutines(alias: str) -> None:
    await native(count)(alias)
    await at_each_depth(lambda depth: deep_coroutine(depth, lambda: native(count)(alias)), alias)


async def test_while_others_wait(alias: str) -> None:
    async def others() -> None:
        while True:
            with contextlib.suppress(Exception):
                await native(count)(alias)

    async def end() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    tasks = [asyncio.create_task(others()) for _ in range(4)]
    try:
        await at_each_depth(lambda depth: native(deep)(depth, lambda: count(alias)), alias, end)
    finally:
        await end()
        await asyncorm.close_pools(alias)


def test_a_class_that_has_changed_is_looked_at_at_any_depth() -> None:
    """Python takes a comparison that fails there for an attribute that is not there."""
    sound, found = grounds.are_sound(), set()
    try:
        for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()):
            Exact.changed = depth  # type: ignore[attr-defined]
            try:
                found.add(deep(depth, grounds.are_sound))
            except RecursionError:
                found.add(None)
    finally:
        del Exact.changed  # type: ignore[attr-defined]
    assert sound and {True, None} <= found <= {True, False, None}
