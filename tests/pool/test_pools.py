"""The pools: one for each loop and alias, with Django's own options, gone with the loop."""

import asyncio
import contextlib
import gc
import os
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import anyio
import psycopg
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connection, connections, transaction
from django.db.backends.signals import connection_created
from django.db.models import Q
from django.test import override_settings
from psycopg import IsolationLevel

import asyncorm
from asyncorm import native, pools
from tests.project.shop.models import Tag
from tests.support import (
    administrator,
    backend_pid,
    database,
    eventually,
    run_script,
    server_connections,
    sleep,
    value,
)

pytestmark = pytest.mark.usefixtures("shop_data")


@pytest.fixture(autouse=True)
def _no_connection_stays() -> Iterator[None]:
    """After each test, when its loop is closed, the server has none of its connections."""
    yield
    with administrator() as ask:
        deadline = time.monotonic() + 5
        while server_connections(ask, "extra") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server_connections(ask, "extra") == 0


def nap(using: str, seconds: float = 0.1) -> int:
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s), pg_backend_pid()", [seconds])
        return int(cursor.fetchone()[1])


async def nap_at_once(using: str, n: int, seconds: float = 0.1) -> set[int]:
    return set(await asyncio.gather(*[native(nap)(using, seconds) for _ in range(n)]))


async def show(name: str, using: str = "default") -> str:
    return str(await native(value)(f"SHOW {name}", using=using))


# Which pool


async def test_operations_of_a_loop_share_a_pool() -> None:
    pids = {await native(backend_pid)() for _ in range(10)}
    assert len(pids) == 1
    assert asyncorm.pool_stats()["pool_size"] == 1


async def test_a_stream_that_an_error_keeps_open_holds_its_connection_no_longer() -> None:
    """It is in the frame of the function that has failed, which is over when that goes."""
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:

        def fails() -> None:
            stream = connections[alias].chunked_cursor()
            stream.execute("SELECT generate_series(1, 1000)")
            raise ZeroDivisionError

        with warnings.catch_warnings(action="ignore"):  # psycopg's
            with contextlib.suppress(ZeroDivisionError):
                await native(fails)()
            gc.collect()
        assert await native(backend_pid)(alias)


async def test_each_alias_has_its_own() -> None:
    await native(backend_pid)()
    assert asyncorm.pool_stats("other") == {}
    await native(backend_pid)("other")
    assert pools.find("default") is not pools.find("other")
    assert asyncorm.pool_stats("other")["pool_size"] == 1
    assert await native(value)("SELECT current_database()") != await native(value)(
        "SELECT current_database()", using="other"
    )


def test_each_loop_has_its_own() -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        pids = [
            loop.run_until_complete(native(backend_pid)())
            for loop in (first, second, first, second)
        ]
    finally:
        for loop in (first, second):
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
    assert pids[0] == pids[2]
    assert pids[1] == pids[3]
    assert pids[0] != pids[1]


async def test_it_opens_on_first_use_only() -> None:
    assert asyncorm.pool_stats() == {}
    await native(lambda: list(Tag.objects.none()))()
    assert asyncorm.pool_stats().get("pool_size", 0) == 0
    await native(backend_pid)()
    assert asyncorm.pool_stats()["pool_size"] == 1


async def test_the_pool_is_not_the_synchronous_one() -> None:
    """Django's own connections, pooled or not, are apart from the native ones."""
    with database() as alias, administrator() as ask:
        await native(backend_pid)(alias)
        assert server_connections(ask, alias) == 1
        found: list[int] = []

        def in_thread() -> None:
            try:
                found.append(backend_pid(alias))
                found.append(server_connections(ask, alias))
            finally:
                connections[alias].close()
                connections[alias].close_pool()

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        assert found[0] != await native(backend_pid)(alias)
        assert found[1] >= 2


# Sizes


