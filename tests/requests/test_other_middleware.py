"""Middleware of other people, named in NATIVE_MIDDLEWARE: it does its work, without a thread.

Each is skipped where its package is not installed.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application as djangos
from django.http import HttpResponse
from django.urls import path

from asyncorm.asgi import get_asgi_application, native_view
from tests.asgi_client import Answer, ask
from tests.support import all_given_back, watched_threads

pytestmark = pytest.mark.django_db(transaction=True)


async def asynchronous(request: Any) -> HttpResponse:
    return HttpResponse(f"<html><body>{await User.objects.acount()}</body></html>")


@native_view
def synchronous(request: Any) -> HttpResponse:
    return HttpResponse(f"<html><body>{User.objects.count()}</body></html>")


urlpatterns = [path("asynchronous/", asynchronous), path("synchronous/", synchronous)]


class Other(NamedTuple):
    middleware: list[str]
    settings: dict[str, Any]
    does: Callable[[Answer], Any]
    apps: list[str] = []
    headers: dict[str, str] = {}

    @property
    def package(self) -> str:
        return self.middleware[0].partition(".")[0]


def header(name: str, value: str) -> Callable[[Answer], bool]:
    return lambda answer: any(
        key.decode().lower() == name and value in each.decode() for key, each in answer.headers
    )


OTHERS = [
    Other(
        ["corsheaders.middleware.CorsMiddleware"],
        {"CORS_ALLOWED_ORIGINS": ["https://shop.test"]},
        header("access-control-allow-origin", "https://shop.test"),
        headers={"origin": "https://shop.test"},
    ),
    Other(
        ["whitenoise.middleware.WhiteNoiseMiddleware"],
        {"WHITENOISE_AUTOREFRESH": False, "STATIC_ROOT": None},
        lambda answer: "<html>" in answer.body,
    ),
    Other(
        ["csp.middleware.CSPMiddleware"],
        {"CONTENT_SECURITY_POLICY": {"DIRECTIVES": {"default-src": ["'self'"]}}},
        header("content-security-policy", "default-src 'self'"),
    ),
    Other(
        [
            "django_prometheus.middleware.PrometheusBeforeMiddleware",
            "django_prometheus.middleware.PrometheusAfterMiddleware",
        ],
        {},
        lambda answer: counted() > 0,
    ),
    Other(
        ["allauth.account.middleware.AccountMiddleware"],
        {},
        lambda answer: "<html>" in answer.body,
        ["allauth", "allauth.account"],
    ),
    Other(
        ["simple_history.middleware.HistoryRequestMiddleware"],
        {},
        lambda answer: "<html>" in answer.body,
    ),
    Other(
        ["axes.middleware.AxesMiddleware"],
        {"AXES_ENABLED": True},
        lambda answer: "<html>" in answer.body,
        ["axes"],
    ),
    Other(
        ["debug_toolbar.middleware.DebugToolbarMiddleware"],
        {"DEBUG_TOOLBAR_CONFIG": {"SHOW_TOOLBAR_CALLBACK": lambda request: False}},
        lambda answer: "<html>" in answer.body,
        ["debug_toolbar"],
    ),
]


def counted() -> float:
    from prometheus_client import REGISTRY

    name = "django_http_responses_total_by_status_total"
    return REGISTRY.get_sample_value(name, {"status": "200"}) or 0


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.package)
@pytest.mark.parametrize("view", ["asynchronous", "synchronous"])
async def test_named(other: Other, view: str, settings: Any) -> None:
    if importlib.util.find_spec(other.package) is None:
        pytest.skip(f"{other.package} is not installed")
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = [
        "django.middleware.security.SecurityMiddleware",
        *other.middleware[:1],
        *settings.MIDDLEWARE,
        *other.middleware[1:],
    ]
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, *other.apps]
    for name, value in other.settings.items():
        setattr(settings, name, value)
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_MIDDLEWARE": other.middleware}
    expected = await ask(djangos(), f"/{view}/", **other.headers)
    app = get_asgi_application()
    await ask(app, f"/{view}/", **other.headers)
    with watched_threads() as threads:
        found = await ask(app, f"/{view}/", **other.headers)
    assert (found.status, found.body) == (expected.status, expected.body)
    assert {key for key, _ in found.headers} == {key for key, _ in expected.headers}
    assert found.status == 200 and other.does(found)
    assert threads == []
    await all_given_back()
