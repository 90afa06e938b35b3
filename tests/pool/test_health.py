"""The health view: what a load balancer is told, and that it never waits for long."""

import asyncio
import json
import socket
from time import monotonic
from typing import Any

import pytest
from django.core.asgi import get_asgi_application as djangos
from django.db import connections
from django.test import override_settings
from django.urls import path

import asyncorm
from asyncorm._sessions.engines import native_class
from asyncorm.asgi import get_asgi_application, health, health_view
from tests.asgi_client import ask
from tests.support import database, watched_threads

pytestmark = pytest.mark.usefixtures("shop_data")

urlpatterns = [
    path("health/", health),
    path("extra/", health_view(using=["extra"], deadline=0.3)),
]


@pytest.fixture(autouse=True)
def _urls() -> Any:
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[]):
        yield


async def asked(url: str, make: Any = get_asgi_application) -> tuple[int, Any]:
    answer = await ask(make(), url)
    return answer.status, json.loads(answer.body)


@pytest.mark.parametrize("make", [djangos, get_asgi_application])
async def test_all_is_well(make: Any) -> None:
    await asked("/health/", make)
    with watched_threads() as threads:
        status, body = await asked("/health/", make)
    assert status == 200 and body["status"] == "ok"
    ours = {alias for alias in connections if native_class(alias) is not None}
    assert set(body["databases"]) == ours >= {"default"}
    one = body["databases"]["default"]
    assert one["status"] == "ok" and 0 <= one["seconds"] < 1
    assert one["pool"]["size"] >= 1 and one["pool"]["in_use"] == one["pool"]["waiting"] == 0
    if make is get_asgi_application:
        assert not threads


async def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with database(HOST="127.0.0.1", PORT=str(free.getsockname()[1])):
            status, body = await asked("/extra/")
    assert status == 503 and body["status"] == "unavailable"
    assert body["databases"]["extra"]["status"] == "down"
    assert body["databases"]["extra"]["error"] == "OperationalError"


async def test_a_server_that_does_not_answer() -> None:
    with socket.socket() as silent:  # it takes connections, and is silent then
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with database(HOST="127.0.0.1", PORT=str(silent.getsockname()[1])) as alias:
            began = monotonic()
            status, body = await asked("/extra/")
            assert monotonic() - began < 10
            assert status == 503
            assert body["databases"]["extra"]["status"] == "down"
            assert body["databases"]["extra"]["error"] == "TimeoutError"
            await asyncorm.close_pools(alias)


async def test_all_connections_are_in_use() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        held, enough = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with asyncorm.atomic(alias), asyncorm.cursor(alias) as cursor:
                await cursor.execute("SELECT 1")
                held.set()
                await enough.wait()

        holding = asyncio.create_task(hold())
        await held.wait()
        status, body = await asked("/extra/")
        assert status == 503
        found = body["databases"]["extra"]
        assert (found["status"], found["pool"]["in_use"]) == ("busy", 1)
        enough.set()
        await holding
        status, body = await asked("/extra/")
        assert status == 200 and body["databases"]["extra"]["pool"]["max"] == 1
        await asyncorm.close_pools(alias)
