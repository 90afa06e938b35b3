"""Elastic APM: each native query has a span, as its agent makes one of psycopg's cursors.

The agent sees the cursors of `psycopg.connect()`, which native code has none of. Installed where
its app, `elasticapm.contrib.django`, is (`found`).

Of the agent's modules that it does not document `traces.execution_context` and what
`instrumentation.packages.dbapi2` says of a statement are used.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from time import monotonic, time

from elasticapm.instrumentation.packages.dbapi2 import (
    CursorProxy,
    extract_action_from_signature,
    extract_signature,
)
from elasticapm.traces import execution_context
from elasticapm.utils.encoding import shorten

from .. import _events
from ._where import where

_LONGEST = 10_000  # characters that the agent sends of a statement


class _Spans(_events.Listener):
    def statement_ended(self, statement: _events.Statement) -> None:
        """Make the span; what was current when the statement began is current now."""
        transaction = execution_context.get_transaction()
        if not statement.pooled or transaction is None or not transaction.is_sampled:
            return
        server = where(statement.alias)
        name = extract_signature(statement.sql)
        span = transaction.begin_span(
            name,
            "db",
            leaf=True,
            span_subtype="postgresql",
            span_action=extract_action_from_signature(name, "query"),
            start=time() - monotonic() + statement.began,
            context={
                "db": {
                    "type": "sql",
                    "statement": shorten(statement.sql, string_length=_LONGEST),
                    "instance": server.database,
                },
                "destination": {"address": server.host, "port": server.port},
            },
        )
        if statement.rows >= 0 and name.startswith(CursorProxy.DML_QUERIES):
            span.update_context("db", {"rows_affected": statement.rows})
        transaction.end_span(
            duration=timedelta(seconds=statement.ended - statement.began),
            outcome="success" if statement.error is None else "failure",
        )


_spans = _Spans()


@functools.cache
def install() -> None:
    """Have Elastic APM see native queries, from now on."""
    _events.listen(_spans)
