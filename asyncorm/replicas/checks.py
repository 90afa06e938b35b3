"""Checks a ReplicaRouter: its aliases, and that the middleware is where it belongs."""

from __future__ import annotations

from collections.abc import Iterator

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections

from .. import conf
from .._sessions import engines
from .router import ReplicaRouter, routers

_MIDDLEWARE = "asyncorm.replicas.ReplicaMiddleware"
_SESSIONS = "django.contrib.sessions.middleware.SessionMiddleware"


def check() -> list[CheckMessage]:
    """asyncorm.E006, W044 and W045."""
    if conf.problems():
        return []
    found = [message for each in routers() for message in _check_aliases(each)]
    if message := _check_middleware():
        found.append(message)
    return found


def _check_aliases(router: ReplicaRouter) -> Iterator[CheckMessage]:
    for alias in (router.primary, *router.replicas):
        if alias not in connections.settings or engines.native_class(alias) is None:
            yield Error(
                f"ReplicaRouter names {alias!r}, which is no database in DATABASES with an ENGINE "
                "of asyncorm.",
                id="asyncorm.E006",
            )
        elif alias != router.primary:
            database = connections.settings[alias]
            host = database["HOST"] or database["OPTIONS"].get("host") or ""
            if "," in str(host):
                yield Warning(
                    f"DATABASES[{alias!r}] is a replica and names several hosts: it is asked on "
                    "one of them how far it is, and may be read on another.",
                    hint="Give each host an alias of its own in ReplicaRouter's replicas.",
                    id="asyncorm.W045",
                )


def _check_middleware() -> CheckMessage | None:
    middleware = list(settings.MIDDLEWARE or ())
    if not routers():
        if _MIDDLEWARE not in middleware:
            return None
        problem, hint = "does nothing.", "Put a ReplicaRouter into DATABASE_ROUTERS."
    elif conf.get("REPLICA_POSITION") == "session":
        at = middleware.index(_SESSIONS) + 1 if _SESSIONS in middleware else None
        if at is not None and middleware[at : at + 1] == [_MIDDLEWARE]:
            return None
        problem = "is not where it can keep positions in the session."
        hint = "Put it into MIDDLEWARE right behind SessionMiddleware."
    elif middleware[:1] == [_MIDDLEWARE]:
        return None
    else:
        problem = "is not first in MIDDLEWARE: a client's next request may miss what it wrote."
        hint = "Put it there; or use replicas.after() and position() where no client is concerned."
    return Warning(f"{_MIDDLEWARE} {problem}", hint=hint, id="asyncorm.W044")
