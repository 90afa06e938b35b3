"""Loops that live for one call: what they open, what they leave, and that nothing is lost by it."""

import asyncio
import gc
import socket
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import OperationalError, close_old_connections, connections
from django.test import override_settings

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
        connections[alias].close()
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
        pids = ask(
            "SELECT array_agg(pid) FROM (SELECT pid, pg_terminate_backend(pid) "
            "FROM pg_stat_activity WHERE application_name = %s) AS ended",
            alias,
        )
        # The server says that it will: until then a statement may still be sent on one of them.
        await eventually(
            lambda: not ask("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)", pids)
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


async def test_a_connection_whose_reset_was_cancelled_is_replaced(alias: str) -> None:
    connections.settings[alias]["OPTIONS"]["pool"] = {"min_size": 0, "max_size": 1, "timeout": 5}
    own = asyncio.all_tasks()
    cancelled = 0
    for turns in range(1, 4):  # not begun yet, or under way
        await native(value)("SELECT set_config('my.marker', '1', false)", using=alias)
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - own:
            cancelled += task.cancel()
        marker = "SELECT coalesce(current_setting('my.marker', true), '')"
        assert await native(value)(marker, using=alias) == ""
    assert cancelled
    assert asyncorm.pool_stats(alias)["pool_size"] == 1


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_loop_ends_at_once_although_the_server_is_silent(alias: str, gives_up: bool) -> None:
    async def call() -> None:
        task = asyncio.create_task(native(backend_pid)(alias))
        await eventually(lambda: asyncorm.pool_stats(alias).get("connections_num"))
        if gives_up:
            task.cancel()
            await asyncio.wait([task])

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        connections.settings[alias].update(HOST="127.0.0.1", PORT=port)
        began = time.monotonic()
        asyncio.run(call())
        assert time.monotonic() - began < 15


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
print(len(pools.everywhere()))
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


# A thread keeps a connection between the loops that it waits for


@pytest.fixture
def aged() -> Iterator[str]:
    """A database whose connections may be ten minutes old.

    An alias of its own: a thread that works for loops may have a connection of an earlier test's
    with something in it, which would be lent.
    """
    with database("aged", CONN_MAX_AGE=600, OPTIONS={"pool": None}) as alias:
        yield alias
        connections[alias].close()


def one(alias: str) -> int:
    return async_to_sync(native(backend_pid))(alias)


def wait_for_connections(alias: str, number: int) -> None:
    with administrator() as ask:
        asyncio.run(eventually(lambda: server_connections(ask, alias) == number))


def test_calls_of_a_thread_use_one_connection(aged: str) -> None:
    first = one(aged)
    assert [one(aged) for _ in range(3)] == [first] * 3
    wait_for_connections(aged, 1)


def test_without_conn_max_age_it_is_kept_as_djangos_own(alias: str) -> None:
    """Which nobody closes in a command or a script: only the end of a request does."""
    first = one(alias)
    assert one(alias) == first
    close_old_connections()
    wait_for_connections(alias, 0)
    assert one(alias) != first
    close_old_connections()


def test_of_gathered_calls_one_connection_is_kept(aged: str) -> None:
    async def call() -> set[int]:
        return set(await asyncio.gather(*[native(nap)(aged) for _ in range(3)]))

    first = one(aged)
    pids = async_to_sync(call)()
    assert len(pids) == 3 and first in pids
    assert one(aged) in pids
    wait_for_connections(aged, 1)


def test_a_loop_that_nobody_waits_for_keeps_nothing(aged: str) -> None:
    first = one(aged)
    assert asyncio.run(native(backend_pid)(aged)) != first
    wait_for_connections(aged, 1)
    assert one(aged) == first


def test_a_thread_that_works_for_a_loop_leaves_it_its_pool(aged: str) -> None:
    """Its coroutine runs on that loop, which goes on."""

    async def call() -> None:
        first = await sync_to_async(one)(aged)
        assert await native(backend_pid)(aged) == first
        assert pools.find(aged) is not None
        assert await sync_to_async(one)(aged) == first

    asyncio.run(call())
    wait_for_connections(aged, 0)


def test_each_thread_keeps_its_own_until_it_ends(aged: str) -> None:
    pids: list[list[int]] = []
    begun = threading.Barrier(3)

    def work() -> None:
        mine = [one(aged)]
        begun.wait(30)
        pids.append([*mine, one(aged)])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(first == second for first, second in pids)
    assert len({first for first, _ in pids}) == 3
    wait_for_connections(aged, 0)


@pytest.mark.parametrize("close", ["close", "close_all", "close_pool"])
def test_what_closes_djangos_connection_closes_it(aged: str, close: str) -> None:
    one(aged)
    if close == "close_all":
        connections.close_all()
    else:
        getattr(connections[aged], close)()
    wait_for_connections(aged, 0)


def test_close_all_while_its_loop_runs_leaves_nothing(aged: str) -> None:
    first = one(aged)

    async def call() -> int:
        if used_before:
            assert await native(backend_pid)(aged) == first
        await sync_to_async(connections.close_all)()
        return await native(backend_pid)(aged)

    for used_before in (True, False):
        assert (async_to_sync(call)() == first) is used_before
        wait_for_connections(aged, 0)
        first = one(aged)


async def test_a_retired_pool_is_not_kept_by_its_timers(alias: str) -> None:
    await Tag.objects.using(alias).native_count()
    found = pools.find(alias)
    assert found is not None
    pool = weakref.ref(found.connections)
    del found
    pools.discard_pools(alias)

    def is_gone() -> bool:
        gc.collect()
        return pool() is None

    await eventually(is_gone)


def test_the_end_of_a_request_closes_it_when_it_is_old() -> None:
    with database(CONN_MAX_AGE=0.5, OPTIONS={"pool": None}) as aged:
        one(aged)
        close_old_connections()
        wait_for_connections(aged, 1)
        time.sleep(0.6)
        one(aged)  # an old one that nobody has closed is used, as Django's
        wait_for_connections(aged, 1)
        close_old_connections()
        wait_for_connections(aged, 0)


def test_conn_max_age_none_is_for_ever() -> None:
    with database(CONN_MAX_AGE=None, OPTIONS={"pool": None}) as aged:
        first = one(aged)
        close_old_connections()
        assert one(aged) == first
        connections[aged].close()


def test_close_pools_leaves_nothing(aged: str) -> None:
    async def call() -> None:
        await native(backend_pid)(aged)
        await asyncorm.close_pools(aged)

    async_to_sync(call)()
    wait_for_connections(aged, 0)


def test_one_that_the_server_has_closed_is_replaced(aged: str) -> None:
    with administrator() as ask:
        for _ in range(3):
            pid = one(aged)
            ask("SELECT pg_terminate_backend(%s)", pid)
            wait_for_connections(aged, 0)
            assert one(aged) != pid


def test_what_a_call_leaves_in_the_session_nobody_sees(aged: str) -> None:
    def mark() -> int:
        with connections[aged].cursor() as cursor:
            cursor.execute("SET my.marker = 'left'")
        return backend_pid(aged)

    async_to_sync(native(mark))()
    marker = "SELECT coalesce(current_setting('my.marker', true), '')"
    assert async_to_sync(native(value))(marker, using=aged) == ""


def test_one_in_a_transaction_is_not_kept(aged: str) -> None:
    async def call() -> int:
        block = asyncorm.atomic(using=aged)
        await block.__aenter__()
        abandoned.append(block)
        return await native(backend_pid)(aged)

    abandoned: list[object] = []
    first = async_to_sync(call)()
    assert one(aged) != first
    wait_for_connections(aged, 1)


def test_changed_settings_reach_the_next_call(aged: str) -> None:
    name = "SELECT current_database()"
    other = connections.settings["other"]["NAME"]
    assert async_to_sync(native(value))(name, using=aged) != other
    connections.settings[aged]["NAME"] = other
    assert async_to_sync(native(value))(name, using=aged) == other
    zone = "SELECT current_setting('TimeZone')"
    assert async_to_sync(native(value))(zone, using=aged) == "UTC"
    with override_settings(USE_TZ=False, TIME_ZONE="Asia/Tokyo"):
        assert async_to_sync(native(value))(zone, using=aged) == "Asia/Tokyo"
    assert async_to_sync(native(value))(zone, using=aged) == "UTC"


def test_max_lifetime_and_checks_hold_for_it(aged: str) -> None:
    connections.settings[aged]["CONN_HEALTH_CHECKS"] = True
    assert one(aged) == one(aged)
    assert asyncio.run(native(value)("SELECT 1", using=aged)) == 1


def test_statistics_of_a_loop_that_begins_with_it(aged: str) -> None:
    async def call() -> dict[str, int]:
        await native(backend_pid)(aged)
        return asyncorm.pool_stats(aged)

    for _ in range(2):
        stats = async_to_sync(call)()
        assert (stats["pool_size"], stats["pool_available"]) == (1, 1)


def test_a_child_process_has_no_part_in_it() -> None:
    script = """
import asyncio, gc, os, django
from tests.project import settings
settings.DATABASES["default"]["CONN_MAX_AGE"] = 600
settings.DATABASES["default"]["OPTIONS"]["pool"] = None
django.setup()
from asgiref.sync import async_to_sync
from django.db import connections
from asyncorm import native
from tests.support import backend_pid
one = async_to_sync(native(backend_pid))
first = one()
for closes in (False, True):
    if not (child := os.fork()):
        if closes:
            connections.close_all()
        pid = one()
        assert pid != first and one() == pid
        connections.close_all()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert one() == first
connections.close_all()
"""
    done = run_script(script)
    assert (done.stderr, done.returncode) == ("", 0)


def test_what_a_script_keeps_ends_quietly_with_it(fresh_shop: object) -> None:
    script = """
import django
django.setup()
from asgiref.sync import async_to_sync
from asyncorm import native
from tests.support import backend_pid
one = async_to_sync(native(backend_pid))
assert one() == one()
"""
    done = run_script(script)
    assert (done.stderr, done.returncode) == ("", 0)


# Other ways to have a loop


def test_a_runner_keeps_its_pool_between_calls(alias: str) -> None:
    with asyncio.Runner() as runner:
        pids = {runner.run(native(backend_pid)(alias)) for _ in range(5)}
        assert len(pids) == 1
        with administrator() as ask:
            for pid in pids:
                ask("SELECT pg_terminate_backend(%s)", pid)  # while its loop does not run
        wait_for_connections(alias, 0)
        assert runner.run(native(backend_pid)(alias)) not in pids
    wait_for_connections(alias, 0)


def test_a_process_that_gevent_has_patched_is_told_so(fresh_shop: object) -> None:
    pytest.importorskip("gevent")
    script = """
from gevent import monkey
monkey.patch_all()
import gevent, django
django.setup()
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from tests.project.shop.models import Tag

async def count():
    return await Tag.objects.native_count()

def call():
    try:
        async_to_sync(count)()
    except ImproperlyConfigured as exc:
        return str(exc)

found = gevent.spawn(call)
found.join()
print(found.value)
print(Tag.objects.count() >= 0)
"""
    # gevent itself warns of nothing that concerns us.
    done = run_script(script, "-W", "default")
    assert "gevent has patched this process" in done.stdout, done.stderr
    assert "short-loops.md#gevent" in done.stdout
    assert done.stdout.endswith("True\n")
