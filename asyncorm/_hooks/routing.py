"""A router that was asked ahead of Django is not asked again by it.

To know which way a call goes its alias has to be known, and Django asks for that itself later. A
router may take turns, or count: it has to be asked as often as on Django's own backend.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable
from contextvars import ContextVar
from operator import is_
from typing import Any, TypeVar

from django.db import router
from django.db.utils import ConnectionRouter

from .. import elsewhere, patches

_Value = TypeVar("_Value")
# What was asked and answered: emptied by who asks the same, in whichever copy of the context, or
# when the call for which it was asked is done: what a router says may be another thing then.
_kept: ContextVar[Any] = ContextVar("asyncorm_routed", default=())


def keep(alias: str, action: str, model: Any, hints: dict[str, Any]) -> None:
    """Let an answer of the router's be the answer to who asks the same next.

    ReplicaRouter is asked again: it may have to choose another one if this one is gone.
    """
    if router.routers and not elsewhere.routers():
        _replace()
        _kept.set([alias, router.routers, action, model, *hints, *hints.values()])


def forget() -> None:
    """Drop an answer that nobody has asked for."""
    if kept := _kept.get():
        kept.clear()


async def once(call: Awaitable[_Value]) -> _Value:
    """Await a call that the router was asked for."""
    try:
        return await call
    finally:
        forget()


def keep_of(queryset: Any, alias: str) -> None:
    """The same of a queryset's `db`."""
    if queryset._db is None:
        action = "db_for_write" if queryset._for_write else "db_for_read"
        keep(alias, action, queryset.model, queryset._hints)


def ask(action: str, model: Any, **hints: Any) -> str:
    """Ask the router, ahead of Django."""
    alias: str = getattr(router, action)(model, **hints)
    keep(alias, action, model, hints)
    return alias


@functools.cache
def _replace() -> None:
    """Only in a process with routers: others pay nothing."""
    for action in ("db_for_read", "db_for_write"):
        by = _answered(action)
        patches.replace(ConnectionRouter, action, by, "a router is asked once for what it chooses")


def _answered(action: str) -> Any:
    original = getattr(ConnectionRouter, action)

    @functools.wraps(original)
    def answered(self: Any, model: Any, **hints: Any) -> Any:
        kept = _kept.get()
        if kept:
            asked = [self.routers, action, model, *hints, *hints.values()]
            if len(kept) == len(asked) + 1 and all(map(is_, kept[1:], asked)):
                alias = kept[0]
                kept.clear()
                return alias
        return original(self, model, **hints)

    return answered