async def test_max_size_is_the_limit() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 3}}) as alias:
        assert len(await nap_at_once(alias, 9, 0.05)) == 3
        assert asyncorm.pool_stats(alias)["pool_size"] == 3
        assert asyncorm.pool_stats(alias)["pool_max"] == 3


async def test_without_max_size_the_pool_has_min_size() -> None:
    with database(OPTIONS={"pool": {"min_size": 2}}) as alias:
        assert len(await nap_at_once(alias, 4, 0.05)) == 2


async def test_pool_true_means_the_four_of_psycopg() -> None:
    with database(OPTIONS={"pool": True}) as alias:
        assert len(await nap_at_once(alias, 8, 0.1)) == 4


@pytest.mark.parametrize("option", [None, False])
async def test_without_a_pool_key_there_are_ten(option: Any) -> None:
    with database(OPTIONS={"pool": option}) as alias:
        assert len(await nap_at_once(alias, 14, 0.2)) == 10
        stats = asyncorm.pool_stats(alias)
        assert (stats["pool_min"], stats["pool_max"]) == (0, 10)


def test_without_a_pool_key_the_synchronous_side_is_unpooled() -> None:
    with database(OPTIONS={"pool": None}) as alias:
        first = backend_pid(alias)
        assert asyncio.run(native(backend_pid)(alias)) != first
        assert connections[alias].pool is None
        connections[alias].close()
        assert backend_pid(alias) != first


async def test_conn_max_age_does_not_concern_native_connections() -> None:
    with database(CONN_MAX_AGE=0, OPTIONS={"pool": None}) as alias:
        first = await native(backend_pid)(alias)
        from django.db import close_old_connections

        await native(close_old_connections)()
        assert await native(backend_pid)(alias) == first


async def test_one_connection_at_first_and_min_size_later() -> None:
    with (
        override_settings(ASYNCORM={"FILL_DELAY": 0.3}),
        database(OPTIONS={"pool": {"min_size": 3, "max_size": 5}}) as alias,
        administrator() as ask,
    ):
        await native(backend_pid)(alias)
        assert server_connections(ask, alias) == 1
        await asyncio.sleep(0.1)
        assert server_connections(ask, alias) == 1
        await eventually(lambda: server_connections(ask, alias) == 3)
        await asyncio.sleep(0.1)
        assert asyncorm.pool_stats(alias)["pool_size"] == 3


async def test_filling_never_exceeds_max_size() -> None:
    with (
        override_settings(ASYNCORM={"FILL_DELAY": 0.2}),
        database(OPTIONS={"pool": {"min_size": 3, "max_size": 3}}) as alias,
        administrator() as ask,
    ):
        assert len(await nap_at_once(alias, 5, 0.2)) == 3
        await asyncio.sleep(0.3)
        assert server_connections(ask, alias) == 3


# Django's other keys


async def test_name() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2, "name": "mine"}}) as alias:
        await native(backend_pid)(alias)
        pool = pools.find(alias)
        assert pool is not None and pool.connections is not None
        assert pool.connections.name == "mine"


async def test_configure_runs_once_on_each_new_connection() -> None:
    calls: list[Any] = []

    def configure(conn: psycopg.Connection[Any]) -> None:
        calls.append(conn)
        conn.execute("SET my.marker = 'configured'")
        conn.commit()

    with database(
        OPTIONS={"pool": {"min_size": 0, "max_size": 3, "configure": configure}}
    ) as alias:
        pids = await nap_at_once(alias, 3)
        for _ in range(5):
            assert await show("my.marker", alias) == "configured"
    assert len(calls) == len(pids) == 3
    assert all(isinstance(conn, psycopg.Connection) for conn in calls)


