"""More operations than connections: their statements travel together, and nothing else changes."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from django.db import (
    DataError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    connections,
    transaction,
)
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

import asyncorm
from asyncorm import bridge, multiplexing, native, pools
from asyncorm._wire import texts
from asyncorm.rows import RowMaker
from asyncorm.statements import clear
from tests.project.myapp.models import Item
from tests.support import administrator, all_given_back, database, eventually, value

ALIAS = "few"


@pytest.fixture(autouse=True)
def _empty(django_db_setup: Any, django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock(), administrator() as ask:
        ask(
            "CREATE FUNCTION pause(seconds float) RETURNS text LANGUAGE sql AS "
            "$$ SELECT pg_sleep(seconds)::text $$;"
            "CREATE DOMAIN nap AS float CHECK (pause(VALUE) IS NOT NULL)"
        )
        yield
        ask("DROP DOMAIN nap; DROP FUNCTION pause; TRUNCATE myapp_item")


@pytest.fixture
def few() -> Iterator[str]:
    """An alias with two connections."""
    with database(ALIAS, OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        yield alias


async def grow() -> None:
    """Have both connections opened."""
    await asyncio.gather(*[query("SELECT pg_sleep(0.02)") for _ in range(4)])
    assert (await all_given_back(ALIAS))["pool_size"] == 2


@pytest.fixture
async def grown(few: str) -> str:
    """The same, both connections opened, nothing counted yet."""
    await grow()
    return few


async def query(sql: str, params: Any = None) -> Any:
    async with asyncorm.cursor(ALIAS) as cursor:
        await cursor.execute(sql, params)
        row = await cursor.fetchone()
        return row[0] if row else None


@asynccontextmanager
async def crowded(using: str) -> AsyncIterator[None]:
    """Inside, other tasks have both connections."""
    release = asyncio.Event()

    async def hold() -> None:
        async with asyncorm.connection(using):
            await query("SELECT 1")
            await release.wait()

    holders = [asyncio.create_task(hold()) for _ in range(2)]
    try:
        await eventually(lambda: not asyncorm.pool_stats(using)["pool_available"])
        yield
    finally:
        release.set()
        await asyncio.gather(*holders)


def pipelined() -> int:
    return asyncorm.pool_stats(ALIAS).get("statements_pipelined", 0)


async def test_statements_travel_together(grown: str) -> None:
    results = await asyncio.gather(*[query("SELECT %s::int", [n]) for n in range(100)])
    assert results == list(range(100))
    stats = await all_given_back(grown)
    assert stats["statements_pipelined"] > 50
    assert stats["pipelines"] < stats["statements_pipelined"] / 2
    assert stats["pool_size"] == 2
    assert stats["requests_waiting"] == 0


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="from Python 3.12 on")
async def test_nobody_is_left_waiting_where_tasks_begin_at_once(grown: str) -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    try:
        results = await asyncio.gather(*[query("SELECT %s::int", [n]) for n in range(50)])
    finally:
        loop.set_task_factory(None)
    assert results == list(range(50))
    pool = pools.find(grown)
    assert pool is not None and pool.queue is not None
    assert not pool.queue.starting
    stats = await all_given_back(grown)
    assert stats["statements_pipelined"] > 0
    assert stats["requests_waiting"] == 0


@pytest.mark.parametrize("way", ["gathered", "batch"])
async def test_large_results_are_taken_apart_in_turns(
    grown: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come at once, others have a turn after each piece of work."""
    with administrator() as ask:
        ask(
            "INSERT INTO myapp_item (remote_id, name) SELECT n, 'x' FROM generate_series(1, 2000) n"
        )
    monkeypatch.setattr("asyncorm.driver._BUSY", 0)
    monkeypatch.setattr("asyncorm.turns.BUSY", 0)
    turn = 0
    pieces: Counter[int] = Counter()

    async def watch() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def counted(self: Any, *args: Any) -> Any:
        pieces[turn] += 1
        return make_part(self, *args)

    make_part = RowMaker.make_part
    monkeypatch.setattr(RowMaker, "make_part", counted)
    watching = asyncio.create_task(watch())
    items = Item.objects.using(grown)
    if way == "batch":
        found = await asyncorm.batch(*[items.all() for _ in range(20)], using=grown)
    else:
        found = await asyncio.gather(*[items.all().anative() for _ in range(20)])
    watching.cancel()
    assert [len(each) for each in found] == [2000] * 20
    assert pieces.total() == 400
    assert max(pieces.values()) <= 3  # those with a connection of their own took no turn yet
    assert pipelined() > 0


