"""asyncorm.parallelism(): at most so many connections at once."""

import asyncio
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connections
from django.test import override_settings

import asyncorm
from asyncorm import limits, native, pools
from asyncorm.asgi import limited
from tests.project.shop.models import Tag
from tests.support import all_given_back, backend_pid, database, eventually, sleep, value

pytestmark = pytest.mark.usefixtures("shop_data")


@pytest.fixture
def alias(shop_data: None) -> Iterator[str]:
    """An alias with ten connections at most."""
    with database("limited", OPTIONS={"pool": {"min_size": 0, "max_size": 10}}) as name:
        yield name


class Meter:
    """How many operations slept on the server at once, by the server's clock."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.times: list[tuple[float, int, int]] = []
        self.pids: set[int] = set()

    async def nap(self, number: int = 0, seconds: float = 0.02) -> None:
        def work() -> None:
            with connections[self.alias].cursor() as cursor:
                cursor.execute(
                    "SELECT pg_backend_pid(), extract(epoch FROM clock_timestamp()), pg_sleep(%s),"
                    " extract(epoch FROM clock_timestamp())",
                    [seconds],
                )
                pid, began, _, ended = cursor.fetchone()
                self.pids.add(pid)
                self.times += [(began, 1, number), (ended, -1, number)]

        await native(work)()

    @property
    def most(self) -> int:
        return max(accumulate(change for _, change, _ in sorted(self.times)))

    @property
    def order(self) -> list[int]:
        return [number for _, change, number in sorted(self.times) if change > 0]


async def test_at_most_so_many(alias: str) -> None:
    meter = Meter(alias)
    async with asyncorm.parallelism(3, using=alias):
        await asyncio.gather(*[meter.nap(n) for n in range(12)])
    assert meter.most == 3
    stats = await all_given_back(alias)
    assert stats["requests_waiting"] == 0


async def test_without_a_limit_there_are_more(alias: str) -> None:
    meter = Meter(alias)
    await asyncio.gather(*[meter.nap(n, 0.1) for n in range(12)])
    assert meter.most > 3


async def test_one_is_strictly_one_after_another_on_one_session(alias: str) -> None:
    meter = Meter(alias)
    with override_settings(ASYNCORM={"MULTIPLEXING": False}):
        with asyncorm.parallelism(1, using=alias):
            tasks = [asyncio.create_task(meter.nap(n)) for n in range(8)]
        await asyncio.gather(*tasks)
    assert meter.most == 1
    assert meter.order == list(range(8))
    assert len(meter.pids) == 1


async def test_statements_wait_together_for_their_turn(alias: str) -> None:
    async with asyncorm.parallelism(1, using=alias):
        found = await asyncio.gather(
            *[native(value)("SELECT %s::int", [n], using=alias) for n in range(50)]
        )
    assert found == list(range(50))
    await all_given_back(alias)


async def test_reads_that_wait_travel_together(alias: str) -> None:
    before = asyncorm.pool_stats(alias).get("statements_pipelined", 0)
    await native(value)("SELECT 1", using=alias)
    meter = Meter(alias)
    async with asyncorm.parallelism(2, using=alias):
        naps = [asyncio.create_task(meter.nap(n, 0.1)) for n in range(2)]
        await asyncio.sleep(0.02)  # both connections are in use, and eight more are free
        reads = [asyncio.create_task(native(value)(f"SELECT {n}", using=alias)) for n in range(20)]
        assert await asyncio.gather(*reads) == list(range(20))
        await asyncio.gather(*naps)
    stats = await all_given_back(alias)
    assert stats["statements_pipelined"] - before >= 18


async def test_one_keeps_the_order_of_reads_and_writes(alias: str, fresh_shop: Any) -> None:
    async def write(number: int) -> None:
        await Tag.objects.using(alias).native_create(name=f"number {number}")

    async def read() -> int:
        return await Tag.objects.using(alias).native_count()

    there = await read()
    async with asyncorm.parallelism(1, using=alias):
        calls = [read() if n % 3 else write(n) for n in range(60)]
        seen = await asyncio.gather(*calls)
    numbers = [number - there for number in seen if number is not None]
    assert numbers == [n // 3 + 1 for n in range(60) if n % 3]


async def test_the_narrower_limit_holds(alias: str) -> None:
    for outer, inner in [(2, 5), (5, 2)]:
        meter = Meter(alias)
        async with asyncorm.parallelism(outer, using=alias):
            async with asyncorm.parallelism(inner, using=alias):
                await asyncio.gather(*[meter.nap(n) for n in range(8)])
        assert meter.most == 2


async def test_one_object_is_one_limit_for_all_who_enter_it(alias: str) -> None:
    limit = asyncorm.parallelism(2, using=alias)
    meter = Meter(alias)

    async def request() -> None:
        async with limit:
            await asyncio.gather(*[meter.nap() for _ in range(4)])

    await asyncio.gather(*[request() for _ in range(3)])
    assert meter.most == 2


async def test_others_are_not_limited(alias: str) -> None:
    meter = Meter(alias)
    async with asyncorm.parallelism(1, using=alias):
        tasks = [asyncio.create_task(meter.nap()) for _ in range(3)]
    free = Meter(alias)
    await asyncio.gather(*tasks, *[free.nap(seconds=0.1) for _ in range(5)])
    assert meter.most == 1
    assert free.most > 1


async def test_blocks_and_streams_count(alias: str) -> None:
    from tests.project.shop.models import Tag

    async with asyncorm.parallelism(1, using=alias):

        async def block() -> int:
            async with asyncorm.atomic(alias):
                first = await native(backend_pid)(alias)
                await asyncio.sleep(0.01)
                assert await native(backend_pid)(alias) == first
                return int(first)

        async def stream() -> None:
            async for _ in Tag.objects.using(alias).native_iterator(chunk_size=2):
                pass

        results = await asyncio.gather(block(), stream(), block())
    assert results[0] == results[2]
    await all_given_back(alias)


async def test_a_kept_connection_that_was_reset_is_given_back(alias: str) -> None:
    """Resetting its session makes another twin of it."""
    with asyncorm.parallelism(2, using=alias):
        for _ in range(3):
            async with asyncorm.connection(alias):
                await native(backend_pid)(alias)
            await native(backend_pid)(alias)
            stats = asyncorm.pool_stats(alias)
            assert stats["pool_available"] == stats["pool_size"]


async def test_waiting_for_oneself_is_an_error(alias: str) -> None:
    async with asyncorm.parallelism(1, using=alias):
        async with asyncorm.atomic(alias):
            await native(value)("SELECT 1", using=alias)
            async with asyncorm.detached():
                with pytest.raises(OperationalError, match=r"Deadlock.*test_limits\.py"):
                    await native(value)("SELECT 2", using=alias)
            assert await native(value)("SELECT 3", using=alias) == 3
    await all_given_back(alias)


async def test_a_cancelled_wait_takes_no_turn(alias: str) -> None:
    async with asyncorm.parallelism(1, using=alias):
        busy = asyncio.create_task(native(lambda: nap(alias))())
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(native(lambda: nap(alias))()) for _ in range(3)]
        await asyncio.sleep(0.02)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await busy
        assert await native(value)("SELECT 1", using=alias) == 1
    await all_given_back(alias)


def nap(alias: str) -> Any:
    return value("SELECT pg_sleep(0.2)", using=alias)


async def test_the_setting(alias: str) -> None:
    with override_settings(ASYNCORM={"PARALLELISM": 2}):
        meter = Meter(alias)
        await asyncio.gather(*[meter.nap() for _ in range(6)])
        assert meter.most == 2
        await asyncorm.close_pools(alias)


@pytest.mark.parametrize("key", ["PARALLELISM", "STATEMENT_CACHE_SIZE"])
@pytest.mark.parametrize("wrong", [0, -1, True, "2"])
def test_wrong_settings(key: str, wrong: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match=key):
        with override_settings(ASYNCORM={key: wrong}):
            pass


@pytest.mark.parametrize("wrong", [0, -1])
def test_wrong_numbers(wrong: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        asyncorm.parallelism(wrong)


@pytest.mark.parametrize("wrong", [True, "2", None, 1.5])
def test_not_numbers(wrong: Any) -> None:
    with pytest.raises(TypeError, match="parallelism"):
        asyncorm.parallelism(wrong)


async def test_it_is_kept_while_anything_runs(alias: str) -> None:
    """While others of the context run, an operation's connection stays with the context."""
    async with asyncorm.parallelism(2, using=alias):
        running = asyncio.create_task(native(lambda: nap(alias))())
        await asyncio.sleep(0.05)
        pids = {await native(backend_pid)(alias) for _ in range(5)}
        assert len(pids) == 1
        assert asyncorm.pool_stats(alias)["pool_available"] == 0
        await running
    stats = await all_given_back(alias)
    assert stats["pool_size"] == 2


