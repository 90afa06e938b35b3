"""Tools that are set up already are found: they see native queries without a line of ours.

(Those that replace methods of Django's cursors, as Sentry does, are found by backends/cursors.py.)
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import django
import psycopg
from django.apps import apps


def find() -> None:
    """Set up what is found when the project starts.

    Datadog, New Relic, Elastic APM and django-prometheus.
    """
    if getattr(psycopg, "_datadog_patch", False) or _datadog_wraps_cursors():
        _install("datadog")
    if "newrelic.core.trace_cache" in sys.modules:
        _install("newrelic")
    if apps.is_installed("elasticapm.contrib.django"):
        _install("elastic")
    if apps.is_installed("django_prometheus"):
        _install("prometheus")


def _datadog_wraps_cursors() -> bool:
    """Whether ddtrace has patched Django, and is to wrap its cursors once all apps are ready."""
    config: Any = getattr(sys.modules.get("ddtrace"), "config", None)
    of_django = getattr(config, "django", {})
    return bool(getattr(django, "_datadog_patch", False) and of_django.get("instrument_databases"))


def _install(name: str) -> None:
    try:
        module = import_module(f"asyncorm.observe.{name}")
    except ImportError:  # a version of the tool's that is not known
        return
    module.install()