async def test_the_setting_turns_it_off(grown: str) -> None:
    with override_settings(ASYNCORM={"MULTIPLEXING": False}):
        results = await asyncio.gather(*[query("SELECT %s::int", [n]) for n in range(50)])
    assert results == list(range(50))
    assert pipelined() == 0


@pytest.mark.parametrize("binding", [False, True])
@pytest.mark.parametrize("threshold", [None, 2])
async def test_values_and_types_are_the_same(binding: bool, threshold: int | None) -> None:
    options = {
        "pool": {"min_size": 0, "max_size": 2},
        "server_side_binding": binding,
        "prepare_threshold": threshold,
    }
    with database(ALIAS, OPTIONS=options):
        await grow()
        values = [
            (1, "int"),
            (2**40, "bigint"),
            ("it's \\ ünïcode %", "text"),
            (None, "text"),
            (Decimal("1.50"), "numeric"),
            (datetime(2026, 1, 2, 3, 4, tzinfo=UTC), "timestamptz"),
            ([1, 2], "int[]"),
            (True, "bool"),
            (b"\x00\xff", "bytea"),
        ] * 8
        results = await asyncio.gather(
            *[query(f"SELECT %s::{kind}", [value]) for value, kind in values]
        )
        wanted = [bytes(v) if isinstance(v, bytes) else v for v, _ in values]
        assert [bytes(r) if isinstance(r, memoryview) else r for r in results] == wanted
        assert pipelined() > 0
        await asyncorm.close_pools(ALIAS)


async def test_one_that_fails_fails_alone(grown: str) -> None:
    async def divide(by: int) -> Any:
        return await query("SELECT 10 / %s::int", [by])

    results = await asyncio.gather(
        *[divide(n % 5) for n in range(60)], query("SELECT nothing"), return_exceptions=True
    )
    assert isinstance(results.pop(), ProgrammingError)
    for n, result in enumerate(results):
        if n % 5:
            assert result == 10 // (n % 5)
        else:
            assert isinstance(result, DataError)
            assert isinstance(result.__cause__, psycopg.errors.DivisionByZero)
    assert pipelined() > 0
    assert len({id(result) for result in results if isinstance(result, Exception)}) == 12
    await all_given_back(grown)


