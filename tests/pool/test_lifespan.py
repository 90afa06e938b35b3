"""lifespan(): opening the pools at start-up or saying why not, draining and closing them."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.db import NotSupportedError, OperationalError
from psycopg import sql

import asyncorm
from asyncorm.asgi import lifespan, open_pools
from asyncorm.demo.postgres import postgres_server
from tests.support import (
    administrator,
    database,
    eventually,
    free_port,
    server_connections,
    value,
)

pytestmark = pytest.mark.usefixtures("django_db_setup")


class Protocol:
    """An ASGI server's side of the lifespan protocol."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.to_app: asyncio.Queue[Any] = asyncio.Queue()
        self.from_app: asyncio.Queue[Any] = asyncio.Queue()
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
        self.task = asyncio.ensure_future(app(scope, self.to_app.get, self.from_app.put))

    async def ask(self, what: str) -> Any:
        await self.to_app.put({"type": f"lifespan.{what}"})
        return await asyncio.wait_for(self.from_app.get(), 20)


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("called with lifespan")


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[Protocol]:
    protocol = Protocol(app)
    assert await protocol.ask("startup") == {"type": "lifespan.startup.complete"}
    yield protocol
    assert await protocol.ask("shutdown") == {"type": "lifespan.shutdown.complete"}
    await protocol.task


async def test_opened_and_closed(django_db_blocker: Any) -> None:
    with django_db_blocker.unblock(), database(OPTIONS={"pool": {"min_size": 3, "max_size": 5}}):
        with administrator() as ask:
            async with served(lifespan(nothing, using=["extra"])):
                assert server_connections(ask, "extra") == 3
                assert asyncorm.pool_stats("extra")["pool_available"] == 3
            await eventually(lambda: server_connections(ask, "extra") == 0)
        assert asyncorm.pool_stats("extra") == {}


async def test_without_a_pool_option_one_connection(django_db_blocker: Any) -> None:
    with django_db_blocker.unblock(), database(OPTIONS={"pool": False}), administrator() as ask:
        async with open_pools(["extra"]):
            assert server_connections(ask, "extra") == 1


async def test_all_native_aliases_by_default(django_db_blocker: Any) -> None:
    with django_db_blocker.unblock():
        async with open_pools():
            assert asyncorm.pool_stats("default") and asyncorm.pool_stats("other")
            assert asyncorm.pool_stats("legacy") == {}
        with pytest.raises(NotSupportedError, match="sqlite3"):
            async with open_pools(["legacy"]):
                raise AssertionError


