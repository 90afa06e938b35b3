"""A server that refuses connections for a while: it is full, away, or going down."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connections

import asyncorm
from asyncorm import native, pools
from asyncorm.demo.postgres import Server, postgres_server
from tests.support import all_given_back, database, eventually, value

SLOTS = 8

pytestmark = pytest.mark.usefixtures("django_db_setup")


def reach(server: Server) -> dict[str, Any]:
    keys = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST"}
    return {name: server.settings[key] for name, key in keys.items()} | {
        "port": server.settings["PORT"],
        "connect_timeout": 10,
    }


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = {"max_connections": str(SLOTS + 3), "superuser_reserved_connections": "3"}
    with postgres_server(own=True, settings=settings) as server:
        with psycopg.connect(**reach(server), autocommit=True) as admin:
            admin.execute("CREATE ROLE app LOGIN")
        yield server


@pytest.fixture
def small(server: Server, django_db_blocker: Any) -> Iterator[Any]:
    """Make the alias `extra` on that server, with options for its pool."""
    with ExitStack() as stack:
        stack.enter_context(django_db_blocker.unblock())

        def make(**pool: Any) -> str:
            changes = {**server.settings, "USER": "app", "OPTIONS": {"pool": pool}}
            return stack.enter_context(database(**changes))

        yield make


@asynccontextmanager
async def others(server: Server, count: int) -> AsyncIterator[list[Any]]:
    """Other clients' connections."""
    reached = {**reach(server), "user": "app"}
    async with asyncio.timeout(20):
        taken: list[Any] = []
        while len(taken) < count:
            try:
                taken.append(await psycopg.AsyncConnection.connect(**reached))
            except psycopg.OperationalError:  # the one of the test before is being closed
                await asyncio.sleep(0.02)
    try:
        yield taken
    finally:
        for each in taken:
            await each.close()


def nap(seconds: float) -> Any:
    return native(value)("SELECT pg_sleep(%s)", [seconds], using="extra")


def refused() -> int:
    return asyncorm.pool_stats("extra").get("connections_errors", 0)


async def test_while_there_are_others_tasks_wait_and_growth_backs_off(
    server: Server, small: Any
) -> None:
    small(min_size=0, max_size=6, timeout=20)
    async with others(server, SLOTS - 2):
        began = time.monotonic()
        await asyncio.gather(*(nap(0.02) for _ in range(150)))
        took = time.monotonic() - began
        assert asyncorm.pool_stats("extra")["pool_size"] <= 3  # one of them is being asked for
        assert refused() <= 2 + took, "about one a second at first, fewer later"
        await asyncorm.close_pools("extra")


async def test_one_that_comes_free_is_taken_into_use(server: Server, small: Any) -> None:
    small(min_size=0, max_size=4, timeout=20)
    async with others(server, SLOTS - 1) as taken:
        stop = asyncio.Event()

        async def busy() -> None:
            while not stop.is_set():
                await nap(0.02)

        tasks = [asyncio.create_task(busy()) for _ in range(8)]
        await eventually(refused)
        await taken[0].close()
        await eventually(lambda: len(_live()) >= 2, 20)
        stop.set()
        await asyncio.gather(*tasks)
        await asyncorm.close_pools("extra")


def _live() -> Any:
    pool = pools.find("extra")
    assert pool is not None and pool.connections is not None
    return pool.connections.live


async def test_without_any_tasks_are_patient(server: Server, small: Any) -> None:
    small(min_size=0, max_size=4, timeout=30)
    async with others(server, SLOTS) as taken:
        tasks = [asyncio.create_task(nap(0)) for _ in range(10)]
        await eventually(refused)
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in tasks)
        await taken[0].close()
        await asyncio.gather(*tasks)
        await asyncorm.close_pools("extra")


async def test_but_not_for_ever(server: Server, small: Any) -> None:
    small(min_size=0, max_size=4, timeout=0.5)
    async with others(server, SLOTS):
        began = time.monotonic()
        with pytest.raises(OperationalError, match=r"(?s)for 0\.5 s: .*max_connections") as caught:
            await nap(0)
        assert 0.4 < time.monotonic() - began < 5
        assert "connection slots" in str(caught.value) or "too many" in str(caught.value)
        await asyncorm.close_pools("extra")


async def test_what_does_not_pass_is_an_error_at_once(server: Server, small: Any) -> None:
    connections.settings[small(min_size=0, max_size=4)]["NAME"] = "no_such_database"
    began = time.monotonic()
    with pytest.raises(OperationalError, match="does not exist"):
        await nap(0)
    assert time.monotonic() - began < 10


async def test_idle_ones_are_given_up_when_others_need_them(server: Server, small: Any) -> None:
    small(min_size=1, max_size=SLOTS + 2, timeout=20)
    await asyncio.gather(*(nap(0.2) for _ in range(4)))
    await all_given_back("extra")
    assert asyncorm.pool_stats("extra")["pool_size"] == 4
    async with others(server, SLOTS - 4):
        await asyncio.sleep(1.5)
        assert asyncorm.pool_stats("extra")["pool_size"] == 4, "nobody has said that it is full"
        await asyncio.gather(*(nap(0.3) for _ in range(8)))
        assert refused()
        await eventually(lambda: len(_live()) == 1, 15)
        async with others(server, 3):
            await nap(0)
        await asyncorm.close_pools("extra")


@pytest.mark.parametrize("reset", [False, True])
async def test_a_proxy_without_a_server_cuts_tls(small: Any, reset: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(b"S")
        await writer.drain()
        if reset:  # what was sent is not read
            await asyncio.sleep(0.01)
        else:
            await reader.read(8192)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        options = {"sslmode": "require", "gssencmode": "disable", "pool": {"timeout": 0.5}}
        twice = {"HOST": "127.0.0.1,127.0.0.1", "PORT": f"{port},{port}"}
        with database("cut", **twice, OPTIONS=options) as alias:
            with pytest.raises(OperationalError, match=r"(?s)for 0\.5 s: .*(SSL|closed|reset)"):
                await native(value)("SELECT 1", using=alias)
            await asyncorm.close_pools(alias)


async def test_a_restart_behind_several_hosts(small: Any) -> None:
    """Going down, away, and back: the tasks that come meanwhile wait."""
    with postgres_server(own=True) as server:
        twice = {key: f"{server.settings[key]},{server.settings[key]}" for key in ("HOST", "PORT")}
        pool = {"min_size": 0, "max_size": 3, "timeout": 60}
        with database("twice", **{**server.settings, **twice}, OPTIONS={"pool": pool}) as alias:
            client = await psycopg.AsyncConnection.connect(**reach(server))
            assert await native(value)("SELECT 1", using=alias) == 1
            await asyncorm.close_pools(alias)
            # Waits for its clients, and refuses new ones: "the database system is shutting down".
            assert server.datadir is not None
            pid = int((server.datadir / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGTERM)

            tasks: list[Any] = []
            for number in range(5):
                tasks.append(asyncio.create_task(native(value)(f"SELECT {number}", using=alias)))
                await asyncio.sleep(0.1)
            pool_of: Any = pools.find(alias)
            await eventually(lambda: "shutting down" in str(pool_of.connections.connect_error))
            await client.close()
            await eventually(lambda: "No such file" in str(pool_of.connections.connect_error), 30)
            assert not any(task.done() for task in tasks)
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            assert await asyncio.gather(*tasks) == list(range(5))
            await asyncorm.close_pools(alias)
