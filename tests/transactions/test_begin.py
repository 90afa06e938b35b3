"""BEGIN goes with a block's first statement: in one round trip, and as safely as before it.

The round trips are counted where they pass: a proxy keeps what is sent to the server.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from typing import Any

import psycopg
import pytest
from django.db import (
    DatabaseError,
    DataError,
    InternalError,
    OperationalError,
    connections,
    transaction,
)
from psycopg import IsolationLevel, pq

import asyncorm
from asyncorm import pools
from asyncorm._wire.statement import Statement
from asyncorm.demo.postgres import Server, postgres_server
from asyncorm.driver import Connection
from tests.pool.test_standby import ask
from tests.project.myapp.models import Item
from tests.support import CREATE_ITEM, database, eventually
from tests.transactions.test_fate import Proxy

ALIAS = "lossy"
LOUD = (
    "CREATE FUNCTION loud() RETURNS int LANGUAGE plpgsql AS"
    " $$BEGIN RAISE NOTICE 'heard'; RETURN 1; END$$"
)
ids = count(1)


@pytest.fixture(scope="module")
def server(django_db_setup: Any) -> Iterator[Server]:
    with postgres_server(own=True, tcp=True) as server:
        for sql in (CREATE_ITEM, LOUD):
            ask(server, sql, password=server.settings["PASSWORD"])
        yield server


@pytest.fixture
def query(server: Server) -> Callable[..., Any]:
    """Asks the server, beside the proxy."""
    return lambda sql, *params: ask(server, sql, *params, password=server.settings["PASSWORD"])


@pytest.fixture
def options() -> dict[str, Any]:
    return {}


@pytest.fixture
async def proxy(
    server: Server, options: dict[str, Any], django_db_blocker: Any
) -> AsyncIterator[Proxy]:
    """The alias, behind a proxy, with one connection; one item."""
    ask(server, "TRUNCATE myapp_item", password=server.settings["PASSWORD"])
    proxy = Proxy(server)
    changes = {
        **server.settings,
        "HOST": "127.0.0.1",
        "PORT": str(proxy.port),
        "OPTIONS": {
            "options": None,
            "pool": {"min_size": 0, "max_size": 1},
            "sslmode": "disable",
            **options,
        },
    }
    with django_db_blocker.unblock(), database(ALIAS, **changes):
        async with proxy.running():
            await Item.objects.using(ALIAS).native_create(remote_id=0, name="first")
            await item()
            yield proxy


async def item() -> Item:
    return await Item.objects.using(ALIAS).native_get(remote_id=0)  # type: ignore[no-any-return]


async def raw(sql: str, *params: Any) -> Any:
    async with asyncorm.cursor(ALIAS) as cursor:
        await cursor.execute(sql, params or None)
        row = await cursor.fetchone()
        return row and row[0]


async def create(**values: Any) -> Item:
    created = await Item.objects.using(ALIAS).native_create(remote_id=next(ids), **values)
    return created  # type: ignore[no-any-return]


async def pid() -> int:
    return int(await raw("SELECT pg_backend_pid()"))


def twin() -> Connection:
    """The pool's one connection."""
    (conn,) = pools.find(ALIAS).connections.live  # type: ignore[union-attr]
    return conn.twin


def segments(sent: list[bytes]) -> list[str]:
    """The messages up to each that has the server say it is ready, by their letters."""
    data, found, letters = b"".join(sent), [], ""
    while data:
        letter, size = chr(data[0]), int.from_bytes(data[1:5], "big")
        letters, data = letters + letter, data[1 + size :]
        if letter in "SQ":
            found.append(letters)
            letters = ""
    return found


async def sent(proxy: Proxy, work: Callable[[], Awaitable[Any]]) -> list[str]:
    """What a block of so much work sends to the server."""
    proxy.sent.clear()
    async with asyncorm.atomic(ALIAS):
        await work()
    return segments(proxy.sent)


def by_django() -> Any:
    """The statement through a cursor of Django's, in synchronous code."""

    def work() -> None:
        with connections[ALIAS].cursor() as cursor:
            cursor.execute("SELECT name FROM myapp_item WHERE remote_id = %s", [0])
            assert cursor.fetchall() == [("first",)]

    return asyncorm.native(work)()


EXTENDED = "PBDE"  # Parse, Bind, Describe, Execute
WITH_IT: dict[str, Callable[[], Awaitable[Any]]] = {
    "get": item,
    "list": lambda: Item.objects.using(ALIAS).anative(),
    "update": lambda: Item.objects.using(ALIAS).filter(pk=-1).native_update(name="x"),
    "create": lambda: create(name="x"),
    "raw": lambda: raw("SELECT 1"),
    "a cursor of Django's": by_django,
}


