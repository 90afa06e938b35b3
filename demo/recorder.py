"""Records which statement ran when, on which connection and in which thread."""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from asyncorm.timeline import Timeline

from .figures import Statement

P = ParamSpec("P")
T = TypeVar("T")

_TABLE = re.compile(r'(?:FROM|INTO|COPY) "demo_shop_(\w+)"')

_query: ContextVar[str] = ContextVar("query", default="")


def named(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Statements that `function` runs are recorded under its name and its arguments."""
    title = function.__name__.replace("_", " ")

    @wraps(function)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        token = _query.set(" ".join([title, *map(str, args)]))
        try:
            return await function(*args, **kwargs)
        finally:
            _query.reset(token)

    return run


class Recorder(Timeline):
    """The timeline that `asyncorm.timeline()` records, with names for what ran."""

    def begin(self) -> None:
        """Forget what was recorded, and start the clock; called in the event loop's thread."""
        super().begin()
        self.names: list[str] = []
        self.threads = {threading.get_ident()}

    def _add(self, *args: Any, **facts: Any) -> None:
        super()._add(*args, **facts)
        self.names.append(_query.get())
        self.threads.add(threading.get_ident())

    @property
    def statements(self) -> list[Statement]:
        return [
            Statement(name or _short(span.what), span.connection, span.began, span.ended)
            for name, span in zip(self.names, self.spans, strict=True)
            if not span.is_wait
        ]


def _short(sql: str) -> str:
    """A name for a statement that has none: "SELECT product"."""
    verb = sql.lstrip("( ").partition(" ")[0]
    found = _TABLE.search(sql)
    return verb if found is None else f"{verb} {found[1]}"
