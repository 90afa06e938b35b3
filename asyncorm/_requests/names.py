"""What is wrong with the names in NATIVE_MIDDLEWARE and NATIVE_VIEWS (for check and start-up)."""

from __future__ import annotations

from collections.abc import Iterator

from django.conf import settings
from django.utils.module_loading import import_string

from .. import conf
from . import middleware, views


def problems() -> list[str]:
    """The names that do not stand for what they should, in words for the user."""
    found = []
    for key, problem in (
        ("NATIVE_MIDDLEWARE", middleware.problem),
        ("NATIVE_VIEWS", views.problem),
    ):
        names = conf.get(key)
        for name in names if isinstance(names, list | tuple) else ():
            if text := problem(name):
                found.append(f'ASYNCORM["{key}"]: {name!r} {text}.')
    return found


def missing() -> Iterator[str]:
    """The entries of MIDDLEWARE that cannot be imported: each handler says so of the first, when
    it starts."""
    for path in settings.MIDDLEWARE:
        try:
            import_string(path)
        except ImportError as exc:
            yield f"MIDDLEWARE: {path!r} cannot be imported ({exc})."
