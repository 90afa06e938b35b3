"""What middleware leaves on the connection of a thread, the rest of the request finds.

Middleware that hops to the thread (a `process_request()` of MiddlewareMixin, `process_view()`, an
asynchronous one by `sync_to_async()`) begins a transaction there, or sets a tenant. On Django's own
backend all asynchronous methods go there, too; with the swap and with our handler they must.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction, sync_to_async
from django.core.asgi import get_asgi_application as djangos
from django.db import connection, models, transaction
from django.db.models.functions import NullIf
from django.http import HttpResponse, StreamingHttpResponse
from django.template import engines
from django.template.response import TemplateResponse
from django.urls import path
from django.utils.deprecation import MiddlewareMixin

import asyncorm
from asyncorm.asgi import get_asgi_application, native_view
from tests.asgi_client import ask
from tests.middleware import AsynchronousMiddleware, set_tenant
from tests.project.myapp.models import Item
from tests.support import all_given_back

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
]

trace: list[Any] = []


@pytest.fixture(autouse=True)
def _no_tenants_afterwards() -> Iterator[None]:
    """Connections of Django's own pool keep what was set on them."""
    yield
    connection.close_pool()


def begin(request: Any) -> None:
    request.block = transaction.atomic()
    request.block.__enter__()
    Item.objects.create(remote_id=100)


def end(request: Any, response: Any) -> Any:
    trace.append((Item.objects.count(), connection.in_atomic_block))
    if response.status_code >= 400:
        transaction.set_rollback(True)
    request.block.__exit__(None, None, None)
    return response


class Begins(MiddlewareMixin):
    def process_request(self, request: Any) -> None:
        begin(request)

    def process_response(self, request: Any, response: Any) -> Any:
        return end(request, response)


class BeginsInView(MiddlewareMixin):
    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        begin(request)

    def process_response(self, request: Any, response: Any) -> Any:
        return end(request, response)


class Manually(MiddlewareMixin):
    def process_request(self, request: Any) -> None:
        transaction.set_autocommit(False)
        Item.objects.create(remote_id=100)

    def process_response(self, request: Any, response: Any) -> Any:
        trace.append(Item.objects.count())
        (transaction.commit if response.status_code < 400 else transaction.rollback)()
        transaction.set_autocommit(True)
        return response


class Sets(MiddlewareMixin):
    def process_request(self, request: Any) -> None:
        set_tenant("acme")

    def process_response(self, request: Any, response: Any) -> Any:
        set_tenant("")
        return response


class SetsInView(Sets):
    def process_request(self, request: Any) -> None:
        return None

    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        set_tenant("acme")


class Hops(AsynchronousMiddleware):
    async def __call__(self, request: Any) -> Any:
        await sync_to_async(begin)(request)
        response = await self.get_response(request)
        return await sync_to_async(end)(request, response)


class BeginsUntilClosed(Begins):
    """Its transaction is that of the stream, too."""

    def process_response(self, request: Any, response: Any) -> Any:
        response._resource_closers.append(lambda: end(request, response))
        return response


class Asks(AsynchronousMiddleware):
    """Asynchronous middleware inside: what it does is in it, too."""

    async def __call__(self, request: Any) -> Any:
        seen = await asks(request, "streams_natively" in request.path)
        response = await self.get_response(request)
        response["seen"] = f"{seen} {await asks(request, 'natively' in request.path)}"
        return response


KINDS = [Begins, BeginsInView, BeginsUntilClosed, Manually, Sets, SetsInView, Hops]


class _Setting(models.Func):
    function = "current_setting"
    output_field = models.TextField()


# A connection that it was reset on says "", one that it never was set on says NULL.
EMPTY = models.Value("", output_field=models.TextField())
SEEN = NullIf(_Setting(models.Value("app.tenant"), models.Value(True)), EMPTY)


async def asks(request: Any, natively: bool) -> Any:
    request.asked = remote_id = getattr(request, "asked", 200) + 1
    if not natively:
        await Item.objects.acreate(remote_id=remote_id)
        return [name async for name in Item.objects.values_list(SEEN, flat=True)]
    async with asyncorm.atomic():
        await Item.objects.native_create(remote_id=remote_id)
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT count(*) FROM myapp_item")
        assert await cursor.fetchone() == (await Item.objects.native_count(),)
    return await Item.objects.values_list(SEEN, flat=True).anative()


async def streams_asynchronously(request: Any) -> StreamingHttpResponse:
    async def parts() -> Any:
        for _ in range(3):
            yield f"{await asks(request, 'natively' in request.path)} "

    return StreamingHttpResponse(parts())


async def streams_natively(request: Any) -> StreamingHttpResponse:
    return await streams_asynchronously(request)


async def writes(request: Any) -> HttpResponse:
    await Item.objects.acreate(remote_id=1)
    names = [name async for name in Item.objects.annotate(t=SEEN).values_list("t", flat=True)]
    return HttpResponse(f"{await Item.objects.acount()} {names}")