async def test_all_kinds_of_operations_beside_each_other(grown: str) -> None:
    random.seed(7)

    async def get(n: int) -> None:
        item = await Item.objects.using(grown).native_create(remote_id=n, name="x")
        assert (await Item.objects.using(grown).native_get(pk=item.pk)).remote_id == n

    async def block(n: int) -> None:
        async with asyncorm.atomic(grown):
            await Item.objects.using(grown).native_create(remote_id=n, name="block")
            assert await Item.objects.using(grown).filter(remote_id=n).native_exists()

    async def undone(n: int) -> None:
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic(grown):
                await Item.objects.using(grown).native_create(remote_id=n, name="undone")
                raise ZeroDivisionError

    async def stream(n: int) -> None:
        numbers = Item.objects.using(grown).values_list("remote_id", flat=True)
        async for _ in numbers.native_iterator(chunk_size=3):
            pass

    async def state(n: int) -> None:
        async with asyncorm.connection(grown):
            await query("SELECT set_config('application_name', %s, false)", [f"n{n}"])
            assert await query("SHOW application_name") == f"n{n}"

    async def twice(n: int) -> None:
        def work() -> None:
            with connections[grown].cursor() as cursor:
                cursor.execute("SELECT %s::int", [n])
                assert cursor.fetchone() == (n,)
                cursor.execute("CREATE TEMPORARY TABLE t (n int); INSERT INTO t VALUES (1)")
                cursor.execute("SELECT n FROM t")
                assert cursor.fetchall() == [(1,)]
                cursor.executemany("INSERT INTO t VALUES (%s)", [(2,), (3,)])
                cursor.execute("SELECT sum(n) FROM t")
                assert cursor.fetchone() == (6,)
                cursor.execute("DROP TABLE t")

        await native(work)()

    async def django_block(n: int) -> None:
        def work() -> None:
            assert Item.objects.using(grown).filter(remote_id=-1).count() == 0
            with transaction.atomic(using=grown):
                Item.objects.using(grown).create(remote_id=n, name="django")

        await native(work)()

    kinds = [get, block, undone, stream, state, twice, django_block] * 12
    random.shuffle(kinds)
    before = await query("SELECT setting FROM pg_settings WHERE name = 'application_name'")
    await asyncio.gather(*[kind(n) for n, kind in enumerate(kinds, 1000)])
    names = Item.objects.using(grown).values_list("name", flat=True)
    found = sorted(await names.filter(remote_id__gte=1000).anative())
    assert found == ["block"] * 12 + ["django"] * 12 + ["x"] * 12
    after = await asyncio.gather(
        *[query("SELECT setting FROM pg_settings WHERE name = 'application_name'")] * 1
    )
    assert after == [before]
    assert pipelined() > 0
    stats = await all_given_back(grown)
    assert stats["pool_size"] == 2


async def test_what_needs_a_session_does_not_share_one(grown: str) -> None:
    """The raw psycopg connection of an operation, with no connection free."""

    def work(n: int) -> None:
        connection = connections[grown]
        connection.ensure_connection()
        raw = connection.connection
        assert psycopg.ClientCursor(raw).execute("SELECT %s::int", [n]).fetchone() == (n,)
        with raw.transaction():
            raw.execute("SET LOCAL application_name = 'mine'")
            assert raw.execute("SHOW application_name").fetchone() == ("mine",)
        with raw.cursor("named") as cursor, raw.transaction():
            cursor.execute("SELECT generate_series(1, 3)")
            assert cursor.fetchall() == [(1,), (2,), (3,)]
        with raw.cursor() as cursor, cursor.copy("COPY (SELECT 1) TO STDOUT") as copy:
            assert [bytes(row) for row in copy] == [b"1\n"]
        with raw.cursor() as cursor:
            assert list(cursor.stream("SELECT generate_series(1, 3)")) == [(1,), (2,), (3,)]

    await asyncio.gather(*[native(work)(n) for n in range(20)])
    await all_given_back(grown)


