"""Loops that live for one call: what they open, what they leave, and that nothing is lost by it."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from asgiref.sync import async_to_sync
from django.db import OperationalError, connections

import asyncorm
from asyncorm import native, pools
from tests.project.shop.models import Tag
from tests.support import (
    administrator,
    backend_pid,
    database,
    eventually,
    free_port,
    run_script,
    server_connections,
    value,
)

pytestmark = pytest.mark.usefixtures("shop_data")


@pytest.fixture
def alias() -> Iterator[str]:
    """A database of its own whose pool would like to have four connections."""
    with database(OPTIONS={"pool": {"min_size": 4, "max_size": 5}}) as alias:
        yield alias


def nap(using: str) -> int:
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_sleep(0.2), pg_backend_pid()")
        return int(cursor.fetchone()[1])


def test_one_call_opens_one_connection_and_starts_nothing(alias: str) -> None:
    async def call() -> tuple[int, int, int]:
        threads = set(threading.enumerate())
        await Tag.objects.using(alias).native_get(pk=1)
        return (
            server_connections(ask, alias),
            len(asyncio.all_tasks()),
            len(set(threading.enumerate()) - threads),
        )

    with administrator() as ask:
        assert async_to_sync(call)() == (1, 1, 0)
        assert asyncio.run(call()) == (1, 1, 0)


def test_gathered_calls_in_it_run_at_once(alias: str) -> None:
    async def call() -> set[int]:
        return set(await asyncio.gather(*[native(nap)(alias) for _ in range(9)]))

    assert len(async_to_sync(call)()) == 5
    assert len(asyncio.run(call())) == 5


async def test_no_task_is_left_when_the_work_is_done(alias: str) -> None:
    """Whatever maintenance there was: growth, a reset, a connection that the server ended."""
    before = asyncio.all_tasks()
    await asyncio.gather(*[native(nap)(alias) for _ in range(5)])
    await native(value)("SELECT set_config('my.marker', '1', false)", using=alias)
    with administrator() as ask:
        ask(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = %s",
            alias,
        )
    await eventually(lambda: asyncio.all_tasks() <= before)
    assert await Tag.objects.using(alias).native_count() == 6
    await eventually(lambda: asyncio.all_tasks() <= before)


async def test_who_waits_is_served_although_what_connects_was_cancelled(alias: str) -> None:
    """As by who cancels every task that he did not start."""
    call = asyncio.create_task(Tag.objects.using(alias).native_count())
    cancelled = 0
    while not call.done():
        for task in asyncio.all_tasks():
            if cancelled < 3 and task.get_name() == f"asyncorm-{alias}-worker":
                task.cancel()
                cancelled += 1
        await asyncio.sleep(0)
    assert await call == 6
    assert cancelled == 3
    pids = await asyncio.gather(*[native(nap)(alias) for _ in range(9)])
    assert len(set(pids)) == 5


def test_the_first_connection_is_refused_as_any(alias: str) -> None:
    connections.settings[alias].update(HOST="127.0.0.1", PORT=str(free_port()))

    async def call() -> None:
        try:
            await Tag.objects.using(alias).native_count()
        finally:
            await eventually(lambda: len(asyncio.all_tasks()) == 1)

    for _ in range(2):
        with pytest.raises(OperationalError, match="Cannot connect to database 'extra'"):
            async_to_sync(call)()


def test_a_cancelled_first_connection_is_not_left_on_the_server(alias: str) -> None:
    async def call(turns: int) -> None:
        task = asyncio.create_task(native(backend_pid)(alias))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    with administrator() as ask:
        for turns in range(12):
            asyncio.run(call(turns))
        assert asyncio.run(native(value)("SELECT 1", using=alias)) == 1
        asyncio.run(eventually(lambda: server_connections(ask, alias) == 0))


def test_loops_that_end_with_maintenance_under_way_end_quietly() -> None:
    """A loop that is closed without `shutdown_asyncgens()`, while connections are being made."""
    script = """
import asyncio, gc, django
django.setup()
from asyncorm import native, pools
from tests.support import backend_pid

async def main(turns):
    calls = [asyncio.create_task(native(backend_pid)()) for _ in range(4)]
    for _ in range(turns):
        await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)

for turns in range(0, 40, 4):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main(turns))
    loop.close()
    asyncio.run(native(backend_pid)())
    gc.collect()
print(len(pools._pools))
"""
    done = run_script(script)
    assert (done.stderr, done.stdout) == ("", "0\n")


async def test_statistics_and_closing_before_any_maintenance(alias: str) -> None:
    await Tag.objects.using(alias).native_count()
    stats = asyncorm.pool_stats(alias)
    assert (stats["pool_size"], stats["pool_available"], stats["pool_min"]) == (1, 1, 4)
    await asyncorm.close_pools(alias)
    assert pools.find(alias) is None
    with administrator() as ask:
        await eventually(lambda: server_connections(ask, alias) == 0)