async def fails(request: Any) -> HttpResponse:
    await Item.objects.acreate(remote_id=1)
    raise ZeroDivisionError


async def refuses(request: Any) -> HttpResponse:
    await sync_to_async(Item.objects.create)(remote_id=1)
    item = await Item.objects.alast()
    assert item is not None
    await item.arefresh_from_db()
    await Item.objects.filter(pk=item.pk).aupdate(remote_id=2)
    return HttpResponse(f"{await Item.objects.acount()}", status=409)


async def natively(request: Any) -> HttpResponse:
    """What `writes()` does, by asyncorm's own names."""
    async with asyncorm.atomic():
        await Item.objects.native_create(remote_id=1)
    names = await Item.objects.annotate(t=SEEN).values_list("t", flat=True).anative()
    assert names == [t async for t in Item.objects.values_list(SEEN, flat=True).native_iterator()]
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT count(*) FROM myapp_item")
        assert await cursor.fetchone() == (await Item.objects.native_count(),)
    return HttpResponse(f"{await asyncorm.native(Item.objects.count)()} {names}")


def synchronously(request: Any) -> HttpResponse:
    Item.objects.create(remote_id=1)
    return HttpResponse(str([*Item.objects.annotate(t=SEEN).values_list("t", flat=True)]))


def streams(request: Any) -> StreamingHttpResponse:
    return StreamingHttpResponse(f"{n} " for n in [Item.objects.count()])


def renders(request: Any) -> TemplateResponse:
    template = engines["django"].from_string("{% for i in items %}{{ i.t }} {% endfor %}")
    return TemplateResponse(request, template, {"items": Item.objects.annotate(t=SEEN)})


# Each of the second kind does what the first does, by asyncorm's own names.
TWINS = {natively: writes, streams_natively: streams_asynchronously}
VIEWS: list[Any] = [
    *TWINS, *TWINS.values(), fails, refuses, synchronously, streams, renders,
]  # fmt: skip
urlpatterns = [path(f"{view.__name__}/", view) for view in VIEWS]


SESSIONS = "django.contrib.sessions.middleware.SessionMiddleware"
ASKS = f"{__name__}.Asks"


async def outcome(app: Any, url: str) -> tuple[Any, ...]:
    answer = await ask(app, url)
    steps = list(trace)
    trace.clear()
    left = sorted(await asyncorm.native(lambda: [*Item.objects.values_list("remote_id")])())
    await Item.objects.all().native_delete()
    told = answer.body, dict(answer.headers).get(b"seen")
    return answer.status, told if answer.status == 200 else "", steps, left


@pytest.mark.parametrize(
    "inside", ["", "django.contrib.sessions.middleware.SessionMiddleware", ASKS]
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_the_rest_of_the_request_finds_it(settings: Any, kind: Any, inside: str) -> None:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = [
        f"{__name__}.{kind.__name__}",
        *[inside] * bool(inside),
    ]
    differences = []
    for view in VIEWS:
        url = f"/{view.__name__}/"
        settings.ASYNCORM = {}
        expected = await outcome(djangos(), f"/{TWINS.get(view, view).__name__}/")
        settings.ASYNCORM = {"SWAP_MANAGERS": True}
        ways = {"Django's handler": djangos(), "ours": get_asgi_application()}
        if inside == ASKS and view in TWINS:  # else Django's own names only
            del ways["Django's handler"]
            if kind in (BeginsInView, SetsInView):  # what was left after it had begun
                continue
        if not iscoroutinefunction(view):
            settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_VIEWS": [__name__]}
            ways["ours, native views"] = get_asgi_application()
        for way, app in ways.items():
            if (found := await outcome(app, url)) != expected:
                differences.append(f"{way} {url}:\n  {expected}\n  {found}")
    await all_given_back()
    assert not differences, "\n".join(differences)


async def logs_in(request: Any) -> HttpResponse:
    await request.session.aset("key", "value")
    await request.session.asave()
    return HttpResponse(request.session.session_key)


@native_view
def sets_in_session(request: Any) -> HttpResponse:
    request.session["key"] = "value"
    request.session.save()
    return HttpResponse(request.session.session_key)


urlpatterns += [path("logs/in/", logs_in), path("sets/in/session/", sets_in_session)]


@pytest.mark.parametrize("url", ["/logs/in/", "/sets/in/session/"])
@pytest.mark.parametrize("kind", [Begins, BeginsInView, Hops], ids=lambda kind: kind.__name__)
async def test_sessions_are_in_its_transaction(settings: Any, kind: Any, url: str) -> None:
    """A session that is saved there is found when the middleware of sessions saves it again."""
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = [
        f"{__name__}.{kind.__name__}",
        SESSIONS,
    ]
    settings.ASYNCORM = {"SWAP_MANAGERS": True}
    for app in djangos(), get_asgi_application():
        answer = await ask(app, url)
        assert answer.status == 200, answer.body
        assert answer.cookies["sessionid"] == answer.body
        trace.clear()
        await Item.objects.all().native_delete()
    await all_given_back()