@pytest.mark.parametrize("first", WITH_IT)
async def test_begin_has_no_round_trip_of_its_own(proxy: Proxy, first: str) -> None:
    await sent(proxy, WITH_IT[first])  # what is asked for once is known
    assert await sent(proxy, WITH_IT[first]) == [EXTENDED * 2 + "S", "Q"]


async def test_a_block_without_a_statement_sends_nothing(proxy: Proxy) -> None:
    async def nothing() -> None:
        pass

    await item()
    assert await sent(proxy, nothing) == []
    proxy.sent.clear()
    with pytest.raises(KeyError):
        async with asyncorm.atomic(ALIAS, read_only=True):
            raise KeyError
    assert proxy.sent == []


async def stream() -> None:
    async for _ in Item.objects.using(ALIAS).native_iterator():
        pass


def two_commands() -> Any:
    def work() -> None:
        with connections[ALIAS].cursor() as cursor:
            cursor.execute("SELECT 1; SELECT 2")

    return asyncorm.native(work)()


BEFORE_IT: dict[str, Callable[[], Awaitable[Any]]] = {
    "several commands": two_commands,
    "setting": lambda: raw("SELECT set_config('work_mem', '5MB', false)"),
    "stream": stream,
    "COPY": lambda: Item.objects.using(ALIAS).native_bulk_create(
        [Item(remote_id=next(ids))], method="copy"
    ),
}


@pytest.mark.parametrize("first", BEFORE_IT)
async def test_what_may_not_travel_has_it_sent_before(proxy: Proxy, first: str) -> None:
    await sent(proxy, BEFORE_IT[first])
    assert (await sent(proxy, BEFORE_IT[first]))[0] == "Q"


async def test_with_a_time_limit_and_with_the_id_of_its_transaction(proxy: Proxy) -> None:
    async def work(**options: Any) -> list[str]:
        proxy.sent.clear()
        async with asyncorm.atomic(ALIAS, **options):
            await Item.objects.using(ALIAS).filter(remote_id=0).native_update(name="first")
        return segments(proxy.sent)

    await work()
    assert await work(statement_timeout=5) == [EXTENDED * 2 + "S", EXTENDED + "S", "Q"]
    proxy.sent.clear()
    assert await work(settle=True) == [EXTENDED * 2 + "S", EXTENDED + "S", "Q"]
    assert len(proxy.sent) == 2  # the id is asked for in the same flight


def several(*queries: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[list[Any]]]:
    return lambda: asyncorm.batch(*queries, using=ALIAS, return_exceptions=True)


async def test_several_that_read_go_with_it(proxy: Proxy) -> None:
    reads = several(item, item, item)
    await sent(proxy, reads)
    assert await sent(proxy, reads) == [EXTENDED * 2 + "S", EXTENDED + "S", EXTENDED + "S", "Q"]
    assert len(proxy.sent) == 2


async def test_one_behind_it_that_may_write_waits_for_it(proxy: Proxy, query: Any) -> None:
    """It would be committed by itself if BEGIN failed."""
    await item()
    assert (await sent(proxy, several(item, lambda: create(name="x"))))[0] == "Q"
    async with asyncorm.connection(ALIAS):
        twin()._begin_statement = b"BEGIN ISOLATION LEVEL UNHEARD OF"
        failed: list[Any] = []
        async with asyncorm.atomic(ALIAS):
            failed += await several(item, item, item)()
            asyncorm.set_rollback(True, ALIAS)
        # By itself it has the connection closed.
        with pytest.raises(OperationalError, match="connection was lost"):
            async with asyncorm.atomic(ALIAS):
                failed += await several(item, lambda: create(name="lost"))()
                asyncorm.set_rollback(True, ALIAS)
    assert len(failed) == 5 and all(isinstance(each, DatabaseError) for each in failed)
    assert all("syntax error" in str(each) for each in failed)
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'lost'") == 0
    assert (await item()).name == "first"


async def test_without_pipelines_it_goes_first(proxy: Proxy, monkeypatch: Any) -> None:
    """As with libpq before 14."""
    monkeypatch.setattr(Connection, "has_pipelines", False)
    assert await sent(proxy, item) == ["Q", EXTENDED + "S", "Q"]


async def test_its_characteristics_hold_for_the_first_statement(proxy: Proxy) -> None:
    level = "SELECT current_setting('transaction_isolation')"
    async with asyncorm.atomic(ALIAS, isolation_level=IsolationLevel.SERIALIZABLE):
        assert await raw(level) == "serializable"
    async with asyncorm.atomic(ALIAS):
        assert await raw(level) == "read committed"
    with pytest.raises(InternalError, match="read-only transaction"):
        async with asyncorm.atomic(ALIAS, read_only=True):
            await create()


