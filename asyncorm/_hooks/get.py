"""`QuerySet.get()` by keywords, without making another queryset after the first time."""

from __future__ import annotations

import datetime
import decimal
import functools
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from django.db import OperationalError
from django.db.models import Model, Q, query
from django.db.models.query import MAX_GET_RESULTS, QuerySet
from django.db.models.sql.query import Query
from greenlet import getcurrent

from .. import elsewhere, grounds, rows
from .._cache.awaited import Found
from .._cache.execute import items
from .._chains.nodes import MAX_CHILDREN, Node
from .._chains.plans import plan_of
from .._chains.recorded import Recorded
from .._chains.twins import djangos
from .._chains.values import kind_of
from ..bridge import Runner
from ..statements import UNPLANNED
from ..wrappers import Wrapper
from . import routing
from .iterate import compile_instances, iterating_plan, mode_of
from .switch import native_wrapper

# The types of values that a filter treats alike, whatever their value.
PLAIN_VALUES = {
    int, str, float, decimal.Decimal, datetime.datetime, datetime.date, uuid.UUID,
}  # fmt: skip


def _filters_as_django(cls: type) -> bool:
    """Whether a queryset class leaves to Django what `get()` is made of."""
    return grounds.inherits(cls, query.QuerySet, _OF_GET)


_OF_GET = (
    "filter", "_filter_or_exclude", "_filter_or_exclude_inplace", "_chain", "_clone",
    "order_by", "__len__", "_fetch_all", "db", "query", "using", "_add_hints",
)  # fmt: skip


def get(original: Callable[..., Any]) -> Any:
    """`QuerySet.get()` by keywords: without making another queryset, after the first time."""

    def get(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(getcurrent()) is Runner and kwargs and not args:
            try:
                found = _got(self, kwargs)
            except OperationalError as exc:
                return elsewhere.again(self, exc, lambda: original(self, *args, **kwargs))
            if found is not None:
                return only(self, found)
        try:
            return original(self, *args, **kwargs)
        finally:
            routing.forget()

    global _own_get
    _own_get = functools.wraps(original)(get)
    return _own_get


_own_get: Any = object()


def only(queryset: QuerySet[Any], found: list[Any]) -> Any:
    """The only item; otherwise what Django's `get()` raises."""
    return found[0] if len(found) == 1 else _own_get.__wrapped__(_Found(queryset.model, found))


class _Found:
    """What `QuerySet.get()` needs of a queryset to say what is wrong with its result."""

    def __init__(self, model: type[Model], result: list[Any]) -> None:
        self.model = model
        self.query = Query(model)
        self._result_cache = result

    def filter(self) -> _Found:
        return self

    order_by = filter

    def __len__(self) -> int:
        return len(self._result_cache)


def _got(queryset: QuerySet[Any], kwargs: dict[str, Any]) -> list[Any] | None:
    wrapper = native_wrapper(alias := queryset.db)
    found = None if wrapper is None else _get_plan(queryset, kwargs, wrapper)
    if found is None:
        routing.keep_of(queryset, alias)
        return None
    plan, params = found
    return items(plan, params, 0, wrapper, mode_of(queryset))


def _get_plan(queryset: Any, kwargs: dict[str, Any], wrapper: Any) -> Any:
    """A plan and its parameters, None if there is to be none; UNPLANNED if an operation has to
    make it."""
    mode = mode_of(queryset)
    if (
        queryset._iterable_class is not query.ModelIterable
        or queryset._prefetch_related_lookups
        or queryset._sticky_filter
        or queryset._known_related_objects
        or queryset._deferred_filter
        or queryset._defer_next_filter
        or (mode is not None and mode.track_peers)
    ):
        return None
    if type(queryset._query) is not Recorded:
        return None
    pairs = kwargs.items() if len(kwargs) == 1 else sorted(kwargs.items())
    names, values = zip(*pairs, strict=True)
    if not PLAIN_VALUES.issuperset(map(type, values)):
        return None
    return _recorded_plan(queryset, names, values, wrapper)


def awaited_plan(queryset: QuerySet[Any], kwargs: dict[str, Any], wrapper: Wrapper) -> Found | None:
    """What `get()` by keywords would execute; none where that is not known yet."""
    if kwargs and (found := _get_plan(queryset, kwargs, wrapper)) is not None:
        return None if found is UNPLANNED else (*found, 0)
    query = queryset.query
    # What is used up by the first look at it is left to Django.
    if query.combinator or not all(map(_stays, kwargs.values())):
        return None
    narrowed = queryset.filter(**kwargs)
    if query.can_filter() and not query.distinct_fields:  # what order_by() does to another copy
        narrowed.query.clear_ordering(force=True, clear_default=False)
        narrowed.query.add_ordering()
    narrowed.query.set_limits(high=MAX_GET_RESULTS)
    return iterating_plan(narrowed, wrapper)


def _stays(value: object) -> bool:
    return type(value) in _STAYING or isinstance(value, Model)


_STAYING = {*PLAIN_VALUES, bool, type(None), list, tuple, set, frozenset}


def _recorded_plan(
    queryset: Any, names: Sequence[str], values: Sequence[Any], wrapper: Wrapper
) -> Any:
    """The plan of a recorded queryset: what `get()` does is done to a copy of its query."""
    cls = type(queryset)
    if not ((cls is query.QuerySet or _filters_as_django(cls)) and grounds.clones_as_django()):
        return None
    base: Any = queryset._query
    node, form = base.chain_node, (*names, *map(kind_of, values))
    narrowed = node.gets.get(form)
    if narrowed is None:
        narrowed = _narrowed_node(base, names, values)
        if narrowed is None or None in form:
            return None
        if len(node.gets) >= MAX_CHILDREN:
            node.gets.clear()
        node.gets[form] = narrowed
    django = lambda: djangos(_narrowed(queryset, names, values).query)  # noqa: E731
    of_all = [*base.chain_values, *values]
    found = plan_of(
        narrowed, of_all, wrapper, compile_instances, query.ModelIterable, None, djangos=django
    )
    if found is None or found is UNPLANNED:
        return found
    return None if rows.is_watched(found[0].maker.models) else found[:2]


def _narrowed_node(base: Recorded, names: Sequence[str], values: Sequence[Any]) -> Node | None:
    """The node of the queries that `get()` executes, if it is known."""
    asked = base.chain()
    if asked.is_sliced or asked.distinct_fields:
        return None
    try:
        asked.add_q(Q(*zip(names, values, strict=True)))
        asked.clear_ordering(force=True, clear_default=False)
        asked.add_ordering()
        asked.set_limits(high=MAX_GET_RESULTS)
    except Exception:  # Django says what is wrong
        return None
    return asked.chain_node if type(asked) is Recorded else None


def _narrowed(queryset: QuerySet[Any], names: Sequence[str], values: Sequence[Any]) -> Any:
    """The queryset that `QuerySet.get()` would make."""
    filtered = queryset.filter(**dict(zip(names, values, strict=True))).order_by()
    filtered.query.set_limits(high=MAX_GET_RESULTS)
    return filtered