@pytest.mark.parametrize("how", ["raises", "leaves a transaction", "is cancelled"])
async def test_connections_that_cannot_be_configured_are_closed(how: str) -> None:
    asked: list[int] = []

    def configure(conn: psycopg.Connection[Any]) -> None:
        asked.append(conn.info.backend_pid)
        conn.execute("SELECT 1")
        if how == "raises":
            raise ValueError("no")
        if how == "is cancelled":
            conn.execute("SELECT pg_sleep(60)")
        conn.autocommit = False
        conn.execute("SELECT 1")

    options = {"pool": {"min_size": 0, "max_size": 2, "configure": configure}}
    with database(OPTIONS=options) as alias, administrator() as ask:
        for number in range(1, 4):
            own = asyncio.all_tasks()
            task = asyncio.create_task(native(backend_pid)(alias))
            await eventually(lambda: len(asked) >= number)  # noqa: B023
            if how == "is cancelled":
                task.cancel()
                await asyncio.wait([task])
                await asyncio.sleep(0.05)
                for worker in asyncio.all_tasks() - own:
                    worker.cancel()
            with pytest.raises((OperationalError, asyncio.CancelledError)):
                await task
        await eventually(lambda: server_connections(ask, alias) == 0)
        await asyncorm.close_pools(alias)


async def test_check_runs_at_each_checkout_and_refused_connections_are_replaced() -> None:
    refused: list[int] = []
    checked: list[int] = []

    def check(conn: psycopg.Connection[Any]) -> None:
        pid = conn.execute("SELECT pg_backend_pid()").fetchone()[0]  # type: ignore[index]
        checked.append(pid)
        if pid in refused:
            conn.close()
            raise psycopg.OperationalError("refused")

    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2, "check": check}}) as alias:
        first = await native(backend_pid)(alias)
        assert await native(backend_pid)(alias) == first
        assert first in checked
        refused.append(first)
        for _ in range(3):
            assert await native(backend_pid)(alias) != first


async def test_reset_runs_when_a_connection_is_given_back() -> None:
    calls: list[int] = []

    def reset(conn: psycopg.Connection[Any]) -> None:
        conn.execute("SET my.marker = 'reset'")
        calls.append(conn.info.backend_pid)

    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1, "reset": reset}}) as alias:
        pid = await native(backend_pid)(alias)
        await eventually(lambda: calls)
        assert await show("my.marker", alias) == "reset"
        assert set(calls) == {pid}


async def test_a_reset_that_fails_discards_the_connection() -> None:
    def reset(conn: psycopg.Connection[Any]) -> None:
        raise ValueError("no")

    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1, "reset": reset}}) as alias:
        pids = [await native(backend_pid)(alias) for _ in range(3)]
    assert len(set(pids)) == 3


async def test_connections_that_wait_for_their_reset_are_closed_with_the_pool() -> None:
    """More of them than the pool resets at a time, when settings change."""

    def reset(conn: psycopg.Connection[Any]) -> None:
        conn.execute("SELECT pg_sleep(0.1)")

    options = {"pool": {"min_size": 0, "max_size": 8, "reset": reset}}
    with database(OPTIONS=options) as alias, administrator() as ask:
        await asyncio.gather(
            *[native(value)("SELECT pg_sleep(0.2)", None, alias) for _ in range(8)]
        )
        assert server_connections(ask, alias) == 8
        pools.discard_pools(alias)
        await eventually(lambda: server_connections(ask, alias) == 0)


async def test_max_lifetime_replaces_old_connections() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1, "max_lifetime": 0.3}}) as alias:
        first = await native(backend_pid)(alias)
        assert await native(backend_pid)(alias) == first
        await asyncio.sleep(0.4)
        await native(backend_pid)(alias)  # an expired one is replaced when it is given back
        assert await native(backend_pid)(alias) != first


async def test_max_idle_shrinks_the_pool() -> None:
    with (
        database(OPTIONS={"pool": {"min_size": 0, "max_size": 4, "max_idle": 0.3}}) as alias,
        administrator() as ask,
    ):
        await nap_at_once(alias, 4)
        assert server_connections(ask, alias) == 4
        await eventually(lambda: server_connections(ask, alias) < 4, 15)


