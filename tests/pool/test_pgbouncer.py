"""Native code through PgBouncer in transaction mode: what works, and what is refused or told."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import anyio
import pytest
from django.db import NotSupportedError, OperationalError, connection, connections
from django.db.models import Sum

import asyncorm
from asyncorm.demo.postgres import postgres_server
from tests import bouncer
from tests.compare import differences
from tests.operations import RAISES, READS, WRITES, Do, Native
from tests.pool.test_standby import ask
from tests.project.myapp.models import Item
from tests.stock import Stock
from tests.support import CREATE_ITEM, administrator, database, eventually
from tests.ways import outcome, synchronously

pytestmark = pytest.mark.skipif(
    bouncer.program() is None,
    reason="PgBouncer is not installed (Debian: apt install pgbouncer)",
)

ids = count(1)
# PgBouncer understands prepared statements since 1.21, DISCARD ALL among them since 1.22.
PREPARES = bouncer.program() is not None and bouncer.version() >= (1, 22)


@pytest.fixture(scope="module")
def pgbouncer(django_db_setup: Any, request: pytest.FixtureRequest) -> Iterator[bouncer.Bouncer]:
    """Two server connections for each database, however many clients there are."""
    options = {"default_pool_size": 2} | ({"max_prepared_statements": 100} if PREPARES else {})
    with bouncer.pgbouncer(connections.settings["default"], **options) as running:
        yield running


def behind(pgbouncer: bouncer.Bouncer, **options: Any) -> dict[str, Any]:
    """The changes to an alias that docs/pgbouncer.md tells of."""
    return {
        **pgbouncer.settings,
        "DISABLE_SERVER_SIDE_CURSORS": True,
        # PgBouncer 1.18 refuses the startup parameter that the tests' settings have.
        "OPTIONS": {"options": None, "pool": {"min_size": 1, "max_size": 10}, **options},
    }


# Psycopg prepares with server-side binding only.
THRESHOLDS = {"unprepared": None} | ({"prepared": 5} if PREPARES else {})


@pytest.fixture(params=THRESHOLDS.values(), ids=THRESHOLDS)
def alias(
    pgbouncer: bouncer.Bouncer, django_db_blocker: Any, request: pytest.FixtureRequest
) -> Iterator[str]:
    """The alias `bounced`: the database of `default` through PgBouncer; no items."""
    with administrator() as ask:
        ask("TRUNCATE myapp_item")
    options = {"prepare_threshold": request.param, "server_side_binding": bool(request.param)}
    changes = behind(pgbouncer, **options)
    with django_db_blocker.unblock(), database("bounced", **changes) as alias:
        yield alias


def items(alias: str) -> Any:
    return Item.objects.using(alias).order_by("pk")


async def add(alias: str, name: str = "") -> Any:
    return await items(alias).native_create(remote_id=next(ids), name=name)


async def names(alias: str) -> list[str]:
    return await items(alias).values_list("name", flat=True).anative()


async def scalar(alias: str, sql: str, params: Any = None) -> Any:
    async with asyncorm.cursor(alias) as cursor:
        await cursor.execute(sql, params)
        row = await cursor.fetchone() if cursor.description else None
        return row[0] if row else None


@asynccontextmanager
async def occupied(alias: str) -> AsyncIterator[int]:
    """Another client's transaction occupies the server connection used last; its process."""
    entered, leave = asyncio.Event(), asyncio.Event()
    pids = []

    async def occupy() -> None:
        async with asyncorm.detached(), asyncorm.atomic(alias):
            pids.append(await scalar(alias, "SELECT pg_backend_pid()"))
            entered.set()
            await leave.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(occupy())
        await entered.wait()
        yield pids[0]
        leave.set()


# The operations of the equality tests


