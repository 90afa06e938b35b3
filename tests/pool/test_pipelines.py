"""Pipelines: large values in both directions, errors at COMMIT, connections that break."""

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import IntegrityError, OperationalError, connections

import asyncorm
from asyncorm import pools
from asyncorm._wire import slow
from asyncorm.demo.postgres import ServerError, find_bindir, postgres_server
from tests.project.myapp.models import Item
from tests.support import administrator, all_given_back, database, eventually

ALIAS = "piped"
BIG = 15 * 2**20  # more than the buffers of a socket
pytestmark = pytest.mark.usefixtures("django_db_setup")


@pytest.fixture(autouse=True)
def _allowed(django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield


@pytest.fixture(scope="module")
def by_tcp() -> Iterator[dict[str, Any]]:
    """How to reach a server by TCP, with TLS where it and `openssl` can."""
    try:
        bindir = find_bindir(wheel=False)  # the wheel's server has no TLS
    except ServerError:
        bindir = None
    with postgres_server(tcp=True, own=True, bindir=bindir) as server:
        assert server.datadir is not None
        where = server.settings
        options: dict[str, Any] = {}
        if shutil.which("openssl"):
            key, certificate = server.datadir / "server.key", server.datadir / "server.crt"
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                 "-subj", "/CN=localhost", "-keyout", key, "-out", certificate],
                check=True, capture_output=True,
            )  # fmt: skip
            owner = server.datadir.stat()
            for path in (key, certificate):
                path.chmod(0o600)
                os.chown(path, owner.st_uid, owner.st_gid)
            names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host"}
            params = {name: where[key] for key, name in names.items()} | {"port": where["PORT"]}
            with psycopg.connect(**params, autocommit=True) as admin:
                try:
                    admin.execute("ALTER SYSTEM SET ssl = on")
                    admin.execute("SELECT pg_reload_conf()")
                    options = {"sslmode": "require"}
                except psycopg.Error:
                    pass  # a server without TLS
        yield {**where, "OPTIONS": {**where.get("OPTIONS", {}), **options}}


async def query(sql: str, *params: Any) -> Any:
    async with asyncorm.cursor(ALIAS) as cursor:
        await cursor.execute(sql, params or None)
        row = await cursor.fetchone()
        return row[0] if row else None


async def echo(size: int, letter: str = "x") -> int:
    """Send so many bytes and get as many back."""
    answer = await query("SELECT %s::text || ''", letter * size)
    assert answer == letter * size
    return size


def few(**changes: Any) -> Any:
    """The alias with two connections."""
    options = {**changes.pop("OPTIONS", {}), "pool": {"min_size": 0, "max_size": 2}}
    return database(ALIAS, **changes, OPTIONS=options)


async def grow() -> None:
    """Have both connections opened."""
    await asyncio.gather(*[query("SELECT pg_sleep(0.1)") for _ in range(4)])
    assert (await all_given_back(ALIAS))["pool_size"] == 2


