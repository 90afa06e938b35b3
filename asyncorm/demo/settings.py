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
    apps: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


DJANGO = Half("django", "Django's a* methods", "django.db.backends.postgresql")
ASYNCORM = Half(
    "asyncorm",
    "asyncorm",
    "asyncorm.backends.postgresql",
    apps=("asyncorm",),
    extra={"ASYNCORM": {"SWAP_MANAGERS": True}},
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
        INSTALLED_APPS=[*half.apps, "asyncorm.demo.shop"],
        USE_TZ=True,
        TIME_ZONE="UTC",
        **half.extra,
    )
    django.setup()
