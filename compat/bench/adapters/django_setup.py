"""Django's settings for its contestants."""

from __future__ import annotations

from typing import Any

from .base import POOL


def setup(settings: dict[str, Any], options: dict[str, Any], *apps: str, **more: Any) -> None:
    """Configure Django: ENGINE, prepare_threshold and so on come from the contestant's options."""
    import django
    from django.conf import settings as django_settings

    database_options = {
        **settings.get("OPTIONS", {}),
        "prepare_threshold": options["prepare_threshold"],
    }
    if options.get("server_side_binding"):
        database_options["server_side_binding"] = True
    if options.get("pool", True):
        database_options["pool"] = {"min_size": POOL, "max_size": POOL}
    engine = options.get("engine", "django.db.backends.postgresql")
    django_settings.configure(
        DATABASES={"default": {**settings, "ENGINE": engine, "OPTIONS": database_options}},
        INSTALLED_APPS=[*apps, "compat.bench.shop"],
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        **more,
    )
    django.setup()
