"""asyncorm.batch(): several operations on one connection, in few round trips."""

import asyncio
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import (
    DataError,
    IntegrityError,
    NotSupportedError,
    OperationalError,
    connection,
    transaction,
)
from django.db.transaction import TransactionManagementError
from django.db.utils import ConnectionDoesNotExist
from django.test.utils import CaptureQueriesContext
from psycopg import IsolationLevel

import asyncorm
from tests.project.myapp.models import Item
from tests.project.shop.models import Book, Product, Publisher, Tag
from tests.support import all_given_back, backend_pid, eventually, value

pytestmark = pytest.mark.usefixtures("shop_data")


@pytest.fixture
def items(shop_data: None) -> Iterator[None]:
    """The table of items, emptied afterwards."""
    yield
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE myapp_item")
    connection.close()


def pipelines() -> tuple[int, int]:
    """Round trips that carried several statements, and how many these were."""
    stats = asyncorm.pool_stats()
    return stats.get("pipelines", 0), stats.get("statements_pipelined", 0)


def div(by: int) -> Any:
    return value("SELECT 10 / %s::int", [by])


async def test_results_in_order() -> None:
    products = Product.objects.order_by("pk")
    tags, count, newest, missing, total, name = await asyncorm.batch(
        Tag.objects.order_by("pk"),
        products.count,
        lambda: products.latest("pk"),
        products.filter(pk=-1).first,
        functools.partial(value, "SELECT %s::int", [7]),
        Publisher.objects.order_by("pk").native_first(),
    )
    assert tags == await Tag.objects.order_by("pk").anative()
    assert count == await products.native_count() > 0
    assert newest == await products.native_last()
    assert missing is None
    assert total == 7
    assert name == await Publisher.objects.order_by("pk").native_first()
    assert await asyncorm.batch() == []
    await all_given_back()


async def test_the_querysets_cache_is_filled() -> None:
    tags = Tag.objects.order_by("pk")
    (found,) = await asyncorm.batch(tags)
    assert tags._result_cache == found


@pytest.fixture(
    params=[
        None,
        pytest.param(
            EAGER := getattr(asyncio, "eager_task_factory", None),
            marks=pytest.mark.skipif(EAGER is None, reason="since Python 3.12"),
        ),
    ],
    ids=["later", "at once"],
)
async def tasks_begin(request: pytest.FixtureRequest) -> None:
    asyncio.get_running_loop().set_task_factory(request.param)


@pytest.mark.usefixtures("tasks_begin")
async def test_one_connection_and_as_many_round_trips_as_the_longest_has_statements() -> None:
    await asyncorm.batch(backend_pid)
    began, sent = pipelines()

    def steps(n: int) -> list[int]:
        return [backend_pid() for _ in range(n)]

    pids = await asyncorm.batch(*(functools.partial(steps, n) for n in [1, 3, 2, 3, 1]))
    assert len({pid for each in pids for pid in each}) == 1
    ended, all_sent = pipelines()
    assert (ended - began, all_sent - sent) == (3, 10)


async def test_prefetches_go_together() -> None:
    await asyncorm.batch(backend_pid)
    began, sent = pipelines()
    with CaptureQueriesContext(connection) as captured:
        one, two = await asyncorm.batch(
            Publisher.objects.prefetch_related("books"),
            Book.objects.prefetch_related("tags"),
        )
    assert len(captured) == 4
    ended, all_sent = pipelines()
    assert (ended - began, all_sent - sent) == (2, 4)
    for publisher in one:
        assert "books" in publisher._prefetched_objects_cache
    assert all("tags" in book._prefetched_objects_cache for book in two)


async def test_an_error_is_of_its_own_operation_only() -> None:
    four, error, five = await asyncorm.batch(
        functools.partial(div, 2), functools.partial(div, 0), lambda: 5, return_exceptions=True
    )
    assert (four, five) == (5, 5)
    assert isinstance(error, DataError)
    with pytest.raises(DataError):
        await asyncorm.batch(functools.partial(div, 2), functools.partial(div, 0))
    with pytest.raises(ZeroDivisionError):  # the first in order of the operations
        await asyncorm.batch(lambda: 1 / 0, functools.partial(div, 0))
    await all_given_back()


async def test_writes_stand_alone(items: None) -> None:
    create = functools.partial(Item.objects.create, name="x")
    results = await asyncorm.batch(
        functools.partial(create, remote_id=1),
        functools.partial(create, remote_id=1),
        functools.partial(create, remote_id=2),
        return_exceptions=True,
    )
    assert isinstance(results[1], IntegrityError)
    assert await Item.objects.native_count() == 2


