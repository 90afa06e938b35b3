"""Requests, tasks and processes that follow one that has written see it, on lagging standbys."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.asgi import get_asgi_application as djangos
from django.db import connections
from django.db.transaction import TransactionManagementError
from django.http import HttpResponse, StreamingHttpResponse
from django.test import Client
from django.urls import path

import asyncorm
from asyncorm import replicas
from asyncorm.asgi import get_asgi_application as ours
from asyncorm.replicas import ReplicaRouter, positions
from tests.asgi_client import ask as ask_app
from tests.project.myapp.models import Item
from tests.standbys import (
    REPLICAS,
    Servers,
    ids,
    position_now,
    reached,
    read_by,
    request,
    routed,
    trio,
)
from tests.support import database, eventually, in_thread, run_script

COOKIE = "asyncorm_position"
items: Any = Item.objects
pytestmark = pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")


@pytest.fixture(scope="module")
def servers(django_db_setup: Any) -> Iterator[Servers]:
    with trio() as servers:
        yield servers


@pytest.fixture
def router(servers: Servers, django_db_blocker: Any, settings: Any) -> Iterator[ReplicaRouter]:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = ["asyncorm.replicas.ReplicaMiddleware"]
    with (
        django_db_blocker.unblock(),
        reached(servers),
        routed(settings, max_lag=8.0) as router,
    ):
        yield router


async def add(request: Any, number: int) -> HttpResponse:
    await Item.objects.acreate(remote_id=number)
    return HttpResponse(str(await Item.objects.filter(remote_id=number).aexists()))


async def look(request: Any, number: int) -> HttpResponse:
    found = Item.objects.filter(remote_id=number)
    return HttpResponse(f"{await found.aexists()} {found.db}")


def add_synchronously(request: Any, number: int) -> HttpResponse:
    Item.objects.create(remote_id=number)
    return HttpResponse(str(Item.objects.filter(remote_id=number).exists()))


def look_synchronously(request: Any, number: int) -> HttpResponse:
    found = Item.objects.filter(remote_id=number)
    return HttpResponse(f"{found.exists()} {found.db}")


async def stream(request: Any, number: int) -> StreamingHttpResponse:
    await Item.objects.acreate(remote_id=number)

    async def parts() -> Any:
        yield str(await Item.objects.filter(remote_id=number).aexists())

    return StreamingHttpResponse(parts())


urlpatterns = [
    path("add/<int:number>", add),
    path("look/<int:number>", look),
    path("sync/add/<int:number>", add_synchronously),
    path("sync/look/<int:number>", look_synchronously),
    path("stream/<int:number>", stream),
]


class Browser:
    """Keeps the cookies that it gets."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.cookies: dict[str, str] = {}

    async def open(self, path: str) -> str:
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        headers: Any = {"cookie": cookie} if cookie else {}
        answer = await ask_app(self.app, path, **headers)
        assert answer.status == 200, answer.body
        self.cookies |= answer.cookies
        return answer.body


@pytest.mark.parametrize("delay", [0, 300, 5000])
@pytest.mark.parametrize("prefix", ["", "/sync"])
@pytest.mark.parametrize("handler", [ours, djangos])
async def test_the_next_request_sees_it(
    router: ReplicaRouter, servers: Servers, settings: Any, handler: Any, prefix: str, delay: int
) -> None:
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_VIEWS": True}
    app = handler()
    await read_by(router, *REPLICAS)
    await asyncio.to_thread(servers.delay, delay)
    try:
        for _ in range(8):
            browser, number = Browser(app), next(ids)
            body = await browser.open(f"{prefix}/look/{number}")
            assert body.split()[0] == "False"
            assert not browser.cookies, "nothing was written"
            assert await browser.open(f"{prefix}/add/{number}") == "True"
            assert COOKIE in browser.cookies
            for wait in (0, 0.05, 0.1):
                await asyncio.sleep(wait)
                body = await browser.open(f"{prefix}/look/{number}")
                assert body.split()[0] == "True", body
        stranger = await Browser(app).open(f"{prefix}/look/{number}")
        assert stranger.split()[1] in REPLICAS, "others read there meanwhile"
        if delay < 1000:
            for _ in range(400):
                if (await browser.open(f"{prefix}/look/{number}")).split()[1] in REPLICAS:
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail("The standbys have replayed it, and are not read.")
    finally:
        await asyncio.to_thread(connections.close_all)


async def test_a_forged_cookie_counts_as_none(router: ReplicaRouter) -> None:
    browser, number = Browser(ours()), next(ids)
    await read_by(router, *REPLICAS)
    browser.cookies[COOKIE] = "primary:1.1:ffffffffffff:x:y"
    assert (await browser.open(f"/look/{number}")).split()[1] in REPLICAS


