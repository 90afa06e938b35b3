"""A primary with a streaming standby and Django's routers: who reads and writes where."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import psycopg
import pytest
from django.db import InternalError, OperationalError, connections, transaction
from django.db.models import BooleanField, Func

import asyncorm
from asyncorm.demo.postgres import Server, postgres_server
from tests.project.myapp.models import Item
from tests.support import CREATE_ITEM, database, eventually

ids = count(1)
POOL = {"options": None, "pool": {"min_size": 0, "max_size": 5}}


class Apart:
    """Reads go to the standby whatever happens."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "replica"

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "primary"

    def allow_relation(self, *objects: Any, **hints: Any) -> bool:
        return True


class Pinning(Apart):
    """Reads in a transaction go to the primary (docs/replicas.md)."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "primary" if transaction.get_connection("primary").in_atomic_block else "replica"


class Changing(Apart):
    """Answers differently from time to time, as by the random choice in Django's documentation."""

    def __init__(self, asked: int) -> None:
        self.asked = asked

    def db_for_read(self, model: Any, **hints: Any) -> str:
        self.asked += 1
        return ("primary", "primary", "replica")[self.asked % 3]


def ask(server: Server, statement: str, *params: Any, **options: Any) -> Any:
    """The value of a query, over a connection of its own; options are psycopg's."""
    names = {"host": "HOST", "port": "PORT", "user": "USER", "dbname": "NAME"}
    where = {name: server.settings[key] for name, key in names.items()}
    with psycopg.connect(**where, **options, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), params or None)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


