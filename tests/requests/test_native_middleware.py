"""Middleware of every kind, in every order: our handler does what Django's does."""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction
from django.core.asgi import get_asgi_application as djangos
from django.core.exceptions import MiddlewareNotUsed, PermissionDenied
from django.core.signals import got_request_exception
from django.http import Http404, HttpResponse
from django.template import engines
from django.template.response import TemplateResponse
from django.urls import path
from django.utils.decorators import async_only_middleware, sync_and_async_middleware
from django.utils.deprecation import MiddlewareMixin

from asyncorm.asgi import get_asgi_application as ours
from tests.asgi_client import ask
from tests.middleware import AsynchronousMiddleware

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
]

trace: list[str] = []


def note(what: str) -> None:
    """Write down a step, and whether it runs on the loop's thread."""
    here = "loop" if threading.current_thread() is threading.main_thread() else "thread"
    trace.append(f"{what} ({here})")


def answer(name: str) -> HttpResponse:
    return HttpResponse(f"from {name}")


# The middleware: each says what it is called for.


def function(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        note("function in")
        response = get_response(request)
        note(f"function out {response.status_code}")
        response["x-function"] = "1"
        return response

    return middleware


@async_only_middleware
def coroutine(get_response: Any) -> Any:
    async def middleware(request: Any) -> Any:
        note("coroutine in")
        await asyncio.sleep(0)
        response = await get_response(request)
        note(f"coroutine out {response.status_code}")
        return response

    return middleware


@sync_and_async_middleware
def either(get_response: Any) -> Any:
    if iscoroutinefunction(get_response):

        async def middleware(request: Any) -> Any:
            note("either, async, in")
            response = await get_response(request)
            note("either, async, out")
            return response

    else:

        def middleware(request: Any) -> Any:
            note("either, sync, in")
            response = get_response(request)
            note("either, sync, out")
            return response

    return middleware


class Mixin(MiddlewareMixin):
    def process_request(self, request: Any) -> None:
        note("mixin request")

    def process_response(self, request: Any, response: Any) -> Any:
        note(f"mixin response {response.status_code}")
        return response


class Hooks(MiddlewareMixin):
    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        note(f"hooks view {view.__name__}")

    def process_exception(self, request: Any, exception: Exception) -> Any:
        note(f"hooks exception {exception!r}")

    def process_template_response(self, request: Any, response: Any) -> Any:
        note("hooks template")
        response.context_data["by"] = "hooks"
        return response


class Plain:
    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        note("plain in")
        response = self.get_response(request)
        note("plain out")
        return response

    def process_exception(self, request: Any, exception: Exception) -> Any:
        note("plain exception")
        return answer("plain's process_exception")


class Slots:
    """Nothing can be set on it, nor on its class's property."""

    __slots__ = ("get_response",)

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        note("slots in")
        return self.get_response(request)

    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        note("slots view")

    @property
    def process_exception(self) -> Any:
        return lambda request, exception: note("slots exception")


class Asynchronous(AsynchronousMiddleware):
    async def __call__(self, request: Any) -> Any:
        note("asynchronous in")
        response = await self.get_response(request)
        note("asynchronous out")
        return response

    async def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        note("asynchronous view")

    async def process_template_response(self, request: Any, response: Any) -> Any:
        note("asynchronous template")
        return response


class Unused(MiddlewareMixin):
    def __init__(self, get_response: Any) -> None:
        raise MiddlewareNotUsed("not used")


class Refuses(MiddlewareMixin):
    def process_request(self, request: Any) -> Any:
        note("refuses")
        return answer("refuses")


class RefusesView(MiddlewareMixin):
    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> Any:
        note("refuses view")
        return answer("refuses view")


class FailsBefore(MiddlewareMixin):
    def process_request(self, request: Any) -> Any:
        raise PermissionDenied("before")


class FailsAfter(MiddlewareMixin):
    def process_response(self, request: Any, response: Any) -> Any:
        raise Http404("after")


class FailsInView(MiddlewareMixin):
    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> Any:
        raise ValueError("in process_view")


class FailsInException(MiddlewareMixin):
    def process_exception(self, request: Any, exception: Exception) -> Any:
        raise LookupError("in process_exception") from exception


class FailsInTemplate(MiddlewareMixin):
    def process_template_response(self, request: Any, response: Any) -> Any:
        return None


KINDS: list[Any] = [
    function, coroutine, either, Mixin, Hooks, Plain, Slots, Asynchronous, Unused, Refuses,
    RefusesView, FailsBefore, FailsAfter, FailsInView, FailsInException, FailsInTemplate,
]  # fmt: skip
OWN = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
]


# The views.


def synchronous(request: Any) -> HttpResponse:
    note("view")
    return answer("synchronous")


async def asynchronous(request: Any) -> HttpResponse:
    note("view")
    await asyncio.sleep(0)
    return answer("asynchronous")


