"""No thread is started and no executor used by native operations, once a pool is warm."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from django.db import transaction
from django.test import override_settings

import asyncorm
from tests.operations import READS, WRITES, Native, Swapped
from tests.project.shop.models import Book, Tag
from tests.support import backend_pid, in_thread, sleep, watched_threads


async def block() -> None:
    async with asyncorm.atomic():
        await Tag.objects.native_count()
        with contextlib.suppress(ZeroDivisionError):
            async with asyncorm.atomic():
                await Tag.objects.filter(pk=1).native_update(weight=1)
                raise ZeroDivisionError
        asyncorm.on_commit(lambda: asyncio.sleep(0))
        await asyncio.gather(*[Tag.objects.native_count() for _ in range(3)])


async def kept() -> None:
    async with asyncorm.connection():
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SET my.marker = '1'")
            await cursor.execute("SELECT %s", [1])
            await cursor.fetchall()


async def stream() -> None:
    async for _ in Book.objects.prefetch_related("tags").native_iterator(chunk_size=7):
        pass
    async for _ in Tag.objects.native_iterator(chunk_size=2):
        break  # closed later, by the loop


async def function() -> None:
    def work() -> None:
        with transaction.atomic():
            list(Tag.objects.select_for_update())
            asyncorm.await_(asyncio.sleep(0))
        for _ in Tag.objects.iterator(chunk_size=2):
            pass

    await asyncorm.native(work)()


async def cancelled() -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncorm.native(sleep)(10)


async def failed() -> None:
    with contextlib.suppress(Exception):
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT nonsense")


async def detached() -> None:
    async with asyncorm.atomic():
        async with asyncorm.detached():
            await Tag.objects.native_count()


OTHERS: list[Callable[[], Awaitable[None]]] = [
    block, kept, stream, function, cancelled, failed, detached
]  # fmt: skip


async def warm() -> None:
    """Open the connections; those of other pools too."""
    for alias in ("default", "other"):
        await asyncio.gather(*[asyncorm.native(backend_pid)(alias) for _ in range(5)])


@pytest.mark.slow
async def test_over_a_thousand_operations(fresh_shop: Callable[[], None]) -> None:
    await warm()
    threads = threading.active_count()
    n, used = 0, set()
    ways = itertools.cycle([Native(), Swapped()])
    while n < 1000:
        way = next(ways)
        swap = {"SWAP_MANAGERS": isinstance(way, Swapped)}
        operations = {name: partial(each, way) for name, each in {**READS, **WRITES}.items()}
        operations |= {each.__name__: each for each in OTHERS}
        with override_settings(ASYNCORM=swap):
            for name, operation in operations.items():
                with watched_threads() as seen, contextlib.suppress(Exception):
                    await operation()  # some are there to fail
                if seen:
                    used.add(name)
                n += 1
    # The storage of a FileField works in a thread.
    assert {name for name in used if "file" not in name} == set()
    if not used:
        assert threading.active_count() == threads


async def test_gathered_operations_and_growing_pools(shop_data: None) -> None:
    """Opening connections needs no thread either, on a Unix socket or to an address in numbers."""
    with watched_threads() as seen:
        await asyncio.gather(*[Tag.objects.native_count() for _ in range(100)])
        await asyncorm.close_pools()
        await asyncio.gather(*[asyncorm.native(sleep)(0.2) for _ in range(20)])
    assert seen == []
    assert asyncorm.pool_stats()["pool_size"] >= 10


async def test_the_watch_sees_djangos_own_threads(shop_data: None) -> None:
    """What is looked for is there without asyncorm."""
    with watched_threads() as seen:
        await Tag.objects.acount()
    assert seen
    with watched_threads() as seen:
        await asyncio.to_thread(lambda: None)
    assert seen
    with watched_threads() as seen:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    assert len(seen) == 1
    await in_thread(lambda: None)
