"""Operations of each kind, cancelled at every await while others use the same two connections: the
connections stay fit for use, and what others do stays right."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import pytest
from django.db import connections

import asyncorm
from asyncorm import native
from tests.cancellation.test_cancellation import by_anyio, by_cancel, by_many_cancels, by_timeout
from tests.project.myapp.models import Item
from tests.project.shop.models import Book
from tests.support import (
    administrator,
    all_given_back,
    database,
    eventually,
    sleep,
    two_pids,
    value,
)

pytestmark = pytest.mark.usefixtures("shop_data")
ALIAS = "few"
ids = count(1)
SCENARIOS: list[Callable[[], Any]] = []


@pytest.fixture
def few() -> Iterator[str]:
    with database(ALIAS, OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        yield alias
    with administrator() as ask:
        ask("TRUNCATE myapp_item")


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    SCENARIOS.append(function)
    return function


def books() -> Any:
    return Book.objects.using(ALIAS).order_by("pk")


def items() -> Any:
    return Item.objects.using(ALIAS)


async def create() -> Any:
    return await items().native_create(remote_id=next(ids), name="x")


@scenario
async def reads() -> None:
    assert (await books().native_get(pk=1)).pk == 1
    assert await books().anative()
    assert await books().native_count()
    assert await books().values("pk").native_first()


@scenario
async def gathered() -> None:
    found = await asyncio.gather(*[books().native_get(pk=1 + n % 2) for n in range(8)])
    assert [book.pk for book in found] == [1, 2] * 4


@scenario
async def in_a_task_group() -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(books().native_get(pk=1))
            group.create_task(create())


@scenario
async def writes() -> None:
    item = await create()
    await item.native_save()
    await items().filter(pk=item.pk).native_update(name="y")
    await items().native_update_or_create(remote_id=item.remote_id, defaults={"name": "z"})
    await items().native_bulk_create([Item(remote_id=next(ids)) for _ in range(5)])
    await item.native_delete()


@scenario
async def batch() -> None:
    found = await asyncorm.batch(books(), create(), books().native_get(pk=1), create(), using=ALIAS)
    assert found[2].pk == 1


@scenario
async def batches_in_blocks() -> None:
    async with asyncorm.atomic(ALIAS):
        await batch()
        async with asyncorm.atomic(ALIAS):
            await batch()


@scenario
async def batch_on_a_kept_connection() -> None:
    async with asyncorm.connection(ALIAS), asyncorm.cursor(ALIAS) as cursor:
        await cursor.execute("SET TIME ZONE 'Asia/Tokyo'")
        await batch()


@scenario
async def prefetches() -> None:
    assert await books().prefetch_related("authors", "tags", "reviews", "publisher").anative()


@scenario
async def a_generator_with_a_block() -> None:
    async def written() -> AsyncIterator[Any]:
        async with asyncorm.atomic(ALIAS):
            async for book in books().native_iterator(chunk_size=1):
                await create()
                yield book

    async with contextlib.aclosing(written()) as found:  # type: ignore[type-var]
        async for book in found:
            if book.pk >= 3:
                break


@scenario
async def a_generator_that_is_left() -> None:
    async def keeping() -> AsyncIterator[int]:
        async with asyncorm.connection(ALIAS), asyncorm.cursor(ALIAS) as cursor:
            await cursor.execute("SET TIME ZONE 'Asia/Tokyo'")
            yield 1
            yield 2

    async for _ in keeping():
        break
    await books().native_count()


@scenario
async def state_of_an_operation() -> None:
    def work() -> None:
        with connections[ALIAS].cursor() as cursor:
            cursor.execute("SET TIME ZONE 'Asia/Tokyo'")
        asyncorm.await_(asyncio.gather(*[books().native_count() for _ in range(3)]))

    await native(work)()


@scenario
async def many() -> None:
    async with asyncorm.cursor(ALIAS) as cursor:
        await cursor.execute("SELECT generate_series(1, 500)")
        assert len(await cursor.fetchall()) == 500
        await cursor.executemany(
            "INSERT INTO myapp_item (remote_id, name) VALUES (%s, %s)",
            [(next(ids), "x" * 50) for _ in range(300)],
        )


@scenario
async def single_rows() -> None:
    def work() -> None:
        connections[ALIAS].ensure_connection()
        with connections[ALIAS].connection.cursor() as cursor:
            assert len(list(cursor.stream("SELECT generate_series(1, 300)"))) == 300

    await native(work)()


@scenario
async def in_turns() -> None:
    async with asyncorm.parallelism(1, ALIAS):
        await asyncio.gather(*[create() for _ in range(4)], gathered())


def zone() -> Any:
    return value("SELECT current_setting('TimeZone')", using=ALIAS)


async def others(over: asyncio.Event) -> None:
    """Use the same connections, and find nothing of what is cancelled beside."""
    first = await books().native_get(pk=1)
    while not over.is_set():
        assert (await books().native_get(pk=1)).created == first.created
        assert await asyncorm.batch(zone, using=ALIAS) == ["UTC"]
        async with asyncorm.atomic(ALIAS):
            assert (await books().native_get(pk=2)).pk == 2


@pytest.mark.parametrize("cancelled", [by_cancel, by_many_cancels, by_anyio, by_timeout])
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_cancelled_at_every_await(scenario: Any, cancelled: Any, few: str) -> None:
    busy = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'few' AND state <> 'idle'"
    )
    await native(value)("SELECT 1", using=few)
    with administrator() as ask:
        for n in range(1, 1000):
            over = asyncio.Event()
            beside = [asyncio.create_task(others(over)) for _ in range(3)]
            async with asyncio.timeout(30):
                reached = await asyncio.create_task(cancelled(scenario(), n))
                over.set()
                await asyncio.gather(*beside)
            await all_given_back(few)
            await eventually(lambda: not ask(busy))
            if not reached:
                break
    assert asyncorm.pool_stats(few)["pool_size"] <= 2


async def test_a_pipeline_after_a_stream_of_single_rows(few: str) -> None:
    for _ in range(2):
        await single_rows()
        rows = await asyncorm.batch(*[books().all() for _ in range(3)], using=few)
        assert len(rows[0]) == len(rows[1]) > 1
        await many()


async def test_a_stream_of_single_rows_that_is_left(few: str) -> None:
    """The server stops it, nobody else's statement."""

    def work() -> None:
        connections[few].ensure_connection()
        with connections[few].connection.cursor() as cursor:
            for _ in cursor.stream("SELECT generate_series(1, 10000000)"):
                break
        assert value("SELECT 1", using=few) == 1

    for _ in range(10):
        await native(work)()
        assert await asyncorm.batch(books().native_count(), using=few) == [
            await books().native_count()
        ]


async def test_executemany_is_stopped_on_the_server(few: str) -> None:
    async def run() -> None:
        async with asyncorm.cursor(few) as cursor:
            await cursor.executemany("SELECT pg_sleep(%s)", [(600,), (600,)])

    task = asyncio.create_task(run())
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    with administrator() as ask:
        await eventually(lambda: ask(asleep))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: not ask(asleep))
    await native(sleep)(0)


async def test_a_cancelled_executemany_costs_one_connection(few: str) -> None:
    """It is not taken for a server that hangs (5 s, then all connections were retired), whatever of
    its pipeline the server has answered."""

    for n in range(1, 1000):
        before = await two_pids(few)
        reached = await asyncio.create_task(by_cancel(many(), n))
        assert before & await two_pids(few)
        if not reached:
            break
    assert n > 4


async def test_operations_of_a_batch_that_did_not_begin(few: str) -> None:
    """No warning of coroutines that nobody awaited (each is an error)."""
    task = asyncio.create_task(asyncorm.batch(create(), books().native_get(pk=1), using=few))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
