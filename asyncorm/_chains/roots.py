"""Where recording begins: querysets that are made on an event loop's thread."""

from __future__ import annotations

import functools
from asyncio.events import _get_running_loop
from typing import Any

from django.db import connections
from django.db.models import QuerySet
from django.db.models.signals import class_prepared

from .. import conf, grounds, patches, verifying
from .._sessions import engines
from . import nodes, twins
from .recorded import new

_is_on = False  # follows the settings (planned.py)


def _init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(
        self: Any, model: Any = None, query: Any = None, using: Any = None, hints: Any = None
    ) -> None:
        if (
            query is None
            and _is_on
            and _get_running_loop() is not None
            and model is not None
            and grounds.are_sound()  # or somebody's code would be called later than it should
        ):
            query = new(model)
        original(self, model, query, using, hints)

    return __init__


def follow_settings() -> None:
    """Record or not, as the settings now say."""
    global _is_on
    _is_on = bool(
        conf.get("RECORD_QUERYSETS")
        and conf.get("STATEMENT_CACHE")
        and any(map(engines.native_class, connections.settings))
    )
    twins.follow(verifying.active)


def install() -> None:
    """Put the replacement in place."""
    why = "what is done to a queryset in native code is recorded"
    patches.replace(QuerySet, "__init__", _init(QuerySet.__init__), why)
    class_prepared.connect(_forget, dispatch_uid="asyncorm.chains")


def _forget(**kwargs: Any) -> None:
    nodes.clear()