@pytest.mark.parametrize(
    ("way", "binding"),
    [("socket", False), ("tcp", True), pytest.param("tls", False, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", ["reads", "batch", "block", "batch in a block"])
async def test_large_values_in_both_directions(
    kind: str, way: str, binding: bool, by_tcp: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {"OPTIONS": {}}
    if way != "socket":
        changes = {**by_tcp, "OPTIONS": {**by_tcp["OPTIONS"]}}
        if way == "tcp":
            changes["OPTIONS"]["sslmode"] = "disable"
        elif "sslmode" not in changes["OPTIONS"]:
            pytest.skip("no TLS here")
    changes["OPTIONS"]["server_side_binding"] = binding
    with few(**changes):
        await grow()
        async with asyncio.timeout(60):
            if kind == "reads":
                pauses = [query("SELECT pg_sleep(0.2)") for _ in range(2)]  # they hold both
                await asyncio.gather(*pauses, *[echo(BIG, letter) for letter in "abcdef"])
            elif kind == "batch":
                await asyncorm.batch(
                    *[(lambda letter=letter: echo(BIG, letter)) for letter in "abc"], using=ALIAS
                )
            elif kind == "block":
                async with asyncorm.atomic(ALIAS):
                    await asyncio.gather(*[echo(BIG, letter) for letter in "abcd"])
            else:
                async with asyncorm.atomic(ALIAS):
                    await asyncorm.batch(
                        *[(lambda letter=letter: echo(BIG, letter)) for letter in "abc"],
                        using=ALIAS,
                    )
        stats = await all_given_back(ALIAS)
        assert stats["statements_pipelined"] > 1
        await asyncorm.close_pools(ALIAS)


async def test_many_small_and_large_ones_beside_each_other() -> None:
    with few():
        await grow()
        sizes = [BIG if n % 9 == 4 else n for n in range(40)]
        async with asyncio.timeout(60):
            assert await asyncio.gather(*[echo(size) for size in sizes]) == sizes
        await asyncorm.close_pools(ALIAS)


async def test_when_large_ones_are_cancelled_the_server_stops() -> None:
    with few():
        await grow()
        sleeping = "SELECT pg_backend_pid() FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        large = [lambda: echo(BIG)] * 4
        work = asyncorm.batch(lambda: query("SELECT pg_sleep(600)"), *large, using=ALIAS)
        batch = asyncio.create_task(work)
        with administrator() as ask:
            await eventually(lambda: ask(sleeping))
            batch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await batch
            await eventually(lambda: not ask(sleeping))
        assert await echo(10) == 10
        await all_given_back(ALIAS)
        await asyncorm.close_pools(ALIAS)


async def test_an_error_at_commit_is_that_statements_own() -> None:
    """A deferred constraint is checked when the statement itself is done."""
    with few(), administrator() as ask:
        ask(
            "CREATE TABLE piped_parent (id int PRIMARY KEY); CREATE TABLE piped_child "
            "(parent int REFERENCES piped_parent DEFERRABLE INITIALLY DEFERRED)"
        )
        try:
            insert = "INSERT INTO piped_child VALUES (%s) RETURNING parent"
            results = await asyncorm.batch(
                lambda: query("SELECT 1"),
                lambda: query(insert, 7),
                lambda: query("SELECT 3"),
                lambda: query("INSERT INTO piped_parent VALUES (%s) RETURNING id", 4),
                using=ALIAS,
                return_exceptions=True,
            )
            assert isinstance(results[1], IntegrityError)
            assert [results[0], *results[2:]] == [1, 3, 4]
            assert ask("SELECT count(*) FROM piped_child") == 0
            assert (await all_given_back(ALIAS))["statements_pipelined"] == 4
        finally:
            ask("DROP TABLE piped_child, piped_parent")
        await asyncorm.close_pools(ALIAS)


async def test_what_was_answered_before_the_connection_broke_is_told() -> None:
    """The others are told that nobody knows."""
    with few(), administrator() as ask:
        ask("CREATE TABLE piped (id int)")
        try:
            insert = "INSERT INTO piped VALUES (%s) RETURNING id"
            batch = asyncio.create_task(
                asyncorm.batch(
                    lambda: query(insert, 1),
                    lambda: query("SELECT pg_sleep(600)"),
                    lambda: query(insert, 3),
                    using=ALIAS,
                    return_exceptions=True,
                )
            )
            sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            pid = await eventually(lambda: ask(sleeping))
            beside = asyncio.gather(*[echo(n) for n in range(20)])
            ask("SELECT pg_terminate_backend(%s)", pid)
            results = await batch
            assert results[0] == 1
            for lost in results[1:]:
                assert isinstance(lost, OperationalError)
                assert "may or may not have been done" in str(lost)
            assert ask("SELECT array_agg(id) FROM piped") == [1]
            assert await beside == list(range(20)), "it concerns nobody else"
        finally:
            ask("DROP TABLE piped")
        await all_given_back(ALIAS)
        await asyncorm.close_pools(ALIAS)


async def test_a_stall_of_the_loop_makes_no_statement_slow() -> None:
    """The answer has been there all the time."""
    with few():
        await grow()
        pool = pools.find(ALIAS)
        assert pool is not None and pool.connections is not None
        live = pool.connections.live
        for _ in range(3):
            gathered = asyncio.gather(*[echo(n) for n in range(60)])
            async with asyncio.timeout(10):
                while not any(conn.wire.waiting for conn in live):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            time.sleep(2 * slow.SLOW)  # noqa: ASYNC251
            await gathered
        assert not slow.slow._seen
        await asyncorm.close_pools(ALIAS)


async def test_only_the_statement_that_is_slow_counts_as_such() -> None:
    with few(), administrator() as ask:
        ask("CREATE VIEW piped_pause AS SELECT 1 FROM pg_sleep(1)")
        try:
            await asyncorm.batch(
                lambda: query("SELECT 1"),
                lambda: query("SELECT * FROM piped_pause"),
                lambda: query("SELECT 2"),
                using=ALIAS,
            )
            assert list(slow.slow._seen) == ["SELECT * FROM piped_pause"]
        finally:
            ask("DROP VIEW piped_pause")
        await asyncorm.close_pools(ALIAS)


async def test_what_is_executed_again_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has answered all of a pipeline, but one with: there is no such prepared one."""
    monkeypatch.setattr(slow, "SLOW", 0.02)
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    options = {"prepare_threshold": 0, "pool": {"min_size": 0, "max_size": 1}}
    items = Item.objects.using(ALIAS)

    def forget() -> None:
        connections[ALIAS].ensure_connection()
        connections[ALIAS].connection.pgconn.exec_(b"DEALLOCATE ALL")

    async def counts() -> Any:
        return await asyncorm.batch(items.native_count(), items.native_exists(), using=ALIAS)

    with administrator() as ask, database(ALIAS, OPTIONS=options):
        for _ in range(3):
            assert await counts() == [0, False]
        await asyncorm.native(forget)()
        slow.slow._seen.clear()
        ask("BEGIN")
        ask("LOCK TABLE myapp_item IN ACCESS EXCLUSIVE MODE")
        counting = asyncio.create_task(counts())
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        await eventually(lambda: ask(waiting))
        await asyncio.sleep(0.1)
        ask("ROLLBACK")
        assert await counting == [0, False]
        await all_given_back(ALIAS)
    assert not reported