@contextmanager
def replicated() -> Iterator[tuple[Server, Server]]:
    """A primary and its standby, in step: what is committed is to be read on the standby."""
    with (
        postgres_server(own=True) as primary,
        postgres_server(standby_of=primary) as standby,
    ):
        ask(primary, CREATE_ITEM)
        for statement in (
            "ALTER SYSTEM SET synchronous_standby_names = '*'",
            "ALTER SYSTEM SET synchronous_commit = 'remote_apply'",
            "SELECT pg_reload_conf()",
        ):
            ask(primary, statement)
        deadline = time.monotonic() + 30
        while not (
            ask(standby, "SELECT to_regclass('myapp_item')")
            and ask(primary, "SHOW synchronous_commit") == "remote_apply"
            and ask(primary, "SELECT sync_state FROM pg_stat_replication") == "sync"
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield primary, standby


def reach(*servers: Server) -> dict[str, Any]:
    """The entries of DATABASES that find one of the servers."""
    return {
        **servers[0].settings,
        "HOST": ",".join(server.settings["HOST"] for server in servers),
        "PORT": ",".join(server.settings["PORT"] for server in servers),
    }


@pytest.fixture(scope="module")
def servers(django_db_setup: Any) -> Iterator[tuple[Server, Server]]:
    with replicated() as servers:
        yield servers


@pytest.fixture
def aliases(servers: tuple[Server, Server], django_db_blocker: Any, settings: Any) -> Iterator[Any]:
    """The aliases `primary` and `replica`; no items."""
    primary, standby = servers
    ask(primary, "TRUNCATE myapp_item")
    with (
        django_db_blocker.unblock(),
        database("primary", **reach(primary), OPTIONS=POOL),
        database("replica", **reach(standby), OPTIONS=POOL),
    ):
        yield settings


async def scalar(alias: str, sql: str, params: Any = None) -> Any:
    async with asyncorm.cursor(alias) as cursor:
        await cursor.execute(sql, params)
        row = await cursor.fetchone() if cursor.description else None
        return row[0] if row else None


async def add(name: str = "", **using: str) -> Item:
    objects = Item.objects.using(using["using"]) if using else Item.objects
    return await objects.native_create(remote_id=next(ids), name=name)


def seen() -> Any:
    """Items, each with its name and whether a standby says so."""
    standby = Func(function="pg_is_in_recovery", output_field=BooleanField())
    return Item.objects.annotate(standby=standby).order_by("pk").values_list("name", "standby")


async def test_reads_on_the_standby_and_writes_on_the_primary(aliases: Any) -> None:
    aliases.DATABASE_ROUTERS = [Apart()]
    item = await add("one")
    assert item._state.db == "primary"
    assert await seen().anative() == [("one", True)]
    item.name = "two"
    await item.native_save()
    found = await Item.objects.native_get(pk=item.pk)
    assert (found.name, found._state.db) == ("two", "replica")
    found.name = "three"
    await found.native_save()  # where it came from is not where it is written
    assert found._state.db == "primary"
    await item.native_refresh_from_db()
    assert (item.name, item._state.db) == ("three", "replica")
    again, created = await Item.objects.native_get_or_create(remote_id=item.remote_id)
    assert (again.name, created) == ("three", False)
    await Item.objects.native_bulk_create([Item(remote_id=next(ids)) for _ in range(30)])
    assert await Item.objects.filter(name="").native_update(name="x") == 30
    rows = [row async for row in seen().filter(name="x").native_iterator(chunk_size=10)]
    assert rows == [("x", True)] * 30
    assert (await Item.objects.filter(name="x").native_delete())[0] == 30
    assert await asyncio.gather(*(Item.objects.native_count() for _ in range(10))) == [1] * 10


async def test_a_write_on_the_standby_is_refused(aliases: Any) -> None:
    with pytest.raises(InternalError, match="cannot execute INSERT in a read-only transaction"):
        await add(using="replica")
    with pytest.raises(InternalError, match="read-only transaction"):
        async with asyncorm.atomic("replica"):
            await Item.objects.using("replica").select_for_update().anative()
    assert await Item.objects.using("replica").native_count() == 0, "the pool goes on"


async def test_state_is_reset_on_the_standby(aliases: Any) -> None:
    pid = await scalar("replica", "SELECT pg_backend_pid()")
    await scalar("replica", "SET work_mem = '77MB'")
    await eventually(lambda: asyncorm.pool_stats("replica")["pool_available"] == 1)
    assert await scalar("replica", "SHOW work_mem") != "77MB"
    async with asyncorm.connection("replica"):
        await scalar("replica", "SET work_mem = '77MB'")
    assert await scalar("replica", "SHOW work_mem") != "77MB"
    assert await scalar("replica", "SELECT pg_backend_pid()") == pid, "reset, not replaced"


async def test_transactions_are_pinned(aliases: Any) -> None:
    aliases.DATABASE_ROUTERS = [Pinning()]
    await add("before")
    assert await seen().anative() == [("before", True)]
    async with asyncorm.atomic("primary"):
        item = await add("inside")
        rows = [("before", False), ("inside", False)]
        assert await seen().anative() == rows
        assert await asyncio.gather(*(seen().anative() for _ in range(5))) == [rows] * 5
        assert [row async for row in seen().native_iterator(chunk_size=1)] == rows
        assert await asyncorm.native(lambda: list(seen()))() == rows
        async with asyncorm.atomic("primary"):
            await item.native_refresh_from_db()
            assert item._state.db == "primary"
        async with asyncorm.detached():
            assert await seen().anative() == [("before", True)]
    assert await seen().anative() == [("before", True), ("inside", True)]


async def test_a_block_and_reads_elsewhere_do_not_mix(aliases: Any) -> None:
    aliases.DATABASE_ROUTERS = [Apart()]
    try:
        async with asyncorm.atomic("primary"):
            await add("uncommitted")

            async def read() -> None:
                assert await seen().anative() == []
                assert await seen().using("primary").anative() == [("uncommitted", False)]
                assert [row async for row in seen().native_iterator(chunk_size=1)] == []

            await asyncio.gather(*(read() for _ in range(5)))
            # A block on the one alias within a block on the other: two transactions.
            with pytest.raises(InternalError):
                async with asyncorm.atomic("replica"):
                    assert await seen().anative() == []
                    await add(using="replica")
            async with asyncorm.atomic("replica"):
                assert await scalar("replica", "SELECT pg_is_in_recovery()")
                await add("goes on")
                assert await seen().using("primary").native_count() == 2
            assert await seen().using("primary").native_count() == 2
            raise LookupError
    except LookupError:
        pass
    assert await seen().using("primary").anative() == []


async def test_a_stream_stays_where_it_began(aliases: Any, servers: tuple[Server, Server]) -> None:
    """The router is asked once, though Django's iterator() asks it several times."""
    await Item.objects.using("primary").native_bulk_create(
        [Item(remote_id=next(ids)) for _ in range(30)]
    )
    connections.settings["primary"]["DISABLE_SERVER_SIDE_CURSORS"] = True
    for asked in range(3):
        aliases.DATABASE_ROUTERS = [Changing(asked)]
        rows = [standby async for _, standby in seen().native_iterator(chunk_size=10)]
        assert len(rows) == 30
        assert len(set(rows)) == 1
        # Whether a server-side cursor is used is the same alias's affair.
        cursors = ask(
            servers[0],
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE query ~ '^(DECLARE|FETCH|CLOSE|DISCARD)' AND application_name = 'primary'",
        )
        assert cursors == 0


async def test_the_standby_goes_away_and_comes_back(
    aliases: Any, servers: tuple[Server, Server]
) -> None:
    aliases.DATABASE_ROUTERS = [Apart()]
    _, standby = servers
    ask(servers[0], "ALTER SYSTEM SET synchronous_commit = 'local'")
    ask(servers[0], "SELECT pg_reload_conf()")
    try:
        await asyncio.gather(*(seen().anative() for _ in range(5)))
        await asyncio.to_thread(standby.stop, "immediate")
        with pytest.raises(OperationalError, match="Cannot connect to database 'replica'"):
            await seen().anative()
        await add("meanwhile")
    finally:
        await asyncio.to_thread(standby.start)
        ask(servers[0], "ALTER SYSTEM SET synchronous_commit = 'remote_apply'")
        ask(servers[0], "SELECT pg_reload_conf()")
    async with asyncio.timeout(20):
        while await seen().anative() != [("meanwhile", True)]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


class Traffic:
    """Tasks that write and read until told to stop; what was acknowledged, and every error."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        self.last_written = 0.0
        self.reads = 0
        self.errors: list[BaseException] = []
        self.stopped = False

    async def write(self) -> None:
        while not self.stopped:
            number = next(ids)
            try:
                async with asyncorm.atomic("primary"):
                    await Item.objects.using("primary").native_create(remote_id=number)
            except Exception as error:
                self.errors.append(error)
                await asyncio.sleep(0.02)
            else:
                self.written.add(number)
                self.last_written = time.monotonic()

    async def read(self) -> None:
        while not self.stopped:
            try:
                await Item.objects.using("replica").native_count()
            except Exception as error:
                self.errors.append(error)
                await asyncio.sleep(0.02)
            else:
                self.reads += 1
                await asyncio.sleep(0.002)


async def test_promotion(django_db_setup: Any, django_db_blocker: Any) -> None:
    with ExitStack() as stack:
        primary, standby = stack.enter_context(replicated())
        stack.enter_context(django_db_blocker.unblock())
        both = reach(primary, standby)
        writing = {**POOL, "target_session_attrs": "read-write"}
        reading = {**POOL, "target_session_attrs": "prefer-standby"}
        stack.enter_context(database("primary", **both, OPTIONS=writing))
        stack.enter_context(database("replica", **both, OPTIONS=reading))
        assert not await scalar("primary", "SELECT pg_is_in_recovery()")
        assert await scalar("replica", "SELECT pg_is_in_recovery()")

        traffic = Traffic()
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(traffic.write())
            group.create_task(traffic.read())
            await eventually(lambda: len(traffic.written) > 20 and traffic.reads > 5, 30)

            await asyncio.to_thread(primary.stop, "immediate")
            await eventually(lambda: traffic.errors, 30)
            late = group.create_task(add(using="primary"))  # waits for the next primary
            reads = traffic.reads
            await eventually(lambda: traffic.reads > reads + 5, 30)  # nobody misses the primary

            await asyncio.to_thread(ask, standby, "ALTER SYSTEM SET synchronous_standby_names = ''")
            assert await asyncio.to_thread(ask, standby, "SELECT pg_promote()")
            promoted = time.monotonic()
            await eventually(lambda: traffic.last_written > promoted, 30)
            recovered = time.monotonic() - promoted
            before = len(traffic.written)
            await eventually(lambda: len(traffic.written) > before + 20, 30)
            traffic.stopped = True
            await late

        assert recovered < 10, "the pool recovers within seconds"
        assert 1 <= len(traffic.errors) <= 3, "one for each that was under way"
        kinds = OperationalError, asyncorm.CommitUnknown  # under way was a statement, or COMMIT
        assert [error for error in traffic.errors if type(error) not in kinds] == []
        rows = set(
            await Item.objects.using("replica").values_list("remote_id", flat=True).anative()
        )
        assert rows >= traffic.written, "acknowledged, and lost"
        for alias in ("primary", "replica"):
            assert not await scalar(alias, "SELECT pg_is_in_recovery()")
            stats = asyncorm.pool_stats(alias)
            assert stats["pool_available"] == stats["pool_size"] <= 5
            assert connections.settings[alias]["HOST"] == both["HOST"]
