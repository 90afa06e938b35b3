"""Django settings of the two halves of the demo: the same database, with and without asyncorm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

POOL = {"min_size": 10, "max_size": 10}
DELAY = 0.002  # seconds of network, each way, where asyncorm is alone


@dataclass(frozen=True)
class Half:
    """One side of the comparison, and the settings in which it differs from the other."""

    key: str
    title: str
    engine: str
    handler: str  # the module whose get_asgi_application() asgi.py calls
    apps: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


DJANGO = Half("django", "Django's a* methods", "django.db.backends.postgresql", "django.core.asgi")
ASYNCORM = Half(
    "asyncorm",
    "asyncorm",
    "asyncorm.backends.postgresql",
    "asyncorm.asgi",
    apps=("asyncorm",),
    extra={"ASYNCORM": {"SWAP_MANAGERS": True}},
)
# As `startproject` makes it.
MIDDLEWARE = (
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
)
_CONTRIB = tuple(
    f"django.contrib.{app}" for app in ("auth", "contenttypes", "sessions", "messages")
)
HALVES = {half.key: half for half in (DJANGO, ASYNCORM)}


def configure(half: Half, database: dict[str, Any], *, pool: dict[str, int] | None) -> None:
    """Set Django up in this process; once only, as Django allows."""
    import django
    from django.conf import settings

    options = dict(database.get("OPTIONS", {}))
    if pool is not None:
        options["pool"] = pool
    settings.configure(
        DATABASES={"default": {**database, "ENGINE": half.engine, "OPTIONS": options}},
        INSTALLED_APPS=[*half.apps, *_CONTRIB, "demo.shop"],
        MIDDLEWARE=[*MIDDLEWARE],
        ROOT_URLCONF="demo.requests",
        ASGI_MODULE=half.handler,
        ALLOWED_HOSTS=["localhost"],
        SECRET_KEY="only for the demo",
        USE_TZ=True,
        TIME_ZONE="UTC",
        **half.extra,
    )
    django.setup()
