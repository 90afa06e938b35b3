"""What is wrong with the names in NATIVE_MIDDLEWARE and NATIVE_VIEWS (for check and start-up)."""

from __future__ import annotations

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
