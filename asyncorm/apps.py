"""The Django app: puts everything in place when the project starts."""

import sys
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core import checks as django_checks
from django.db import router

from . import bridge


class AsyncormConfig(AppConfig):
    """INSTALLED_APPS = ["asyncorm", ...]."""

    name = "asyncorm"
    verbose_name = "asyncorm"

    def ready(self) -> None:
        """Install the replacements and the native_* methods; the rest is up to the swap."""
        from . import checks, cursor_events, planned, querysets, related, seam, swap
        from ._requests import consumers, djangos
        from .observe import found

        cursor_events.install()
        seam.install()
        querysets.install()
        swap.install()
        planned.install()
        related.install()
        djangos.install()
        consumers.install()
        bridge.set_guard(None)
        found.find()
        for check in (
            checks.check_settings,
            checks.check_databases,
            checks.check_deadlines,
            checks.check_swap,
            checks.check_internals,
            checks.check_requests,
            checks.check_tools,
            check_replicas,
        ):
            django_checks.register(check, "asyncorm")
        # That tag alone: Django 6.1 names all databases to checks that are asked for by another.
        django_checks.register(checks.check_server, django_checks.Tags.database)


def check_replicas(**kwargs: Any) -> list[django_checks.CheckMessage]:
    """Those of asyncorm.replicas, if it is used."""
    by_middleware = any(path.startswith("asyncorm.replicas.") for path in settings.MIDDLEWARE or ())
    if not by_middleware and not (router.routers and "asyncorm.replicas" in sys.modules):
        return []
    from .replicas import checks

    return checks.check()
