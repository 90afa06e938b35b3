"""Datadog: a span for each native query, as ddtrace's integration of psycopg makes them.

ddtrace sees the cursors of `psycopg.connect()`, which native code has none of. Where ddtrace has
instrumented psycopg, or Django's databases, before the project starts, as `ddtrace-run` does, that
is found (`found`); otherwise `install()` is called, for instance in asgi.py.

Of ddtrace's private names `ext_service`, `is_wrapped` and `_SPAN_MEASURED_KEY` are used, if they
are there.
"""

from __future__ import annotations

from contextlib import suppress
from time import monotonic, time
from typing import Any

import ddtrace
from ddtrace.trace import tracer
from django.db.backends.base.base import BaseDatabaseWrapper

from .. import _events
from ._where import where

ext_service: Any = None
is_wrapped: Any = None
with suppress(ImportError):
    from ddtrace.contrib.internal.trace_utils import ext_service
with suppress(ImportError):
    from ddtrace.internal.wrapping import is_wrapped


class _Spans(_events.Listener):
    def statement_ended(self, statement: _events.Statement) -> None:
        """Make the span; what was current when the statement began is current now."""
        if not statement.pooled or (statement.by_cursor and _sees_cursors()):
            return  # ddtrace has made it
        span: Any = tracer.start_span(
            "postgres.query",
            child_of=tracer.current_span() or tracer.current_trace_context(),
            service=_service(),
            resource=statement.sql,
            span_type="sql",
            activate=False,
        )
        clock = time() - monotonic()
        span.start = clock + statement.began
        server = where(statement.alias)
        span.set_tags(
            {
                "component": "psycopg",
                "span.kind": "client",
                "db.system": "postgresql",
                "db.name": server.database,
                "db.user": server.user,
                "out.host": server.host,
                "server.address": server.host,
                "django.db.alias": statement.alias,
            }
        )
        span.set_tag("_dd.measured", 1)
        if server.port:
            span.set_tag("network.destination.port", server.port)
        if statement.rows >= 0:
            span.set_tag("db.row_count", statement.rows)
        if (error := statement.error) is not None:
            span.set_exc_info(type(error), error, error.__traceback__)
        span.finish(finish_time=clock + statement.ended)


def _service() -> Any:
    default = "postgres"
    return default if ext_service is None else ext_service(None, ddtrace.config.psycopg, default)


def _sees_cursors() -> bool:
    """Whether ddtrace wraps Django's cursors."""
    cursor: Any = BaseDatabaseWrapper.cursor
    return hasattr(cursor, "__dd_wrapped__") or (is_wrapped is not None and is_wrapped(cursor))


_spans = _Spans()


def install() -> None:
    """Make a span for each native query from now on; once, however often it is called."""
    _events.listen(_spans)


def uninstall() -> None:
    """Make no spans any more."""
    _events.unlisten(_spans)
