"""Channels' consumers: no thread for each message where there is nothing to close in it.

Before it hands a message to its consumer, Channels calls `close_old_connections()` in the thread of
sync_to_async(). Without a connection in any thread but the loop's own that does nothing, and is
left out; with databases of other engines, or somebody else's function, it is not known to.

Replaced: `sync_to_async` in channels.db.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from asgiref.sync import sync_to_async
from django.db import close_old_connections, connections

from .. import between, patches, swap
from .._sessions import engines


@functools.cache
def install() -> None:
    """Put the replacement in place, once, if there is Channels."""
    try:
        db: Any = import_module("channels.db")
    except ImportError:
        return
    if getattr(db, "sync_to_async", None) is sync_to_async:  # else it is a package of the project
        patches.replace(db, "sync_to_async", _dispatch, "a consumer's message needs no thread")


def _dispatch(func: Callable[..., Any], **options: Any) -> Any:
    if _is_no_op(func) or (func is close_old_connections and _does_nothing()):
        return _take_turns
    return sync_to_async(func, **options)


def _is_no_op(func: Callable[..., Any]) -> bool:
    """Whether it is what Channels' test clients put in the place of close_old_connections()."""
    return getattr(func, "__module__", "") == "channels.testing.application"


async def _take_turns() -> None:
    await asyncio.sleep(0)  # as the hop did


def _does_nothing() -> bool:
    """Whether `close_old_connections()` would find nothing to close in any thread."""
    return (
        not swap.has_foreign()
        and not between.other_threads_have()
        and all(_closes_as_django(engines.native_class(alias)) for alias in connections)
    )


@functools.cache
def _closes_as_django(cls: type) -> bool:
    return all(
        base.__module__.startswith(("django.", "asyncorm."))
        for base in cls.__mro__
        if "close_if_unusable_or_obsolete" in vars(base)
    )