def failing(request: Any) -> HttpResponse:
    raise ValueError("view")


async def missing(request: Any) -> HttpResponse:
    raise Http404("view")


def template(request: Any) -> TemplateResponse:
    return TemplateResponse(request, engines["django"].from_string("by {{ by }}"), {"by": "view"})


async def async_template(request: Any) -> TemplateResponse:
    return template(request)


def bad_template(request: Any) -> TemplateResponse:
    class Bad:
        def __str__(self) -> str:
            raise ValueError("template")

    return TemplateResponse(request, engines["django"].from_string("{{ by }}"), {"by": Bad()})


def none(request: Any) -> None:
    return None


VIEWS: list[Any] = [
    synchronous, asynchronous, failing, missing, template, async_template, bad_template, none,
]  # fmt: skip
urlpatterns = [path(f"{view.__name__}/", view) for view in VIEWS]


def bad_handler(request: Any) -> HttpResponse:
    note("handler500")
    raise ValueError("handler500")


def told(sender: Any, **kwargs: Any) -> None:
    trace.append("got_request_exception")


def named(kinds: tuple[Any, ...]) -> list[str]:
    return [
        kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        for kind in kinds
    ]


async def outcome(app: Any, url: str) -> tuple[Any, ...]:
    trace.clear()
    try:
        answered = await ask(app, url)
    except Exception as exc:  # what goes to the server
        return type(exc), str(exc), None, list(trace)
    return answered.status, answered.body, sorted(answered.headers), list(trace)


def without_place(outcome: tuple[Any, ...]) -> tuple[Any, ...]:
    *rest, steps = outcome
    return *rest, [
        step.partition(" (")[0].replace(", async", "").replace(", sync", "") for step in steps
    ]


PAIRS = [*itertools.product(KINDS, repeat=1), *itertools.permutations(KINDS, 2)]
MIXED = [
    (OWN[0], a, OWN[1], b, c)
    for a, b, c in itertools.islice(itertools.permutations(KINDS, 3), 0, None, 37)
]


@pytest.fixture(autouse=True)
def _project(settings: Any) -> Iterator[None]:
    settings.ROOT_URLCONF = __name__
    settings.DEBUG = False
    settings.LOGGING_CONFIG = None  # each handler that is made would configure it again
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


async def compared(settings: Any, kinds: tuple[Any, ...], same: Callable[..., Any]) -> list[str]:
    settings.MIDDLEWARE = named(kinds)
    theirs, mine = djangos(), ours()
    differences = []
    for view in VIEWS:
        url = f"/{view.__name__}/"
        expected, found = await outcome(theirs, url), await outcome(mine, url)
        if same(expected) != same(found):
            differences.append(f"{settings.MIDDLEWARE} {url}:\n  {expected}\n  {found}")
    return differences


both_sets = pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(PAIRS, id="alone and in pairs", marks=pytest.mark.slow),
        pytest.param(MIXED, id="among Django's own"),
    ],
)


@both_sets
async def test_other_peoples_middleware_keeps_djangos_rules(settings: Any, kinds: Any) -> None:
    """The same answers and the same steps, in the same order, each in the same place."""
    settings.ASYNCORM = {}
    differences = []
    for each in kinds:
        differences += await compared(settings, each, lambda outcome: outcome)
    assert not differences, "\n".join([str(len(differences)), *differences[:8]])


@both_sets
async def test_middleware_that_is_named_does_the_same_on_the_loop(
    settings: Any, kinds: Any
) -> None:
    settings.ASYNCORM = {"NATIVE_MIDDLEWARE": named(tuple(KINDS)), "NATIVE_VIEWS": [__name__]}
    differences = []
    for each in kinds:
        differences += await compared(settings, each, without_place)
        assert not [step for step in trace if "thread" in step]
    assert not differences, "\n".join([str(len(differences)), *differences[:8]])


async def test_a_view_of_errors_that_fails_itself(settings: Any, monkeypatch: Any) -> None:
    """It is called again for each middleware around, as often as by Django."""
    monkeypatch.setitem(globals(), "handler500", bad_handler)
    # Django's handler does not close the body of a request that fails so.
    memory = SimpleNamespace(SpooledTemporaryFile=lambda **options: BytesIO())
    monkeypatch.setattr("django.core.handlers.asgi.tempfile", memory)
    got_request_exception.connect(told)
    try:
        for kinds in ((), (function,), (coroutine,), (Hooks, function), *MIXED[:2]):
            for names in ([], named(tuple(KINDS))):
                settings.ASYNCORM = {"NATIVE_MIDDLEWARE": names}
                differences = await compared(settings, kinds, without_place)
                assert not differences, "\n".join(differences)
                assert "handler500" in str(trace) or kinds
    finally:
        got_request_exception.disconnect(told)
