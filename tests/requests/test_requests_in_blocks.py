"""Requests that a coroutine makes inside its own transaction block, as tests and tools do.

They take part in the block, under our handler and under Django's, and leave it as it was: Django's
receivers of a request's signals would close a connection that is in a transaction.
"""

from typing import Any

import pytest
from django.core.asgi import get_asgi_application as djangos
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, connection, transaction
from django.http import HttpResponse
from django.test import AsyncClient
from django.urls import path

import asyncorm
from asyncorm.asgi import get_asgi_application, native_view
from tests.asgi_client import ask
from tests.project.myapp.models import Item
from tests.support import all_given_back

pytestmark = pytest.mark.django_db(transaction=True)


async def writes(request: Any) -> HttpResponse:
    await Item.objects.acreate(remote_id=await Item.objects.acount() + 1)
    return HttpResponse(str(await Item.objects.acount()))


@native_view
def natively(request: Any) -> HttpResponse:
    Item.objects.create(remote_id=Item.objects.count() + 1)
    return HttpResponse(str(Item.objects.count()))


async def fails(request: Any) -> HttpResponse:
    raise ZeroDivisionError


def threaded(request: Any) -> HttpResponse:
    return HttpResponse("no query")


urlpatterns = [
    path("writes/", writes),
    path("natively/", natively),
    path("fails/", fails),
    path("threaded/", threaded),
]


@pytest.fixture(autouse=True)
def _project(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = ["django.middleware.common.CommonMiddleware"]
    settings.ASYNCORM = {"SWAP_MANAGERS": True}


@pytest.mark.parametrize("handler", [get_asgi_application, djangos], ids=["ours", "djangos"])
async def test_they_take_part_in_it_and_leave_it_open(handler: Any) -> None:
    app = handler()
    urls, counts = ["/writes/", "/fails/", "/threaded/", "/writes/"], ["2", "3"]
    if handler is get_asgi_application:
        urls, counts = [*urls, "/natively/"], [*counts, "4"]
    async with asyncorm.atomic():
        await Item.objects.acreate(remote_id=100)
        answers = [await ask(app, url) for url in urls]
        assert [each.body for each in answers if each.body.isdigit()] == counts
        assert [each.status for each in answers[:4]] == [200, 500, 200, 200]
        transaction.set_rollback(True)
    assert await Item.objects.acount() == 0
    await all_given_back()


async def test_what_closes_connections_leaves_the_blocks_alone() -> None:
    def work() -> int:
        with transaction.atomic():
            Item.objects.create(remote_id=1)
            close_old_connections()
            return Item.objects.count()

    async with asyncorm.atomic():
        close_old_connections()
        await asyncorm.native(close_old_connections)()
        assert await Item.objects.acount() == 0
    assert await asyncorm.native(work)() == 1
    await all_given_back()


async def test_other_peoples_receivers_take_part_in_it() -> None:
    seen: list[Any] = []

    def receiver(signal: Any, **kwargs: Any) -> None:
        seen.append((connection.in_atomic_block, Item.objects.count()))

    for signal in request_started, request_finished:
        signal.connect(receiver)
    try:
        async with asyncorm.atomic():
            await Item.objects.acreate(remote_id=100)
            for url in "/writes/", "/threaded/":
                assert (await ask(get_asgi_application(), url)).status == 200
            transaction.set_rollback(True)
    finally:
        for signal in request_started, request_finished:
            signal.disconnect(receiver)
    assert seen == [(True, 1), (True, 2), (True, 2), (True, 2)]


@pytest.mark.parametrize("native", [True, False])
async def test_by_djangos_client(settings: Any, native: bool) -> None:
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_HANDLER": native}
    async with asyncorm.atomic():
        client = AsyncClient()
        assert [(await client.get("/writes/")).content for _ in range(3)] == [b"1", b"2", b"3"]
        transaction.set_rollback(True)
    assert await Item.objects.acount() == 0
