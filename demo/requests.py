"""Requests to a project with the middleware of `startproject`, through each half's own handler."""

from __future__ import annotations

import asyncio
import functools
from importlib import import_module
from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import path

from .shop.models import Product

CLIENTS = 10


async def product_page(request: HttpRequest, number: int) -> HttpResponse:
    product = await Product.objects.aget(pk=number)
    return HttpResponse(product.name)


urlpatterns = [path("<int:number>/", product_page)]


@functools.cache
def application() -> Any:
    """What this half's asgi.py has: `get_asgi_application()` of Django, or of asyncorm."""
    return import_module(settings.ASGI_MODULE).get_asgi_application()


async def request(url: str) -> str:
    """The body of the answer, as the ASGI server gets it."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "path": url, "query_string": b"", "headers": [(b"host", b"localhost")],
    }  # fmt: skip
    asked: asyncio.Queue[Any] = asyncio.Queue()
    asked.put_nowait({"type": "http.request"})
    answer: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        answer.append(message)

    await application()(scope, asked.get, send)
    if answer[0]["status"] != 200:
        raise RuntimeError(f"{url} was answered with {answer[0]['status']}")
    return b"".join(message.get("body", b"") for message in answer).decode()


async def requests(count: int, products: int) -> list[str]:
    async def client(first: int) -> list[str]:
        numbers = range(first, count, CLIENTS)
        pages = (1 + number % products for number in numbers)
        return [await request(f"/{page}/") for page in pages]

    answers = await asyncio.gather(*map(client, range(CLIENTS)))
    return [each for answer in answers for each in answer]
