"""Native synchronous views begin in order, a few at once, and none waits for ever."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, transaction
from django.http import HttpResponse
from django.urls import path

import asyncorm
from asyncorm._requests import line
from asyncorm.asgi import get_asgi_application, native_view
from tests.asgi_client import ask
from tests.support import all_given_back, eventually

pytestmark = pytest.mark.django_db(transaction=True)

LOCK = 4711  # advisory, on the server
COUNT = 3 * line.AT_ONCE

begun: list[str] = []
running: list[str] = []
most: list[int] = []
news = asyncio.Event()


@native_view
def works(request: Any, name: str) -> HttpResponse:
    begun.append(name)
    running.append(name)
    most.append(len(running))
    for _ in range(3):
        value()
    running.remove(name)
    return HttpResponse(name)


@native_view
def awaits(request: Any) -> HttpResponse:
    begun.append("awaits")
    asyncorm.await_(news.wait())
    return HttpResponse(str(value()))


@native_view
def locks(request: Any) -> HttpResponse:
    begun.append("locks")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock_shared(%s)", [LOCK])
    return HttpResponse("locked")


@native_view
def fails(request: Any) -> HttpResponse:
    value()
    raise ImproperlyConfigured


def value() -> Any:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return cursor.fetchone()


def atomically(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        with transaction.atomic():
            return get_response(request)

    return middleware


urlpatterns = [
    path("works/<name>/", works),
    path("awaits/", awaits),
    path("locks/", locks),
    path("fails/", fails),
]


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = []
    for each in begun, running, most:
        each.clear()
    news.clear()
    yield
    assert line._lines.line is None or not line._lines.line.under_way


@pytest.fixture
def strictly(monkeypatch: Any) -> None:
    """Neither an idle loop nor time lets a view begin."""
    monkeypatch.setattr(line, "_IDLE", 0.0)
    monkeypatch.setattr(line, "_PATIENCE", 600.0)


@asynccontextmanager
async def locked(app: Any) -> AsyncIterator[None]:
    """As many views as are under way at once wait for a lock of the server."""
    async with asyncorm.connection(), asyncio.TaskGroup() as tasks:
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        try:
            for _ in range(line.AT_ONCE):
                tasks.create_task(ask(app, "/locks/"))
            await eventually(lambda: len(begun) == line.AT_ONCE)
            yield
        finally:
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT pg_advisory_unlock(%s)", [LOCK])


@pytest.mark.usefixtures("strictly")
async def test_they_begin_in_order_and_a_few_at_once() -> None:
    app = get_asgi_application()
    names = [f"{n}" for n in range(COUNT)]
    answers = await asyncio.gather(*[ask(app, f"/works/{name}/") for name in names])
    assert [answer.body for answer in answers] == begun == names
    assert max(most) == line.AT_ONCE


@pytest.mark.usefixtures("strictly")
async def test_who_awaits_something_lets_others_begin() -> None:
    app = get_asgi_application()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(COUNT):
            tasks.create_task(ask(app, "/awaits/"))
        await eventually(lambda: len(begun) == COUNT)
        assert (await ask(app, "/works/another/")).status == 200
        news.set()
    await all_given_back()


@pytest.mark.usefixtures("strictly")
@pytest.mark.parametrize("middleware", [f"{__name__}.atomically", "tests.middleware.sets_tenant"])
async def test_who_has_a_connection_does_not_wait(settings: Any, middleware: str) -> None:
    app = get_asgi_application()
    settings.MIDDLEWARE = [middleware]
    settings.ASYNCORM = {"NATIVE_MIDDLEWARE": "__all__"}
    keeping = get_asgi_application()
    async with locked(app):
        task = asyncio.create_task(ask(keeping, "/works/another/"))
        await eventually(task.done)
    assert (await task).body == "another"
    await all_given_back()


@pytest.mark.parametrize("way", ["idle", "time"])
async def test_others_begin_where_those_under_way_do_not_get_on(monkeypatch: Any, way: str) -> None:
    monkeypatch.setattr(line, "_IDLE", 0.0005 if way == "idle" else 0.0)
    monkeypatch.setattr(line, "_PATIENCE", 0.01 if way == "time" else 600.0)
    app = get_asgi_application()
    async with locked(app):
        tasks = [asyncio.create_task(ask(app, f"/works/{n}/")) for n in range(COUNT)]
        await eventually(lambda: all(task.done() for task in tasks))
    assert [(await task).body for task in tasks] == [f"{n}" for n in range(COUNT)]
    await all_given_back()


@pytest.mark.usefixtures("strictly")
async def test_who_leaves_or_fails_keeps_no_place(settings: Any) -> None:
    settings.ASYNCORM = {"CANCEL_NATIVE_VIEWS": True}
    app = get_asgi_application()
    async with locked(app):
        waiting = [asyncio.create_task(ask(app, f"/works/{n}/")) for n in range(COUNT)]
        current = line._lines.line
        await eventually(lambda: current and len(current._waiting) == COUNT)
        for task in waiting[::2]:
            task.cancel()
        await asyncio.wait(waiting[::2])
        assert all(task.cancelled() for task in waiting[::2])
    assert [(await task).body for task in waiting[1::2]] == [f"{n}" for n in range(1, COUNT, 2)]
    answers = await asyncio.gather(*[ask(app, "/fails/") for _ in range(COUNT)])
    assert {answer.status for answer in answers} == {500}
    await all_given_back()
