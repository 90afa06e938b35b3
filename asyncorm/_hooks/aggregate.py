"""`exists()`, `count()` and `aggregate()`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent

from .. import rows
from .._cache.execute import count_of, items
from ..rows import RowMaker
from ..shapes import Unfit
from ..statements import Compiled, plan_for
from ..tracing import Resolving
from .switch import native_wrapper


def has_results(original: Any) -> Any:
    def compile(query: Any, wrapper: Any) -> Compiled:
        sql, params = query.exists().get_compiler(using=wrapper.alias).as_sql()
        return sql, params, None

    def has_results(self: Any, using: str) -> bool:
        wrapper = native_wrapper(using)
        if wrapper is None or not (found := plan_for(self, wrapper, compile, "exists")):
            return bool(original(self, using))
        return count_of(*found, wrapper) > 0

    return has_results


def get_count(original: Any) -> Any:
    def compile(query: Any, wrapper: Any) -> Compiled:
        # What get_aggregation() does with the query is best seen from its statement.
        sql, params = _watched(lambda: original(query, wrapper.alias)).as_sql()
        maker = RowMaker(1, {})
        maker.item = "c0"
        return sql, params, maker

    def get_count(self: Any, using: str) -> int:
        wrapper = native_wrapper(using)
        if wrapper is None or not (found := plan_for(self, wrapper, compile, "count")):
            return int(original(self, using))
        return int(items(*found, wrapper)[0])

    return get_count


def get_aggregation(original: Any) -> Any:
    """`aggregate()`: the names and the row of values."""

    def compile(exprs: Any, query: Any, wrapper: Any) -> Compiled:
        named = {name: Resolving(name, expression) for name, expression in exprs.items()}
        seen = _watched(lambda: original(query.clone(), wrapper.alias, named))
        columns = list(seen.query.annotation_select.values())
        sql, params = seen.as_sql()
        if seen.has_composite_fields(columns) or wrapper.ops.get_db_converters(columns[0]):
            raise Unfit
        maker = RowMaker(len(columns), seen.get_converters(columns))
        maker.item = rows.tuple_of(len(columns))
        maker.names_of_columns = [*seen.query.annotation_select]
        return sql, params, maker

    def get_aggregation(self: Any, using: str, aggregate_exprs: Any) -> Any:
        wrapper = native_wrapper(using)
        if wrapper is not None and aggregate_exprs and getcurrent() not in _watching:
            found = plan_for(
                self, wrapper, functools.partial(compile, aggregate_exprs), "aggregate",
                expressions=aggregate_exprs,
            )  # fmt: skip
            if found is not None:
                (row,) = items(*found, wrapper)
                return dict(zip(found[0].maker.names_of_columns, row, strict=True))  # type: ignore[union-attr]
        return original(self, using, aggregate_exprs)

    return get_aggregation


class _Seen(Exception):
    """Carries the compiler of a statement that is not executed."""


_watching: set[Any] = set()  # greenlets that do not want what they compile executed


def execute_select(original: Any) -> Any:
    """`SQLCompiler.execute_sql()`: Django's, unless only the statement is asked for."""

    def execute_sql(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _watching and getcurrent() in _watching:
            raise _Seen(self)
        return original(self, *args, **kwargs)

    return execute_sql


def _watched(function: Callable[[], Any]) -> Any:
    """The compiler of the first statement that `function` would execute."""
    me = getcurrent()
    _watching.add(me)
    try:
        function()
    except _Seen as seen:
        return seen.args[0]
    finally:
        _watching.discard(me)
    raise Unfit