@pytest.mark.parametrize(
    ("option", "words"),
    [({"max_sise": 3}, "max_sise"), ({"min_size": 5, "max_size": 2}, "max_size")],
)
async def test_wrong_options_name_the_alias(option: Any, words: str) -> None:
    with database(OPTIONS={"pool": option}) as alias:
        with pytest.raises(ImproperlyConfigured, match=words) as caught:
            await native(backend_pid)(alias)
    assert "'extra'" in str(caught.value)


# The rest of DATABASES


async def test_time_zone() -> None:
    assert await show("TimeZone") == "UTC"
    assert await show("TimeZone", "other") == "America/New_York"
    with database(TIME_ZONE="Asia/Tokyo") as alias:
        assert await show("TimeZone", alias) == "Asia/Tokyo"


async def test_a_changed_time_zone_reaches_connections() -> None:
    first = await native(backend_pid)()
    with override_settings(USE_TZ=False, TIME_ZONE="Asia/Tokyo"):
        assert await show("TimeZone") == "Asia/Tokyo"
    assert await show("TimeZone") == "UTC"
    assert await native(backend_pid)() != first


@pytest.mark.parametrize(
    "level", [IsolationLevel.SERIALIZABLE, IsolationLevel.REPEATABLE_READ, None]
)
async def test_isolation_level(level: IsolationLevel | None) -> None:
    option = {} if level is None else {"isolation_level": level}
    with database(OPTIONS=option) as alias:
        async with asyncorm.atomic(using=alias):
            found = await show("transaction_isolation", alias)
    expected = level or IsolationLevel.READ_COMMITTED
    assert found == expected.name.lower().replace("_", " ")


async def test_a_wrong_isolation_level_is_refused() -> None:
    with database(OPTIONS={"isolation_level": "rather strict"}) as alias:
        with pytest.raises(ImproperlyConfigured, match="isolation level"):
            await native(backend_pid)(alias)


async def test_assume_role() -> None:
    with administrator() as ask:
        ask("DROP ROLE IF EXISTS assumed")
        ask("CREATE ROLE assumed")
        try:
            with database(OPTIONS={"assume_role": "assumed"}) as alias:
                for _ in range(3):
                    assert await native(value)("SELECT current_user", using=alias) == "assumed"
                await asyncorm.close_pools(alias)
        finally:
            ask("DROP ROLE assumed")


async def test_cancelled_first_use_leaves_nothing() -> None:
    """At whichever turn of the loop."""
    before = asyncio.all_tasks()
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        for turns in range(25):
            task = asyncio.create_task(native(value)("SELECT 1", using=alias))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await asyncorm.close_pools(alias)
            await eventually(lambda: asyncio.all_tasks() <= before)
        assert await native(value)("SELECT 1", using=alias) == 1
        await asyncorm.close_pools(alias)


