"""New Relic: spans of native code belong to the request, and each native query has one.

New Relic keeps its current span by greenlet, and native code runs in greenlets of ours: there they
are the task's. It sees the cursors of `psycopg.connect()`, which native code has none of. Installed
where the agent has been imported before the project starts, as `newrelic-admin` does (`found`).

Replaced: `TraceCache.current_thread_id()`.
"""

from __future__ import annotations

import functools
from asyncio import current_task
from collections.abc import Callable
from time import monotonic, time
from typing import Any

import psycopg
from greenlet import getcurrent
from newrelic.api.database_trace import DatabaseTrace
from newrelic.api.time_trace import current_trace
from newrelic.core.trace_cache import TraceCache

from .. import _events, patches
from ..bridge import Runner
from ._where import where


def _of_task(original: Callable[[Any], int]) -> Callable[[Any], int]:
    @functools.wraps(original)
    def current_thread_id(self: Any) -> int:
        return id(current_task()) if type(getcurrent()) is Runner else original(self)

    return current_thread_id


class _Spans(_events.Listener):
    def statement_ended(self, statement: _events.Statement) -> None:
        """Make the span; what was current when the statement began is current now."""
        if not statement.pooled or current_trace() is None:
            return
        server = where(statement.alias)
        error = statement.error
        with DatabaseTrace(
            statement.sql,
            dbapi2_module=psycopg,
            host=server.host,
            port_path_or_id=str(server.port) if server.port else None,
            database_name=server.database,
        ) as span:
            span.start_time = time() - monotonic() + statement.began
            if error is not None:
                span.notice_error((type(error), error, error.__traceback__))


_spans = _Spans()


@functools.cache
def install() -> None:
    """Have New Relic see native code, from now on."""
    patches.replace(
        TraceCache, "current_thread_id", _of_task(TraceCache.current_thread_id),
        "spans of native code belong to the request",
    )  # fmt: skip
    _events.listen(_spans)