async def test_wrappers_and_the_query_log_see_each(grown: str) -> None:
    seen: list[str] = []

    def watch(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    with (
        CaptureQueriesContext(connections[grown]) as captured,
        connections[grown].execute_wrapper(watch),
    ):
        await asyncio.gather(*[query("SELECT %s::int", [n]) for n in range(30)])
    assert len(captured) == 30
    assert seen == ["SELECT %s::int"] * 30
    assert pipelined() > 0


async def test_a_cursor_says_what_it_did(grown: str) -> None:
    sql = "SELECT n, n::text AS word FROM generate_series(1, %s) n"

    async def look(number: int) -> None:
        async with asyncorm.cursor(grown) as cursor:
            await cursor.execute(sql, [number])
            first = await cursor.fetchone()
            assert [column.name for column in cursor.description] == ["n", "word"]
            assert (cursor.rowcount, cursor.statusmessage) == (number, f"SELECT {number}")
            rest = await cursor.fetchmany(2) + [row async for row in cursor]
            assert [first, *rest] == [(n, str(n)) for n in range(1, number + 1)]
            await cursor.execute("SELECT %s", ["again"])
            assert await cursor.fetchall() == [("again",)]

    await asyncio.gather(*[look(number) for number in range(1, 40)])
    assert pipelined() > 40
    await all_given_back(grown)


async def test_a_task_that_outlived_its_block_is_refused(grown: str) -> None:
    release = asyncio.Event()

    async def late() -> Any:
        await release.wait()
        return await query("SELECT 1")

    async with asyncorm.atomic(grown):
        task = asyncio.create_task(late())
    async with crowded(grown):
        release.set()
        with pytest.raises(TransactionManagementError, match="has ended"):
            await task


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("known", [False, True])
async def test_gets_travel_without_operations(
    grown: str, swapped: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(30):
        await Item.objects.using(grown).native_create(remote_id=n, name=f"name {n % 15}")
    operations: list[Any] = []
    run = bridge.run

    def counted(func: Any, *args: Any, **kwargs: Any) -> Any:
        operations.append(func.__name__)
        return run(func, *args, **kwargs)

    monkeypatch.setattr(bridge, "run", counted)

    async def get(**lookups: Any) -> Any:
        items = Item.objects.using(grown)
        return await (items.aget(**lookups) if swapped else items.native_get(**lookups))

    with override_settings(ASYNCORM={"SWAP_MANAGERS": swapped}):
        clear()
        if known:
            await get(remote_id=0)
            with pytest.raises(Item.DoesNotExist):
                await get(name="")
        operations.clear()
        before = pipelined()
        found = await asyncio.gather(*[get(remote_id=n) for n in range(30)])
        assert [(item.remote_id, item._state.db) for item in found] == [
            (n, grown) for n in range(30)
        ]
        others = await asyncio.gather(
            *[get(name=f"name {n}") for n in range(20)], return_exceptions=True
        )
    assert [type(exc) for exc in others] == [Item.MultipleObjectsReturned] * 15 + [
        Item.DoesNotExist
    ] * 5
    assert str(others[0]) == "get() returned more than one Item -- it returned 2!"
    assert pipelined() - before > 20
    gets = operations.count("get")
    assert gets < 10 if known else gets
    await all_given_back(grown)


async def test_gets_are_seen_refused_and_cancelled_as_ever(grown: str) -> None:
    item = await Item.objects.using(grown).native_create(remote_id=1, name="one")
    get = Item.objects.using(grown).native_get
    await get(pk=item.pk)
    with CaptureQueriesContext(connections[grown]) as captured:
        await asyncio.gather(*[get(pk=item.pk) for _ in range(30)])
    assert len(captured) == 30

    release = asyncio.Event()

    async def late() -> Any:
        await release.wait()
        return await get(pk=item.pk)

    async with asyncorm.atomic(grown):
        task = asyncio.create_task(late())
        changed = Item.objects.using(grown).filter(pk=item.pk)
        await changed.native_update(name="changed")
        pause = asyncio.create_task(query("SELECT pg_sleep(0.3)"))
        inside = await asyncio.gather(*[get(pk=item.pk) for _ in range(10)])
        outside = await asyncio.gather(
            *[asyncorm.detached_task(get(pk=item.pk)) for _ in range(10)]
        )
        await pause
    assert {item.name for item in inside} == {"changed"}
    assert {item.name for item in outside} == {"one"}
    async with crowded(grown):
        release.set()
        with pytest.raises(TransactionManagementError, match="has ended"):
            await task
        waiting = [asyncio.create_task(get(pk=item.pk)) for _ in range(4)]
        await asyncio.sleep(0.02)
        waiting[1].cancel()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results.pop(1), asyncio.CancelledError)
    assert results == [item] * 3
    await all_given_back(grown)


async def test_writes_that_may_wait_go_alone(grown: str) -> None:
    async def create(n: int) -> Any:
        try:
            return await Item.objects.using(grown).native_create(remote_id=n % 5, name="w")
        except IntegrityError:
            return None

    made = await asyncio.gather(*[create(n) for n in range(25)])
    assert sum(item is not None for item in made) == 5
    assert pipelined() == 0


async def test_a_slow_statement_delays_only_what_was_behind_it(grown: str) -> None:
    assert not texts.is_read("SELECT pg_sleep(1)")
    async with asyncorm.connection(grown):
        await query("SELECT 1")  # one connection is left
        slow = asyncio.create_task(query("SELECT pg_sleep(600)"))
        with administrator() as ask:
            await eventually(lambda: ask(SLEEPING))
            waiting = [asyncio.create_task(query("SELECT %s::int", [n])) for n in range(5)]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in waiting)
            ask(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query ~ '600' "
                "AND pid <> pg_backend_pid()"
            )
            with pytest.raises(OperationalError):
                await slow
            assert await asyncio.gather(*waiting) == list(range(5))