async def test_each_connection_asks_how_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on stock Django: a backend may take a password that is rotated from elsewhere."""
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        cls: Any = type(connections[alias])
        original = cls.get_connection_params
        asked: list[int] = []

        def params(self: Any) -> Any:
            asked.append(1)
            return {**original(self), "application_name": f"extra-{len(asked)}"}

        monkeypatch.setattr(cls, "get_connection_params", params)
        name = "SELECT current_setting('application_name') FROM pg_sleep(0.1)"
        names = await asyncio.gather(*[native(value)(name, using=alias) for _ in range(4)])
        assert set(names) == {"extra-1", "extra-2"}
        pool: Any = pools.find(alias)
        for conn in list(pool.connections.live):
            conn.twin.terminate()
        assert await native(value)(name, using=alias) not in {"extra-1", "extra-2"}
        await asyncorm.close_pools(alias)


@pytest.mark.parametrize(("binding", "kind"), [(False, "integer"), (True, "smallint")])
async def test_server_side_binding(binding: bool, kind: str) -> None:
    """A small number is sent as such by psycopg; in the text of a query it is an integer."""
    with database(OPTIONS={"server_side_binding": binding}) as alias:
        query = "SELECT pg_typeof(%s)::text"
        assert await native(value)(query, [1], using=alias) == kind
        assert await Tag.objects.using(alias).native_count() == 6


@pytest.mark.parametrize(("options", "prepared"), [({}, 0), ({"prepare_threshold": 0}, 1)])
async def test_prepare_threshold(options: dict[str, Any], prepared: int) -> None:
    query = (
        "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT \"shop_tag\"%%'"
    )

    def function(using: str) -> int:
        for _ in range(3):
            list(Tag.objects.using(using))
        return int(value(query, using=using))

    with database(OPTIONS={"server_side_binding": True, **options}) as alias:
        assert await native(function)(alias) == prepared


@pytest.mark.parametrize("health_checks", [False, True])
async def test_health_checks(health_checks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[Any] = []
    original = psycopg.AsyncConnection.execute

    async def execute(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        checks.append(query)
        return await original(self, query, *args, **kwargs)

    with database(CONN_HEALTH_CHECKS=health_checks) as alias:
        await native(backend_pid)(alias)
        monkeypatch.setattr(psycopg.AsyncConnection, "execute", execute)
        for _ in range(3):
            await native(backend_pid)(alias)
    assert len(checks) == (3 if health_checks else 0)


async def test_the_test_database_is_the_renamed_one() -> None:
    name = await native(value)("SELECT current_database()")
    assert name == connection.settings_dict["NAME"]
    assert name.startswith("test_")


async def test_a_database_renamed_while_the_loop_runs_is_followed() -> None:
    with database() as alias:
        first = await native(value)("SELECT current_database()", using=alias)
        connections.settings[alias]["NAME"] = connections.settings["other"]["NAME"]
        second = await native(value)("SELECT current_database()", using=alias)
    assert (first, second) == (
        connections.settings["default"]["NAME"],
        connections.settings["other"]["NAME"],
    )


# The physical connection and its wrapper


async def test_connection_created_is_sent_once_for_each_connection() -> None:
    created: list[Any] = []

    def receiver(connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET my.marker = 'from the receiver'")
        created.append(connection.alias)

    connection_created.connect(receiver)
    try:
        with database(OPTIONS={"pool": {"min_size": 0, "max_size": 4}}) as alias:
            pids = await nap_at_once(alias, 8)
            for _ in range(10):
                assert await show("my.marker", alias) == "from the receiver"
    finally:
        connection_created.disconnect(receiver)
    assert len(pids) == 4
    assert created == ["extra"] * 4


def trace(pid_of: str, path: str) -> Any:
    """Have libpq write what the alias's connection sends and gets to a file."""
    stream = open(path, "wb")  # noqa: SIM115
    connections[pid_of].ensure_connection()
    connections[pid_of].connection.pgconn.trace(stream.fileno())
    return stream


async def test_a_checkout_sends_nothing() -> None:
    """What libpq traces: of ten operations on a used connection, only their own statements."""
    with (
        database(
            TIME_ZONE="Asia/Tokyo",
            OPTIONS={
                "assume_role": connections.settings["default"]["USER"],
                "isolation_level": IsolationLevel.SERIALIZABLE,
                "pool": {"min_size": 0, "max_size": 1},
            },
        ) as alias,
        tempfile.TemporaryDirectory() as folder,
    ):
        path = os.path.join(folder, "trace")
        await native(Tag.objects.using(alias).count)()
        stream = await native(trace)(alias, path)
        for _ in range(10):
            await native(Tag.objects.using(alias).count)()
        await asyncorm.close_pools(alias)
        stream.close()
        lines = await anyio.Path(path).read_text()
        sent = [line.split("\t") for line in lines.splitlines() if "\tF\t" in line]
    queries = [parts for parts in sent if parts[3] in ("Query", "Parse")]
    assert len(queries) == 10
    assert {parts[3] for parts in sent} <= {
        "Query", "Parse", "Bind", "Describe", "Execute", "Sync", "Terminate",
    }  # fmt: skip
    assert all("COUNT(*)" in parts[4] for parts in queries)


