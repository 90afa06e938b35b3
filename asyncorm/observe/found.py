"""Tools that are set up already are found: they see native queries without a line of ours.

Who replaces methods of Django's cursors is to see each statement, so that all are executed there;
but for those that are known and told otherwise (Sentry), which see them at production's speed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from types import FunctionType
from typing import Any

import django
import psycopg
from django.apps import apps
from django.db.backends import utils
from django.db.backends.postgresql.base import Cursor, DatabaseWrapper

_ORIGINAL = os.path.dirname(django.__file__), os.path.dirname(psycopg.__file__)
_of_outer = attrgetter("__init__", "execute", "executemany", "_execute", "_execute_with_wrappers")
_of_wrapper = attrgetter("cursor", "_cursor", "make_cursor", "create_cursor", "ensure_connection")
_of_inner = attrgetter("execute", "executemany")
_functions: tuple[Any, ...] = ()
_patched = False


def cursors_are_patched() -> bool:
    """Whether somebody whom nobody else tells of statements has put functions in the place of those
    of Django's cursors, or of what connects for them.

    Tools that record queries do, and tests, pytest-django's among them: they are to see each of
    them.
    """
    global _functions, _patched
    # Another class may be there.
    now = (*_of_outer(utils.CursorWrapper), *_of_wrapper(DatabaseWrapper), *_of_inner(Cursor))
    if now != _functions:
        known = list(map(_is_known, now))
        _patched = not all(known) or not _follow_sentry("sentry" in known)
        _functions = now
    return _patched


def _is_known(function: object) -> str | None:
    """Whose function it is, "django" or "sentry" around Django's; None if that is not known."""
    owner = "django"
    while type(function) is FunctionType:
        name = function.__code__.co_filename
        if name.startswith(_ORIGINAL):
            return owner
        package = sys.modules.get("sentry_sdk")
        if package is None or not name.startswith(os.path.dirname(str(package.__file__))):
            return None
        owner = "sentry"
        function = getattr(function, "__wrapped__", None)
    return None


def _follow_sentry(there: bool) -> bool:
    """Have Sentry told of statements without a cursor, or no more; False if that cannot be done."""
    if not there and "asyncorm.observe.sentry" not in sys.modules:
        return True
    try:
        sentry: Any = import_module("asyncorm.observe.sentry")
    except ImportError:  # another version of it
        return False
    if there:
        return bool(sentry.follow())
    sentry.unfollow()
    return True


def find() -> None:
    """Set up what is found when the project starts: Datadog, New Relic and django-prometheus."""
    if getattr(psycopg, "_datadog_patch", False) or _datadog_wraps_cursors():
        _try("datadog", lambda module: module.install())
    if "newrelic.core.trace_cache" in sys.modules:
        _try("newrelic", lambda module: module.install())
    if apps.is_installed("django_prometheus"):
        _try("prometheus", lambda module: module.install())


def _datadog_wraps_cursors() -> bool:
    """Whether ddtrace has patched Django, and is to wrap its cursors once all apps are ready."""
    config: Any = getattr(sys.modules.get("ddtrace"), "config", None)
    of_django = getattr(config, "django", {})
    return bool(getattr(django, "_datadog_patch", False) and of_django.get("instrument_databases"))


def _try(name: str, install: Callable[[Any], None]) -> None:
    try:
        module = import_module(f"asyncorm.observe.{name}")
    except ImportError:  # a version of the tool's that is not known
        return
    install(module)