SLEEPING = (
    "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND pid <> pg_backend_pid()"
)
# A sleep that the text does not show.
HIDDEN = "SELECT %s::nap"


async def test_statements_known_to_be_slow_go_alone(grown: str) -> None:
    assert texts.is_read(HIDDEN)
    assert texts.calls_known(HIDDEN)
    multiplexing.slow.add(HIDDEN)
    await asyncio.gather(*[query(HIDDEN, ["0"]) for _ in range(8)])
    assert pipelined() == 0


async def travelling(grown: str, seconds: str, others: int) -> tuple[Any, list[Any]]:
    """A slow statement under way together with quick ones behind it."""
    multiplexing.slow._seen.clear()
    async with crowded(grown):
        slow = asyncio.create_task(query(HIDDEN, [seconds]))
        quick = [asyncio.create_task(query("SELECT %s::int", [n])) for n in range(others)]
        await asyncio.sleep(0.05)
    with administrator() as ask:
        await eventually(lambda: ask(SLEEPING))
    return slow, quick


async def test_a_cancelled_one_does_not_stop_the_others(grown: str) -> None:
    slow, quick = await travelling(grown, "0.5", 10)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert await asyncio.gather(*quick) == list(range(10))
    assert "connections_lost" not in await all_given_back(grown)


async def test_when_all_are_cancelled_the_server_stops(grown: str) -> None:
    slow, quick = await travelling(grown, "600", 10)
    for task in [slow, *quick]:
        task.cancel()
    results = await asyncio.gather(slow, *quick, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    with administrator() as ask:
        await eventually(lambda: not ask(SLEEPING))
    assert await asyncio.gather(*[query("SELECT %s::int", [n]) for n in range(20)]) == list(
        range(20)
    )
    await all_given_back(grown)


async def test_one_cancelled_before_it_went_is_not_sent(grown: str) -> None:
    async with asyncorm.connection(grown), asyncio.TaskGroup() as group:

        async def keep() -> None:
            async with asyncorm.connection(grown):
                await query("SELECT 1")
                gone = asyncio.create_task(query("SELECT nextval('myapp_item_id_seq')"))
                await asyncio.sleep(0.02)
                gone.cancel()
                await asyncio.sleep(0.02)
                assert gone.cancelled()

        before = await query("SELECT last_value FROM myapp_item_id_seq")
        group.create_task(keep())
    assert await query("SELECT last_value FROM myapp_item_id_seq") == before


async def test_a_killed_backend_is_told_to_all_that_were_on_it(grown: str) -> None:
    slow, quick = await travelling(grown, "600", 10)
    with administrator() as ask:
        ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE wait_event = 'PgSleep' AND pid <> pg_backend_pid()"
        )
    results = await asyncio.gather(slow, *quick, return_exceptions=True)
    assert isinstance(results[0], OperationalError)
    for n, result in enumerate(results[1:]):
        assert result == n or isinstance(result, OperationalError)
    assert await asyncio.gather(*[query("SELECT %s::int", [n]) for n in range(20)]) == list(
        range(20)
    )
    await all_given_back(grown)


