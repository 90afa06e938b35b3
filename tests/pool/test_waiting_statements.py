"""A statement that waits without a connection depends on nobody else's: not on what others set in
their sessions, not on how long their connections live.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from django.db import DataError, OperationalError, connections
from django.db.backends.signals import connection_created
from django.test.utils import CaptureQueriesContext
from psycopg.adapt import Dumper, Loader
from psycopg.types import TypeInfo

import asyncorm
from asyncorm import native, pools
from tests.project.shop.models import Customer
from tests.support import administrator, all_given_back, database, eventually

ALIAS = "waiting"
WHEN = datetime(2024, 3, 4, 12, tzinfo=UTC)
LASTS = timedelta(days=1, hours=2)
VALUES = (
    "SELECT %s::timestamptz, ARRAY[%s::timestamptz], %s::date, %s::interval, %s::text, ARRAY[%s]"
)
SETTINGS = {
    "time zone": "SET LOCAL TIME ZONE 'Asia/Tokyo'",
    "date style": "SET LOCAL DateStyle = 'German, DMY'",
    "interval style": "SET LOCAL IntervalStyle = 'sql_standard'",
    "encoding": "SET LOCAL client_encoding = 'LATIN1'",
    "strings": "SET LOCAL standard_conforming_strings = off",
}


@pytest.fixture(autouse=True)
def _allowed(django_db_setup: Any, django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield


@contextlib.asynccontextmanager
async def few(**pool: Any) -> AsyncIterator[None]:
    """The alias with two connections, both opened."""
    with database(ALIAS, OPTIONS={"pool": {"min_size": 0, "max_size": 2, **pool}}):
        await asyncio.gather(*[row("SELECT pg_sleep(0.1)") for _ in range(4)])
        yield
        await asyncorm.close_pools(ALIAS)


async def row(sql: str, *params: Any) -> Any:
    async with asyncorm.cursor(ALIAS) as cursor:
        await cursor.execute(sql, params or None)
        return await cursor.fetchone()


def djangos(sql: str, *params: Any) -> Any:
    with connections[ALIAS].cursor() as cursor:
        cursor.execute(sql, params or None)
        return cursor.fetchone()


async def values() -> None:
    """Go to the server and back by a cursor without an operation."""
    text = "\\ü'"
    sent = (WHEN, WHEN, WHEN.date(), LASTS, text, text)
    assert await row(VALUES, *sent) == (WHEN, [WHEN], date(2024, 3, 4), LASTS, text, [text])


async def by_djangos_cursor() -> None:
    sent = (WHEN, WHEN, WHEN.date(), LASTS, "\\ü", "\\ü")
    got = await native(djangos)(VALUES, *sent)
    assert got == (WHEN, [WHEN], date(2024, 3, 4), LASTS, "\\ü", ["\\ü"])
    assert got[0].utcoffset() == timedelta()


async def watched() -> None:
    with CaptureQueriesContext(connections[ALIAS]) as captured:
        await by_djangos_cursor()
    assert "ü" in captured[0]["sql"]


async def by_orm() -> None:
    customers = Customer.objects.using(ALIAS)
    customer = await customers.native_get(name="ü")
    assert (customer.joined, customer.joined.utcoffset()) == (WHEN, timedelta())
    (listed,) = await customers.filter(joined=WHEN).anative()
    assert listed.joined == WHEN
    assert [when async for when in customers.values_list("joined", flat=True).aiterator()] == [WHEN]


async def in_batch() -> None:
    customers = Customer.objects.using(ALIAS)
    (one,), when = await asyncorm.batch(
        customers.filter(joined=WHEN),
        lambda: djangos("SELECT %s::timestamptz", WHEN),
        using=ALIAS,
    )
    assert (one.joined, when) == (WHEN, (WHEN,))


KINDS: list[Callable[[], Any]] = [values, by_djangos_cursor, watched, by_orm, in_batch]


@pytest.fixture
def customer() -> Iterator[None]:
    with administrator() as ask:
        ask("INSERT INTO shop_customer (name, joined) VALUES ('ü', '2024-03-04 12:00Z')")
        yield
        ask("DELETE FROM shop_customer")


@pytest.mark.usefixtures("customer")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
async def test_what_another_task_has_set(kind: Callable[[], Any], setting: str) -> None:
    """In its block; the others share the one connection that is left."""
    async with few():
        stop = asyncio.Event()
        begun = asyncio.Event()

        async def other() -> None:
            async with asyncorm.atomic(ALIAS):
                await native(djangos_only)(SETTINGS[setting])
                begun.set()
                while not stop.is_set():
                    await row("SELECT 1")

        task = asyncio.create_task(other())
        await begun.wait()
        for _ in range(3):
            await asyncio.gather(*[kind() for _ in range(20)])
        stop.set()
        await task
        await asyncio.gather(*[kind() for _ in range(20)])


def djangos_only(sql: str) -> None:
    with connections[ALIAS].cursor() as cursor:
        cursor.execute(sql)


@pytest.mark.usefixtures("customer")
async def test_connections_that_reach_the_end_of_their_life() -> None:
    """Each statement has its result, whatever becomes of the connection that ran it."""
    async with few(max_lifetime=0.2):
        end = asyncio.get_running_loop().time() + 2
        done = 0

        async def work(kind: Callable[[], Any]) -> None:
            nonlocal done
            while asyncio.get_running_loop().time() < end:
                await kind()
                done += 1

        await asyncio.gather(*[work(kind) for kind in KINDS * 4])
        assert done > 100


async def test_writes_of_a_batch_that_were_committed_have_their_results() -> None:
    async with few(max_lifetime=0.1):
        with administrator() as ask:
            ask("CREATE TABLE waiting (id serial PRIMARY KEY, at timestamptz DEFAULT now())")
            try:
                insert = "INSERT INTO waiting DEFAULT VALUES RETURNING id, at"
                end = asyncio.get_running_loop().time() + 1.5
                ids: list[int] = []

                async def work() -> None:
                    while asyncio.get_running_loop().time() < end:
                        for number, _ in await asyncorm.batch(
                            *[(lambda: djangos(insert)) for _ in range(3)], using=ALIAS
                        ):
                            ids.append(number)

                await asyncio.gather(*[work() for _ in range(6)])
                assert sorted(ids) == sorted(ask("SELECT array_agg(id) FROM waiting"))
            finally:
                ask("DROP TABLE waiting")


async def test_those_that_wait_while_all_connections_are_killed() -> None:
    """They run on others."""
    async with few():
        with administrator() as ask:
            holders = [asyncio.create_task(row("SELECT pg_sleep(600)")) for _ in range(2)]
            sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            await eventually(lambda: ask(sleeping) == 2)
            waiting = asyncio.gather(*[values() for _ in range(20)])
            await asyncio.sleep(0.05)
            ask(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE wait_event = 'PgSleep'"
            )
            lost = await asyncio.gather(*holders, return_exceptions=True)
            assert all(isinstance(error, OperationalError) for error in lost)
            await waiting


async def test_those_that_wait_while_a_new_connection_is_killed_too() -> None:
    """The server said so to that connection, not to all who wait for one."""
    killed: list[int] = []

    def receive(connection: Any, **kwargs: Any) -> None:
        if len(killed) < 3:
            killed.append(connection.connection.info.backend_pid)
            ask("SELECT pg_terminate_backend(%s, 10000)", killed[-1])
            connection.connection.execute("SELECT 1")

    async with few():
        with administrator() as ask:
            holders = [asyncio.create_task(row("SELECT pg_sleep(600)")) for _ in range(2)]
            sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            await eventually(lambda: ask(sleeping) == 2)
            waiting = asyncio.gather(*[values() for _ in range(20)])
            await asyncio.sleep(0.05)
            connection_created.connect(receive)
            try:
                ask(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE wait_event = 'PgSleep'"
                )
                await asyncio.gather(*holders, return_exceptions=True)
                await waiting
            finally:
                connection_created.disconnect(receive)
            assert len(killed) == 3


async def test_values_that_cannot_be_sent_concern_nobody_else() -> None:
    async with few():
        tasks = [row("SELECT %s::text", "\0" if n % 5 == 2 else f"{n}") for n in range(40)] + [
            native(djangos)("SELECT %s::text", "\0" if n % 5 == 2 else f"{n}") for n in range(40)
        ]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for n, result in enumerate(results):
            if n % 5 == 2:
                assert isinstance(result, DataError)
            else:
                assert result == (f"{n % 40}",)
        assert (await all_given_back(ALIAS))["statements_pipelined"] > 20


class Point:
    """A type of the program's own, with a type of the database's own."""

    def __init__(self, text: str) -> None:
        self.text = text


class PointDumper(Dumper):
    def dump(self, obj: Any) -> bytes:
        return f"<{obj.text}>".encode()


class PointLoader(Loader):
    def load(self, data: Any) -> Point:
        return Point(bytes(data).decode().strip("<>"))


async def test_adapters_of_each_connection() -> None:
    """A receiver of connection_created registers them, before or after the first connection."""

    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == ALIAS:
            info = TypeInfo.fetch(connection.connection, "waiting_point")
            assert info is not None
            info.register(connection.connection)
            adapters = connection.connection.adapters
            adapters.register_dumper(Point, PointDumper)
            adapters.register_loader(info.oid, PointLoader)

    async def there_and_back(n: int) -> None:
        ask = row if n % 2 else native(djangos)
        (got,) = await ask("SELECT %s::waiting_point", Point(f"{n}"))
        assert (type(got), got.text) == (Point, f"{n}")

    with administrator() as ask:
        ask("CREATE DOMAIN waiting_text AS text; CREATE TYPE waiting_point AS ENUM ('<0>')")
        for n in range(1, 30):
            ask(f"ALTER TYPE waiting_point ADD VALUE '<{n}>'")
        connection_created.connect(receive)
        try:
            async with few():
                await asyncio.gather(*[there_and_back(n) for n in range(30)])
                assert (await all_given_back(ALIAS))["statements_pipelined"] > 5
        finally:
            connection_created.disconnect(receive)
            ask("DROP TYPE waiting_point; DROP DOMAIN waiting_text")


async def test_adapters_of_a_cursor_are_its_own() -> None:
    def shout(n: int) -> Any:
        class Shouting(Loader):
            def load(self, data: Any) -> str:
                return bytes(data).decode().upper()

        with connections[ALIAS].cursor() as cursor:
            if n % 2:
                cursor.cursor.adapters.register_loader("text", Shouting)
            cursor.execute("SELECT %s::text", ["quiet"])
            return cursor.fetchone()[0]

    async with few():
        got = await asyncio.gather(*[native(shout)(n) for n in range(40)])
        assert got == ["quiet", "QUIET"] * 20
        assert (await all_given_back(ALIAS))["statements_pipelined"] > 5


async def test_what_is_set_on_what_stands_for_a_connection() -> None:
    """It is set on a connection of the operation's own, and nobody else sees it."""

    class Shouting(Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode().upper()

    def shout(n: int) -> Any:
        wrapper = connections[ALIAS]
        wrapper.ensure_connection()
        if n % 2:
            wrapper.connection.adapters.register_loader("text", Shouting)
        return djangos("SELECT %s::text", "quiet")[0]

    async with few():
        got = await asyncio.gather(*[native(shout)(n) for n in range(40)])
        assert got == ["quiet", "QUIET"] * 20


async def test_results_do_not_depend_on_the_connection_that_gave_them() -> None:
    async with few():
        cursors = [asyncorm.cursor(ALIAS) for _ in range(10)]
        sql = "SELECT n, ARRAY[%s::timestamptz], 'ü' AS \"ü\" FROM generate_series(1, 3) n"
        await asyncio.gather(*[cursor.execute(sql, [WHEN]) for cursor in cursors])
        assert (await all_given_back(ALIAS))["statements_pipelined"] > 1
        await asyncorm.close_pools(ALIAS)
        for cursor in cursors:
            assert await cursor.fetchone() == (1, [WHEN], "ü")
            assert [column.name for column in cursor.description] == ["n", "array", "ü"]
            assert await cursor.fetchall() == [(2, [WHEN], "ü"), (3, [WHEN], "ü")]


async def test_a_timestamp_that_python_does_not_know() -> None:
    """psycopg says so, for a statement that travelled, too."""
    async with few():
        with administrator() as ask:
            ask("INSERT INTO shop_customer (name, joined) VALUES ('x', 'infinity')")
            try:
                get = Customer.objects.using(ALIAS).native_get
                results = await asyncio.gather(
                    *[get(name="x") for _ in range(10)], return_exceptions=True
                )
                assert {type(result) for result in results} == {DataError}
            finally:
                ask("DELETE FROM shop_customer")


async def test_the_start_of_a_pool_survives_its_connections() -> None:
    async with few():
        pool = pools.find(ALIAS)
        assert pool is not None
        with administrator() as ask:
            ask(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                "application_name = %s",
                ALIAS,
            )
            living = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
            await eventually(lambda: not ask(living, ALIAS))
            assert pool.start is not None
            await asyncio.gather(*[values() for _ in range(30)])