@pytest.mark.parametrize("last", ["lastval()", "currval('myapp_item_id_seq')"])
async def test_the_number_of_another_ones_insert_is_not_given(items: None, last: str) -> None:
    ids = itertools.count(1)

    def insert(raw: bool) -> tuple[int, int]:
        with connection.cursor() as cursor:
            if raw:
                cursor.execute(
                    "INSERT INTO myapp_item (remote_id, name) VALUES (%s, 'a') RETURNING id",
                    [next(ids)],
                )
                made = cursor.fetchone()[0]
            else:
                made = Item.objects.create(remote_id=next(ids), name="a").pk
            cursor.execute(f"SELECT {last}")
            return made, cursor.fetchone()[0]

    def alone(raw: bool) -> tuple[int, int]:
        with transaction.atomic():
            return insert(raw)

    for raw in (True, False):
        results = await asyncorm.batch(
            *[functools.partial(each, raw) for each in (insert, insert, alone, alone)],
            return_exceptions=True,
        )
        assert [type(each) for each in results[:2]] == [NotSupportedError] * 2
        assert all(made == found for made, found in results[2:])


async def test_transactions_of_operations(items: None) -> None:
    def add(n: int, fail: bool) -> None:
        with transaction.atomic():
            Item.objects.create(remote_id=n, name="x")
            Item.objects.create(remote_id=n + 100, name="x")
            if fail:
                raise ZeroDivisionError

    results = await asyncorm.batch(
        functools.partial(add, 1, False),
        functools.partial(add, 2, True),
        Item.objects.filter(remote_id=2).exists,
        functools.partial(add, 3, False),
        return_exceptions=True,
    )
    assert isinstance(results[1], ZeroDivisionError)
    assert results[2] is False
    found = await Item.objects.order_by("remote_id").values_list("remote_id", flat=True).anative()
    assert found == [1, 3, 101, 103]
    await all_given_back()


async def test_session_state_of_operations() -> None:
    def change() -> str:
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('application_name', 'batch', false)")
            cursor.execute("SHOW application_name")
            return str(cursor.fetchone()[0])

    results = await asyncorm.batch(
        change, lambda: list(Tag.objects.iterator(chunk_size=2)), change, Tag.objects.count
    )
    assert results[0] == results[2] == "batch"
    assert len(results[1]) == results[3]
    await all_given_back()


async def test_a_block_whose_first_statements_travel_together(items: None) -> None:
    create = functools.partial(Item.objects.create, name="x")
    async with asyncorm.atomic():
        await asyncorm.batch(
            functools.partial(create, remote_id=1), functools.partial(create, remote_id=2)
        )
        asyncorm.set_rollback(True)
    assert not await Item.objects.native_exists()
    async with asyncorm.atomic(isolation_level=IsolationLevel.SERIALIZABLE):
        levels = await asyncorm.batch(*[lambda: value("SHOW transaction_isolation")] * 2)
        await asyncorm.batch(
            functools.partial(create, remote_id=1), functools.partial(create, remote_id=2)
        )
    assert levels == ["serializable"] * 2
    assert await Item.objects.native_count() == 2


@pytest.mark.usefixtures("tasks_begin")
async def test_inside_a_block(items: None) -> None:
    def count() -> int:
        return int(Item.objects.count())

    async with asyncorm.atomic():
        pid = await asyncorm.native(backend_pid)()
        await Item.objects.native_create(remote_id=1, name="x")
        began, sent = pipelines()
        results = await asyncorm.batch(count, backend_pid, count)
        assert results == [1, pid, 1]
        assert pipelines() == (began + 1, sent + 3)
        with pytest.raises(ZeroDivisionError):
            await asyncorm.batch(count, lambda: 1 / 0)
        await Item.objects.native_create(remote_id=2, name="x")
    assert await Item.objects.native_count() == 2


async def test_inside_a_kept_connection(items: None) -> None:
    def remember(number: int) -> int:
        with connection.cursor() as cursor:
            cursor.execute("SET asyncorm.number = %s", [number])
        return backend_pid()

    def transfer() -> None:
        with transaction.atomic():
            Item.objects.create(remote_id=1)
            Item.objects.create(remote_id=2)

    number = functools.partial(value, "SELECT current_setting('asyncorm.number', true)")
    async with asyncorm.connection():
        first = await asyncorm.batch(number, backend_pid)
        pid = await asyncorm.native(backend_pid)()
        assert first == [None, pid]
        await asyncorm.native(remember)(1)
        before = pipelines()
        found = await asyncorm.batch(number, backend_pid, Tag.objects.count)
        assert found == ["1", pid, await Tag.objects.native_count()]
        assert pipelines()[0] == before[0] + 1
        assert await asyncorm.batch(functools.partial(remember, 2), transfer) == [pid, None]
        assert await asyncorm.native(number)() == "2"
        assert await Item.objects.native_count() == 2
        failed, pids = await asyncorm.batch(lambda: div(0), backend_pid, return_exceptions=True)
        assert isinstance(failed, DataError) and pids == pid
        for delay in (0.0, 0.01, 0.05):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay):
                    await asyncorm.batch(
                        lambda: value("SELECT pg_sleep(10)"), Tag.objects.count, transfer
                    )
            assert await asyncorm.batch(number, backend_pid) == ["2", pid]
        async with asyncorm.atomic():
            assert await asyncorm.batch(number, backend_pid) == ["2", pid]
        # Its child tasks do not inherit it, nor do their batches.
        assert pid not in (await asyncio.create_task(asyncorm.batch(backend_pid)))
    assert (await asyncorm.batch(number))[0] in (None, "")
    await all_given_back()