async def test_a_connection_lost_meanwhile_is_replaced(alias: str) -> None:
    async with asyncorm.parallelism(1, using=alias):
        with pytest.raises(OperationalError):
            await native(value)("SELECT pg_terminate_backend(pg_backend_pid())", using=alias)
        assert await native(value)("SELECT 1", using=alias) == 1
        await native(sleep)(0.01)


async def test_each_request_is_limited(alias: str) -> None:
    meters = [Meter(alias), Meter(alias)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.gather(*[scope["meter"].nap(seconds=0.05) for _ in range(6)])

    application = limited(app, parallelism=2, using=alias)
    await asyncio.gather(*[application({"type": "http", "meter": m}, None, None) for m in meters])
    assert [meter.most for meter in meters] == [2, 2]


def test_a_wrong_limit_is_refused_at_start_up() -> None:
    with pytest.raises(ValueError, match="positive"):
        limited(lambda scope, receive, send: asyncio.sleep(0), parallelism=0)


async def test_who_gives_up_waiting_leaves_nothing_kept(alias: str) -> None:
    """The connection that was kept for a task goes back if it is cancelled before it has it."""
    held, go = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with asyncorm.atomic(using=alias):
            await native(value)("SELECT 1", using=alias)
            held.set()
            await go.wait()
        waiting.cancel()

    with override_settings(ASYNCORM={"MULTIPLEXING": False}):
        async with asyncorm.parallelism(1, using=alias):
            holding = asyncio.create_task(hold())
            await held.wait()
            waiting = asyncio.create_task(native(value)("SELECT 2", using=alias))
            pool: Any = pools.find(alias)
            await eventually(lambda: limits.source(pool).waiting)
            go.set()
            await holding
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await all_given_back(alias)
    await asyncorm.close_pools(alias)


async def test_nothing_is_kept_after_connection(alias: str) -> None:
    """It resets the connection, which is the limit's all the same."""
    async with asyncorm.parallelism(1, using=alias):
        for _ in range(2):
            async with asyncorm.connection(using=alias):
                await native(value)("SELECT 1", using=alias)
                waiting = asyncio.create_task(native(value)("SELECT 2", using=alias))
                await eventually(lambda: limits.source(pools.find(alias)).waiting)  # type: ignore[arg-type]
            await waiting
            await all_given_back(alias)
    await asyncorm.close_pools(alias)