@pytest.fixture
def bounced_shop(
    pgbouncer: bouncer.Bouncer, fresh_shop: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """`default` and `other` through PgBouncer for native code; synchronous code goes directly."""
    aliases = ("default", "other")
    before = {alias: copy.copy(connections.settings[alias]) for alias in aliases}
    for alias in aliases:
        connections[alias].ensure_connection()
        settings = connections.settings[alias]
        changes = behind(pgbouncer)
        options = {**settings["OPTIONS"], **changes.pop("OPTIONS")}
        settings.update(changes, OPTIONS=options)
    yield fresh_shop
    for alias in aliases:
        connections.settings[alias].clear()
        connections.settings[alias].update(before[alias])


@pytest.mark.slow
def test_operations_equal_sync(bounced_shop: Callable[[], None], stock: Stock, run: Any) -> None:
    found = []
    writes = dict(list(WRITES.items())[::2])  # the others' statements are of the same kinds
    for name, operation in {**READS, **writes}.items():
        expected = outcome(synchronously, operation(Do()))
        assert isinstance(expected, Exception) == (name in RAISES), (name, expected)
        written = stock.changes() if name in WRITES else []
        if name in WRITES:
            bounced_shop()
        found += [(name, each) for each in differences(expected, outcome(run, operation(Native())))]
        if name in WRITES:
            found += [(name, each) for each in differences(written, stock.changes())]
            bounced_shop()
    assert found == []
    assert run(asyncorm.native(lambda: connection.settings_dict["PORT"])()) == str(bouncer.PORT)


# Statements and transactions


async def test_it_is_a_transaction_pooler(alias: str, pgbouncer: bouncer.Bouncer) -> None:
    """What the other tests rely on: clients share server connections, statement by statement."""
    pid = await scalar(alias, "SELECT pg_backend_pid()")
    async with occupied(alias) as occupier:
        assert occupier == pid
        assert await scalar(alias, "SELECT pg_backend_pid()") != pid
    pids = await asyncio.gather(
        *(scalar(alias, "SELECT pg_backend_pid() FROM pg_sleep(0.02)") for _ in range(10))
    )
    assert len(set(pids)) <= 2
    assert asyncorm.pool_stats(alias)["pool_size"] > 2


async def test_reads_and_writes(alias: str) -> None:
    item = await add(alias, "one")
    item.name = "changed"
    await item.native_save(using=alias)
    await items(alias).native_bulk_create([Item(remote_id=next(ids)) for _ in range(3)])
    assert await names(alias) == ["changed", "", "", ""]
    assert (await items(alias).native_get(pk=item.pk)).name == "changed"
    assert await items(alias).filter(name="").native_update(name="x") == 3
    assert (await items(alias).native_aggregate(n=Sum("remote_id")))["n"] > 0
    assert (await items(alias).filter(name="x").native_delete())[0] == 3
    # Often enough to be prepared.
    for _ in range(12):
        assert await items(alias).native_count() == 1


async def test_concurrent_statements(alias: str) -> None:
    await asyncio.gather(*(add(alias, f"{n:02}") for n in range(40)))
    found = await asyncio.gather(
        *(items(alias).native_get(name=f"{n:02}") for _ in range(3) for n in range(40))
    )
    assert [item.name for item in found[:40]] == [f"{n:02}" for n in range(40)]


async def test_blocks(alias: str) -> None:
    called = []

    async def child(n: int) -> None:
        try:
            async with asyncorm.atomic(alias):
                await add(alias, f"child {n}")
                if n % 2:
                    raise LookupError
        except LookupError:
            pass
        await add(alias, f"after {n}")

    async with asyncorm.atomic(alias):
        pid = await scalar(alias, "SELECT pg_backend_pid()")
        asyncorm.on_commit(lambda: called.append("committed"), using=alias)
        await asyncio.gather(*(child(n) for n in range(4)))
        assert await scalar(alias, "SELECT pg_backend_pid()") == pid
        assert not called
    assert called == ["committed"]
    assert sorted(await names(alias)) == [
        *("after 0", "after 1", "after 2", "after 3"),
        *("child 0", "child 2"),
    ]
    with pytest.raises(LookupError):
        async with asyncorm.atomic(alias):
            asyncorm.on_commit(lambda: called.append("wrong"), using=alias)
            await items(alias).native_delete()
            raise LookupError
    assert called == ["committed"]
    assert await items(alias).native_count() == 6


async def test_options_of_a_block_end_with_it(alias: str) -> None:
    async with asyncorm.atomic(alias, read_only=True, statement_timeout=5):
        assert await scalar(alias, "SHOW transaction_read_only") == "on"
        assert await scalar(alias, "SHOW statement_timeout") == "5s"
    for _ in range(3):
        assert await scalar(alias, "SHOW transaction_read_only") == "off"
        assert await scalar(alias, "SHOW statement_timeout") == "0"


@pytest.mark.parametrize("block", [False, True], ids=["alone", "in a block"])
async def test_cancellation_reaches_the_server(alias: str, block: bool) -> None:
    async def sleep() -> None:
        if block:
            async with asyncorm.atomic(alias):
                await add(alias, "lost")
                await scalar(alias, "SELECT pg_sleep(600)")
        else:
            await scalar(alias, "SELECT pg_sleep(600)")

    with administrator() as ask:

        def sleeping() -> Any:
            return ask(
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'active'"
                " AND query LIKE 'SELECT pg_sleep(600)%%' AND pid <> pg_backend_pid()"
            )

        async with anyio.create_task_group() as group:
            group.start_soon(sleep)
            await eventually(sleeping)
            group.cancel_scope.cancel()
        assert await eventually(lambda: not sleeping())
    # No late cancel request hits who comes next on the same server connection.
    await asyncio.gather(*(scalar(alias, "SELECT pg_sleep(0.02)") for _ in range(10)))
    assert await names(alias) == []
    await add(alias, "next")
    assert await names(alias) == ["next"]


# Streams


async def test_streams_without_server_side_cursors(alias: str) -> None:
    await items(alias).native_bulk_create([Item(remote_id=next(ids)) for _ in range(50)])
    found = 0
    async for _ in items(alias).native_iterator(chunk_size=10):
        found += 1
        if found % 10 == 1:
            async with occupied(alias):  # whatever server connection was used last is another's now
                assert await scalar(alias, "SELECT count(*) FROM pg_cursors WHERE name <> ''") == 0
    assert found == 50
    async with asyncorm.atomic(alias):
        stream = items(alias).native_iterator(chunk_size=10)
        assert await anext(stream)
        assert await scalar(alias, "SELECT count(*) FROM pg_cursors WHERE name <> ''") == 0
        assert len([item async for item in stream]) == 49


async def test_streams_from_server_side_cursors(alias: str) -> None:
    """Inside a block they work; outside, WITH HOLD cursors do not, and that is told."""
    settings = connections.settings[alias]
    await items(alias).native_bulk_create([Item(remote_id=next(ids)) for _ in range(50)])
    settings["DISABLE_SERVER_SIDE_CURSORS"] = False
    async with asyncorm.atomic(alias):
        stream = items(alias).native_iterator(chunk_size=10)
        assert await anext(stream)
        mine = "SELECT count(*) FROM pg_cursors WHERE NOT is_holdable AND name <> ''"
        assert await scalar(alias, mine) == 1
        assert len([item async for item in stream]) == 49

    stream = items(alias).native_iterator(chunk_size=10)
    for _ in range(10):
        assert await anext(stream)
    async with occupied(alias):
        with pytest.raises(OperationalError, match="DISABLE_SERVER_SIDE_CURSORS"):
            await anext(stream)
    assert await items(alias).native_count() == 50, "the pool goes on"


# Session state


async def test_time_zones(pgbouncer: bouncer.Bouncer, alias: str) -> None:
    """PgBouncer keeps each client's TimeZone, so Django's SET TIME ZONE holds."""
    zone = "America/New_York"
    with database("bounced_elsewhere", TIME_ZONE=zone, **behind(pgbouncer)) as elsewhere:
        for _ in range(5):
            assert await scalar(alias, "SHOW timezone") == "UTC"
            assert await scalar(elsewhere, "SHOW timezone") == zone
        async with occupied(alias):
            assert await scalar(elsewhere, "SHOW timezone") == zone


async def test_state_left_behind_is_seen_by_others(alias: str, pgbouncer: bouncer.Bouncer) -> None:
    """Why SET is not to be relied on: who waits gets the server connection before our reset."""
    # Have clients that are configured already, so that SHOW is what waits.
    await asyncio.gather(*(scalar(alias, "SELECT pg_sleep(0.05)") for _ in range(4)))
    async with occupied(alias):
        async with asyncorm.atomic(alias):
            pid = await scalar(alias, "SELECT pg_backend_pid()")
            await scalar(alias, "SET work_mem = '77MB'")
            other = asyncorm.detached_task(scalar(alias, "SHOW work_mem"))
            await eventually(
                lambda: any(pool["cl_waiting"] for pool in pgbouncer.ask("SHOW POOLS"))
            )
        assert await other == "77MB"
    await eventually(lambda: at_rest(alias))
    # DISCARD ALL did no harm, wherever it went.
    await asyncio.gather(*(add(alias, f"{n}") for n in range(10)))
    assert len(await names(alias)) == 10
    with administrator() as ask:
        ask("SELECT pg_terminate_backend(%s)", pid)


def at_rest(alias: str) -> bool:
    stats = asyncorm.pool_stats(alias)
    return bool(stats["pool_available"] == stats["pool_size"])


async def test_connection_is_refused(alias: str) -> None:
    with pytest.raises(NotSupportedError, match=r"pools transactions.*atomic"):
        async with asyncorm.connection(alias):
            pass
    assert await scalar(alias, "SELECT 1") == 1
    async with asyncorm.atomic(alias):
        async with asyncorm.connection(alias):  # changes nothing there
            assert await scalar(alias, "SELECT 1") == 1
    assert at_rest(alias)


async def test_connection_with_the_server_itself(django_db_setup: Any, django_db_blocker: Any):
    """DISABLE_SERVER_SIDE_CURSORS alone does not take `connection()` away."""
    with django_db_blocker.unblock(), database("direct", DISABLE_SERVER_SIDE_CURSORS=True) as alias:
        async with asyncorm.connection(alias):
            await scalar(alias, "SET work_mem = '77MB'")
            assert await scalar(alias, "SHOW work_mem") == "77MB"


async def test_state_of_a_block(alias: str) -> None:
    """What takes the place of session state: SET LOCAL and locks of the transaction."""
    async with asyncorm.atomic(alias):
        await scalar(alias, "SET LOCAL work_mem = '77MB'")
        await scalar(alias, "SELECT pg_advisory_xact_lock(4711)")
        assert await scalar(alias, "SHOW work_mem") == "77MB"
        async with asyncorm.detached():
            free = "SELECT pg_try_advisory_xact_lock(4711)"
            assert await scalar(alias, free) is False
            assert await scalar(alias, "SHOW work_mem") != "77MB"
    for _ in range(3):
        assert await scalar(alias, "SHOW work_mem") != "77MB"
    assert await scalar(alias, free) is True


@pytest.mark.skipif(not PREPARES, reason="prepared statements need PgBouncer 1.22 or later")
async def test_statements_are_prepared(alias: str) -> None:
    """The parameter `prepared` is not in vain: psycopg prepares, and PgBouncer follows."""
    threshold = connections.settings[alias]["OPTIONS"]["prepare_threshold"]

    def work() -> int:
        for _ in range(12):
            items(alias).count()
        return len(connections[alias].connection._prepared._names)

    assert bool(await asyncorm.native(work)()) == (threshold is not None)


# Faults


async def test_restart_of_pgbouncer(django_db_setup: Any, django_db_blocker: Any) -> None:
    """Clients are cut off; the pool is well at once when PgBouncer is back."""
    server = connections.settings["default"]
    with django_db_blocker.unblock(), bouncer.pgbouncer(server) as first:
        with database("bounced", **behind(first)) as alias:
            await asyncio.gather(*(scalar(alias, "SELECT pg_sleep(0.01)") for _ in range(5)))
            first.stop()
            with pytest.raises(OperationalError, match="Cannot connect to database 'bounced'"):
                await scalar(alias, "SELECT 1")
            first.start()
            async with asyncio.timeout(5):
                assert await scalar(alias, "SELECT 1") == 1


async def test_reads_while_pgbouncer_has_no_server(
    django_db_setup: Any, django_db_blocker: Any
) -> None:
    """It ends each client at its statement then: reads are repeated until the pool's timeout."""
    with (
        django_db_blocker.unblock(),
        postgres_server(own=True) as server,
        bouncer.pgbouncer(server.settings) as running,
    ):
        ask(server, CREATE_ITEM)
        changes = {**server.settings, **behind(running)}
        hasty = behind(running)["OPTIONS"]
        hasty["pool"] |= {"timeout": 0.5}
        with (
            database("bounced", **changes) as alias,
            database("hasty", **{**changes, "OPTIONS": hasty}) as impatient,
            database("writing", **changes),
        ):

            async def read(number: int, alias: str = alias) -> list[Any]:
                found = items(alias).filter(remote_id=number)
                if number % 2:
                    return await found.anative()
                return await asyncorm.native(lambda: list(found))()

            async def failing(awaitables: Any) -> None:
                # PgBouncer has one of them wait until it asks for the server again.
                several = [asyncio.create_task(each) for each in awaitables]
                await asyncio.wait(several, return_when=asyncio.FIRST_EXCEPTION)
                errors = [each.exception() for each in several if each.done()]
                assert [type(each) for each in errors] == [OperationalError] * len(errors)
                assert "server login has been failing" in str(errors[0])
                for each in several:
                    each.cancel()
                await asyncio.wait(several)

            for each in (alias, impatient, "writing"):
                await asyncio.gather(*(read(number, each) for number in range(6)))
            await asyncio.to_thread(server.stop, "immediate")
            async with asyncio.TaskGroup() as group:
                reads = []
                for number in range(20):
                    reads.append(group.create_task(read(number)))
                    await asyncio.sleep(0.02)
                await failing(read(number, impatient) for number in range(6))
                await failing(add("writing") for _ in range(6))
                assert not all(each.done() for each in reads)
                await asyncio.to_thread(server.start)
            assert [each.result() for each in reads] == [[]] * 20