async def test_no_one_waits_for_ever(few: str) -> None:
    options = {"pool": {"min_size": 0, "max_size": 1, "timeout": 0.3}}
    with database("one", OPTIONS=options) as alias:
        async with asyncorm.connection(alias):
            await native(value)("SELECT 1", using=alias)

            async def wait() -> None:
                await native(value)("SELECT 2", using=alias)

            tasks = [asyncio.create_task(wait()) for _ in range(5)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                assert isinstance(result, OperationalError)
                assert "exhausted" in str(result)
        assert await native(value)("SELECT 3", using=alias) == 3
        await asyncorm.close_pools(alias)


async def test_child_tasks_of_a_block_share_its_round_trips(grown: str) -> None:
    async with asyncorm.atomic(grown):
        pid = await query("SELECT pg_backend_pid()")
        before = asyncorm.pool_stats(grown)["pipelines"]
        results = await asyncio.gather(*[query("SELECT %s::int", [n]) for n in range(50)])
        pids = await asyncio.gather(*[query("SELECT pg_backend_pid()") for _ in range(5)])
        stats = asyncorm.pool_stats(grown)
    assert results == list(range(50))
    assert set(pids) == {pid}
    assert 0 < stats["pipelines"] - before <= 4
    assert stats["statements_pipelined"] >= 48


async def test_a_stream_beside_statements_of_a_block(grown: str) -> None:
    numbers = Item.objects.using(grown).order_by("pk")
    async with asyncorm.atomic(grown):
        for turn in range(20):
            adding = [
                asyncio.create_task(
                    Item.objects.using(grown).native_create(remote_id=100 * turn + n, name="x")
                )
                for n in range(3)
            ]
            for _ in range(turn % 5):
                await asyncio.sleep(0)
            async for _ in numbers.native_iterator(chunk_size=2):
                pass
            await asyncio.gather(*adding)
    assert await numbers.native_count() == 60


async def test_a_statement_after_one_that_failed_is_refused(grown: str) -> None:
    add = Item.objects.using(grown).native_create
    async with asyncorm.atomic(grown):
        await add(remote_id=1, name="x")
        results = await asyncio.gather(
            query("SELECT 1"),
            query("SELECT 2"),
            add(remote_id=1, name="x"),
            query("SELECT 3"),
            return_exceptions=True,
        )
        asyncorm.set_rollback(True, using=grown)
    assert results[:2] == [1, 2]
    assert isinstance(results[2], IntegrityError)
    assert isinstance(results[3], TransactionManagementError)


async def test_a_task_cancelled_in_a_block_breaks_it(grown: str) -> None:
    """Its statement may have been executed, with those of others."""
    with pytest.raises(TransactionManagementError, match="cancelled"):
        async with asyncorm.atomic(grown):
            first = asyncio.create_task(query("SELECT pg_sleep(0.3)"))
            await asyncio.sleep(0.05)
            gone = asyncio.create_task(
                Item.objects.using(grown).native_create(remote_id=1, name="gone")
            )
            beside = asyncio.create_task(query("SELECT pg_sleep(0.3), 1"))
            await first
            await asyncio.sleep(0.1)  # both are under way
            gone.cancel()
            with pytest.raises(TransactionManagementError):
                await beside
            with pytest.raises(TransactionManagementError):
                await query("SELECT 1")
    assert gone.cancelled()
    assert not await Item.objects.using(grown).native_exists()
    await all_given_back(grown)


async def test_a_task_cancelled_as_its_statement_fails_breaks_the_block(grown: str) -> None:
    """In whichever turn: those behind it do not hear of the server's refusal."""
    add = Item.objects.using(grown).native_create
    await add(remote_id=1, name="x")
    for turns in range(3, 14):
        with suppress(TransactionManagementError):  # of the block, if it was cancelled in it
            async with asyncorm.atomic(grown):
                await query("SELECT 1")
                before = asyncio.create_task(query("SELECT 1"))
                gone = asyncio.create_task(add(remote_id=1, name="x"))
                behind = asyncio.create_task(query("SELECT 2"))
                for turn in range(turns):
                    await asyncio.sleep(0)
                    if turn > 2:
                        time.sleep(0.002)  # noqa: ASYNC251 - the answers arrive together
                gone.cancel()
                await asyncio.wait([before, gone, behind])
                if gone.cancelled() and behind.exception() is None:  # it was not sent
                    assert behind.result() == 2
                else:
                    with pytest.raises(TransactionManagementError):
                        await behind
                    with pytest.raises(TransactionManagementError):
                        await query("SELECT 3")
                asyncorm.set_rollback(True, using=grown)


async def test_the_block_waits_for_statements_that_travel(grown: str) -> None:
    async with asyncorm.atomic(grown):
        await query("SELECT 1")
        tasks = [
            asyncio.create_task(
                Item.objects.using(grown).native_create(remote_id=n, name="in time")
            )
            for n in range(20)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert await Item.objects.using(grown).native_count() == 20


@pytest.mark.parametrize(
    ("text", "read", "single"),
    [
        ("SELECT 1", True, True),
        ("  (SELECT 1) UNION (SELECT 2);  ", True, True),
        ("SELECT ';'", True, True),
        ("SELECT 1 INTO a", False, False),
        ("SELECT 1; DROP TABLE x", False, False),
        ("SELECT a FROM b FOR UPDATE", False, True),
        ("SELECT a FROM b FOR NO KEY UPDATE SKIP LOCKED", False, True),
        ("SELECT pg_advisory_lock(1)", False, False),
        ("SELECT pg_advisory_xact_lock(1)", False, True),
        ("SELECT pg_sleep(1)", False, True),
        ("INSERT INTO a VALUES (1)", False, True),
        ("UPDATE a SET b = 1", False, True),
        ("WITH x AS (DELETE FROM a RETURNING b) SELECT b FROM x", False, True),
        ("COPY a TO STDOUT", False, False),
        ("BEGIN", False, False),
        ("SAVEPOINT a", False, False),
        ("SET a = 1", False, False),
        ("LISTEN a", False, False),
        ("CREATE TEMPORARY TABLE a (b int)", False, False),
        ("DECLARE a CURSOR FOR SELECT 1", False, False),
        ("VACUUM", False, False),
        ("SELECT set_config('a', 'b', false)", False, False),
    ],
)
def test_what_may_travel(text: str, read: bool, single: bool) -> None:
    assert texts.is_read(text) is read
    assert texts.is_single(text) is single


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ('SELECT COUNT(*) FROM "a" WHERE "a"."b" IN (1, 2) AND (LOWER ("a"."c") = %s)', True),
        ('INSERT INTO "a"."b" ("c") VALUES (%s) ON CONFLICT ("c") DO NOTHING', True),
        ('INSERT INTO "a" ("c") VALUES (%s) RETURNING "a"."id"', True),
        ('WITH "x" AS (SELECT 1::numeric(3, 1)) SELECT ROW_NUMBER() OVER (ORDER BY 1)', True),
        ("SELECT 'a(1)' -- b(2)", True),
        ("SELECT set_tenant(1)", False),
        ("SELECT max(set_tenant /* */ (1))", False),
        ("SELECT public.lower(1)", False),
        ('SELECT "lower"(1)', False),
        ('SELECT "-" (1)', False),
        ("SELECT e(1)", False),
        (
            'SELECT "a"::date - %s * "b"->>%(key)s, 7%%2 FROM "c" WHERE "d" @> %s AND -1 <> "e"',
            True,
        ),
        ("SELECT @~ 'x'", False),
        ("SELECT 1 OPERATOR(public.+) 2", False),
    ],
)
def test_functions_that_are_known(text: str, known: bool) -> None:
    assert texts.calls_known(text) is known


