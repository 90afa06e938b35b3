"""The whole request on the loop: asyncorm.asgi.get_asgi_application()."""

import asyncio
import contextvars
import gc
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth import login
from django.contrib.auth.middleware import RemoteUserMiddleware
from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application as djangos
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import got_request_exception, request_finished, request_started
from django.db import connection, connections, transaction
from django.http import FileResponse, Http404, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.template import engines
from django.template.response import TemplateResponse
from django.test import AsyncClient
from django.urls import clear_url_caches, path
from django.utils.decorators import async_only_middleware
from django.utils.functional import SimpleLazyObject
from django.views.generic import ListView

import asyncorm
from asyncorm.asgi import get_asgi_application, lifespan, native_view
from asyncorm.bridge import Runner
from tests.asgi_client import ask, scope
from tests.project.myapp.models import Item
from tests.support import (
    administrator,
    all_given_back,
    eventually,
    server_connections,
    watched_threads,
)

pytestmark = pytest.mark.django_db(transaction=True)

# As `startproject` makes it.
DEFAULT = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ENGINES = ["db", "cached_db", "cache", "signed_cookies"]

seen: list[Any] = []
mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="unset")


def here() -> str:
    return "loop" if threading.current_thread() is threading.main_thread() else "thread"


async def empty(request: Any) -> HttpResponse:
    return HttpResponse("empty")


async def one(request: Any) -> HttpResponse:
    return HttpResponse((await Item.objects.aget(remote_id=1)).name)


async def user(request: Any) -> HttpResponse:
    user = await request.auser()
    count = await request.session.aget("count", 0) + 1
    await request.session.aset("count", count)
    return HttpResponse(f"{user.username} {count} {await Item.objects.acount()}")


async def enter(request: Any) -> HttpResponse:
    await asyncorm.native(login)(
        request, await User.objects.aget(), "django.contrib.auth.backends.ModelBackend"
    )
    return HttpResponse("in")


async def missing(request: Any) -> HttpResponse:
    raise Http404


async def broken(request: Any) -> HttpResponse:
    raise ZeroDivisionError


def threaded(request: Any) -> HttpResponse:
    return HttpResponse(f"{here()} {Item.objects.count()}")


@native_view
def natively(request: Any) -> HttpResponse:
    request.session["natively"] = True
    return HttpResponse(f"{here()} {Item.objects.count()} {mark.get()}")


class Items(ListView):
    model = Item
    template_name = "unused"

    def render_to_response(self, context: Any, **kwargs: Any) -> Any:
        template = engines["django"].from_string(
            "{% for item in object_list %}{{ item.name }}{% endfor %} {{ here }}"
        )
        lazily = SimpleLazyObject(here)
        return TemplateResponse(self.request, template, {**context, "here": lazily})


@native_view
class NativeItems(Items):
    pass


urlpatterns = [
    path("empty/", empty),
    path("one/", one),
    path("user/", user),
    path("enter/", enter),
    path("missing/", missing),
    path("broken/", broken),
    path("threaded/", threaded),
    path("natively/", natively),
    path("items/", Items.as_view()),
    path("native/items/", NativeItems.as_view()),
]


@pytest.fixture(autouse=True)
def _project(settings: Any) -> None:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = DEFAULT
    settings.ASYNCORM = {"SWAP_MANAGERS": True}
    seen.clear()


@pytest.fixture
async def item() -> Item:
    return await Item.objects.native_create(remote_id=1, name="one")


@pytest.fixture
async def someone() -> User:
    return await User.objects.native_create(username="someone", is_active=True)


async def body(app: Any, path: str, **headers: Any) -> str:
    answer = await ask(app, path, **headers)
    assert answer.status == 200, answer
    return answer.body


@pytest.mark.parametrize("engine", ENGINES)
async def test_asynchronous_views_need_no_thread(
    settings: Any, engine: str, item: Item, someone: User
) -> None:
    settings.SESSION_ENGINE = f"django.contrib.sessions.backends.{engine}"
    app = get_asgi_application()
    await body(app, "/one/")  # the first one opens a connection
    with watched_threads() as threads:
        cookies = (await ask(app, "/enter/")).cookies
        for n in range(20):
            answer = await ask(
                app, "/user/", cookie="; ".join("=".join(each) for each in cookies.items())
            )
            assert answer.body == f"someone {n + 1} 1"
            cookies |= answer.cookies
            assert await body(app, "/empty/") == "empty"
            assert await body(app, "/one/") == "one"
            assert (await ask(app, "/missing/")).status == 404
            assert (await ask(app, "/nothing")).status == 404
            assert (await ask(app, "/empty")).status == 301
            assert (await ask(app, "/broken/")).status == 500
            assert (await ask(app, "/empty/", method="POST")).status == 403
    assert threads == []
    await all_given_back()


async def test_django_has_threads_there(item: Item) -> None:
    with watched_threads() as threads:
        await body(djangos(), "/empty/")
    assert threads


