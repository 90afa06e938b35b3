"""ATOMIC_REQUESTS for asynchronous views: decorator, middleware, both of Django's handlers."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction
from django.contrib.auth import alogin
from django.contrib.auth.models import User
from django.db import IntegrityError, connection, connections
from django.db.transaction import non_atomic_requests
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from django.views import View

import asyncorm
from asyncorm.asgi import AtomicRequestsMiddleware, atomic_requests
from tests.project.myapp.models import Item

HERE = __name__
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    f"{HERE}.exceptions_become_responses",
    f"{HERE}.synchronous",
    "asyncorm.asgi.AtomicRequestsMiddleware",
]
pytestmark = [pytest.mark.django_db(transaction=True, databases=["default", "other"])]
number = iter(range(1, 1000))


class exceptions_become_responses:
    """A middleware with a process_exception(), which Django must still call."""

    sync_capable = async_capable = True

    def __new__(cls, get_response: Any) -> Any:
        async def call(request: Any) -> Any:
            return await get_response(request)

        def call_synchronously(request: Any) -> Any:
            return get_response(request)

        middleware = call if iscoroutinefunction(get_response) else call_synchronously
        middleware.process_exception = cls.process_exception  # type: ignore[attr-defined]
        return middleware

    @staticmethod
    def process_exception(request: Any, exception: Exception) -> HttpResponse | None:
        if isinstance(exception, ZeroDivisionError):
            return HttpResponse("by process_exception", status=418)
        return None


def synchronous(get_response: Any) -> Any:
    """A synchronous middleware that uses the database before and after the view, in a thread."""

    def middleware(request: Any) -> Any:
        before = Item.objects.count()
        response = get_response(request)
        response["added"] = str(Item.objects.count() - before)
        return response

    return middleware


async def add(name: str = "") -> Item:
    return await Item.objects.native_create(remote_id=next(number), name=name)


async def good(request: Any) -> HttpResponse:
    await asyncio.gather(add(), add())
    return HttpResponse(connections.settings["default"]["NAME"])


async def fails(request: Any) -> HttpResponse:
    await add()
    raise ZeroDivisionError


async def not_found(request: Any) -> HttpResponse:
    await add()
    raise Http404


async def error_response(request: Any) -> HttpResponse:
    await add()
    return HttpResponse(status=500)


async def rolled_back(request: Any) -> HttpResponse:
    await add()
    asyncorm.set_rollback(True)
    return HttpResponse()


async def failed_commit(request: Any) -> HttpResponse:
    await add()
    async with asyncorm.cursor() as cursor:
        await cursor.execute(
            "CREATE TEMPORARY TABLE deferred (a int UNIQUE DEFERRABLE INITIALLY DEFERRED);"
            "INSERT INTO deferred VALUES (1), (1)"
        )
    return HttpResponse()


async def streaming(request: Any) -> StreamingHttpResponse:
    await add()

    async def body() -> Any:
        async for item in Item.objects.order_by("pk").native_iterator():
            yield f"{item.remote_id} "
        await Item.objects.native_update(name="after the transaction")

    return StreamingHttpResponse(body())


async def template(request: Any) -> TemplateResponse:
    await add()
    response = TemplateResponse(request, [])
    response.add_post_render_callback(lambda response: None)
    response.resolve_template = lambda names: Rendered()  # type: ignore[method-assign, assignment]
    return response


class Rendered:
    def render(self, context: Any, request: Any) -> str:
        raise ValueError("after the transaction")


@non_atomic_requests
async def excluded(request: Any) -> HttpResponse:
    await add()
    raise ZeroDivisionError


@non_atomic_requests(using="other")
async def excluded_elsewhere(request: Any) -> HttpResponse:
    return await fails(request)


class ByClass(View):
    async def get(self, request: Any) -> HttpResponse:
        return await fails(request)


class Bound:
    async def view(self, request: Any) -> HttpResponse:
        return await fails(request)


def of_rest_framework() -> Any:
    """A view whose error Django REST framework makes a response of."""
    adrf = pytest.importorskip("adrf.views")
    from rest_framework.exceptions import ValidationError

    class Rest(adrf.APIView):  # type: ignore[misc, name-defined]
        authentication_classes: list[Any] = []

        async def get(self, request: Any) -> HttpResponse:
            await add()
            raise ValidationError

    return Rest.as_view()


async def log_in(request: Any) -> HttpResponse:
    user = await User.objects.native_get(username="user")
    await alogin(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return HttpResponse()


async def until_cancelled(request: Any) -> HttpResponse:
    await add()
    await asyncio.sleep(30)
    return HttpResponse()


async def two_aliases(request: Any) -> HttpResponse:
    await Item.objects.using("other").native_create(remote_id=next(number))
    return await fails(request)


def sync_view(request: Any) -> HttpResponse:
    Item.objects.create(remote_id=next(number))
    raise ZeroDivisionError


VIEWS: dict[str, Any] = {
    "good": good,
    "fails": fails,
    "not_found": not_found,
    "error_response": error_response,
    "rolled_back": rolled_back,
    "failed_commit": failed_commit,
    "streaming": streaming,
    "template": template,
    "excluded": excluded,
    "excluded_elsewhere": excluded_elsewhere,
    "by_class": ByClass.as_view(),
    "bound": Bound().view,
    "log_in": log_in,
    "rest": of_rest_framework(),
    "until_cancelled": until_cancelled,
    "two_aliases": two_aliases,
}
urlpatterns = [
    *[path(f"{name}/", view) for name, view in VIEWS.items()],
    *[path(f"decorated/{name}/", atomic_requests(view)) for name, view in VIEWS.items()],
    path("sync/", sync_view),
    path("decorated/excluded_above/", non_atomic_requests(atomic_requests(fails))),
]
# Status, rows added in the end.
EXPECTED = {
    "good": (200, 2),
    "fails": (418, 0),
    "not_found": (404, 0),
    "error_response": (500, 1),
    "rolled_back": (200, 0),
    "failed_commit": (500, 0),
    "streaming": (200, 1),
    "template": (500, 1),
    "excluded": (418, 1),
    "excluded_elsewhere": (418, 0),
    "by_class": (418, 0),
    "bound": (418, 0),
    "log_in": (200, 0),
    "rest": (400, 0),
    "two_aliases": (418, 0),
}


@pytest.fixture(autouse=True)
def _atomic(settings: Any) -> Iterator[None]:
    settings.ASYNCORM = {"SWAP_MANAGERS": True}
    settings.ROOT_URLCONF = HERE
    settings.MIDDLEWARE = MIDDLEWARE
    User.objects.create_user("user")
    for alias in ("default", "other"):
        connections.settings[alias]["ATOMIC_REQUESTS"] = True
    yield
    for alias in ("default", "other"):
        connections.settings[alias]["ATOMIC_REQUESTS"] = False


def rows() -> int:
    return Item.objects.count() + Item.objects.using("other").count()


def outcomes(prefix: str, get: Any) -> dict[str, tuple[int, int]]:
    """What each view came to; one test for all, since emptying the tables takes its time."""
    found = {}
    for name in EXPECTED:
        for alias in ("default", "other"):
            Item.objects.using(alias).all().delete()
        found[name] = (get(f"/{prefix}{name}/"), rows())
    return found


@pytest.mark.parametrize("prefix", ["", "decorated/"], ids=["middleware", "decorator"])
def test_on_the_asynchronous_handler(prefix: str, settings: Any) -> None:
    if prefix:
        settings.MIDDLEWARE = MIDDLEWARE[:-1]

    async def get(path: str) -> int:
        response = await AsyncClient(raise_request_exception=False).get(path)
        if response.streaming:
            assert b"".join([part async for part in response.streaming_content])
        elif response.status_code < 400:
            # It was committed before the middleware around it went on.
            assert response["added"] == str(EXPECTED[path.split("/")[-2]][1])
        return int(response.status_code)

    with asyncio.Runner() as runner:
        assert outcomes(prefix, lambda path: runner.run(get(path))) == EXPECTED


@pytest.mark.parametrize("prefix", ["", "decorated/"], ids=["middleware", "decorator"])
def test_on_the_synchronous_handler(prefix: str, settings: Any) -> None:
    if prefix:
        settings.MIDDLEWARE = MIDDLEWARE[:-1]
    found = outcomes(
        prefix, lambda path: Client(raise_request_exception=False).get(path).status_code
    )
    for name, (status, added) in EXPECTED.items():
        if status == 418 and not prefix:
            # Only here, Django does not call process_exception() of other middleware.
            status = 500
        if name == "streaming":
            added = 1
        assert found[name] == (status, added), name


def test_synchronous_views_are_left_to_django() -> None:
    for client in (Client(), AsyncClient()):
        response = client.get("/sync/")
        if asyncio.iscoroutine(response):
            response = asyncio.run(response)
        assert (response.status_code, rows()) == (418, 0)


def test_excluded_above_the_decorator() -> None:
    async def run() -> None:
        await AsyncClient().get("/decorated/excluded_above/")

    asyncio.run(run())
    assert rows() == 1


def test_a_cancelled_request_rolls_back() -> None:
    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await AsyncClient().get("/until_cancelled/")
        assert asyncorm.pool_stats()["pool_available"] == asyncorm.pool_stats()["pool_size"]

    with override_settings(MIDDLEWARE=["asyncorm.asgi.AtomicRequestsMiddleware"]):
        asyncio.run(run())
    assert rows() == 0


def test_without_the_middleware_django_refuses_as_ever(settings: Any) -> None:
    async def run() -> None:
        await AsyncClient().get("/good/")  # marks the view
        settings.MIDDLEWARE = []
        with pytest.raises(RuntimeError, match="ATOMIC_REQUESTS with async views"):
            await AsyncClient().get("/good/")

    asyncio.run(run())
    with pytest.raises(RuntimeError, match="ATOMIC_REQUESTS with async views"):
        Client().get("/good/")


def test_another_engine_is_refused_as_ever() -> None:
    async def run() -> None:
        await AsyncClient().get("/good/")

    connections.settings["legacy"]["ATOMIC_REQUESTS"] = True
    try:
        with pytest.raises(RuntimeError, match="ATOMIC_REQUESTS with async views"):
            asyncio.run(run())
    finally:
        connections.settings["legacy"]["ATOMIC_REQUESTS"] = False


def test_only_coroutine_functions_are_decorated() -> None:
    with pytest.raises(TypeError, match="asynchronous views"):
        atomic_requests(sync_view)


def test_errors_of_the_database_are_the_views() -> None:
    async def view(request: Any) -> HttpResponse:
        await Item.objects.native_create(remote_id=1)
        await Item.objects.native_create(remote_id=1)
        return HttpResponse()

    with pytest.raises(IntegrityError):
        asyncio.run(atomic_requests(view)(None))  # type: ignore[arg-type]
    assert rows() == 0
    assert connection.in_atomic_block is False
    assert AtomicRequestsMiddleware.async_capable
