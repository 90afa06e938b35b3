"""The live page: pools, who holds what since when, statements under way, the last requests."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from django.core.management import CommandError
from django.http import HttpResponse
from django.urls import path

import asyncorm
from asyncorm.asgi import get_asgi_application
from asyncorm.observe import live
from tests.asgi_client import ask
from tests.browser import WIDTHS, browser, program
from tests.project.shop.models import Book, Tag
from tests.support import eventually
from tests.tools.test_command import shown

pytestmark = pytest.mark.usefixtures("shop_data")


async def working(request: Any, x: str) -> HttpResponse:
    await asyncio.gather(Tag.objects.native_count(), Book.objects.native_count())
    async with asyncorm.atomic():
        await Tag.objects.native_count()
    return HttpResponse("done")


async def holding(request: Any) -> HttpResponse:
    async with asyncorm.atomic(), asyncorm.cursor() as cursor:
        await cursor.execute("SELECT '<b>' || pg_sleep(1)")
    return HttpResponse("done")


urlpatterns = [path("live/", live.view), path("work/<x>", working), path("hold/", holding)]


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Any:
    settings.ROOT_URLCONF = __name__
    settings.DEBUG = True
    settings.MIDDLEWARE = ["asyncorm.observe.live.requests_middleware"]
    yield
    live.unwatch()


async def test_what_happens_now() -> None:
    app = get_asgi_application()
    await ask(app, "/work/first")  # Django looks up types when a connection is new
    assert (await ask(app, "/work/<i>")).status == 200
    busy = asyncio.create_task(ask(app, "/hold/"))

    async def look() -> Any:
        return json.loads((await ask(app, "/live/?format=json")).body)

    await eventually(lambda: live.snapshot()["statements"])
    now = await look()
    [statement] = now["statements"]
    assert "pg_sleep" in statement["sql"] and not statement["waits"]
    [holder] = now["holders"]
    assert "transaction block that began at" in holder["holder"]
    assert "test_live.py" in holder["holder"] and holder["connection"] == statement["connection"]
    assert holder["seconds"] >= statement["seconds"] >= 0
    assert now["pools"]["default"]["pool_size"] >= 1

    page = await ask(app, "/live/")
    text = page.body
    assert page.status == 200 and "Statements under way" in text
    assert "pg_sleep" in text and "&lt;b&gt;" in text and "<b>" not in text
    await busy

    now = await look()
    assert not now["statements"] and not now["holders"]
    titles = [each["title"] for each in now["requests"]]
    assert not any("/live/" in title for title in titles), "the page's own push nothing out"
    at = titles.index("GET /work/%3Ci%3E")
    assert now["requests"][at]["queries"] == 3 and now["requests"][at]["seconds"] > 0
    link = f"?timeline={now['requests'][at]['number']}"
    assert link in (await ask(app, "/live/")).body
    await ask(app, "/hold/")  # of a page that is open, the links stay what they are
    shown = (await ask(app, f"/live/{link}")).body
    assert "COUNT(*)" in shown and "COMMIT" in shown and "<svg" in shown
    assert (await ask(app, "/live/?timeline=1000")).status == 404


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The application behind a server on this loop; its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve([listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await serving


async def test_in_a_terminal(settings: Any) -> None:
    settings.ALLOWED_HOSTS = ["127.0.0.1", "testserver"]
    app = get_asgi_application()
    async with served(app) as address:

        async def look(every: str = "0") -> str:
            return await asyncio.to_thread(shown, "live", address, "--every", every)

        await ask(app, "/work/first")
        busy = asyncio.create_task(ask(app, "/hold/"))
        await eventually(lambda: live.snapshot()["statements"])
        text = await look()
        assert re.search(r"default: \d+ of \d+ open, [1-9]\d* in use, 0 wait\n", text), text
        assert re.search(r"\n  \d+ for [\d.]+ ms: the transaction block that began at", text), text
        assert re.search(r"\n  \d+, [\d.]+ ms: SELECT '<b>' \|\| pg_sleep", text), text
        assert re.search(r"\nGET /hold/: 0 queries, not ended\n", text), text
        assert re.search(r"\nGET /work/first: \d+ queries, [\d.]+ ms\n", text), text
        await busy
        assert "default: " in await look("-1"), "once, too"

        settings.DEBUG = False
        with pytest.raises(CommandError, match="answers 404; it answers with DEBUG only"):
            await look()
    with pytest.raises(CommandError, match="does not answer"):
        await look()
    settings.ROOT_URLCONF = "tests.project.urls"
    with pytest.raises(CommandError, match=r"path\(.*live\.view\)"):
        await look()


@pytest.mark.slow
@pytest.mark.skipif(program() is None, reason="no Chromium is installed")
async def test_in_a_browser(settings: Any) -> None:
    settings.ALLOWED_HOSTS = ["127.0.0.1", "testserver"]
    app = get_asgi_application()
    await ask(app, "/work/first")
    async with served(app) as address, browser() as page:
        await page.open(f"{address}/live/")
        text = await page.evaluate("document.body.innerText")
        assert re.search(r"Pools\s+alias\s+open\s+most", text) and "default" in text
        assert "GET /work/first" in text
        for width in WIDTHS:
            assert not await page.overflows(width), width
        await ask(app, "/work/second")  # the page renews itself
        link = "[...document.links].find(each => each.innerText == 'GET /work/second')"
        await page.until(f"{link} && ({link}.click(), true)")
        await page.until("document.querySelector('svg') && document.readyState == 'complete'")
        assert "COUNT(*)" in await page.evaluate("document.body.innerHTML")
        for width in WIDTHS:
            assert not await page.overflows(width), width
        await page.evaluate("history.back()")
        await page.until(f"!!{link}")


async def test_nothing_in_production(settings: Any) -> None:
    settings.DEBUG = False
    app = get_asgi_application()
    await ask(app, "/work/1")
    assert (await ask(app, "/live/")).status == 404
    assert not live.snapshot()["requests"]
    await eventually(lambda: not live.snapshot()["holders"])
