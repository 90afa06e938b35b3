"""django-debug-toolbar's SQL panel, which also sees native queries.

The toolbar wraps the cursors of the thread in which Django's `a*` methods work; native code has
none of these. In the settings, put "asyncorm.debug_toolbar.SQLPanel" in the place of
"debug_toolbar.panels.sql.SQLPanel" in DEBUG_TOOLBAR_PANELS.
"""

from __future__ import annotations

from typing import Any

from debug_toolbar.panels.sql import panel, tracking
from django.db import connections

from . import bridge


class _Cursor(tracking.NormalCursorMixin):  # type: ignore[misc]
    """What the toolbar does around a statement, for one that runs already."""

    def __init__(self, logger: Any, context: dict[str, Any]) -> None:
        self.db = context["connection"]
        self.cursor = context["cursor"].cursor
        self.logger = logger


class SQLPanel(panel.SQLPanel):  # type: ignore[misc]
    """The toolbar's, for synchronous and for native queries."""

    def _native(self, execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        if not bridge.in_native_code():  # the toolbar has wrapped the cursor
            return execute(sql, params, many, context)

        def run(sql: Any, params: object) -> Any:
            return execute(sql, params, many, context)

        try:
            return _Cursor(self, context)._record(run, sql, params)
        finally:
            context["connection"].__dict__.pop("_djdt_logger", None)

    async def aenable_instrumentation(self) -> None:
        """The toolbar's; the request's task and those it starts record their native queries."""
        await super().aenable_instrumentation()
        for connection in connections.all():
            connection.execute_wrappers.append(self._native)

    def disable_instrumentation(self) -> None:
        """The toolbar's, in the request's task."""
        super().disable_instrumentation()
        for connection in connections.all(initialized_only=True):
            if self._native in connection.execute_wrappers:
                connection.execute_wrappers.remove(self._native)
