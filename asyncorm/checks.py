"""System checks: what can be seen to be wrong at start-up."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections
from django.db.models import Model

from . import conf, internals, sizing
from ._cache.parts import unknown_attributes
from ._pool import options
from ._sessions import engines

_SILK = "silk.middleware.SilkyMiddleware"


def check_tools(**kwargs: Any) -> list[CheckMessage]:
    """asyncorm.W032: a tool that sees no native query as it is set up."""
    if _SILK not in (settings.MIDDLEWARE or ()):
        return []
    return [
        Warning(
            f"{_SILK} sees no native query.",
            hint="Put 'asyncorm.observe.silk.SilkyMiddleware' in its place in MIDDLEWARE.",
            id="asyncorm.W032",
        )
    ]


MANY_CONNECTIONS = (
    50  # native and synchronous pools of one process; PostgreSQL's default max_connections is 100
)


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """asyncorm.E001: the ASYNCORM setting."""
    return [Error(text, id="asyncorm.E001") for text in conf.problems()]


# What bounds how long a server that does not answer is waited for. connect_timeout alone is not
# enough: it ends with the connection being made.
_DEADLINES = ("tcp_user_timeout", "keepalives_idle", "keepalives_interval", "keepalives_count")


def check_deadlines(**kwargs: Any) -> list[CheckMessage]:
    """asyncorm.W030: several hosts, and nothing that ends the wait for one that hangs."""
    return [
        Warning(
            f"DATABASES[{alias!r}] names several hosts, but not how long one that does "
            f"not answer is waited for: OPTIONS has no {' and no '.join(missing)}.",
            hint='For instance "connect_timeout": 3 (seconds for each host, 2 at least) and '
            '"tcp_user_timeout": 5000 (milliseconds); see docs/distributed.md.',
            id="asyncorm.W030",
        )
        for alias in connections
        if engines.native_class(alias) is not None and (missing := _without_deadline(alias))
    ]


def _without_deadline(alias: str) -> list[str]:
    """What an alias of several hosts has no limit for."""
    database = connections.settings[alias]
    options = database["OPTIONS"]
    if "," not in str(database["HOST"] or options.get("host") or ""):
        return []
    missing = [] if "connect_timeout" in options else ["connect_timeout"]
    return missing if any(map(options.__contains__, _DEADLINES)) else [*missing, "tcp_user_timeout"]


def check_installed(**kwargs: Any) -> list[CheckMessage]:
    """asyncorm.W040: the backend without the app (registered by the backend)."""
    if apps.is_installed("asyncorm"):
        return []
    return [
        Warning(
            'A database has an ENGINE of asyncorm, but "asyncorm" is not in INSTALLED_APPS: '
            "nothing runs natively, and the ASYNCORM setting has no effect.",
            hint='Put "asyncorm" first in INSTALLED_APPS.',
            id="asyncorm.W040",
        )
    ]


def check_databases(**kwargs: Any) -> list[CheckMessage]:
    """asyncorm.E002 to E004, E007, W001 and W002: DATABASES."""
    ours = [alias for alias in connections if engines.native_class(alias) is not None]
    if ours:
        return [each for alias in ours for each in _check_database(alias)]
    return [
        Warning(
            "asyncorm is installed, but no database can run natively.",
            hint="Set ENGINE to 'asyncorm.backends.postgresql' for a PostgreSQL database in "
            "DATABASES.",
            id="asyncorm.W001",
        )
    ]


def _check_database(alias: str) -> Iterator[CheckMessage]:
    database, name = connections.settings[alias], f"DATABASES[{alias!r}]"
    if not database["AUTOCOMMIT"]:
        yield Error(
            f"{name}['AUTOCOMMIT'] is False, which native code does not support.",
            hint="Remove it and use asyncorm.atomic() for transactions.",
            id="asyncorm.E002",
        )
    if wrong := list(options.problems(alias, database)):
        yield from wrong
        return
    most = options.pool_options(alias, database)["max_size"]
    if database["OPTIONS"].get("pool") and 2 * most > MANY_CONNECTIONS:
        yield Warning(
            f"{name} may open {most} native connections and as many synchronous ones in each "
            "process.",
            hint="The two pools are separate; make sure that all processes together stay below the "
            "server's max_connections.",
            id="asyncorm.W002",
        )


def check_server(databases: Sequence[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """asyncorm.W043: pools that the server has no room for (`manage.py check --database default`).

    Without `--database`, and before migrations, no check may connect.
    """
    workers = _workers()
    usable = [
        alias
        for alias in databases or ()
        if not any(options.problems(alias, connections.settings[alias]))
    ]
    return [
        Warning(
            f"DATABASES[{demand.alias!r}] may open {workers * demand.each} connections "
            f"({workers} x {demand.each}, native and synchronous), and the server has room for "
            f"{server.room}.",
            hint="Lower OPTIONS['pool']['max_size'], or raise the server's "
            "max_connections. WEB_CONCURRENCY is taken for the number of processes.",
            id="asyncorm.W043",
        )
        for server in sizing.ask(usable)
        for demand in server.demands
        if server.most and workers * demand.each > server.room
    ]


def _workers() -> int:
    """How many processes serve, as far as the environment tells (gunicorn, uvicorn)."""
    number = os.environ.get("WEB_CONCURRENCY", "")
    return int(number) if number.isdecimal() and int(number) else 1


def check_swap(**kwargs: Any) -> list[CheckMessage]:
    """asyncorm.W003: a* methods that the swap cannot make native."""
    if conf.problems() or not conf.get("SWAP_MANAGERS"):
        return []
    return [
        Warning(
            f"{cls.__module__}.{cls.__qualname__}.{name}() uses sync_to_async, so it stays in a "
            "thread although ASYNCORM['SWAP_MANAGERS'] is on.",
            hint="Use asyncorm.native() in it, or await Django's a* methods.",
            obj=model,
            id="asyncorm.W003",
        )
        for cls, model in _classes_of_projects().items()
        for name, method in vars(cls).items()
        if inspect.iscoroutinefunction(method) and "sync_to_async" in method.__code__.co_names
    ]


def _classes_of_projects() -> dict[type, type[Model]]:
    """The classes of models, managers and querysets that are not Django's, each with a model."""
    found: dict[type, type[Model]] = {}
    for model in apps.get_models():
        classes: list[type] = list(model.__mro__)
        for manager in model._meta.managers:
            # Not get_queryset(), which is the project's code and may fail or query.
            queryset: Any = getattr(manager, "_queryset_class", object)
            classes += [*type(manager).__mro__, *queryset.__mro__]
        for cls in classes:
            if not cls.__module__.startswith(("django.", "asyncorm.", "builtins")):
                found.setdefault(cls, model)
    return found


def check_internals(**kwargs: Any) -> list[CheckMessage]:
    """asyncorm.W010 and W011: undocumented names that the installed versions do not have."""
    found: list[CheckMessage] = [
        Warning(
            f"ASYNCORM[{part!r}] is switched off: {'; '.join(map(str, names))}.",
            hint="Everything else works; a release of asyncorm for these versions has it again.",
            id="asyncorm.W010",
        )
        for part, names in internals.lost().items()
    ]
    if unknown := unknown_attributes():
        found.append(
            Warning(
                f"This Django's Query has {', '.join(unknown)}, which asyncorm does not know: the "
                "statement cache leaves every statement to Django's compiler.",
                hint="A release of asyncorm for this Django has looked at it.",
                id="asyncorm.W011",
            )
        )
    return found


def check_requests(**kwargs: Any) -> list[CheckMessage]:
    """asyncorm.E005, W004, W041, W042 and I001 to I003: middleware, views and the handler."""
    if conf.problems():
        return []
    from ._requests import checks

    if found := checks.check_names():
        return found
    return [
        *checks.check_thread_locals(),
        *checks.check_admin(),
        *checks.check_handler(),
        *checks.check_middleware(),
        *checks.check_toolbar(),
    ]
