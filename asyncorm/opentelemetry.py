"""OpenTelemetry: a span for each native query.

OpenTelemetry's instrumentation of psycopg sees the cursors of `psycopg.connect()`, which native
code has none of; that of Django makes the spans of requests, which are the parents of these.
"""

from __future__ import annotations

from typing import Any

from opentelemetry import trace

from . import __version__, bridge, sessions


class _Tracing:
    """An execute_wrapper."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self.tracer = tracer

    def __call__(self, execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        wrapper = context["connection"]
        if not bridge.in_native_code():
            return execute(sql, params, many, context)
        text = str(sql)
        settings = wrapper.settings_dict
        attributes = {
            "db.system.name": "postgresql",
            "db.namespace": settings["NAME"] or "",
            "db.query.text": text,
            "db.operation.name": text.lstrip("( ").partition(" ")[0].upper(),
            "server.address": settings["HOST"] or "localhost",
        }
        name = f"{attributes['db.operation.name']} {attributes['db.namespace']}"
        with self.tracer.start_as_current_span(
            name, kind=trace.SpanKind.CLIENT, attributes=attributes
        ):
            return execute(sql, params, many, context)


_tracing: _Tracing | None = None


def instrument(tracer_provider: trace.TracerProvider | None = None) -> None:
    """Make a span for each native query from now on; called once, for instance in asgi.py.

    Args:
        tracer_provider: OpenTelemetry's global one by default.
    """
    global _tracing
    uninstrument()
    _tracing = _Tracing(trace.get_tracer("asyncorm", __version__, tracer_provider))
    sessions.everywhere.append(_tracing)


def uninstrument() -> None:
    """Make no spans any more."""
    global _tracing
    if _tracing is not None:
        sessions.everywhere.remove(_tracing)
        _tracing = None
