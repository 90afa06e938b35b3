"""What middleware and views do to the database is what they do under Django's synchronous handler.

Each pair of a middleware and a view is served by it first, in a thread, on Django's own connection;
then by our handler, the middleware natively and in a thread. The steps that they note and the rows
that are left must be the same.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction, sync_to_async
from django.db import DatabaseError, connection, connections, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.template import engines
from django.template.response import TemplateResponse
from django.test import Client
from django.urls import path

import asyncorm
from asyncorm.asgi import get_asgi_application, native_view
from tests.asgi_client import ask
from tests.middleware import set_tenant
from tests.project.myapp.models import Item
from tests.support import all_given_back, in_thread

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
]

trace: list[Any] = []


def rows() -> list[int]:
    return sorted(Item.objects.values_list("remote_id", flat=True))


def note(what: str) -> None:
    trace.append((what, connection.in_atomic_block, rows()))


def setting(name: str) -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting(%s, true)", [name])
        return str(cursor.fetchone()[0] or "")


def later(name: str, fails: bool = False) -> Callable[[], None]:
    def callback() -> None:
        trace.append((f"on_commit {name}", rows()))
        if fails:
            raise ValueError(f"on_commit {name}")

    return callback


# The middleware


class Middleware:
    """Does something around the rest of the chain."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        with self.around(request):
            return self.get_response(request)

    @contextmanager
    def around(self, request: Any) -> Iterator[None]:
        yield


class Nothing(Middleware):
    pass


class Atomic(Middleware):
    def __call__(self, request: Any) -> Any:
        with transaction.atomic():
            Item.objects.create(remote_id=100)
            transaction.on_commit(later("middleware"))
            response = self.get_response(request)
            note("atomic")
            if response.status_code >= 500:
                transaction.set_rollback(True)
        note("after atomic")
        return response


class Savepoint(Middleware):
    def __call__(self, request: Any) -> Any:
        with transaction.atomic():
            Item.objects.create(remote_id=100)
            with transaction.atomic():
                Item.objects.create(remote_id=101)
                response = self.get_response(request)
                transaction.set_rollback(True)
            note("after savepoint")
        return response


class LocalSetting(Middleware):
    def __call__(self, request: Any) -> Any:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL app.tenant = 'acme'")
            return self.get_response(request)


class SessionSetting(Middleware):
    def __call__(self, request: Any) -> Any:
        set_tenant("acme")
        try:
            return self.get_response(request)
        finally:
            with connection.cursor() as cursor:
                cursor.execute("RESET app.tenant")


class Wrapper(Middleware):
    def __call__(self, request: Any) -> Any:
        def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            if "myapp_item" in sql:
                trace.append(("wrapped", sql.split()[0]))
            return execute(sql, params, many, context)

        with connection.execute_wrapper(wrapper):
            return self.get_response(request)


class Refuses(Middleware):
    """A wrapper that lets no statement through, as those of tools that look for queries."""

    def __call__(self, request: Any) -> Any:
        def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            raise DatabaseError("refused")

        with connection.execute_wrapper(wrapper):
            return self.get_response(request)


class Catches(Middleware):
    def process_exception(self, request: Any, exception: Exception) -> HttpResponse:
        note(f"process_exception {exception}")
        Item.objects.create(remote_id=102)
        return HttpResponse("caught", status=418)


class AtomicCatches(Catches):
    def __call__(self, request: Any) -> Any:
        with transaction.atomic():
            Item.objects.create(remote_id=100)
            return self.get_response(request)


class InView(Middleware):
    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        Item.objects.create(remote_id=103)
        note("process_view")

    def process_template_response(self, request: Any, response: Any) -> Any:
        note("process_template_response")
        return response


MIDDLEWARE = [
    Nothing, Atomic, Savepoint, LocalSetting, SessionSetting, Wrapper, Refuses, Catches,
    AtomicCatches, InView,
]  # fmt: skip
# Those that have the connection in a state which the view must find.
OF_CONNECTIONS = [Atomic, Savepoint, LocalSetting, SessionSetting, AtomicCatches]


# The views


def writes(request: Any) -> HttpResponse:
    Item.objects.create(remote_id=1)
    transaction.on_commit(later("view"))
    note("view")
    return HttpResponse(f"{rows()} {setting('app.tenant')}")


def fails(request: Any) -> HttpResponse:
    Item.objects.create(remote_id=1)
    transaction.on_commit(later("never, with ATOMIC_REQUESTS"))
    raise ZeroDivisionError("view")


def saves(request: Any) -> HttpResponse:
    with transaction.atomic():
        Item.objects.create(remote_id=1)
        transaction.on_commit(later("robust", fails=True), robust=True)
        transaction.on_commit(later("after"))
        try:
            with transaction.atomic():
                Item.objects.create(remote_id=2)
                transaction.on_commit(later("never"))
                raise ZeroDivisionError
        except ZeroDivisionError:
            note("inner")
    return HttpResponse(str(rows()))


def fails_after(request: Any) -> HttpResponse:
    with transaction.atomic():
        Item.objects.create(remote_id=1)
        transaction.on_commit(later("fails", fails=True))
        transaction.on_commit(later("never reached"))
    return HttpResponse("not reached, outside a transaction")


def breaks(request: Any) -> HttpResponse:
    """A failed statement: a transaction around it is aborted."""
    Item.objects.create(remote_id=1)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT nothing")
    except DatabaseError:
        pass
    return HttpResponse(str(rows()))


def streams(request: Any) -> StreamingHttpResponse:
    Item.objects.create(remote_id=1)

    def content() -> Iterator[str]:
        note("stream")
        for item in Item.objects.order_by("pk").iterator(chunk_size=1):
            yield f"{item.remote_id} "
        Item.objects.create(remote_id=2)

    return StreamingHttpResponse(content())