async def test_wrappers_are_reused() -> None:
    wrappers = [await native(lambda: connections["default"])() for _ in range(5)]
    assert len(set(map(id, wrappers))) == 1


async def test_a_wrapper_returns_clean() -> None:
    def dirty() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT nonsense")

    def state() -> Any:
        connection.ensure_connection()
        return (
            connection.get_autocommit(),
            bool(connection.needs_rollback),
            connection.in_atomic_block,
            connection.savepoint_ids,
            connection.run_on_commit,
            connection.connection.pgconn.transaction_status,
        )

    clean = await native(state)()
    with pytest.raises(Exception, match="nonsense"):
        await native(dirty)()
    assert await native(state)() == clean


async def test_autocommit_turned_off_and_left_is_rolled_back() -> None:
    def function() -> None:
        connection.set_autocommit(False)
        Tag.objects.create(name="not committed")

    await native(function)()
    assert not await Tag.objects.filter(name="not committed").native_exists()
    assert await native(connection.get_autocommit)()


# The end


async def test_closing_with_operations_in_flight() -> None:
    with database() as alias, administrator() as ask:
        tasks = [asyncio.create_task(native(nap)(alias, 60)) for _ in range(3)]
        # Until all are asleep: a statement that is only about to be sent cannot be cancelled.
        asleep = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = %s AND wait_event = 'PgSleep'"
        )
        await eventually(lambda: ask(asleep, alias) == 3)
        began = time.monotonic()
        await asyncorm.close_pools()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        # CommitUnknown, if a connection closed before the server said that it had cancelled.
        assert [isinstance(result, OperationalError) for result in results] == [True] * 3
        assert time.monotonic() - began < 7
        assert asyncorm.pool_stats(alias) == {}
        # The pool opens again.
        assert await native(backend_pid)(alias)
        await asyncorm.close_pools(alias)


async def test_closing_at_any_moment_of_blocks(caplog: pytest.LogCaptureFixture) -> None:
    """Of the first one, too, for which the pool is opened: nothing stays open, nobody is misled."""
    outcomes: Counter[str] = Counter()

    async def block(alias: str) -> None:
        async with asyncorm.atomic(alias), asyncorm.atomic(alias):
            await native(backend_pid)(alias)

    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        for turns in range(25):
            tasks = [asyncio.create_task(block(alias)) for _ in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncorm.close_pools(alias)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, OperationalError), result
                outcomes[str(result)] += 1
            await asyncorm.close_pools(alias)
            gc.collect()
            with administrator() as ask:
                await eventually(lambda ask=ask: not server_connections(ask, alias))
    assert any("was closed while" in outcome for outcome in outcomes)
    assert "was destroyed" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"isolation_level": IsolationLevel.SERIALIZABLE}])
async def test_a_block_begins_on_a_connection_that_was_closed(options: dict[str, Any]) -> None:
    with database() as alias:
        async with asyncorm.connection(alias):
            await native(backend_pid)(alias)
            await asyncorm.close_pools(alias)
            with pytest.raises(OperationalError, match="connection was closed"):
                async with asyncorm.atomic(alias, **options):
                    raise AssertionError("there is no connection")
            with pytest.raises(OperationalError, match="connection was closed"):
                await native(transaction.atomic(alias).__enter__)()


async def test_settings_change_while_pools_open_and_tasks_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def elsewhere() -> str:
        with override_settings(TIME_ZONE="Asia/Tokyo"):
            return str(value("SELECT current_setting('application_name')", using=alias))

    with (
        database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias,
        administrator() as ask,
    ):
        for _ in range(3):
            changing = [native(elsewhere)() for _ in range(6)]
            assert await asyncio.gather(*changing) == ["extra"] * 6
            gc.collect()  # a pool that nobody closed would be destroyed with its tasks
        await eventually(lambda: server_connections(ask, alias) <= 2)
        await asyncorm.close_pools(alias)
    assert "destroyed" not in caplog.text