async def test_nothing_is_executed_if_it_fails(proxy: Proxy, query: Any) -> None:
    await item()
    async with asyncorm.connection(ALIAS):
        twin()._begin_statement = b"BEGIN ISOLATION LEVEL UNHEARD OF"
        for work in (lambda: create(name="lost"), lambda: raw("DELETE FROM myapp_item")):
            with pytest.raises(DatabaseError, match="syntax error"):
                async with asyncorm.atomic(ALIAS):
                    await work()
            assert twin().pgconn.transaction_status == pq.TransactionStatus.IDLE
        with pytest.raises(DatabaseError, match="syntax error"):
            async with asyncorm.atomic(ALIAS, settle=True):
                await create(name="lost")
        twin()._begin_statement = b""
    assert query("SELECT count(*) FROM myapp_item") == 1
    assert await pid() == twin().pgconn.backend_pid


async def test_a_failed_statement_aborts_the_transaction(proxy: Proxy, query: Any) -> None:
    before = await pid()
    with pytest.raises(DataError):
        async with asyncorm.atomic(ALIAS):
            await raw("SELECT 1 / 0")
    with pytest.raises(InternalError, match="current transaction is aborted"):
        async with asyncorm.atomic(ALIAS):
            with pytest.raises(DataError):
                await raw("SELECT 1 / 0")
            await raw("SELECT 1")
    with pytest.raises(transaction.TransactionManagementError):
        async with asyncorm.atomic(ALIAS):
            with pytest.raises(DatabaseError):
                await Item.objects.using(ALIAS).native_create(remote_id=0)
            await item()
    async with asyncorm.atomic(ALIAS):
        with pytest.raises(DatabaseError):
            async with asyncorm.atomic(ALIAS):
                await Item.objects.using(ALIAS).native_create(remote_id=0)
        await create(name="kept")
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'kept'") == 1
    assert await pid() == before


async def test_what_libpq_refuses(proxy: Proxy) -> None:
    """BEGIN was sent, the statement was not: the transaction is open, and the connection sound."""
    statement = Statement(b"SELECT 1", [b"1"] * 65536, (23,) * 65536)

    def work() -> None:
        conn = connections[ALIAS].connection
        with pytest.raises(psycopg.OperationalError, match="65535"):
            conn.run(statement)
        assert conn.pgconn.transaction_status == pq.TransactionStatus.INTRANS
        assert not conn.pgconn.pipeline_status

    before = await pid()
    async with asyncorm.atomic(ALIAS):
        await asyncorm.native(work)()
        assert await pid() == before
    assert await pid() == before


# Cancelling, and losing the connection