def renders(request: Any) -> TemplateResponse:
    Item.objects.create(remote_id=1)
    template = engines["django"].from_string("{% for i in items %}{{ i.remote_id }} {% endfor %}")
    response = TemplateResponse(request, template, {"items": Item.objects.order_by("pk")})
    response.add_post_render_callback(lambda response: note("rendered"))
    return response


def wraps(request: Any) -> HttpResponse:
    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        trace.append(("of view", sql.split()[0]))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(wrapper):
        Item.objects.create(remote_id=1)
    return HttpResponse(str(rows()))


async def awaits(request: Any) -> HttpResponse:
    await Item.objects.acreate(remote_id=1)
    return HttpResponse(f"{await Item.objects.acount()}")


async def awaits_and_fails(request: Any) -> HttpResponse:
    await Item.objects.acreate(remote_id=1)
    raise ZeroDivisionError("view")


async def gathers(request: Any) -> HttpResponse:
    await asyncio.gather(*[Item.objects.acreate(remote_id=n) for n in (1, 2, 3)])
    return HttpResponse(f"{await Item.objects.acount()}")


async def streams_asynchronously(request: Any) -> StreamingHttpResponse:
    await Item.objects.acreate(remote_id=1)

    async def content() -> AsyncIterator[str]:
        async for item in Item.objects.order_by("pk").aiterator(chunk_size=1):
            yield f"{item.remote_id} "

    return StreamingHttpResponse(content())


async def hops(request: Any) -> HttpResponse:
    await sync_to_async(Item.objects.create)(remote_id=1)
    return HttpResponse(f"{await Item.objects.acount()}")


SYNCHRONOUS = [writes, fails, saves, fails_after, breaks, streams, renders, wraps]
ASYNCHRONOUS = [awaits, awaits_and_fails, gathers, streams_asynchronously]
urlpatterns = [path(f"{view.__name__}/", view) for view in (*SYNCHRONOUS, *ASYNCHRONOUS, hops)]
urlpatterns += [
    path(f"native/{view.__name__}/", native_view(lambda request, view=view: view(request)))
    for view in SYNCHRONOUS
]


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.ROOT_URLCONF = __name__
    trace.clear()
    yield
    # Django's pool gives connections out as they came back: what middleware has set is still there.
    connections["default"].close_pool()


@pytest.fixture(params=[False, True], ids=["", "atomic"])
def atomic_requests(request: Any, monkeypatch: Any) -> bool:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", request.param)
    return bool(request.param)


async def expected(url: str) -> tuple[Any, ...]:
    def work() -> tuple[int, bytes]:
        response = Client(raise_request_exception=False).get(url)
        content = b"".join(response)
        response.close()
        return response.status_code, content

    status, content = await in_thread(work)
    return await outcome(status, content.decode())


async def found(app: Any, url: str) -> tuple[Any, ...]:
    answer = await ask(app, url)
    return await outcome(answer.status, answer.body)


async def outcome(status: int, body: str) -> tuple[Any, ...]:
    left = await asyncorm.native(rows)()
    steps = list(trace)
    trace.clear()
    await Item.objects.all().native_delete()
    return status, body if status == 200 else "", steps, left


@pytest.mark.parametrize("middleware", MIDDLEWARE, ids=lambda each: each.__name__)
async def test_as_under_djangos_synchronous_handler(
    settings: Any, middleware: Any, atomic_requests: bool
) -> None:
    name = f"{__name__}.{middleware.__name__}"
    settings.MIDDLEWARE = [name]
    differences = []
    for natively in (True, False):
        settings.ASYNCORM = {
            "SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": [name] if natively else [],
        }  # fmt: skip
        app = get_asgi_application()
        for view in (*SYNCHRONOUS, *ASYNCHRONOUS):
            if iscoroutinefunction(view) and atomic_requests:
                continue  # Django refuses those
            url = f"/{view.__name__}/"
            wanted = await expected(url)
            urls = [url]
            if view in SYNCHRONOUS:
                urls = [f"/native{url}"]
                # Inside a transaction or session of native code one in a thread is refused.
                if not natively or middleware not in OF_CONNECTIONS:
                    urls.append(url)
            for each in urls:
                got = await found(app, each)
                if got != wanted:
                    where = "natively" if natively else "in a thread"
                    differences.append(f"{name} {where}, {each}:\n  {wanted}\n  {got}")
    await all_given_back()
    assert not differences, "\n".join([str(len(differences)), *differences])


@pytest.mark.parametrize("middleware", [Wrapper, Refuses], ids=lambda each: each.__name__)
async def test_execute_wrappers_of_native_middleware_see_the_views_own_threads(
    settings: Any, middleware: Any
) -> None:
    name = f"{__name__}.{middleware.__name__}"
    settings.MIDDLEWARE = [name]
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": [name]}
    wanted = await expected("/hops/")
    assert await found(get_asgi_application(), "/hops/") == wanted
    await all_given_back()


@pytest.mark.parametrize("middleware", [Wrapper, Refuses], ids=lambda each: each.__name__)
async def test_execute_wrappers_around_middleware_in_a_thread(
    settings: Any, middleware: Any
) -> None:
    """Native ones see what it does, and what is native inside it, once."""
    name = f"{__name__}.{middleware.__name__}"
    settings.MIDDLEWARE = [name, f"{__name__}.InView", f"{__name__}.Atomic"]
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": [name]}
    app = get_asgi_application()
    for view in (*SYNCHRONOUS, *ASYNCHRONOUS):
        url = f"/{view.__name__}/"
        wanted = await expected(url)
        for each in [url, f"/native{url}"] if view in SYNCHRONOUS else [url]:
            assert await found(app, each) == wanted, each
    await all_given_back()