async def test_a_kept_connection_that_is_lost() -> None:
    async with asyncorm.connection():
        (pid,) = await asyncorm.batch(backend_pid)
        await asyncio.create_task(
            asyncorm.batch(lambda: value("SELECT pg_terminate_backend(%s)", [pid]))
        )
        results = await asyncorm.batch(Tag.objects.count, backend_pid, return_exceptions=True)
        assert all(isinstance(result, OperationalError) for result in results)
        with pytest.raises(OperationalError):
            await asyncorm.batch(Tag.objects.count)
    assert await asyncorm.batch(Tag.objects.count)
    await all_given_back()


async def test_a_database_error_breaks_the_block(items: None) -> None:
    with pytest.raises(IntegrityError):
        async with asyncorm.atomic():
            await Item.objects.native_create(remote_id=1, name="x")
            create = functools.partial(Item.objects.create, remote_id=1, name="x")
            results = await asyncorm.batch(
                Tag.objects.count, create, Tag.objects.count, return_exceptions=True
            )
            assert results[0] == await asyncorm.detached_task(Tag.objects.native_count())
            assert isinstance(results[2], TransactionManagementError)
            with pytest.raises(TransactionManagementError):
                await Tag.objects.native_count()
            raise results[1]
    assert await Item.objects.native_count() == 0
    await all_given_back()


async def test_a_savepoint_protects(items: None) -> None:
    def protected(n: int) -> bool:
        try:
            with transaction.atomic():
                Item.objects.create(remote_id=n, name="x")
        except IntegrityError:
            return False
        return True

    async with asyncorm.atomic():
        results = await asyncorm.batch(
            functools.partial(protected, 1),
            functools.partial(protected, 1),
            functools.partial(protected, 2),
            Tag.objects.count,
        )
    assert sorted(results[:3]) == [False, True, True]
    assert await Item.objects.native_count() == 2


async def test_cancelled(items: None) -> None:
    began = asyncio.Event()

    def slow() -> None:
        began.set()
        value("SELECT pg_sleep(600)")

    batch = asyncio.create_task(asyncorm.batch(slow, slow, Tag.objects.count))
    await began.wait()
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        await all_given_back()
    await eventually(lambda: True)
    assert await Tag.objects.native_count() > 0


async def test_an_operation_may_await(items: None) -> None:
    def waits() -> int:
        first = Tag.objects.count()
        asyncorm.await_(asyncio.sleep(0.01))
        return first + Tag.objects.count()

    tags, twice = await asyncorm.batch(Tag.objects.count, waits)
    assert twice == 2 * tags


@pytest.mark.parametrize("wrong", [3, None, Tag, "x"])
async def test_wrong_operations(wrong: Any) -> None:
    if wrong is Tag:  # callable, and makes an instance
        assert isinstance((await asyncorm.batch(Tag))[0], Tag)
        return
    with pytest.raises(TypeError, match=r"batch\(\) takes querysets"):
        await asyncorm.batch(Tag.objects.native_count(), wrong)


async def test_coroutine_functions() -> None:
    async def own() -> int:
        return await Tag.objects.native_count() + await Tag.objects.native_count()

    one, two, three = await asyncorm.batch(Tag.objects.native_count, own, own())
    assert two == three == 2 * one


async def test_aliases() -> None:
    with pytest.raises(NotSupportedError):
        await asyncorm.batch(lambda: 1, using="legacy")
    with pytest.raises(ConnectionDoesNotExist):
        await asyncorm.batch(lambda: 1, using="nothing")
    one, two = await asyncorm.batch(User.objects.using("other"), Tag.objects.count)
    assert two > 0
    assert all(user._state.db == "other" for user in one)


async def test_many() -> None:
    results = await asyncorm.batch(
        *(functools.partial(value, "SELECT %s::int", [n]) for n in range(300))
    )
    assert results == list(range(300))
