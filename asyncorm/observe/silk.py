"""django-silk: native queries of a request, beside the synchronous ones that silk sees itself.

In MIDDLEWARE `asyncorm.observe.silk.SilkyMiddleware` takes the place of silk's own.

silk replaces `SQLCompiler.execute_sql` and keeps a request in a `threading.local`: in the thread of
its middleware, where native code does not run. It stays in that thread:
ASYNCORM["NATIVE_MIDDLEWARE"] must not name it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from time import monotonic, time
from typing import Any

from django.http import HttpRequest, HttpResponseBase
from silk import middleware
from silk.collector import DataCollector
from silk.config import SilkyConfig

from .. import _events

_seen: ContextVar[list[dict[str, Any]] | None] = ContextVar("asyncorm_silk", default=None)


class _Queries(_events.Listener):
    def statement_ended(self, statement: _events.Statement) -> None:
        """Keep a query for the middleware's thread."""
        if not statement.native or (seen := _seen.get()) is None:
            return
        clock = time() - monotonic()
        seen.append(
            {
                "query": _written_out(statement.sql, statement.params),
                "start_time": datetime.fromtimestamp(clock + statement.began, UTC),
                "end_time": datetime.fromtimestamp(clock + statement.ended, UTC),
                "traceback": "".join(reversed(traceback.format_stack())),
            }
        )


def _written_out(sql: str, params: Any) -> str:
    try:
        return sql % tuple(params) if params else sql
    except (TypeError, ValueError):  # not of that form
        return sql


_queries = _Queries()


class SilkyMiddleware(middleware.SilkyMiddleware):  # type: ignore[misc]
    """silk's, with native queries."""

    def __init__(self, get_response: Callable[..., Any]) -> None:
        super().__init__(get_response)
        _events.listen(_queries)

    def __call__(self, request: HttpRequest) -> Any:
        """silk's; the tasks of the request keep their native queries for it."""
        _seen.set([])
        try:
            return super().__call__(request)
        finally:
            _seen.set(None)

    def process_response(self, request: HttpRequest, response: HttpResponseBase) -> Any:
        """silk's, which saves what it was told of."""
        seen = _seen.get() or []
        _seen.set(None)
        if getattr(request, "silk_is_intercepted", False):
            ignored = SilkyConfig().SILKY_IGNORE_QUERIES
            for query in seen:
                if not any(text in query["query"] for text in ignored):
                    DataCollector().register_query({**query, "request": DataCollector().request})
        return super().process_response(request, response)
