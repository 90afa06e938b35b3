"""Requests through Django's ASGI handler: signals, middleware in threads, streams, debug mode."""

import asyncio
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.core.signals import request_finished, request_started
from django.db import connection
from django.http import HttpResponse, StreamingHttpResponse
from django.test import AsyncClient
from django.urls import path
from django.utils.decorators import async_only_middleware

import asyncorm
from asyncorm.asgi import get_asgi_application as ours
from asyncorm.asgi import lifespan
from tests.project.myapp.models import Item
from tests.support import all_given_back, eventually

pytestmark = pytest.mark.django_db(transaction=True)


async def queries(request: Any) -> HttpResponse:
    """How many queries this request made natively, this one included."""
    await Item.objects.native_count()
    await Item.objects.native_count()
    return HttpResponse(str(len(connection.queries)))


async def queries_of_tasks(request: Any) -> HttpResponse:
    """The same, when tasks that the view starts make the first ones."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(Item.objects.native_count())
        tasks.create_task(asyncorm.batch(Item.objects.count, Item.objects.exists))
    return HttpResponse(str(len(connection.queries)))


async def stream(request: Any) -> StreamingHttpResponse:
    async def body() -> Any:
        async for item in Item.objects.order_by("pk").native_iterator(chunk_size=10):
            yield f"{item.remote_id}\n"

    return StreamingHttpResponse(body())


async def endless(request: Any) -> StreamingHttpResponse:
    async def body() -> Any:
        async for item in Item.objects.order_by("pk").native_iterator(chunk_size=10):
            yield f"{item.remote_id}\n"
            await asyncio.sleep(0.05)

    return StreamingHttpResponse(body())


async def in_a_block(request: Any) -> HttpResponse:
    async with asyncorm.atomic():
        await Item.objects.native_create(remote_id=1000)
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT pg_sleep(30)")
    return HttpResponse()


urlpatterns = [
    path("queries/", queries),
    path("queries/of/tasks/", queries_of_tasks),
    path("stream/", stream),
    path("endless/", endless),
    path("block/", in_a_block),
]


def counting(get_response: Any) -> Any:
    """A synchronous middleware: in a thread, on Django's own connection of it."""

    def middleware(request: Any) -> Any:
        Item.objects.count()
        return get_response(request)

    return middleware


@pytest.fixture(autouse=True)
def _project(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = [f"{__name__}.counting"]


def request(app: Any, path: str) -> ApplicationCommunicator:
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
    return ApplicationCommunicator(app, {**scope, "asgi": {"version": "3.0"}})


async def get(app: Any, path: str) -> str:
    sent = request(app, path)
    await sent.send_input({"type": "http.request"})
    start = await sent.receive_output(5)
    body = ""
    while True:
        part = await sent.receive_output(5)
        body += part.get("body", b"").decode()
        if not part.get("more_body"):
            break
    await sent.wait(5)
    assert start["status"] == 200, body
    return body


async def test_signals_reach_their_receivers_once_for_each_request() -> None:
    seen: list[str] = []

    async def started(**kwargs: Any) -> None:
        seen.append(f"started, {await Item.objects.native_count()} items")

    async def finished(**kwargs: Any) -> None:
        seen.append(f"finished, {await Item.objects.native_count()} items")

    def synchronously(**kwargs: Any) -> None:
        seen.append(f"synchronously, {Item.objects.count()} items")

    request_started.connect(started)
    request_finished.connect(finished)
    request_finished.connect(synchronously)
    try:
        await get(lifespan(get_asgi_application()), "/queries/")
    finally:
        request_started.disconnect(started)
        request_finished.disconnect(finished)
        request_finished.disconnect(synchronously)
    assert sorted(seen) == ["finished, 0 items", "started, 0 items", "synchronously, 0 items"]
    await all_given_back()


async def test_in_debug_mode_each_request_has_its_own_queries(settings: Any) -> None:
    settings.DEBUG = True
    app = get_asgi_application()
    assert [await get(app, "/queries/") for _ in range(3)] == ["2"] * 3
    assert set(await asyncio.gather(*[get(app, "/queries/") for _ in range(5)])) == {"2"}
    paths = ["/queries/of/tasks/", "/queries/"] * 3
    assert await asyncio.gather(*[get(app, path) for path in paths]) == ["3", "2"] * 3
    response = await AsyncClient().get("/queries/of/tasks/")
    assert response.content == b"3"


async def test_a_stream_holds_a_connection_to_its_end_only() -> None:
    await Item.objects.native_bulk_create([Item(remote_id=n) for n in range(50)])
    app = get_asgi_application()
    expected = "".join(f"{n}\n" for n in range(50))
    assert set(await asyncio.gather(*[get(app, "/stream/") for _ in range(10)])) == {expected}
    await all_given_back()


@pytest.mark.parametrize("path", ["/endless/", "/block/"])
async def test_a_client_that_goes_away_frees_the_connection(path: str) -> None:
    await Item.objects.native_bulk_create([Item(remote_id=n) for n in range(50)])
    sent = request(get_asgi_application(), path)
    await sent.send_input({"type": "http.request"})

    def busy() -> bool:
        stats = asyncorm.pool_stats()
        return bool(stats) and stats["pool_available"] < stats["pool_size"]

    await eventually(busy)
    await asyncio.sleep(0.1)
    await sent.send_input({"type": "http.disconnect"})
    await sent.wait(5)
    await all_given_back()
    assert await Item.objects.native_count() == 50


@pytest.mark.parametrize("handler", [get_asgi_application, ours], ids=["djangos", "ours"])
async def test_a_stream_ends_with_a_client_that_goes_away_while_it_is_sent(
    handler: Any, settings: Any
) -> None:
    """The server waits for a slow client then, and the stream for the server: whoever else knows
    the response, its generators are not left to the collector."""
    settings.MIDDLEWARE = [f"{__name__}.keeping"]
    settings.ASYNCORM = {"SWAP_MANAGERS": True}
    await Item.objects.native_bulk_create([Item(remote_id=n) for n in range(50)])
    sending, gone = asyncio.Event(), asyncio.Event()
    asked = iter([{"type": "http.request"}])

    async def receive() -> Any:
        if (message := next(asked, None)) is None:
            await gone.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message: Any) -> None:
        if message.get("body"):
            sending.set()
            await asyncio.sleep(10)

    scope = {"type": "http", "method": "GET", "path": "/endless/", "headers": []}
    app = handler()
    task = asyncio.create_task(app({**scope, "query_string": b""}, receive, send))
    await asyncio.wait_for(sending.wait(), 5)
    gone.set()
    await asyncio.wait([task], timeout=5)
    assert kept
    await all_given_back()
    kept.clear()


kept: list[Any] = []


@async_only_middleware
def keeping(get_response: Any) -> Any:
    async def middleware(request: Any) -> Any:
        kept.append(await get_response(request))
        return kept[-1]

    return middleware