@pytest.fixture
def travel() -> Iterator[None]:
    """A function that changes the session's time zone; a view and a trigger that call it."""
    with administrator() as ask:
        ask(
            "CREATE FUNCTION travel() RETURNS int LANGUAGE plpgsql AS $$ "
            "BEGIN SET TIME ZONE 'Asia/Tokyo'; RETURN 1; END $$;"
            "CREATE VIEW abroad AS SELECT travel();"
            "CREATE FUNCTION travels() RETURNS trigger LANGUAGE plpgsql AS $$ "
            "BEGIN NEW.remote_id = NEW.remote_id * travel(); RETURN NEW; END $$;"
            "CREATE TRIGGER travels BEFORE INSERT ON myapp_item FOR EACH ROW"
            " WHEN (NEW.name = 'abroad') EXECUTE FUNCTION travels()"
        )
        yield
        ask(
            "DROP TRIGGER travels ON myapp_item; DROP FUNCTION travels; DROP VIEW abroad;"
            "DROP FUNCTION travel"
        )


ZONE = "SELECT current_setting('TimeZone')"


@pytest.mark.parametrize("hidden", ["SELECT travel()", "SELECT * FROM abroad"])
@pytest.mark.parametrize("size", [1, 2])
async def test_nobody_runs_with_what_a_function_has_set(
    hidden: str, size: int, travel: None
) -> None:
    multiplexing.slow._seen.clear()
    with database(ALIAS, OPTIONS={"pool": {"min_size": 0, "max_size": size}}):
        await query("SELECT 1")
        for _ in range(2):
            zones = await asyncio.gather(
                *[query(hidden if n % 10 == 0 else ZONE) for n in range(200)]
            )
            assert set(zones) == {1, "UTC"}
        assert pipelined()
        await all_given_back(ALIAS)
        assert await query(ZONE) == "UTC"