async def test_synchronous_views_stay_in_threads_until_they_are_named(
    settings: Any, item: Item
) -> None:
    app = get_asgi_application()
    assert await body(app, "/threaded/") == "thread 1"
    assert await body(app, "/natively/") == "loop 1 unset"
    assert await body(app, "/items/") == "one thread"
    assert await body(app, "/native/items/") == "one loop"
    settings.ASYNCORM = {"NATIVE_VIEWS": [f"{__name__}.threaded", f"{__name__}.Items"]}
    with watched_threads() as threads:
        assert await body(app, "/threaded/") == "loop 1"
        assert await body(app, "/items/") == "one loop"
    assert threads == []
    settings.ASYNCORM = {"NATIVE_VIEWS": True}
    assert await body(app, "/threaded/") == "loop 1"


@pytest.mark.slow
async def test_a_thousand_threaded_views_leave_no_connection(
    item: Item, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = get_asgi_application()
    options = {
        **connections.settings["default"]["OPTIONS"],
        "pool": False,  # of synchronous connections
        "application_name": "threaded",
    }
    monkeypatch.setitem(connections.settings["default"], "OPTIONS", options)
    gc.disable()  # it would close them, some time
    try:
        with administrator() as ask_server:
            for _ in range(100):
                answers = await asyncio.gather(*[body(app, "/threaded/") for _ in range(10)])
                assert set(answers) == {"thread 1"}
            await eventually(lambda: server_connections(ask_server, "threaded") == 0)
    finally:
        gc.enable()


async def whoami(request: Any) -> HttpResponse:
    return HttpResponse(request.user.username)


urlpatterns.append(path("whoami/", whoami))


class OtherHeader(RemoteUserMiddleware):
    pass


@pytest.mark.parametrize(
    "middleware", ["django.contrib.auth.middleware.RemoteUserMiddleware", f"{__name__}.OtherHeader"]
)
async def test_remote_users_are_known_by_the_header_that_servers_of_asgi_give(
    settings: Any, someone: User, middleware: str
) -> None:
    """Django's middleware has an asynchronous form, which is another one on Django 5.2."""
    settings.MIDDLEWARE = [*DEFAULT, middleware]
    settings.AUTHENTICATION_BACKENDS = ["django.contrib.auth.backends.RemoteUserBackend"]
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": [f"{__name__}.OtherHeader"]}
    headers = {"remote-user": "someone"}
    assert await body(djangos(), "/whoami/", **headers) == "someone"
    app = get_asgi_application()
    answer = await ask(app, "/whoami/", **headers)  # logs in: receivers of that have a thread
    assert answer.body == "someone"
    headers["cookie"] = f"sessionid={answer.cookies['sessionid']}"
    with watched_threads() as threads:
        assert await body(app, "/user/", **headers) == "someone 1 0"
    assert threads == []


# Signals


@contextmanager
def receivers(*pairs: Any) -> Iterator[None]:
    for signal, receiver in pairs:
        signal.connect(receiver)
    try:
        yield
    finally:
        for signal, receiver in pairs:
            signal.disconnect(receiver)


def synchronously(signal: Any, **kwargs: Any) -> None:
    seen.append((signal, here(), Item.objects.count()))


async def asynchronously(signal: Any, **kwargs: Any) -> None:
    seen.append((signal, here(), await Item.objects.acount()))


async def test_other_peoples_receivers_of_requests_signals(item: Item) -> None:
    app = get_asgi_application()
    signals = [request_started, request_finished]
    with (
        receivers(*[(signal, asynchronously) for signal in signals]),
        watched_threads() as threads,
    ):
        await body(app, "/empty/")
    assert threads == []
    assert seen == [(request_started, "loop", 1), (request_finished, "loop", 1)]
    seen.clear()
    with receivers(*[(signal, synchronously) for signal in signals]):
        await body(app, "/empty/")
    assert seen == [(request_started, "thread", 1), (request_finished, "thread", 1)]
    seen.clear()
    with receivers(*[(signal, synchronously) for signal in signals]):
        await body(app, "/threaded/")
    assert seen == [(request_started, "thread", 1), (request_finished, "thread", 1)]


class Closes(HttpResponse):
    def close(self) -> None:  # which runs in the request's thread
        super().close()


def closes(request: Any) -> HttpResponse:
    return Closes()


urlpatterns.append(path("closes/", closes))


async def test_receivers_that_are_connected_for_djangos_handler_are_called() -> None:
    def receiver(signal: Any, **kwargs: Any) -> None:
        seen.append(signal)

    signals = [request_started, request_finished]
    for signal in signals:
        signal.connect(receiver, sender=ASGIHandler)
    try:
        for path in "/empty/", "/broken/", "/natively/", "/threaded/", "/closes/":
            await ask(get_asgi_application(), path)
    finally:
        for signal in signals:
            signal.disconnect(receiver, sender=ASGIHandler)
    assert seen == signals * 5


async def test_receivers_of_exceptions_see_them() -> None:
    import sys

    def receiver(request: Any, **kwargs: Any) -> None:
        seen.append((request.path, here(), type(sys.exception())))

    with receivers((got_request_exception, receiver)):
        assert (await ask(get_asgi_application(), "/broken/")).status == 500
    assert seen == [("/broken/", "thread", ZeroDivisionError)]


def sends(request: Any) -> HttpResponse:
    """As a middleware does that puts another response in the place of one, and closes that."""
    request_finished.send(sender=sends)
    seen.append("sent")
    HttpResponse().close()
    seen.append("closed")
    return HttpResponse()


async def sends_later(request: Any) -> HttpResponse:
    async def later() -> None:
        await request.ended.wait()
        request_finished.send(sender=later)
        seen.append("sent")
        HttpResponse().close()
        seen.append("closed")

    request.ended = asyncio.Event()
    outliving.append((asyncio.create_task(later()), request.ended))
    return HttpResponse()


class FailsToClose(Closes):
    def close(self) -> None:
        super().close()
        raise ZeroDivisionError("close")


async def fails_to_close(request: Any) -> HttpResponse:
    return FailsToClose()


urlpatterns += [
    path("sends/", sends), path("sends/natively/", native_view(lambda request: sends(request))),
    path("sends/later/", sends_later), path("fails/to/close/", fails_to_close),
]  # fmt: skip
outliving: list[tuple[asyncio.Task[None], asyncio.Event]] = []


@pytest.mark.parametrize(
    "url", ["/sends/", "/sends/natively/", "/sends/later/", "/fails/to/close/"]
)
async def test_a_signal_of_other_code_is_sent_when_it_sends_it(url: str) -> None:
    """The end of the request has its own; nothing is kept for it, or for after it."""

    def receiver(sender: Any, **kwargs: Any) -> None:
        seen.append(getattr(sender, "__name__", None))

    async def steps(app: Any) -> list[Any]:
        try:
            await ask(app, url)
        except ZeroDivisionError:
            seen.append("failed")
        while outliving:
            task, ended = outliving.pop()
            ended.set()
            await task
        found = list(seen)
        seen.clear()
        return found

    with receivers((request_finished, receiver)):
        assert await steps(get_asgi_application()) == await steps(djangos())


# Context


def marking(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        mark.set("middleware")
        response = get_response(request)
        response["x-mark"] = mark.get()
        return response

    return middleware


async def marked(request: Any) -> HttpResponse:
    before = mark.get()
    mark.set("view")
    return HttpResponse(before)


urlpatterns.append(path("marked/", marked))


@pytest.mark.parametrize("named", [True, False])
async def test_context_variables_are_seen_both_ways(settings: Any, named: bool) -> None:
    settings.MIDDLEWARE = [*DEFAULT, f"{__name__}.marking"]
    if named:
        settings.ASYNCORM = {"NATIVE_MIDDLEWARE": [f"{__name__}.marking"]}
    answer = await ask(get_asgi_application(), "/marked/")
    assert answer.body == "middleware"
    assert (b"x-mark", b"view") in answer.headers
    assert mark.get() == "unset"


# Transactions


@native_view
def failing_write(request: Any) -> HttpResponse:
    Item.objects.create(remote_id=100)
    raise ZeroDivisionError


@native_view
def in_a_transaction(request: Any) -> HttpResponse:
    return HttpResponse(str(connection.in_atomic_block))


urlpatterns += [path("failing/", failing_write), path("transaction/", in_a_transaction)]


async def test_atomic_requests(settings: Any) -> None:
    app = get_asgi_application()
    assert await body(app, "/transaction/") == "False"
    assert (await ask(app, "/failing/")).status == 500
    assert await Item.objects.acount() == 1
    connections.settings["default"]["ATOMIC_REQUESTS"] = True
    try:
        assert await body(app, "/transaction/") == "True"
        assert (await ask(app, "/failing/")).status == 500
    finally:
        connections.settings["default"]["ATOMIC_REQUESTS"] = False
    assert await Item.objects.acount() == 1
    await all_given_back()


def atomically(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        with transaction.atomic():
            Item.objects.create(remote_id=50)
            response = get_response(request)
            transaction.set_rollback(True)
        return response

    return middleware


async def pid(request: Any) -> HttpResponse:
    return HttpResponse(f"{await Item.objects.acount()} {connection.in_atomic_block}")


urlpatterns.append(path("pid/", pid))


async def test_a_native_middleware_has_the_view_in_its_transaction(settings: Any) -> None:
    settings.MIDDLEWARE = [*DEFAULT, f"{__name__}.atomically"]
    settings.ASYNCORM = {
        "SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": [f"{__name__}.atomically"],
    }  # fmt: skip
    app = get_asgi_application()
    assert (await body(app, "/pid/")).startswith("1 ")
    assert await body(app, "/natively/") == "loop 1 unset"
    assert await Item.objects.acount() == 0
    await all_given_back()


# Clients that go away


async def waits(request: Any) -> HttpResponse:
    seen.append("begun")
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        seen.append("cancelled")
        raise
    return HttpResponse()


@native_view
def pays(request: Any) -> HttpResponse:
    Item.objects.create(remote_id=1)
    seen.append("begun")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(0.5)")
    Item.objects.create(remote_id=2)
    seen.append("paid")
    return HttpResponse()


urlpatterns += [path("waits/", waits), path("pays/", pays)]


async def left(url: str) -> asyncio.Task[Any]:
    """A request whose client goes away once something of it is `seen`."""
    gone = asyncio.Event()
    task = asyncio.create_task(ask(get_asgi_application(), url, gone=gone))
    await eventually(lambda: seen)
    gone.set()
    return task


@pytest.mark.parametrize("way", ["disconnect", "cancel"])
async def test_a_client_that_goes_away_cancels_asynchronous_views(way: str) -> None:
    gone = asyncio.Event()
    task = asyncio.create_task(ask(get_asgi_application(), "/waits/", gone=gone))
    await eventually(lambda: seen)
    gone.set() if way == "disconnect" else task.cancel()
    await asyncio.wait([task], timeout=5)
    assert seen == ["begun", "cancelled"]
    assert task.cancelled() == (way == "cancel")


@pytest.mark.parametrize("way", ["disconnect", "cancel"])
async def test_native_synchronous_views_go_on_to_their_end(settings: Any, way: str) -> None:
    app = get_asgi_application()
    finished: list[Any] = []
    with receivers((request_finished, receiver := lambda **kwargs: finished.append(kwargs))):
        gone = asyncio.Event()
        task = asyncio.create_task(ask(app, "/pays/", gone=gone))
        await eventually(lambda: seen)
        gone.set() if way == "disconnect" else task.cancel()
        await asyncio.wait([task], timeout=5)
        assert seen == ["begun", "paid"]
        assert len(finished) == 1
    assert receiver
    assert await Item.objects.acount() == 2
    await all_given_back()
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "CANCEL_NATIVE_VIEWS": True}
    await Item.objects.all().adelete()
    seen.clear()
    gone = asyncio.Event()
    task = asyncio.create_task(ask(app, "/pays/", gone=gone))
    await eventually(lambda: seen)
    gone.set()
    await asyncio.wait([task], timeout=5)
    assert seen == ["begun"]
    await all_given_back()


def limits(wait: Callable[..., Any]) -> Any:
    @async_only_middleware
    def factory(get_response: Any) -> Any:
        async def middleware(request: Any) -> Any:
            try:
                return await wait(get_response, request)
            except TimeoutError:
                await Item.objects.acreate(remote_id=504)
                return HttpResponse(status=504)

        return middleware

    return factory


async def within(get_response: Any, request: Any) -> Any:
    async with asyncio.timeout(0.3):
        return await get_response(request)


async def fail_after(get_response: Any, request: Any) -> Any:
    with anyio.fail_after(0.3):
        return await get_response(request)


async def move_on_after(get_response: Any, request: Any) -> Any:
    """The inner one of two that want to cancel."""
    with anyio.move_on_after(10), anyio.move_on_after(0.3):
        return await get_response(request)
    raise TimeoutError


by_timeout = limits(within)
by_wait_for = limits(lambda get_response, request: asyncio.wait_for(get_response(request), 0.3))
by_fail_after, by_move_on_after = limits(fail_after), limits(move_on_after)


def commits(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        with transaction.atomic():
            return get_response(request)

    return middleware


async def by_client(app: Any, path: str) -> Any:
    response: Any = await AsyncClient().get(path)
    return response


@pytest.mark.parametrize(
    ("way", "other", "asks"),
    [
        *((way, other, ask) for way in ("by_timeout", "by_wait_for")
          for other in (None, "atomically", "passes", "finishes", "commits")),
        ("by_fail_after", None, ask),
        ("by_move_on_after", "atomically", ask),
        ("by_timeout", "commits", by_client),
        ("by_wait_for", "atomically", by_client),
        ("by_fail_after", None, by_client),
    ],
)  # fmt: skip
async def test_so_do_they_when_middleware_gives_up(
    settings: Any, way: str, other: str | None, asks: Any
) -> None:
    """They are awaited, and what the middleware does then is as it is on Django's handler."""
    names = [f"{__name__}.{name}" for name in (other, way) if name]
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_HANDLER": True}
    if other in ("atomically", "commits"):
        settings.ASYNCORM["NATIVE_MIDDLEWARE"] = names[:1]
    inside = other in ("finishes", "commits")  # the first of them in the request's thread
    settings.MIDDLEWARE = names[::-1] if inside else names
    app = get_asgi_application()
    answer = await asks(app, "/pays/")
    status = getattr(answer, "status_code", None) or answer.status
    assert (status, seen) == (504, ["begun", "paid"])
    written = {n async for n in Item.objects.values_list("remote_id", flat=True)}
    rolled_back = {"atomically": set(), "commits": {504}}  # the one as it does, the other by that
    assert written == rolled_back.get(str(other), {1, 2, 504})
    await all_given_back()
    await Item.objects.all().adelete()
    seen.clear()
    assert (await ask(app, "/waits/")).status == 504
    assert seen == ["begun", "cancelled"]  # asynchronous views do not
    assert (await ask(app, "/empty/")).status == 200
    await all_given_back()


class TheirTask(asyncio.Task[Any]):
    pass


THEIR_FACTORIES: dict[str, Any] = {
    "tasks": lambda loop, coro, **kwargs: asyncio.Task(coro, loop=loop, **kwargs),
    "their tasks": lambda loop, coro, **kwargs: TheirTask(coro, loop=loop, **kwargs),
    "eager tasks": getattr(asyncio, "eager_task_factory", None),
}


@pytest.mark.parametrize("kind", THEIR_FACTORIES)
async def test_the_projects_own_task_factory_makes_the_requests_task(
    settings: Any, kind: str
) -> None:
    if (theirs := THEIR_FACTORIES[kind]) is None:
        pytest.skip("since Python 3.12")
    settings.MIDDLEWARE = [f"{__name__}.by_wait_for", f"{__name__}.by_timeout"]
    app = get_asgi_application()
    names: list[str] = []

    def factory(loop: Any, coro: Any, **kwargs: Any) -> Any:
        names.append(coro.__qualname__)
        return theirs(loop, coro, **kwargs)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        assert (await ask(app, "/pays/")).status == 504
    finally:
        loop.set_task_factory(None)
    assert seen == ["begun", "paid"]
    assert names.count("shielded") == 1
    await all_given_back()


released = threading.Event()


def blocks(request: Any) -> HttpResponse:
    seen.append("begun")
    assert released.wait(10)
    seen.append("ended")
    return HttpResponse()


def finishes(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        response = get_response(request)
        seen.append("finished")
        return response

    return middleware


urlpatterns.append(path("blocks/", blocks))


@pytest.mark.parametrize("named", [True, False])
async def test_middleware_around_a_threaded_view_goes_on_to_its_end(
    settings: Any, named: bool
) -> None:
    settings.MIDDLEWARE = [*DEFAULT, f"{__name__}.finishes"]
    if named:
        settings.ASYNCORM = {"NATIVE_MIDDLEWARE": [f"{__name__}.finishes"]}
    released.clear()
    task = await left("/blocks/")
    await asyncio.sleep(0.1)
    released.set()
    await asyncio.wait([task], timeout=5)
    assert seen == ["begun", "ended", "finished"]


async def test_a_view_is_cancelled_that_begins_after_the_client_went_away(settings: Any) -> None:
    settings.MIDDLEWARE = [f"{__name__}.slowly"]
    settings.ASYNCORM = {"NATIVE_MIDDLEWARE": "__all__"}
    task = await left("/waits/")
    await asyncio.wait([task], timeout=5)
    assert seen == ["middleware", "begun", "cancelled"]


def slowly(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        seen.append("middleware")
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.3)")
        return get_response(request)

    return middleware


@pytest.mark.parametrize("url", ["/empty/", "/natively/"])
async def test_a_cancellation_that_comes_too_late_for_one_step_does_not_hit_the_next(
    settings: Any, url: str
) -> None:
    """A view that awaits nothing after the client went away, and what native code does after it."""
    names = [f"{__name__}.{name}" for name in ("recounts", "passes", "slowly")]
    settings.MIDDLEWARE = [*DEFAULT, *(names if url == "/empty/" else [names[0], *names[:0:-1]])]
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": "__all__"}
    finished: list[Any] = []
    with receivers((request_finished, receiver := lambda **kwargs: finished.append(kwargs))):
        task = await left(url)
        await asyncio.wait([task], timeout=5)
    assert receiver
    assert task.done() and not task.cancelled() and task.exception() is None
    assert seen[-1] == "counted" and len(finished) == 1
    await all_given_back()


def recounts(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        try:
            return get_response(request)
        finally:
            Item.objects.count()
            seen.append("counted")

    return middleware


@async_only_middleware
def passes(get_response: Any) -> Any:
    async def middleware(request: Any) -> Any:
        return await get_response(request)

    return middleware


# Streams


def rows(request: Any) -> StreamingHttpResponse:
    def content() -> Iterator[str]:
        seen.append(here())
        for item in Item.objects.order_by("pk").iterator(chunk_size=10):
            yield f"{item.remote_id}\n"
        seen.append("end")

    return StreamingHttpResponse(content())


def file(request: Any) -> FileResponse:
    return FileResponse(open(__file__, "rb"))


urlpatterns += [path("rows/", rows), path("rows/native/", native_view(lambda r: rows(r)))]
urlpatterns += [path("file/", file)]


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
@pytest.mark.parametrize("native", [True, False])
async def test_synchronous_iterators_are_streamed_where_their_view_ran(native: bool) -> None:
    await Item.objects.abulk_create([Item(remote_id=n) for n in range(50)])
    app = get_asgi_application()
    answer = await ask(app, "/rows/native/" if native else "/rows/")
    assert [part.decode() for part in answer.parts] == [f"{n}\n" for n in range(50)]
    assert seen == ["loop" if native else "thread", "end"]
    await all_given_back()


class Iterating(StreamingHttpResponse):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in (b"own", b"way"):
            yield part


class Having(StreamingHttpResponse):
    @property
    def streaming_content(self) -> Any:
        return [b"own", b"way"]

    @streaming_content.setter
    def streaming_content(self, value: Any) -> None:
        self.is_async = False


class Bare(HttpResponseBase):
    streaming = True
    __aiter__ = Iterating.__aiter__


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
@pytest.mark.parametrize("kind", [Iterating, Having, Bare])
@pytest.mark.parametrize("native", [True, False])
async def test_a_response_that_streams_in_its_own_way_does(native: bool, kind: Any) -> None:
    def view(request: Any) -> HttpResponseBase:
        return kind() if kind is Bare else kind(["-"])

    url = f"{kind.__name__}/{native}/"
    urlpatterns.append(path(url, native_view(view) if native else view))
    clear_url_caches()
    answer = await ask(get_asgi_application(), f"/{url}")
    assert answer.parts == [b"own", b"way"]


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
@pytest.mark.parametrize("native", [True, False])
async def test_each_part_is_sent_as_soon_as_it_is_there(native: bool) -> None:
    """The next one is not asked for before the client has got it, or may be waited for."""
    sent: list[bytes] = []
    go_on = threading.Event()

    def view(request: Any) -> StreamingHttpResponse:
        def content() -> Iterator[bytes]:
            yield b"first"
            if native:
                seen.append(list(sent))
            else:
                assert go_on.wait(10)
            yield b"second"

        return StreamingHttpResponse(content())

    urlpatterns.append(path(f"parts/{native}/", native_view(view) if native else view))
    clear_url_caches()
    app = get_asgi_application()
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request"}
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        if message.get("body"):
            sent.append(message["body"])

    task = asyncio.create_task(app(scope(f"/parts/{native}/"), receive, send))
    await eventually(lambda: sent)
    if not native:
        assert sent == [b"first"]
        go_on.set()
    await task
    assert sent == [b"first", b"second"]
    assert seen == ([[b"first"]] if native else [])


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
@pytest.mark.parametrize("native", [True, False])
async def test_a_client_that_goes_away_ends_an_endless_stream(native: bool) -> None:
    def view(request: Any) -> StreamingHttpResponse:
        def content() -> Iterator[bytes]:
            try:
                while True:
                    seen.append(1)
                    yield b"part"
                    if native:
                        asyncorm.await_(asyncio.sleep(0.001))
            finally:
                seen.append(f"closed ({here()})")

        return StreamingHttpResponse(content())

    urlpatterns.append(path(f"endless/{native}/", native_view(view) if native else view))
    clear_url_caches()
    gone = asyncio.Event()
    task = asyncio.create_task(ask(get_asgi_application(), f"/endless/{native}/", gone=gone))
    await eventually(lambda: len(seen) > 10)
    gone.set()
    await asyncio.wait([task], timeout=10)
    assert task.done()
    assert seen[-1] == f"closed ({'loop' if native else 'thread'})"


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
async def test_a_stream_that_fails_after_the_client_went_away_is_no_secret() -> None:
    def view(request: Any) -> StreamingHttpResponse:
        def content() -> Iterator[bytes]:
            seen.append("begun")
            assert released.wait(10)
            raise ZeroDivisionError
            yield b""

        return StreamingHttpResponse(content())

    urlpatterns.append(path("fails/later/", view))
    clear_url_caches()
    released.clear()
    task = await left("/fails/later/")
    await asyncio.sleep(0.05)
    released.set()
    with pytest.raises(ZeroDivisionError):  # the server logs it
        await asyncio.wait_for(task, 10)


async def test_a_stream_that_cancels_itself_ends_the_answer() -> None:
    async def view(request: Any) -> StreamingHttpResponse:
        async def content() -> Any:
            yield b"part"
            raise asyncio.CancelledError

        return StreamingHttpResponse(content())

    urlpatterns.append(path("cancels/", view))
    clear_url_caches()
    answer = await ask(get_asgi_application(), "/cancels/")
    assert (answer.status, answer.parts) == (200, [b"part"])
    with suppress(asyncio.CancelledError):  # which Django 6.1 gives on to the server
        assert await ask(djangos(), "/cancels/") == answer


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
async def test_files() -> None:
    answer = await ask(get_asgi_application(), "/file/")
    with open(__file__) as source:  # noqa: ASYNC230
        assert answer.body == source.read()


async def test_djangos_warning_stays(item: Item) -> None:
    with pytest.warns(Warning, match="must consume synchronous iterators"):
        await body(get_asgi_application(), "/rows/native/")


# Settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"NATIVE_MIDDLEWARE": ["no.such.Middleware"]}, "'no.such.Middleware' cannot be imported"),
        ({"NATIVE_MIDDLEWARE": ["tests.project.myapp.models.Item"]}, "no __call__"),
        ({"NATIVE_MIDDLEWARE": [f"{__name__}.DEFAULT"]}, "is no middleware"),
        ({"NATIVE_MIDDLEWARE": [f"{__name__}.here"]}, "is no middleware"),
        ({"NATIVE_VIEWS": ["no.such.view"]}, "'no.such.view' does not exist"),
        ({"NATIVE_VIEWS": [f"{__name__}.nonsense"]}, "has no nonsense"),
    ],
)
async def test_bad_names_are_refused_at_the_start(settings: Any, changes: Any, words: str) -> None:
    settings.ASYNCORM = changes
    with pytest.raises(ImproperlyConfigured, match=words):
        get_asgi_application()


async def test_asyncclient_goes_where_requests_go(settings: Any, item: Item) -> None:
    def asked(**changes: Any) -> AsyncClient:
        settings.ASYNCORM = {"NATIVE_VIEWS": True, **changes}
        return AsyncClient()

    response = await asked(NATIVE_HANDLER=True).get("/threaded/")
    assert (response.content, response.asgi_request.path) == (b"loop 1", "/threaded/")
    response = await asked(NATIVE_HANDLER=False).get("/threaded/")
    assert response.content == b"thread 1"
    settings.ASGI_APPLICATION = f"{__name__}.application"
    globals()["application"] = lifespan(get_asgi_application())
    assert (await asked().get("/threaded/")).content == b"loop 1"
    globals()["application"] = lifespan(djangos())
    assert (await asked().get("/threaded/")).content == b"thread 1"


async def test_asyncclient_raises_what_views_raise(settings: Any) -> None:
    settings.ASYNCORM = {"NATIVE_HANDLER": True}
    with pytest.raises(ZeroDivisionError):
        await AsyncClient().get("/broken/")
    response = await AsyncClient(raise_request_exception=False).get("/broken/")
    assert response.status_code == 500
    assert response.exc_info[0] is ZeroDivisionError
    assert (await AsyncClient().get("/missing/")).status_code == 404


# Session state


def tenant() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('app.tenant', true)")
        return str(cursor.fetchone()[0])


async def tenants(request: Any) -> HttpResponse:
    return HttpResponse(await asyncorm.native(tenant)())


def threaded_tenants(request: Any) -> HttpResponse:
    return HttpResponse(tenant())


urlpatterns += [
    path("tenant/", tenants),
    path("tenant/native/", native_view(lambda request: threaded_tenants(request))),
    path("tenant/threaded/", threaded_tenants),
]


async def test_what_native_middleware_sets_in_its_session_is_seen_or_refused(
    settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.MIDDLEWARE = [*DEFAULT, "tests.middleware.sets_tenant"]
    settings.ASYNCORM = {"NATIVE_MIDDLEWARE": ["tests.middleware.sets_tenant"]}
    app = get_asgi_application()
    assert await body(app, "/tenant/") == "acme"
    assert await body(app, "/tenant/native/") == "acme"
    # Never silently on another connection.
    assert (await ask(app, "/tenant/threaded/")).status == 500
    assert "was used in another thread" in caplog.text
    await all_given_back()
    assert await asyncorm.native(tenant)() != "acme"


# Storms


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
async def test_random_cancellations_leave_nothing(settings: Any) -> None:
    """`make soak-requests` makes ten thousand."""
    count = 1_000
    settings.MIDDLEWARE = [*DEFAULT, f"{__name__}.marking", f"{__name__}.atomically"]
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": [f"{__name__}.atomically"]}
    app = get_asgi_application()
    await Item.objects.abulk_create([Item(remote_id=n) for n in range(1000, 1030)])
    await Item.objects.filter(remote_id=1).adelete()
    rng = random.Random(5)
    paths = ["/empty/", "/one/", "/natively/", "/rows/native/", "/missing/", "/broken/", "/items/"]
    tasks = len(asyncio.all_tasks())
    threads = threading.active_count()

    async def request() -> None:
        gone = asyncio.Event()
        task = asyncio.create_task(ask(app, rng.choice(paths), gone=gone))
        for way in rng.choices(["wait", "disconnect", "cancel"], k=2):
            await asyncio.sleep(rng.random() * 0.005)
            gone.set() if way == "disconnect" else task.cancel() if way == "cancel" else None
        await asyncio.wait([task])

    for _ in range(count // 50):
        await asyncio.gather(*[request() for _ in range(50)])
    await all_given_back()
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks + 1)
    await eventually(lambda: threading.active_count() <= threads + 1)
    gc.collect()
    waiting = [each for each in gc.get_objects() if type(each) is Runner and each.gr_frame]
    assert len([each for each in waiting if each.gr_context is not None]) == 0
    assert await Item.objects.acount() == 30  # each middleware's was rolled back


# Threaded middleware around native code


@native_view
def counts(request: Any) -> HttpResponse:
    Item.objects.create(remote_id=51)
    return HttpResponse(f"{Item.objects.count()} {here()}")


async def counts_asynchronously(request: Any) -> HttpResponse:
    await Item.objects.acreate(remote_id=51)
    return HttpResponse(f"{await Item.objects.acount()} {here()}")


urlpatterns += [path("counts/", counts), path("counts/async/", counts_asynchronously)]


@pytest.mark.parametrize("url", ["/counts/", "/counts/async/"])
async def test_native_views_take_part_in_the_transaction_of_a_threaded_middleware(
    settings: Any, url: str
) -> None:
    settings.MIDDLEWARE = [*DEFAULT, f"{__name__}.atomically"]
    app = get_asgi_application()
    for _ in range(2):
        assert await body(app, url) == "2 loop"
        assert await Item.objects.acount() == 0
    await all_given_back()


# Debugging


async def logged(request: Any) -> HttpResponse:
    await asyncio.gather(Item.objects.acount(), Item.objects.acount())
    return HttpResponse(str(len(connection.queries)))


@native_view
def logged_natively(request: Any) -> HttpResponse:
    Item.objects.count()
    Item.objects.count()
    return HttpResponse(str(len(connection.queries)))


async def hops(request: Any) -> HttpResponse:
    await sync_to_async(Item.objects.count)()
    return HttpResponse(str(await Item.objects.acount()))


urlpatterns += [
    path("hops/", hops),
    path("logged/", logged),
    path("logged/natively/", logged_natively),
]


async def test_in_debug_mode(settings: Any) -> None:
    settings.DEBUG = True
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "SLOW_STEP": False}
    app = get_asgi_application()
    await body(app, "/logged/")
    with watched_threads() as threads:
        for _ in range(3):
            assert await body(app, "/logged/") == "2"
            assert await body(app, "/logged/natively/") == "2"
        answer = await ask(app, "/broken/")
        assert answer.status == 500 and "ZeroDivisionError at /broken/" in answer.body
        answer = await ask(app, "/nothing/")
        assert answer.status == 404 and "URLconf" in answer.body
    assert threads == []


def counting(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        Item.objects.count()
        response = get_response(request)
        response["x-queries"] = str(len(connection.queries))
        return response

    return middleware


@pytest.mark.parametrize("url", ["/logged/", "/logged/natively/", "/threaded/", "/hops/"])
async def test_middleware_finds_the_queries_of_the_request(settings: Any, url: str) -> None:
    """Wherever they were made, as where all of a request is done in one thread."""
    settings.DEBUG = True
    settings.MIDDLEWARE = [f"{__name__}.counting"]
    for names in [], settings.MIDDLEWARE:
        settings.ASYNCORM = {"SWAP_MANAGERS": True, "SLOW_STEP": False, "NATIVE_MIDDLEWARE": names}
        answer = await ask(get_asgi_application(), url)
        made = 2 if url == "/threaded/" else 3
        assert (b"x-queries", str(made).encode()) in answer.headers


# Django REST framework


async def test_django_rest_framework_natively(settings: Any) -> None:
    pytest.importorskip("rest_framework")
    from rest_framework.exceptions import ValidationError
    from rest_framework.renderers import JSONRenderer
    from rest_framework.response import Response
    from rest_framework.views import APIView

    class Writes(APIView):
        renderer_classes = [JSONRenderer]

        def get(self, request: Any) -> Response:
            Item.objects.create(remote_id=Item.objects.count() + 1)
            if "refuse" in request.query_params:
                raise ValidationError("refused")
            return Response({"items": Item.objects.count(), "ran": here()})

    Writes.__module__ = __name__
    urlpatterns.append(path("drf/", Writes.as_view()))
    clear_url_caches()
    settings.ASYNCORM = {"NATIVE_VIEWS": [f"{__name__}.test_django_rest_framework_natively"]}
    app = get_asgi_application()
    connections.settings["default"]["ATOMIC_REQUESTS"] = True
    try:
        await body(app, "/drf/")
        with watched_threads() as threads:
            assert await body(app, "/drf/") == '{"items":2,"ran":"loop"}'
            assert (await ask(app, "/drf/?refuse")).status == 400
        assert threads == []
    finally:
        connections.settings["default"]["ATOMIC_REQUESTS"] = False
    assert await asyncorm.native(Item.objects.count)() == 2
    await all_given_back()
