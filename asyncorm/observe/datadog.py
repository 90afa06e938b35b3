"""Datadog: a span for each native query, as ddtrace's integration of psycopg makes them, or that of
Django where it is the only one.

ddtrace sees the cursors of `psycopg.connect()`, which native code has none of. Where ddtrace has
instrumented psycopg, or Django's databases, before the project starts, as `ddtrace-run` does, that
is found (`found`); otherwise `install()` is called, for instance in asgi.py.

Of ddtrace's private names `ext_service` is used, if it is there.
"""

from __future__ import annotations

from contextlib import suppress
from time import monotonic, time
from typing import Any

import ddtrace
import django
import psycopg
from ddtrace.trace import tracer

from .. import _events
from ._where import where

ext_service: Any = None
with suppress(ImportError):
    from ddtrace.contrib.internal.trace_utils import ext_service


class _Spans(_events.Listener):
    def statement_ended(self, statement: _events.Statement) -> None:
        """Make the span; what was current when the statement began is current now."""
        if not statement.pooled or (statement.by_cursor and _has_span(statement)):
            return  # ddtrace has made it
        service, component = _integration(statement.alias)
        span: Any = tracer.start_span(
            "postgres.query",
            child_of=tracer.current_span() or tracer.current_trace_context(),
            service=service,
            resource=statement.sql,
            span_type="sql",
            activate=False,
        )
        clock = time() - monotonic()
        span.start = clock + statement.began
        server = where(statement.alias)
        span.set_tags(
            {
                "component": component,
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


def _integration(alias: str) -> tuple[Any, str]:
    """The service and the component that the spans name."""
    if getattr(django, "_datadog_patch", False) and not getattr(psycopg, "_datadog_patch", False):
        config: Any = ddtrace.config.django
        if config.get("instrument_databases"):
            prefix = config.get("database_service_name_prefix", "")
            name = config.get("database_service_name") or f"{prefix}{alias}db"
            return name, "django-database"
    default = "postgres"
    if ext_service is None:
        return default, "psycopg"
    return ext_service(None, ddtrace.config.psycopg, default), "psycopg"


def _has_span(statement: _events.Statement) -> bool:
    """Whether it is executed in a cursor that ddtrace has wrapped: its span is current."""
    span: Any = tracer.current_span()
    return span is not None and span.span_type == "sql" and span.resource in statement.sql


_spans = _Spans()


def install() -> None:
    """Make a span for each native query from now on; once, however often it is called."""
    _events.listen(_spans)


def uninstall() -> None:
    """Make no spans any more."""
    _events.unlisten(_spans)