async def test_what_a_trigger_has_set_in_a_batch(grown: str, travel: None) -> None:
    """What only reads behind it is executed again; a write that ran with it is not served."""
    items = Item.objects.using(grown)
    home, abroad, zone, behind = await asyncorm.batch(
        items.native_create(remote_id=1, name="home"),
        items.native_create(remote_id=2, name="abroad"),
        query(ZONE),
        items.native_create(remote_id=3, name="behind"),
        using=grown,
        return_exceptions=True,
    )
    assert (home.remote_id, abroad.remote_id, zone) == (1, 2, "UTC")
    assert isinstance(behind, OperationalError)
    assert "changed the settings of the server session" in str(behind)
    assert await items.native_count() == 3
    # In a transaction, and on a connection that the task keeps, it is the owner's own session.
    async with asyncorm.atomic(grown):
        made = [items.native_create(remote_id=n, name="abroad") for n in (4, 5)]
        await asyncorm.batch(*made, using=grown)
        assert await query(ZONE) == "Asia/Tokyo"
    async with asyncorm.connection(grown):
        made = [items.native_create(remote_id=n, name="abroad") for n in (6, 7)]
        await asyncorm.batch(*made, query(ZONE), using=grown)
        assert await query(ZONE) == "Asia/Tokyo"


async def test_a_connection_that_is_always_reset_is_not_shared(grown: str) -> None:
    with override_settings(ASYNCORM={"RESET_ALWAYS": True}):
        await asyncio.gather(*[query("SELECT %s::int", [n]) for n in range(20)])
    assert not pipelined()