async def test_clocks_of_two_machines_are_not_compared(
    router: ReplicaRouter, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await read_by(router, *REPLICAS)
    await asyncio.to_thread(servers.delay, 5000)
    browser, number, clock = Browser(ours()), next(ids), time.time
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("django.core.signing.time.time", lambda: clock() - 600)
        await browser.open(f"/add/{number}")
    assert await browser.open(f"/look/{number}") == "True primary"


async def test_an_old_server_is_the_primarys_affair(router: ReplicaRouter) -> None:
    """After a failover a position says nothing: the primary serves until it is forgotten."""
    await read_by(router, *REPLICAS)
    wrong: Any = ("primary:1.1:1", "rubbish", "primary:1.1:", ":::", b"primary:1.1:1", 7, ["x"])
    for text in wrong:
        async with replicas.after(text):
            assert Item.objects.all().db == "primary"
    async with replicas.after("other:1.1:ffffffff"):
        assert Item.objects.all().db != "primary", "another primary's"
    async with replicas.after("primary:1.1:1"):
        need = positions.now()
        need.kept["primary"] = need.kept["primary"]._replace(until=0.0)
        assert Item.objects.all().db != "primary"


async def test_loops_of_one_call_do_not_watch(router: ReplicaRouter) -> None:
    """Under WSGI each call of async_to_sync() has a loop: the watcher outlives them."""

    def calls() -> None:
        async def read() -> str:
            with replicas.after():
                await items.native_count()
                return Item.objects.all().db

        end = time.monotonic() + 30
        while async_to_sync(read)() not in REPLICAS:
            assert time.monotonic() < end

    try:
        await asyncio.to_thread(calls)
        watching = router.watcher._loop
        assert watching is not None
        assert watching.is_running()
        await read_by(router, *REPLICAS)
    finally:
        await asyncio.to_thread(connections.close_all)


async def test_mirrors(settings: Any, django_db_blocker: Any, django_db_setup: Any) -> None:
    """What a test's transaction holds is read there, and nobody is watched."""
    mirror = {"TEST": {**connections.settings["default"]["TEST"], "MIRROR": "default"}}
    with django_db_blocker.unblock(), database("mirror", **mirror):
        settings.DATABASE_ROUTERS = [router := ReplicaRouter("default", ["mirror"])]
        async with asyncorm.atomic(), replicas.after("default:1.1:1"):
            item = await items.native_create(remote_id=next(ids))
            assert await items.filter(pk=item.pk).native_exists()
            assert Item.objects.all().db == "default"
            assert await replicas.position() == "default:1.1:1", "as it was given"
            asyncorm.set_rollback(True)
        assert router.watcher._loop is None


async def test_a_stream_belongs_to_its_request(router: ReplicaRouter, servers: Servers) -> None:
    await read_by(router, *REPLICAS)
    await asyncio.to_thread(servers.delay, 1000)
    assert await Browser(ours()).open(f"/stream/{next(ids)}") == "True"


async def test_the_session_keeps_it(router: ReplicaRouter, servers: Servers, settings: Any) -> None:
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "REPLICA_POSITION": "session"}
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
    settings.MIDDLEWARE = [
        "django.contrib.sessions.middleware.SessionMiddleware",
        "asyncorm.replicas.ReplicaMiddleware",
    ]
    from django.contrib.sessions.models import Session

    await read_by(router, *REPLICAS)
    await asyncio.to_thread(servers.delay, 5000)
    for handler in (ours, djangos):
        browser, number = Browser(handler()), next(ids)
        await browser.open(f"/add/{number}")
        assert browser.cookies.keys() == {settings.SESSION_COOKIE_NAME}
        assert await browser.open(f"/look/{number}") == "True primary"
    assert router.db_for_read(Session) == "primary"


async def test_wsgi(router: ReplicaRouter, servers: Servers) -> None:
    await read_by(router, *REPLICAS)
    await asyncio.to_thread(servers.delay, 5000)

    def browse() -> None:
        client, number = Client(), next(ids)
        assert client.get(f"/sync/look/{number}").content.decode().split()[1] in REPLICAS
        assert client.get(f"/sync/add/{number}").content == b"True"
        cookie = client.cookies[COOKIE]
        assert cookie["httponly"]
        assert 0 < int(cookie["max-age"]) <= 120
        assert client.get(f"/sync/look/{number}").content == b"True primary"

    await in_thread(browse)


