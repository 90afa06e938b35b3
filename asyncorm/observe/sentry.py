"""Sentry: the spans and breadcrumbs of native queries, as its Django integration makes them.

Nothing has to be set up: sentry_sdk with its DjangoIntegration, which it has by itself, is found
(`found`). The integration replaces methods of Django's cursors, and sees the statements that are
executed there; this module makes the same of those that need no cursor.

Of sentry_sdk's private names `add_query_source` and `has_span_streaming_enabled` of its module
`tracing_utils` are used.
"""

from __future__ import annotations

from time import monotonic, time
from typing import Any

import sentry_sdk
from sentry_sdk.consts import OP, SPANDATA
from sentry_sdk.integrations.django import DjangoIntegration
from sentry_sdk.tracing_utils import add_query_source, has_span_streaming_enabled

from .. import _events
from ._where import where


class _Spans(_events.Listener):
    def statement_ended(self, statement: _events.Statement) -> None:
        """Make the span; what was current when the statement began is current now."""
        if statement.by_cursor:  # the integration has seen it
            return
        if sentry_sdk.get_client().get_integration(DjangoIntegration) is None:
            return
        sentry_sdk.add_breadcrumb(message=statement.sql, category="query")
        if (around := sentry_sdk.get_current_span()) is None:
            return
        clock = time() - monotonic()
        span = sentry_sdk.start_span(
            op=OP.DB,
            name=statement.sql,
            origin=DjangoIntegration.origin_db,
            start_timestamp=clock + statement.began,
        )
        if (
            around.origin == DjangoIntegration.origin_db
        ):  # of a sibling task, which connects just now
            span.parent_span_id = around.parent_span_id
        for name, value in _data(statement.alias).items():
            span.set_data(name, value)
        if statement.error is not None:
            span.set_status("internal_error")
        span.finish(end_timestamp=clock + statement.ended)
        add_query_source(span)


def _data(alias: str) -> dict[str, Any]:
    server = where(alias)
    found: dict[str, Any] = {SPANDATA.DB_SYSTEM: "postgresql", SPANDATA.DB_NAME: server.database}
    if server.host and not server.host.startswith("/"):
        found[SPANDATA.SERVER_ADDRESS] = server.host
    if server.port:
        found[SPANDATA.SERVER_PORT] = str(server.port)
    return found


_spans = _Spans()


def follow() -> bool:
    """Make the spans of statements without a cursor from now on; False if that cannot be done.

    Sentry's new way of sending each span by itself is left to its own integration, which sees
    cursors: all statements have one then.
    """
    if has_span_streaming_enabled(sentry_sdk.get_client().options):
        return False
    _events.listen(_spans)
    return True


def unfollow() -> None:
    """Make none any more."""
    _events.unlisten(_spans)
