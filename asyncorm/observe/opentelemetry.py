"""OpenTelemetry: a span for each native query.

OpenTelemetry's instrumentation of psycopg sees the cursors of `psycopg.connect()`, which native
code has none of; that of Django makes the spans of requests, which are the parents of these.
"""

from __future__ import annotations

from time import monotonic_ns, time_ns
from typing import Any

from django.db import connections
from opentelemetry import trace

from .. import __version__, _events


class _Tracing(_events.Listener):
    def __init__(self, tracer: trace.Tracer) -> None:
        self.tracer = tracer

    def statement_ended(self, statement: _events.Statement) -> None:
        """Make the span; what was current when the statement began is current now."""
        if not statement.native:  # the instrumentation of psycopg has seen it
            return
        settings = connections.settings[statement.alias]
        sql = statement.sql
        operation = sql.lstrip("( ").partition(" ")[0].upper()
        attributes: dict[str, Any] = {
            "db.system.name": "postgresql",
            "db.namespace": settings["NAME"] or "",
            "db.query.text": sql,
            "db.operation.name": operation,
            "server.address": settings["HOST"] or "localhost",
        }
        if statement.rows >= 0:
            attributes["db.response.returned_rows"] = statement.rows
        clock = time_ns() - monotonic_ns()
        span = self.tracer.start_span(
            f"{operation} {attributes['db.namespace']}",
            kind=trace.SpanKind.CLIENT,
            attributes=attributes,
            start_time=clock + int(statement.began * 1e9),
        )
        if (error := statement.error) is not None:
            span.record_exception(error)
            span.set_status(
                trace.Status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
            )
        span.end(clock + int(statement.ended * 1e9))


_tracing: _Tracing | None = None


def instrument(tracer_provider: trace.TracerProvider | None = None) -> None:
    """Make a span for each native query from now on; called once, for instance in asgi.py.

    Args:
        tracer_provider: OpenTelemetry's global one by default.
    """
    global _tracing
    uninstrument()
    _tracing = _Tracing(trace.get_tracer("asyncorm", __version__, tracer_provider))
    _events.listen(_tracing)


def uninstrument() -> None:
    """Make no spans any more."""
    global _tracing
    if _tracing is not None:
        _events.unlisten(_tracing)
        _tracing = None