async def test_positions(router: ReplicaRouter, servers: Servers) -> None:
    await read_by(router, *REPLICAS)
    await asyncio.to_thread(servers.delay, 5000)
    async with replicas.after():
        assert await replicas.position() == ""
        number = next(ids)
        async with asyncorm.atomic("primary"):
            await items.native_create(remote_id=number)
            with pytest.raises(TransactionManagementError, match="on_commit"):
                await replicas.position()
        position = await replicas.position()
        assert position.startswith("primary:")
        native = await asyncorm.native(replicas.position)()
        assert positions.load(native)["primary"] >= positions.load(position)["primary"]
    async with replicas.after():
        assert Item.objects.all().db in REPLICAS
        async with replicas.after(position):
            assert Item.objects.all().db == "primary"
            assert await replicas.position() == position
            assert await asyncio.create_task(in_child()) == "primary"
        assert Item.objects.all().db in REPLICAS
        with replicas.after():
            await items.native_create(remote_id=next(ids))
        assert Item.objects.all().db == "primary", "what was written inside is seen outside"
    now = await position_now()
    with request(primary=now._replace(lsn=0)):
        assert Item.objects.all().db in REPLICAS
        with replicas.after(positions.dump({"primary": positions.Position("other.2", 1)})):
            assert Item.objects.all().db == "primary", "neither is behind the other"
    stats = replicas.stats()["primary"]
    assert stats["replicas"]["r1"]["problem"] is None
    assert stats["reads"] > 0


async def in_child() -> str:
    return Item.objects.all().db


SYNCHRONOUS = """
import json, os, sys, time, warnings
warnings.simplefilter('ignore', ResourceWarning)
import django
django.setup()
from django.conf import settings
from django.db import connection, connections
for alias, server in json.loads(os.environ["SERVERS"]).items():
    connections.settings[alias] = {**connections.settings["default"], **server}
from asyncorm import replicas
from asyncorm.replicas import positions
from tests.project.myapp.models import Item
from tests.standbys import readable
router = replicas.ReplicaRouter("primary", ["r1", "r2"], max_lag=8)
settings.DATABASE_ROUTERS = [router]
from django.db import router as djangos
djangos.__dict__.pop("routers", None); djangos._routers = [router]

def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

until(lambda: readable(router) == {"r1", "r2"})
open(os.environ["READY"], "w").close()
until(lambda: os.path.exists(os.environ["ORDER"]))
order = json.load(open(os.environ["ORDER"]))
seen = Item.objects.filter(remote_id=order["number"])
with replicas.after(order["position"]):
    assert seen.exists(), "what another process has written"
    assert seen.db == "primary"
with replicas.after():
    assert seen.db != "primary"
    assert not seen.exists(), "or this proves nothing"

from django.db import transaction
for number in range(10**6, 10**6 + 5):
    with replicas.after():
        mine = Item.objects.filter(remote_id=number)
        assert mine.db != "primary"
        Item.objects.create(remote_id=number)
        assert mine.db == "primary" and mine.exists()
        before = replicas.position()
    with replicas.after(before):
        assert mine.exists()
with replicas.after():
    with transaction.atomic("primary"):
        assert Item.objects.all().db == "primary"
        Item.objects.count()
    assert Item.objects.all().db != "primary", "COMMIT alone writes nothing"
    with connections["primary"].cursor() as cursor:
        cursor.execute("SELECT add(%s)", [10**6 + 10])
    assert Item.objects.filter(remote_id=10**6 + 10).exists()
with replicas.after():
    with connections["primary"].cursor() as cursor:
        with cursor.copy("COPY myapp_item (remote_id) FROM STDIN") as copy:
            copy.write_row([10**6 + 11])
    assert Item.objects.filter(remote_id=10**6 + 11).exists()
with replicas.after():
    with transaction.atomic("primary"):
        Item.objects.create(remote_id=10**6 + 12)
        time.sleep(1)
    assert Item.objects.filter(remote_id=10**6 + 12).exists(), "the position is COMMIT's"
pid = os.fork()
if not pid:
    until(lambda: readable(router) == {"r1", "r2"})
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0, "a forked process watches by itself"
print("done")
"""


async def test_another_process_and_synchronous_code(
    router: ReplicaRouter, servers: Servers, tmp_path: Path
) -> None:
    ready, order = tmp_path / "ready", tmp_path / "order"
    keys = ("NAME", "USER", "HOST", "PORT")
    reached = {
        alias: {key: connections.settings[alias][key] for key in keys}
        for alias in ("primary", *REPLICAS)
    }
    script = asyncio.create_task(
        asyncio.to_thread(
            run_script,
            SYNCHRONOUS,
            SERVERS=json.dumps(reached),
            READY=str(ready),
            ORDER=str(order),
        )
    )
    await eventually(lambda: ready.exists() or script.done(), 60)
    await asyncio.to_thread(servers.delay, 5000)
    async with replicas.after():
        number = next(ids)
        await items.native_create(remote_id=number)
        position = await replicas.position()
    new = tmp_path / "new"
    new.write_text(json.dumps({"number": number, "position": position}))
    new.rename(order)
    done = await script
    assert done.stdout.strip() == "done", done.stderr
