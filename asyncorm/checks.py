"""System checks: what can be seen to be wrong at start-up."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections

from . import conf, internals, pools, sizing
from ._cache.parts import unknown_attributes
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
    found: list[CheckMessage] = []
    for alias in connections:
        database = connections.settings[alias]
        options = database["OPTIONS"]
        host = str(database["HOST"] or options.get("host") or "")
        if engines.native_class(alias) is None or "," not in host:
            continue
        missing = [] if "connect_timeout" in options else ["connect_timeout"]
        if not any(name in options for name in _DEADLINES):
            missing.append("tcp_user_timeout")
        if missing:
            found.append(
                Warning(
                    f"DATABASES[{alias!r}] names several hosts, but not how long one that does "
                    f"not answer is waited for: OPTIONS has no {' and no '.join(missing)}.",
                    hint=(
                        'For instance "connect_timeout": 3 (seconds for each host, 2 at least) and '
                        '"tcp_user_timeout": 5000 (milliseconds); see docs/distributed.md.'
                    ),
                    id="asyncorm.W030",
                )
            )
    return found


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
    """asyncorm.E002 to E004, W001 and W002: DATABASES."""
    found: list[CheckMessage] = []
    ours = [alias for alias in connections if engines.native_class(alias) is not None]
    if not ours:
        found.append(
            Warning(
                "asyncorm is installed, but no database can run natively.",
                hint=(
                    "Set ENGINE to 'asyncorm.backends.postgresql' for a PostgreSQL database in "
                    "DATABASES."
                ),
                id="asyncorm.W001",
            )
        )
    for alias in ours:
        found += _check_database(alias, connections.settings[alias])
    return found


def _check_database(alias: str, database: dict[str, Any]) -> list[CheckMessage]:
    found: list[CheckMessage] = []
    if not database["AUTOCOMMIT"]:
        found.append(
            Error(
                f"DATABASES[{alias!r}]['AUTOCOMMIT'] is False, which native code does not support.",
                hint="Remove it and use asyncorm.atomic() for transactions.",
                id="asyncorm.E002",
            )
        )
    option = database["OPTIONS"].get("pool")
    if option not in (None, True, False) and not isinstance(option, dict):
        return [
            *found,
            Error(
                f"DATABASES[{alias!r}]['OPTIONS']['pool'] must be True or a dict.",
                id="asyncorm.E003",
            ),
        ]
    options = pools.pool_options(database)
    if not 0 <= options["min_size"] <= options["max_size"] or options["max_size"] < 1:
        found.append(
            Error(
                f"DATABASES[{alias!r}]['OPTIONS']['pool'] has min_size {options['min_size']} and "
                f"max_size {options['max_size']}.",
                hint=(
                    "min_size must not be negative nor above max_size; max_size must be at least 1."
                ),
                id="asyncorm.E004",
            )
        )
    elif option and 2 * options["max_size"] > MANY_CONNECTIONS:
        found.append(
            Warning(
                f"DATABASES[{alias!r}] may open {options['max_size']} native connections and as "
                "many synchronous ones in each process.",
                hint=(
                    "The two pools are separate; make sure that all processes together stay "
                    "below the server's max_connections."
                ),
                id="asyncorm.W002",
            )
        )
    return found


def check_server(databases: Sequence[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """asyncorm.W043: pools that the server has no room for (`manage.py check --database default`).

    Without `--database`, and before migrations, no check may connect.
    """
    workers = _workers()
    return [
        Warning(
            f"DATABASES[{demand.alias!r}] may open {workers * demand.each} connections "
            f"({workers} x {demand.each}, native and synchronous), and the server has room for "
            f"{server.room}.",
            hint="Lower OPTIONS['pool']['max_size'], or raise the server's "
            "max_connections. WEB_CONCURRENCY is taken for the number of processes.",
            id="asyncorm.W043",
        )
        for server in sizing.ask(databases or ())
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
    found: list[CheckMessage] = []
    seen: set[Any] = set()
    for model in apps.get_models():
        classes: list[type] = list(model.__mro__)
        for manager in model._meta.managers:
            # Not get_queryset(), which is the project's code and may fail or query.
            queryset: Any = getattr(manager, "_queryset_class", object)
            classes += [*type(manager).__mro__, *queryset.__mro__]
        for cls in classes:
            if cls in seen or cls.__module__.startswith(("django.", "asyncorm.", "builtins")):
                continue
            seen.add(cls)
            for name, method in vars(cls).items():
                if (
                    inspect.iscoroutinefunction(method)
                    and "sync_to_async" in method.__code__.co_names
                ):
                    found.append(
                        Warning(
                            f"{cls.__module__}.{cls.__qualname__}.{name}() uses sync_to_async, "
                            "so it stays in a thread although "
                            "ASYNCORM['SWAP_MANAGERS'] is on.",
                            hint="Use asyncorm.native() in it, or await Django's a* methods.",
                            obj=model,
                            id="asyncorm.W003",
                        )
                    )
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
