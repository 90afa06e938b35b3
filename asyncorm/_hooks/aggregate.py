"""`exists()`, `count()` and `aggregate()`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from django.db.models.sql.compiler import SQLCompiler
from django.db.models.sql.query import Query
from greenlet import getcurrent

from .. import rows
from .._cache.awaited import Found
from .._cache.execute import count_of, items
from .._cache.plan import Plan
from .._chains.plans import plan_for
from ..rows import RowMaker
from ..shapes import NotCacheable
from ..statements import Compiled
from ..tracing import Resolving
from ..wrappers import Wrapper
from .switch import native_wrapper


def has_results(original: Callable[..., Any]) -> Any:
    def has_results(self: Query, using: str) -> bool:
        wrapper = native_wrapper(using)
        if wrapper is None or not (found := exists_plan(self, wrapper)):
            return bool(original(self, using))
        return count_of(*found, wrapper) > 0

    return has_results


def exists_plan(query: Query, wrapper: Wrapper) -> Found | None:
    """What `exists()` executes: it has a row, or none."""
    return plan_for(query, wrapper, _compile_exists, "exists")


def _compile_exists(query: Query, wrapper: Wrapper) -> Compiled:
    sql, params = query.exists().get_compiler(using=wrapper.alias).as_sql()
    return sql, params, None


def get_count(original: Callable[..., Any]) -> Any:
    def get_count(self: Query, using: str) -> int:
        wrapper = native_wrapper(using)
        if wrapper is None or _is_watched() or not (found := count_plan(self, wrapper)):
            return int(original(self, using))
        return int(items(*found, wrapper)[0])

    return get_count


def count_plan(query: Query, wrapper: Wrapper) -> Found | None:
    """What `count()` executes: the number is its one item."""
    return plan_for(query, wrapper, _compile_count, "count")


def _compile_count(query: Query, wrapper: Wrapper) -> Compiled:
    # What get_aggregation() does with the query is best seen from its statement.
    sql, params = _watched(lambda: query.get_count(wrapper.alias)).as_sql()
    maker = RowMaker(1, {})
    maker.item = "c0"
    return sql, params, maker


def get_aggregation(original: Callable[..., Any]) -> Any:
    """`aggregate()`: the names and the row of values."""

    def get_aggregation(self: Query, using: str, aggregate_exprs: dict[str, Any]) -> Any:
        wrapper = native_wrapper(using)
        if wrapper is not None and aggregate_exprs and not _is_watched():
            found = aggregate_plan(self, aggregate_exprs, wrapper)
            if found is not None:
                return named_values(found[0], items(*found, wrapper))
        return original(self, using, aggregate_exprs)

    return get_aggregation


def aggregate_plan(query: Query, exprs: Iterable[Any], wrapper: Wrapper) -> Found | None:
    """What `aggregate()` executes, for expressions by name."""
    compile = functools.partial(_compile_aggregates, exprs)
    return plan_for(query, wrapper, compile, "aggregate", expressions=exprs)


def named_values(plan: Plan, made: list[Any]) -> dict[str, Any]:
    """What `aggregate()` gives for the one item that was made."""
    (row,) = made
    return dict(zip(plan.maker.names_of_columns, row, strict=True))  # type: ignore[union-attr]


def _compile_aggregates(exprs: Any, query: Query, wrapper: Wrapper) -> Compiled:
    named = {name: Resolving(name, expression) for name, expression in exprs.items()}
    seen = _watched(lambda: query.clone().get_aggregation(wrapper.alias, named))
    columns = list(seen.query.annotation_select.values())
    sql, params = seen.as_sql()
    if seen.has_composite_fields(columns) or wrapper.ops.get_db_converters(columns[0]):
        raise NotCacheable
    maker = RowMaker(len(columns), seen.get_converters(columns))
    maker.item = rows.tuple_of(len(columns))
    maker.names_of_columns = [*seen.query.annotation_select]
    return sql, params, maker


class _Seen(Exception):
    """Carries the compiler of a statement that is not executed."""


_watching: set[Any] = set()  # greenlets that do not want what they compile executed


def _is_watched() -> bool:
    return bool(_watching) and getcurrent() in _watching


def execute_select(original: Callable[..., Any]) -> Any:
    """`SQLCompiler.execute_sql()`: Django's, unless only the statement is asked for."""

    def execute_sql(self: SQLCompiler, *args: Any, **kwargs: Any) -> Any:
        if _is_watched():
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
    raise NotCacheable
