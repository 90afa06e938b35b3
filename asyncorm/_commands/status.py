"""`manage.py asyncorm status`: what is in force, read from settings and modules alone.

It connects to no database, so it works where that is the trouble.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
from django.conf import settings
from django.core import checks
from django.db import connections

from .. import __version__, conf, internals, patches, pools
from .._cache.parts import unknown_attributes
from .._pool.options import problems
from .._requests import checks as request_checks
from .._requests import middleware
from .._sessions import engines
from ..backends.cursors import cursors_are_patched

_PACKAGES = ("Django", "psycopg", "psycopg-pool", "asgiref", "greenlet", "anyio", "uvloop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take none: all of it is printed."""


def run(options: dict[str, Any], write: Callable[[str], Any]) -> None:
    """Print the sections, one after the other."""
    for title, lines in (
        ("Versions", _versions()),
        ("Settings: ASYNCORM", _settings()),
        ("Databases, and the connections to expect from each process", _databases()),
        ("Requests", _requests()),
        ("Off, and why", _off()),
        ("Checks", _checks()),
        ("Replaced, of Django and others", _replaced()),
    ):
        write(title)
        for line in list(lines) or ["nothing"]:
            write(f"  {line}")
        write("")


def _versions() -> Iterator[str]:
    yield f"asyncorm {__version__}, Python {platform.python_version()}"
    for package in _PACKAGES:
        version = internals.installed(package)
        if version != internals.UNKNOWN:
            bounds = internals.TESTED.get(package)
            yield f"{package} {version}" + (f" (tested with {bounds})" if bounds else "")
    libpq = psycopg.pq.version()
    yield f"libpq {libpq // 10000}.{libpq % 10000}, psycopg's {psycopg.pq.__impl__} implementation"


def _settings() -> Iterator[str]:
    own = getattr(settings, "ASYNCORM", None) or {}
    width = max(map(len, conf.DEFAULTS))
    for name in conf.DEFAULTS:
        yield f"{name:{width}} {conf.get(name)!r}" + ("" if name in own else " (default)")


def _databases() -> Iterator[str]:
    for alias in connections:
        database = connections.settings[alias]
        engine = database["ENGINE"]
        if engines.native_class(alias) is None:
            yield f"{alias}: {engine}, not native"
            continue
        if any(problems(alias, database)):
            yield f"{alias}: {engine}; its pool cannot be made: see the checks below"
            continue
        size = pools.pool_options(alias, database)["max_size"]
        plain = f"up to {size}" if database["OPTIONS"].get("pool") else "one for each thread"
        yield (
            f"{alias}: {engine}; native: up to {size} for each event loop (a worker of a server "
            f"has one); synchronous, of Django: {plain}"
        )


def _requests() -> Iterator[str]:
    path, whose = request_checks.served_by()
    if whose != request_checks.OURS:
        if whose:
            kind = "Django's own handler; synchronous middleware and views hop to threads"
        else:
            kind = "no handler is found there: name the application in ASGI_APPLICATION"
        yield f"{path}: {kind}"
        return
    yield f"{path}: asyncorm's handler"
    for each in settings.MIDDLEWARE:
        try:
            native = middleware.is_own(each) or middleware.is_named(each)
        except ImportError as exc:
            yield f"  {each}: cannot be imported ({exc})"
            continue
        yield f"  {each}: {'on the event loop' if native else 'in a thread'}"


def _off() -> Iterator[str]:
    lost = internals.lost()
    for part, names in lost.items():
        yield f"{part}: {'; '.join(map(str, names))}"
    for part in (internals.CACHE, internals.PREFETCH, "MULTIPLEXING"):
        if part not in lost and not conf.get(part):
            yield f"{part}: ASYNCORM says so"
    if unknown := unknown_attributes():
        yield f"{internals.CACHE}: this Django's Query has {', '.join(unknown)}"
    if cursors_are_patched():
        yield (
            "The way around Django's cursors: somebody has replaced methods of CursorWrapper, and "
            "is to see each query"
        )
    for alias in connections:
        cls: Any = engines.native_class(alias)
        if cls is not None and cls.acts_in_cursors:
            yield f"a* methods of {alias!r} outside blocks: the backend has cursors of its own"


def _checks() -> Iterator[str]:
    for message in checks.run_checks(tags=["asyncorm"]):
        hint = f" {message.hint}" if message.hint else ""
        yield f"{message.id}: {message.msg}{hint}"


def _replaced() -> Iterator[str]:
    for patch in patches.all_patches():
        since = "" if patch.in_force else " (replaced again since, by others)"
        yield f"{patch}: {patch.why}; by {patch.new}{since}"