async def test_closing_one_alias_leaves_the_others() -> None:
    await native(backend_pid)()
    await native(backend_pid)("other")
    await asyncorm.close_pools("other")
    assert asyncorm.pool_stats("other") == {}
    assert asyncorm.pool_stats()["pool_size"] == 1


async def test_closing_twice_or_nothing_does_nothing() -> None:
    await asyncorm.close_pools()
    await native(backend_pid)()
    await asyncorm.close_pools()
    await asyncorm.close_pools()
    await asyncorm.close_pools("no such alias")


def test_a_loop_closed_without_farewell_leaves_no_connection() -> None:
    """Nobody told the pool: the next one that is opened closes its connections."""
    with database() as alias, administrator() as ask:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(native(backend_pid)(alias))
        assert not asyncio.all_tasks(loop)
        loop.close()
        asyncio.run(native(backend_pid)("default"))
        deadline = time.monotonic() + 5
        while server_connections(ask, alias) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server_connections(ask, alias) == 0
        gc.collect()


@pytest.mark.slow
def test_500_loops_leave_nothing_behind() -> None:
    script = """
import asyncio, warnings, django
django.setup()
from django.conf import settings
settings.DATABASES["default"]["OPTIONS"]["application_name"] = "many loops"
from tests.project.shop.models import Tag
from asyncorm import native
import asyncorm

async def use(n):
    if n % 3 == 0:
        return await Tag.objects.native_count()
    if n % 3 == 1:
        async with asyncorm.atomic():
            return await Tag.objects.native_count()
    return max(await asyncio.gather(*[Tag.objects.native_count() for _ in range(3)]))

assert {asyncio.run(use(n)) for n in range(500)} == {6}
from asyncorm import pools
assert not pools.everywhere()
from tests.support import administrator, server_connections
with administrator() as ask:
    for _ in range(200):
        left = server_connections(ask, "many loops")
        if not left:
            break
print("left", left)
"""
    done = run_script(script, timeout=120)
    assert done.stderr == ""
    assert done.stdout == "left 0\n"
    assert done.returncode == 0


def test_a_process_ends_quietly_with_work_in_flight() -> None:
    """asyncio.run() cancels what is left: statements, transactions, streams, kept connections."""
    script = """
import asyncio, django
django.setup()
from tests.project.shop.models import Tag
from django.db import connection
import asyncorm

def sleep():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(60)")

async def block():
    async with asyncorm.atomic():
        await Tag.objects.native_create(name="in flight")
        await asyncorm.native(sleep)()

async def kept():
    async with asyncorm.connection():
        await Tag.objects.native_count()
        await asyncio.sleep(60)

async def stream():
    async for tag in Tag.objects.native_iterator(chunk_size=1):
        await asyncio.sleep(60)

async def main():
    global tasks
    tasks = [asyncio.create_task(f()) for f in (block, kept, stream, asyncorm.native(sleep))]
    await asyncio.sleep(0.5)

asyncio.run(main())
async def count():
    return await Tag.objects.filter(name="in flight").native_count()
print("left", asyncio.run(count()))
"""
    began = time.monotonic()
    done = run_script(script)
    assert done.stderr == ""
    assert done.stdout == "left 0\n"
    assert time.monotonic() - began < 20


def test_threads_with_loops_leave_nothing_behind() -> None:
    with database() as alias, administrator() as ask:

        def work() -> None:
            for _ in range(5):
                asyncio.run(native(backend_pid)(alias))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 5
        while server_connections(ask, alias) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server_connections(ask, alias) == 0
        assert not [pool for pool in pools.everywhere() if pool.loop.is_closed()]


# Connections that break


async def test_idle_connections_that_the_server_closed_are_replaced() -> None:
    with database() as alias, administrator() as ask:
        before = await nap_at_once(alias, 3, 0.5)
        assert len(before) == 3
        for pid in before:
            ask("SELECT pg_terminate_backend(%s)", pid)
        await eventually(lambda: server_connections(ask, alias) == 0)
        after = await nap_at_once(alias, 3, 0.5)
        assert len(after) == 3
        assert not before & after


