"""Operations outside a transaction run at once, each on a connection of its own."""

import asyncio
import time
from typing import Any

import pytest
from django.db.models import DateTimeField, Func, IntegerField, Value
from django.db.models.functions import Cast
from django.test import override_settings
from django.utils import timezone

from asyncorm import native
from tests.project.shop.models import Tag
from tests.support import all_given_back, database, in_thread, sleep

pytestmark = pytest.mark.usefixtures("shop_data")


class Slow(Func):
    """A column that takes its time: the server sleeps for each row."""

    function = "pg_sleep"
    template = "(SELECT pg_backend_pid() FROM (SELECT %(function)s(%(expressions)s)) AS s)"
    output_field = IntegerField()


def slow(seconds: float, using: str = "default") -> Any:
    began = Func(template="clock_timestamp()", output_field=DateTimeField())
    return Tag.objects.using(using).annotate(began=began, pid=Slow(Value(seconds)))


@pytest.mark.parametrize("name", ["native_get", "aget"])
async def test_two_gets_run_on_two_backends_at_once(name: str) -> None:
    with override_settings(ASYNCORM={"SWAP_MANAGERS": True}):
        began = time.monotonic()
        first, second = await asyncio.gather(
            getattr(slow(1), name)(pk=1), getattr(slow(1), name)(pk=2)
        )
        seconds = time.monotonic() - began
    assert (first.pk, second.pk) == (1, 2)
    assert first.pid != second.pid
    # By the server's clock, the second began before the first had ended.
    assert abs((first.began - second.began).total_seconds()) < 0.9
    assert seconds < 1.9


async def test_without_the_swap_django_takes_turns() -> None:
    """What the above would be otherwise: the test can fail."""
    began = time.monotonic()
    with override_settings(ASYNCORM={"SWAP_MANAGERS": False}):
        found = await asyncio.gather(slow(0.2).aget(pk=1), slow(0.2).aget(pk=2))
    assert time.monotonic() - began > 0.4
    assert len({tag.pid for tag in found}) == 1
    await in_thread(lambda: None)


async def test_ten_slow_queries_take_about_as_long_as_one() -> None:
    await asyncio.gather(*[native(sleep)(0.05) for _ in range(10)])  # opens the connections
    began = time.monotonic()
    pids = await asyncio.gather(*[native(sleep)(0.3) for _ in range(10)])
    assert len(set(pids)) == 10
    assert time.monotonic() - began < 2  # one after the other 3 s


async def test_a_cold_pool_is_parallel_too() -> None:
    began = time.monotonic()
    pids = await asyncio.gather(*[native(sleep)(0.5) for _ in range(10)])
    assert len(set(pids)) == 10
    assert time.monotonic() - began < 4  # one after the other 5 s


async def test_the_pools_size_is_the_limit() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        began = time.monotonic()
        found = await asyncio.gather(*[slow(0.2, alias).native_get(pk=1 + n % 2) for n in range(6)])
        assert time.monotonic() - began >= 0.6
    assert len({tag.pid for tag in found}) == 2


async def test_everything_is_given_back() -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(Tag.objects.native_count())
    stats = await all_given_back()
    assert stats["pool_size"] <= 20
    assert stats["requests_num"] >= 50


async def test_results_do_not_mix() -> None:
    async def one(n: int) -> Any:
        tags = await Tag.objects.annotate(n=Cast(Value(n), IntegerField())).anative()
        return {tag.n for tag in tags}

    assert await asyncio.gather(*map(one, range(100))) == [{n} for n in range(100)]


async def test_two_aliases_at_once() -> None:
    began = time.monotonic()
    await asyncio.gather(slow(1).native_get(pk=1), slow(1, "other").native_get(pk=1))
    assert time.monotonic() - began < 1.9


async def test_the_clock_of_the_server_is_ours() -> None:
    """What the first test's margins rest on."""
    tag = await slow(0).native_get(pk=1)
    assert abs((tag.began - timezone.now()).total_seconds()) < 5