async def test_cancelled_while_it_runs(proxy: Proxy, query: Any) -> None:
    before = await pid()

    async def work() -> None:
        async with asyncorm.atomic(ALIAS):
            await raw("SELECT pg_sleep(60)")

    task = asyncio.create_task(work())
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    await eventually(lambda: query(sleeping) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert query(sleeping) == 0
    assert await pid() == before
    assert not twin().pgconn.pipeline_status and not twin().segment


async def test_caught_cancellation_dooms_the_block(proxy: Proxy, query: Any) -> None:
    before = await pid()
    with pytest.raises(transaction.TransactionManagementError):
        async with asyncorm.atomic(ALIAS):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await raw("INSERT INTO myapp_item (name) SELECT pg_sleep(60)::text")
            await create(name="doomed")
    assert query("SELECT count(*) FROM myapp_item") == 1
    assert await pid() == before


@pytest.mark.parametrize("way", ["planned", "raw", "prepared", "awaited"])
async def test_cancelled_at_each_turn_of_the_loop(proxy: Proxy, query: Any, way: str) -> None:
    """Nothing is left of it: neither in the table nor on the connection."""
    twin().prepare_threshold = 0 if way == "prepared" else None
    work = {
        "planned": lambda: create(name="half"),
        "raw": lambda: raw("INSERT INTO myapp_item (name) VALUES ('half') RETURNING 1"),
        "prepared": lambda: create(name="half"),
        "awaited": lambda: Item.objects.using(ALIAS).filter(remote_id=0).native_update(name="half"),
    }[way]
    ended = asyncio.Event()

    async def block() -> None:
        async with asyncorm.atomic(ALIAS):
            await work()
            await ended.wait()

    before = await pid()
    for turns in range(60):
        task = asyncio.create_task(block())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncorm.atomic(ALIAS):
            await item()
        assert not twin().pgconn.pipeline_status and not twin().segment
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'first'") == 1
    assert query("SELECT count(*) FROM myapp_item") == 1
    assert await pid() == before


async def test_a_session_that_is_ended_meanwhile(proxy: Proxy, query: Any) -> None:
    async def work() -> None:
        async with asyncorm.atomic(ALIAS):
            await raw("SELECT pg_sleep(60)")

    await item()
    task = asyncio.create_task(work())
    sleeping = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    await eventually(lambda: query(sleeping))
    with pytest.raises(OperationalError, match="administrator command") as raised:
        await task
    assert not isinstance(raised.value, asyncorm.CommitUnknown)
    async with asyncorm.atomic(ALIAS):
        await create(name="later")
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'later'") == 1


async def test_a_lost_answer_is_not_repeated(proxy: Proxy, query: Any) -> None:
    await item()
    proxy.lose = b"BEGIN"
    with pytest.raises(OperationalError) as raised:
        async with asyncorm.atomic(ALIAS):
            await item()
    assert not isinstance(raised.value, asyncorm.CommitUnknown)
    assert proxy.lost == 1
    assert (await item()).name == "first"


# What else goes with it


@pytest.mark.parametrize("options", [{"prepare_threshold": 0}])
async def test_prepared_in_the_same_round_trip(proxy: Proxy) -> None:
    """A planned statement, and what cannot be prepared: it is not remembered as if it were."""
    async with asyncorm.atomic(ALIAS):
        with pytest.raises(DatabaseError):
            await Item.objects.using(ALIAS).extra(where=["no_such_column"]).native_count()
        asyncorm.set_rollback(True, ALIAS)
    twin()._prepared.clear()
    assert await sent(proxy, item) == ["PBDE" + "P" + "BDES", "Q"]
    assert len(twin()._prepared._names) == 1
    assert await sent(proxy, item) == ["PBDE" + "BDES", "Q"]
    missing = Statement(b"SELECT * FROM missing WHERE id = $1", [b"1"], (20,))

    def fail() -> None:
        with pytest.raises(psycopg.errors.UndefinedTable):
            connections[ALIAS].connection.run(missing)

    for _ in range(2):
        async with asyncorm.atomic(ALIAS):
            await asyncorm.native(fail)()
            asyncorm.set_rollback(True, ALIAS)
    assert missing.query not in {query for query, _ in twin()._prepared._names}


async def test_all_tasks_of_a_block_are_in_its_transaction(proxy: Proxy) -> None:
    async with asyncorm.atomic(ALIAS):
        found = await asyncio.gather(*(raw("SELECT txid_current()") for _ in range(20)))
        found += await asyncorm.batch(
            *(lambda: raw("SELECT txid_current()") for _ in range(3)), using=ALIAS
        )
    assert len(set(found)) == 1
    async with asyncorm.atomic(ALIAS):
        found = await asyncorm.batch(
            *(lambda: raw("SELECT txid_current()") for _ in range(3)), using=ALIAS
        )
    assert len(set(found)) == 1


async def test_notices_are_heard(proxy: Proxy) -> None:
    heard: list[str] = []

    def work() -> None:
        conn = connections[ALIAS].connection
        conn.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        with connections[ALIAS].cursor() as cursor:
            cursor.execute("SELECT loud()")

    async with asyncorm.atomic(ALIAS):
        await asyncorm.native(work)()
    assert heard == ["heard"]


async def test_large_values_both_ways(proxy: Proxy) -> None:
    big = "x" * 15 * 2**20
    async with asyncorm.atomic(ALIAS):
        assert await raw("SELECT %s::text || ''", big) == big


async def test_batches_of_bulk_create(proxy: Proxy, query: Any) -> None:
    """Sent while the one before runs: the first of them with BEGIN."""
    items = [Item(remote_id=next(ids), name="bulk") for _ in range(3000)]
    await Item.objects.using(ALIAS).native_bulk_create(items, batch_size=1000)
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'bulk'") == 3000
    items = [Item(remote_id=0, name="twice") for _ in range(3000)]
    with pytest.raises(DatabaseError):
        await Item.objects.using(ALIAS).native_bulk_create(items, batch_size=1000)
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'twice'") == 0
    assert (await item()).name == "first"


async def test_the_server_ends_a_statement_that_takes_too_long(proxy: Proxy) -> None:
    before = await pid()
    async with asyncorm.connection(ALIAS):
        await raw("SELECT set_config('statement_timeout', '50ms', false)")
        with pytest.raises(OperationalError, match="statement timeout"):
            async with asyncorm.atomic(ALIAS):
                await raw("SELECT pg_sleep(60)")
        assert await pid() == before
