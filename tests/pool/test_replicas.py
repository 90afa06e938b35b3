"""Reads on standbys that lag, stand still or are down: nobody misses what he has written."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connections, transaction

import asyncorm
from asyncorm.asgi import open_pools
from asyncorm.replicas import ReplicaRouter, positions
from tests.pool.test_standby import ask
from tests.project.myapp.models import Item
from tests.standbys import (
    POOL,
    REPLICAS,
    Servers,
    ids,
    position_now,
    reached,
    read_by,
    readable,
    request,
    routed,
    trio,
)
from tests.support import database, eventually, in_thread


@pytest.fixture(scope="module")
def servers(django_db_setup: Any) -> Iterator[Servers]:
    with trio() as servers:
        yield servers


@pytest.fixture
def aliases(servers: Servers, django_db_blocker: Any) -> Iterator[Servers]:
    with django_db_blocker.unblock(), reached(servers):
        yield servers


@pytest.fixture
def router(aliases: Servers, settings: Any) -> Iterator[ReplicaRouter]:
    with routed(settings) as router:
        yield router


async def add(**values: Any) -> Item:
    return await Item.objects.native_create(remote_id=next(ids), **values)


async def seen(item: Item) -> bool:
    return await Item.objects.filter(remote_id=item.remote_id).native_exists()


async def test_reads_go_to_the_replicas(router: ReplicaRouter) -> None:
    assert Item.objects.all().db == "primary", "nobody knows yet how far they are"
    await read_by(router, *REPLICAS)
    used: Counter[str] = Counter()
    for _ in range(60):
        with request():
            used[Item.objects.all().db] += 1
    assert used.keys() == set(REPLICAS), used
    assert Item.objects.using("primary").db == "primary"
    async with asyncorm.atomic("primary"):
        assert Item.objects.all().db == "primary"
    with request():
        assert len({Item.objects.all().db for _ in range(30)}) == 1, "one request reads on one"


@pytest.mark.parametrize("delay", [0, 300, 5000])
async def test_own_writes_are_seen(router: ReplicaRouter, servers: Servers, delay: int) -> None:
    await read_by(router, *REPLICAS)
    servers.delay(delay)
    for number in range(3 if delay > 1000 else 12):
        with request() as need:
            item = await add(name="x")
            assert await seen(item), "same statement after"
            await asyncio.sleep(number / 20)  # the watcher asks meanwhile
            assert await seen(item)
            children = await asyncio.gather(*(add(name="y") for _ in range(4)))
            assert all(await asyncio.gather(*map(seen, children))), "siblings"
            assert all([await seen(child) for child in children]), "what gathered children wrote"
            async with asyncorm.atomic("primary"):
                inside = await add()
                assert await seen(inside)
            assert await seen(inside), "after the block"
            raw = next(ids)
            async with asyncorm.cursor("primary") as cursor:
                await cursor.execute("SELECT add(%s)", [raw])
            assert await Item.objects.filter(remote_id=raw).native_exists(), "a function"
            assert need.wrote
        with request(primary=await position_now()):
            assert await seen(item)
            assert await seen(inside)


async def test_a_context_goes_back_to_the_replicas(router: ReplicaRouter) -> None:
    await read_by(router, *REPLICAS)
    with request():
        await add()
        assert Item.objects.all().db == "primary"
        await eventually(lambda: Item.objects.all().db != "primary")
        with request():
            assert Item.objects.all().db != "primary", "another request has written nothing"


async def test_a_standby_that_stands_still_is_left(
    aliases: Servers, settings: Any, servers: Servers
) -> None:
    with routed(settings, max_lag=2.0) as router:
        await read_by(router, *REPLICAS)
        await asyncio.sleep(3)
        await read_by(router, *REPLICAS, seconds=1)  # nobody writes: nothing lags
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(write_on())
            ask(servers.standbys[0], "SELECT pg_wal_replay_pause()")
            paused = time.monotonic()
            try:
                with request():
                    await read_by(router, "r2")
                assert 0.5 < time.monotonic() - paused < 8, "max_lag and a second are usual"
                assert router.watcher.replicas["r1"].problem is None
            finally:
                ask(servers.standbys[0], "SELECT pg_wal_replay_resume()")
            await read_by(router, *REPLICAS)
            writing.cancel()


async def write_on() -> None:
    with request():
        while True:
            await add()
            await asyncio.sleep(0.02)


async def test_both_down(router: ReplicaRouter, servers: Servers) -> None:
    await read_by(router, *REPLICAS)
    for standby in servers.standbys:
        await asyncio.to_thread(standby.stop, "immediate")
    try:
        await read_by(router)
        for _ in range(20):
            with request():
                assert await Item.objects.native_count() == 0
    finally:
        for standby in servers.standbys:
            await asyncio.to_thread(standby.start)
    await read_by(router, *REPLICAS)


async def test_a_server_that_is_replaced_is_not_followed(
    router: ReplicaRouter, servers: Servers
) -> None:
    """It was made read-only and runs on, with standbys: these do not get what is written now."""
    await read_by(router, *REPLICAS)
    watcher = router.watcher
    try:
        ask(servers.primary, "ALTER SYSTEM SET default_transaction_read_only = on")
        ask(servers.primary, "SELECT pg_reload_conf()")
        await eventually(lambda: watcher.away)
    finally:
        ask(servers.primary, "ALTER SYSTEM RESET default_transaction_read_only")
        ask(servers.primary, "SELECT pg_reload_conf()")
    await eventually(lambda: not watcher.away)
    await read_by(router, *REPLICAS)
    # The next primary is there, and the replicas were not asked since whom they follow.
    with request(primary=positions.Position("other.2", 1)):
        watcher._see_primary("primary", time.monotonic(), (False, "other.2", 1, 1))
        assert Item.objects.all().db == "primary"


async def test_a_promoted_standby_serves_until_the_primary_answers(router: ReplicaRouter) -> None:
    """It may be the next one, which a proxy has not found yet."""
    await read_by(router, *REPLICAS)
    watcher, replica = router.watcher, router.watcher.replicas["r1"]
    now = await position_now()
    watcher._see_replica("r1", promoted := time.monotonic(), (False, now.server, now.lsn))
    assert "r1" in readable(router)
    watcher._see_primary("primary", time.monotonic(), (False, now.server, now.lsn, now.lsn))
    watcher._see_replica("r1", time.monotonic(), (False, now.server, now.lsn))
    assert "r1" not in readable(router)
    assert replica.promoted == promoted
    await read_by(router, *REPLICAS)


async def test_a_server_starts_without_a_replica(
    router: ReplicaRouter, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(servers.standbys[0].stop, "immediate")
    try:
        async with open_pools(["primary", *REPLICAS]):
            assert asyncorm.pool_stats("r2")["pool_size"]
            assert "Replica 'r1' cannot be reached" in caplog.text
            await eventually(lambda: router.watcher.replicas["r2"].problem is None)
    finally:
        await asyncio.to_thread(servers.standbys[0].start)


async def test_deciding_is_cheap(router: ReplicaRouter) -> None:
    await read_by(router, *REPLICAS)

    def decide() -> float:
        began = time.perf_counter()
        for _ in range(20):  # so few that others do not have the processor meanwhile, each time
            router.db_for_read(Item)
        return (time.perf_counter() - began) / 20

    with request():
        assert min(decide() for _ in range(2000)) < 20e-6  # 5 us are meant, by an idle machine


async def test_relations_stay(router: ReplicaRouter) -> None:
    item = await add()
    assert item._state.db == "primary"
    await read_by(router, *REPLICAS)
    assert router.db_for_read(Item, instance=item) == "primary"
    item._state.db = "r1"
    await eventually(lambda: router.db_for_read(Item, instance=item) == "r1")
    assert router.db_for_write(Item, instance=item) == "primary"
    item._state.db = "elsewhere"
    assert router.db_for_read(Item, instance=item) is None
    assert router.db_for_write(Item, instance=item) is None
    assert router.allow_relation(item, Item()) is None
    assert router.allow_migrate("r1", "myapp") is False
    assert router.allow_migrate("elsewhere", "myapp") is None


@pytest.mark.parametrize("wrong", [{"max_lag": 0}, {"replicas": ["default"]}])
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ImproperlyConfigured):
        ReplicaRouter(**{"replicas": ["r1"], **wrong})


def threaded(function: Any) -> Any:
    return partial(in_thread, function)


INSERT = "INSERT INTO myapp_item (remote_id) VALUES (%s)"
COPY = "COPY myapp_item (remote_id) FROM STDIN"


def copy(number: int) -> None:
    with connections["primary"].cursor() as cursor, cursor.copy(COPY) as lines:
        lines.write_row([number])


def stream(number: int) -> None:
    with connections["primary"].cursor() as cursor:
        list(cursor.cursor.stream(f"{INSERT} RETURNING id", [number]))


def sql(text: str) -> Any:
    def execute(number: int) -> None:
        with connections["primary"].cursor() as cursor:
            cursor.execute(text, [number])

    return execute


WRITES = {
    "create": lambda number: Item.objects.create(remote_id=number),
    "bulk": lambda number: Item.objects.bulk_create([Item(remote_id=number)]),
    "copy": copy,
    "stream": stream,
    "raw": lambda number: list(Item.objects.using("primary").raw("SELECT add(%s) id", [number])),
    "with": sql(f"WITH made AS ({INSERT} RETURNING 1) SELECT * FROM made"),
    **{
        text: sql(text)
        for text in (
            'SELECT "add"(%s)',
            "SELECT public.add(%s)",
            "SELECT add/**/(%s)",
            'SELECT U&"\\0061dd"(%s)',
            "SELECT E'\\'' || add(%s) || ''",
            "SELECT 'lower(' || add(%s) || ')'",
            "VALUES (add(%s))",
            "SELECT count(*) FROM add(%s) AS lower(x)",
            "TABLE myapp_item LIMIT add(%s) * 0",
            "EXPLAIN ANALYZE SELECT add(%s)",
        )
    },
}


@pytest.mark.parametrize("call", [asyncorm.native, threaded], ids=["native", "synchronous"])
async def test_each_way_to_write_is_noticed(
    router: ReplicaRouter, servers: Servers, call: Any
) -> None:
    for name, write in WRITES.items():
        number = next(ids)
        with request() as need:
            await call(write)(number)
        there = ask(servers.primary, f"SELECT count(*) FROM myapp_item WHERE remote_id = {number}")
        assert there == 1, name
        assert need.wrote, name


@pytest.mark.parametrize("call", [asyncorm.native, threaded], ids=["native", "synchronous"])
async def test_a_transaction_that_is_no_block(router: ReplicaRouter, call: Any) -> None:
    """Its rows are read in it, whoever else has the log written to disk meanwhile."""
    await read_by(router, *REPLICAS)

    def by_autocommit() -> list[str]:
        transaction.set_autocommit(False, using="primary")
        try:
            found = [Item.objects.all().db]
            Item.objects.create(remote_id=next(ids))
            found.append(Item.objects.all().db)
            transaction.rollback(using="primary")
        finally:
            transaction.set_autocommit(True, using="primary")
        return found

    def by_statement() -> list[str]:
        with connections["primary"].cursor() as cursor:
            cursor.execute("BEGIN")
            found = [Item.objects.all().db]
            cursor.execute("ROLLBACK")
        return found

    with request():
        assert await call(by_autocommit)() == ["primary", "primary"]
        assert await call(by_statement)() == ["primary"]
    with request():
        assert Item.objects.all().db != "primary"


async def test_a_position_outlasts_the_lag(
    router: ReplicaRouter, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "MAX_AGE", 0.0)
    await read_by(router, *REPLICAS)
    now = await position_now()
    with request(primary=now._replace(lsn=now.lsn + 2**40)):
        assert Item.objects.all().db == "primary", "replicas that lag may not have it yet"


class Elsewhere:
    """Somebody else's router, asked before ours."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "another"


async def test_what_another_router_chose(router: ReplicaRouter, settings: Any) -> None:
    """Its server is gone: that says nothing of the replica that was read before."""
    await read_by(router, *REPLICAS)
    reads: Any = (
        Item.objects.native_count,
        Item.objects.native_first,
        lambda: Item.objects.native_get(remote_id=1),
        asyncorm.native(lambda: list(Item.objects.all())),
    )
    with database("another", HOST="/nowhere", OPTIONS=POOL), request():
        await Item.objects.native_count()
        settings.DATABASE_ROUTERS = [Elsewhere(), router]
        for read in reads:
            with pytest.raises(OperationalError, match="'another'"):
                await read()
    assert not any(each.problem for each in router.watcher.replicas.values())
