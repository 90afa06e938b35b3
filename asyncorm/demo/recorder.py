"""Records which statement ran when, on which connection and in which thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .figures import Statement

P = ParamSpec("P")
T = TypeVar("T")

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


class Recorder:
    """An execute_wrapper for Django's connection; both halves use the same one."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []
        self.threads: set[int] = set()
        self._began = 0.0

    def begin(self) -> None:
        """Forget what was recorded, and start the clock; called in the event loop's thread."""
        self.statements = []
        self.threads = {threading.get_ident()}
        self._began = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    def __call__(
        self, execute: Callable[..., T], sql: str, params: Any, many: bool, context: dict[str, Any]
    ) -> T:
        start = self.elapsed()
        try:
            return execute(sql, params, many, context)
        finally:
            end = self.elapsed()
            server = context["connection"].connection.info.backend_pid
            self.threads.add(threading.get_ident())
            self.statements.append(Statement(_query.get(), server, start, end))