async def test_fails_at_once_and_says_why(django_db_blocker: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
        with django_db_blocker.unblock(), database(HOST="127.0.0.1", PORT=port):
            protocol = Protocol(lifespan(nothing, wait=0))
            began = time.monotonic()
            answer = await protocol.ask("startup")
            await protocol.task
    assert answer["type"] == "lifespan.startup.failed"
    assert f"Cannot connect to database 'extra' (host '127.0.0.1', port {port}" in answer["message"]
    assert "refused" in answer["message"]
    assert time.monotonic() - began < 15


async def test_waits_as_long_as_it_is_told(django_db_blocker: Any) -> None:
    with django_db_blocker.unblock(), database(NAME="late"), administrator() as ask:

        async def create() -> None:
            await asyncio.sleep(0.3)
            ask(sql.SQL("CREATE DATABASE late"))

        creating = asyncio.ensure_future(create())
        try:
            async with served(lifespan(nothing, using=["extra"], wait=10)):
                assert creating.done()
                name = await asyncorm.native(value)("SELECT current_database()", using="extra")
                assert name == "late"
        finally:
            await creating
            ask(sql.SQL("DROP DATABASE late WITH (FORCE)"))
        with pytest.raises(OperationalError, match="does not exist"):
            async with open_pools(["extra"], wait=0.2):
                raise AssertionError


async def test_waits_for_a_server_by_default(django_db_blocker: Any) -> None:
    with postgres_server(own=True) as server, django_db_blocker.unblock():
        await asyncio.to_thread(server.stop)
        with database(**server.settings):
            protocol = Protocol(lifespan(nothing, using=["extra"]))
            starting = asyncio.ensure_future(protocol.ask("startup"))
            await asyncio.sleep(1)
            assert not starting.done()
            await asyncio.to_thread(server.start)
            assert await starting == {"type": "lifespan.startup.complete"}
            await protocol.ask("shutdown")
            await protocol.task


@pytest.mark.parametrize("wrong", [{"PORT": None}, {"NAME": "no_such_database"}])
async def test_one_of_several_workers_starts_if_the_database_is_only_away(
    wrong: dict[str, Any], django_db_blocker: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """In a real worker process: test_availability.py."""
    monkeypatch.setattr("asyncorm.asgi._is_one_of_several", lambda: True)
    if away := "PORT" in wrong:
        wrong = {"HOST": "127.0.0.1", "PORT": str(free_port())}
    with django_db_blocker.unblock(), database(**wrong):
        protocol = Protocol(lifespan(nothing, using=["extra"], wait=0.3))
        answer = await protocol.ask("startup")
        if away:
            assert answer == {"type": "lifespan.startup.complete"}
            assert "starts all the same" in caplog.text
            with pytest.raises(OperationalError, match="refused"):
                await asyncorm.native(value)("SELECT 1", using="extra")
            await protocol.ask("shutdown")
        else:
            assert "does not exist" in answer["message"]
        await protocol.task


async def test_fewer_connections_than_asked_for(django_db_blocker: Any, caplog: Any) -> None:
    with administrator() as ask, django_db_blocker.unblock():
        ask("CREATE ROLE few LOGIN CONNECTION LIMIT 2 SUPERUSER")
        try:
            # Superusers are above such limits.
            ask("ALTER ROLE few NOSUPERUSER")
            pool = {"pool": {"min_size": 3, "max_size": 5}}
            with database(USER="few", OPTIONS=pool):
                async with served(lifespan(nothing, using=["extra"])):
                    # One where the server counts all three while they begin.
                    assert re.search("gave [12] of the 3 connections", caplog.text)
                    assert "too many connections for role" in caplog.text
                    await asyncorm.native(value)("SELECT 1", using="extra")
        finally:
            ask("DROP ROLE few")


async def test_work_in_progress_is_waited_for(django_db_blocker: Any) -> None:
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)
        ended.append(await asyncorm.native(value)("SELECT 'request'", using="extra"))

    async def background() -> None:
        async with asyncorm.atomic(using="extra"):
            await asyncio.sleep(0.1)
            ended.append(await asyncorm.native(value)("SELECT 'background'", using="extra"))

    with django_db_blocker.unblock(), database():
        wrapped = lifespan(app, using=["extra"])
        async with served(wrapped):
            tasks = [
                asyncio.ensure_future(wrapped({"type": "http"}, None, None)),
                asyncio.ensure_future(background()),
            ]
            await asyncio.sleep(0.01)
        assert ended == ["background", "request"]
        await asyncio.gather(*tasks)


async def test_an_idle_websocket_is_not_waited_for_but_its_statement_is(
    django_db_blocker: Any,
) -> None:
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ended.append(await asyncorm.native(value)("SELECT 'message', pg_sleep(0.2)", using="extra"))
        await asyncio.sleep(60)  # for the next message

    with django_db_blocker.unblock(), database():
        wrapped = lifespan(app, using=["extra"])
        async with served(wrapped):
            open_socket = asyncio.ensure_future(wrapped({"type": "websocket"}, None, None))
            await asyncio.sleep(0.1)
            began = time.monotonic()
        assert ended == ["message"] and time.monotonic() - began < 15
        open_socket.cancel()
        await asyncio.gather(open_socket, return_exceptions=True)


async def test_but_not_for_ever(django_db_blocker: Any, caplog: Any) -> None:
    async def background() -> None:
        async with asyncorm.atomic(using="extra"):
            await asyncorm.native(value)("SELECT pg_sleep(30)", using="extra")

    with django_db_blocker.unblock(), database(), administrator() as ask:
        async with served(lifespan(nothing, using=["extra"], drain=0.2)):
            task = asyncio.ensure_future(background())
            await asyncio.sleep(0.1)
        assert "Closing the pools with 1 connections in use" in caplog.text
        with pytest.raises(OperationalError):
            await task
        await eventually(lambda: server_connections(ask, "extra") == 0)