@pytest.mark.parametrize("text", ["SELECT 1", "UPDATE shop_tag SET name = name WHERE id < 0"])
async def test_who_waits_is_not_given_a_connection_that_is_lost(text: str) -> None:
    """The server ends it while its holder, and the loop, are busy with other things."""

    def hold() -> None:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid(), pg_sleep(0.5)")
            pid = cursor.fetchone()[0]
        ask("SELECT pg_terminate_backend(%s, 10000)", pid)

    def execute() -> None:
        with connections[alias].cursor() as cursor:
            cursor.execute(text)

    options = {"pool": {"min_size": 0, "max_size": 1}}
    with database(OPTIONS=options) as alias, administrator() as ask:
        await native(backend_pid)(alias)
        holder = asyncio.create_task(native(hold)())
        await eventually(lambda: not asyncorm.pool_stats(alias)["pool_available"])
        waiter = asyncio.create_task(native(execute)())
        await eventually(lambda: asyncorm.pool_stats(alias)["requests_waiting"] == 1)
        await asyncio.gather(holder, waiter)
        await asyncorm.close_pools(alias)


async def test_a_connection_that_breaks_in_a_statement_is_replaced() -> None:
    with database() as alias, administrator() as ask:
        pid = await native(backend_pid)(alias)
        task = asyncio.create_task(native(nap)(alias, 60))
        await asyncio.sleep(0.1)
        ask("SELECT pg_terminate_backend(%s)", pid)
        with pytest.raises(OperationalError, match="terminat"):
            await task
        assert await native(backend_pid)(alias) != pid


async def test_a_cancelled_statement_leaves_a_usable_connection() -> None:
    pid = await native(backend_pid)()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await native(sleep)(60)
        assert await native(lambda: Tag.objects.count())() == 6
    assert await native(backend_pid)() == pid


# Statistics


async def test_stats_are_numbers() -> None:
    await asyncio.gather(*[native(sleep)(0.05) for _ in range(3)])
    stats = asyncorm.pool_stats()
    assert all(isinstance(number, int | float) for number in stats.values())
    assert stats["pool_size"] == stats["pool_available"] == 3
    assert stats["requests_num"] >= 3
    held = asyncio.create_task(native(sleep)(0.3))
    await asyncio.sleep(0.1)
    assert asyncorm.pool_stats()["pool_available"] == 2
    await held


async def test_stats_tell_of_waiting_tasks() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        async with asyncorm.connection(alias):
            await native(backend_pid)(alias)
            tasks = [asyncio.create_task(native(backend_pid)(alias)) for _ in range(2)]
            await eventually(lambda: asyncorm.pool_stats(alias)["requests_waiting"] == 2)
        await asyncio.gather(*tasks)
        assert asyncorm.pool_stats(alias).get("requests_waiting", 0) == 0


async def test_waiting_tasks_are_served_in_order() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        order: list[int] = []

        async def work(n: int) -> None:
            await native(nap)(alias, 0.01)
            order.append(n)

        await asyncio.gather(*map(work, range(6)))
    assert order == sorted(order)


async def test_a_cancelled_wait_takes_no_connection() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        holder = asyncio.create_task(native(nap)(alias, 0.3))
        await asyncio.sleep(0.05)
        waiter = asyncio.create_task(native(nap)(alias, 0))
        await asyncio.sleep(0.05)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await holder
        assert await native(backend_pid)(alias)
        assert asyncorm.pool_stats(alias)["pool_available"] == 1


async def test_the_pool_inherits_no_context() -> None:
    """A pool opened inside a block serves tasks outside it."""
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        async with asyncorm.atomic(using=alias):
            inside = await native(backend_pid)(alias)
            async with asyncorm.detached():
                outside = await native(backend_pid)(alias)
        assert inside != outside
        assert await Tag.objects.using(alias).filter(Q(pk=1)).native_count() == 1
