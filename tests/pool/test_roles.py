"""A pool follows its server's role: switched over, promoted, hung. PgBouncer, HAProxy and failures
under load: test_availability.py."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from django.db import InternalError

import asyncorm
from asyncorm import checks, native, pools
from asyncorm.demo.postgres import Server, postgres_server
from asyncorm.roles import Role, contradicts
from tests.availability import hung
from tests.pool.test_standby import ask, reach
from tests.support import (
    all_given_back,
    backend_pid,
    database,
    eventually,
    set_cancel_timeout,
    value,
)

POOL = {"min_size": 0, "max_size": 4, "timeout": 30}

pytestmark = pytest.mark.usefixtures("django_db_setup")


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    """Two writable servers with a table each: one takes the place of the other."""
    with postgres_server(own=True) as first, postgres_server(own=True) as second:
        for server in (first, second):
            ask(server, "CREATE TABLE note (server text DEFAULT current_setting('port'), n int)")
        yield first, second


@pytest.fixture
def alias(servers: tuple[Server, Server], django_db_blocker: Any) -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:
        stack.enter_context(django_db_blocker.unblock())

        def make(*reached: Server, user: str = "postgres", **options: Any) -> str:
            changes = {**reach(*(reached or servers)), "USER": user}
            return stack.enter_context(
                database(**changes, OPTIONS={"options": None, "pool": POOL, **options})
            )

        yield make
        for server in servers:
            read_only(server, False)


def read_only(server: Server, on: bool) -> None:
    """Switch over: it takes no more writes, and breaks no connection."""
    ask(server, f"ALTER SYSTEM SET default_transaction_read_only = {'on' if on else 'off'}")
    ask(server, "SELECT pg_reload_conf()")
    deadline = time.monotonic() + 20
    while ask(server, "SHOW default_transaction_read_only") != ("on" if on else "off"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def write(using: str = "extra") -> None:
    async with asyncorm.cursor(using) as cursor:
        await cursor.execute("INSERT INTO note (n) VALUES (1)")


async def where(using: str = "extra") -> str:
    sql = "SELECT current_setting('unix_socket_directories')"
    return str(await native(value)(sql, using=using)).strip('"')


async def at_once(using: str, n: int = 3) -> None:
    await asyncio.gather(*(native(value)("SELECT pg_sleep(0.2)", using=using) for _ in range(n)))
    await all_given_back(using)


async def test_a_write_that_is_refused_says_why_and_the_next_one_goes_elsewhere(
    servers: tuple[Server, Server], alias: Any
) -> None:
    using = alias(target_session_attrs="read-write")
    await at_once(using)
    assert asyncorm.pool_stats(using)["pool_size"] == 3
    first = await where()
    await asyncio.to_thread(read_only, servers[0], True)
    with pytest.raises(InternalError, match=r"(?s)read-only transaction.*nothing was written"):
        await write()
    for _ in range(5):
        await write()
    assert await where() != first
    assert all(conn.began.read_only is False for conn in _live(using))
    await asyncorm.close_pools(using)


async def test_a_read_notices_it_before_a_write(servers: tuple[Server, Server], alias: Any) -> None:
    using = alias(target_session_attrs="read-write")
    await at_once(using)
    first = await where()
    await asyncio.to_thread(read_only, servers[0], True)
    assert await where() == first
    await left(servers[0], using)
    for _ in range(5):
        await write()
    assert await where() != first
    await asyncorm.close_pools(using)


async def test_in_a_block(servers: tuple[Server, Server], alias: Any) -> None:
    using = alias(target_session_attrs="read-write")
    await at_once(using)
    await asyncio.to_thread(read_only, servers[0], True)
    attempts = 0

    @asyncorm.retrying(attempts=3, on=InternalError, using=using)
    @asyncorm.atomic(using=using)
    async def both() -> None:
        nonlocal attempts
        attempts += 1
        await write()
        await write()

    await both()
    assert attempts == 2
    await asyncorm.close_pools(using)


async def test_without_a_target_one_host_that_is_read_only_is_read_on(
    servers: tuple[Server, Server], alias: Any
) -> None:
    using = alias(servers[0])
    await write()
    await asyncio.to_thread(read_only, servers[0], True)
    for _ in range(3):
        with pytest.raises(InternalError, match="read-only transaction"):
            await write()
        assert await where()
    assert await asyncio.gather(*(where() for _ in range(8)))
    await asyncio.to_thread(read_only, servers[0], False)
    for _ in range(2):
        try:
            await write()
            break
        except InternalError:
            pass
    await write()
    await asyncorm.close_pools(using)


@pytest.mark.parametrize("how", ["block", "SET", "OPTIONS", "role"])
async def test_what_the_session_chose_is_no_change_of_role(
    how: str, servers: tuple[Server, Server], alias: Any
) -> None:
    options = {"options": "-c default_transaction_read_only=on"} if how == "OPTIONS" else {}
    ask(servers[0], "DROP ROLE IF EXISTS reader")
    ask(servers[0], "CREATE ROLE reader LOGIN SUPERUSER")
    if how == "role":
        ask(servers[0], "ALTER ROLE reader SET default_transaction_read_only = on")
    using = alias(servers[0], user="reader", **options)
    await at_once(using)
    before = _pids(using)
    with pytest.raises(InternalError, match="read-only transaction") as caught:
        if how == "block":
            async with asyncorm.atomic(using, read_only=True):
                await write()
        elif how == "SET":
            async with asyncorm.connection(using):
                async with asyncorm.cursor(using) as cursor:
                    await cursor.execute("SET default_transaction_read_only = on")
                await write()
        else:
            await write()
    assert "nothing was written" not in str(caught.value)
    await all_given_back(using)
    assert _pids(using) == before
    assert await native(backend_pid)(using) in before
    await asyncorm.close_pools(using)


def _live(using: str) -> Any:
    pool = pools.find(using)
    assert pool is not None and pool.connections is not None
    return pool.connections.live


async def left(server: Server, using: str) -> None:
    """Wait until no connection to the server is used any more."""
    folder = str(server.folder).encode()
    await eventually(
        lambda: not any(conn.home and conn.pgconn.host == folder for conn in _live(using))
    )


def _pids(using: str) -> set[int]:
    return {conn.pgconn.backend_pid for conn in _live(using) if not conn.closed}


async def test_a_standby_that_is_promoted_leaves_the_replica(
    servers: tuple[Server, Server], alias: Any
) -> None:
    with (
        postgres_server(standby_of=servers[0]) as one,
        postgres_server(standby_of=servers[0]) as two,
    ):
        using = alias(one, two, target_session_attrs="prefer-standby")
        await at_once(using)
        assert await where() == str(one.folder)
        assert await asyncio.to_thread(ask, one, "SELECT pg_promote()")
        await where()  # is told
        await left(one, using)
        assert {await where() for _ in range(5)} == {str(two.folder)}
        await asyncorm.close_pools(using)


@pytest.mark.skipif(not os.path.exists("/proc/1/task/1/children"), reason="needs Linux's /proc")
async def test_a_server_that_hangs_has_one_victim(
    servers: tuple[Server, Server], alias: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cancel_timeout(monkeypatch, 1.0)
    using = alias(target_session_attrs="read-write", connect_timeout=2)
    await at_once(using, 4)
    with hung(servers[0]):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await write()
        for _ in range(4):
            await write()
        took = time.monotonic() - began
        assert await where() == str(servers[1].folder)
        # The deadline, the wait for the cancellation, connect_timeout for the hung host.
        assert took < 0.5 + 1 + 2 * 2 + 4, took
        await asyncorm.close_pools(using)


def test_contradictions() -> None:
    primary, standby = Role(False, False), Role(True, False)
    read_only, unknown = Role(False, True), Role(None, None)
    wanted = {
        "read-write": {standby, read_only},
        None: {standby, read_only},
        "primary": {standby},
        "standby": {primary, read_only},
        "read-only": {primary},
        "any": set(),
        "prefer-standby": set(),
    }
    for target, wrong in wanted.items():
        for now in (primary, standby, read_only, unknown):
            assert contradicts(now, primary, target) is (now in wrong), (target, now)
        for role in (standby, read_only, unknown):  # as it was from the start: libpq has looked
            if role not in wrong or target in (None, "read-write"):
                assert not contradicts(role, role, target)
    assert contradicts(primary, standby, "prefer-standby")


def test_several_hosts_without_deadlines() -> None:
    def found() -> list[str]:
        return [str(message) for message in checks.check_deadlines()]

    assert found() == []
    with database(HOST="a,b"):
        (message,) = found()
        assert "no connect_timeout and no tcp_user_timeout" in message
    with database(HOST="a,b", OPTIONS={"connect_timeout": 3}):
        assert "no tcp_user_timeout" in found()[0]
    with database(HOST="a,b", OPTIONS={"connect_timeout": 3, "keepalives_idle": 5}):
        assert found() == []
