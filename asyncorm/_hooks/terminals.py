"""Methods that are awaited: their one statement, without an operation if it is known.

Of each method of querysets that can be is said here what it would execute, and what it makes of the
result. Where more is done than that (an override, a signal, a prefetch) it is an operation.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from django.core.exceptions import SynchronousOnlyOperation
from django.db import OperationalError
from django.db.models import query as models_query
from django.db.models.query import QuerySet

from .. import bridge, elsewhere, grounds
from .._cache.awaited import UNSERVED, Found, awaited
from .._cache.plan import Plan
from .._chains.recorded import Recorded
from ..statements import UNPLANNED, plan_for
from ..wrappers import Wrapper
from . import get, instances, routing, switch
from .aggregate import aggregate_plan, count_plan, exists_plan, named_values
from .iterate import iterating_plan, mode_of, related
from .write import Written, compile_write, raw_delete_plan, update_plan

_Queryset = QuerySet[Any]
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


class _Terminal(NamedTuple):
    """A method of querysets that executes one statement.

    Attributes:
        find: what that is, given the queryset, the arguments and a wrapper.
        finish: what the method returns, given the queryset, the plan and its result.
        calls: what of the queryset's class has to be Django's own, beside the method.
        writes: it changes rows.
    """

    find: Callable[[Any, _Args, _Kwargs, Any], Found | None]
    finish: Callable[[Any, Plan, Any], Any]
    calls: tuple[str, ...] = ()
    writes: bool = False


async def run(method: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a method natively, by `bridge.run()` if it has to be an operation."""
    terminal = _terminals.get(getattr(method, "__func__", None))
    if terminal is not None and switch.is_on:
        value = await terminal(method.__self__, args, kwargs)
        if value is not UNSERVED:
            return value
    return await routing.once(bridge.run(method, *args, **kwargs))


async def fetched(queryset: Any) -> list[Any]:
    """The items of a queryset natively, as `list()` gives them."""
    if is_djangos(queryset, "__iter__", "__len__", "_fetch_all"):
        await run(queryset._fetch_all)
        return list(queryset._result_cache)
    return await routing.once(bridge.run(list, queryset))


async def _awaited(terminal: _Terminal, queryset: Any, args: _Args, kwargs: _Kwargs) -> Any:
    # Somebody's code would be called once here and once by the operation.
    if not (is_djangos(queryset, *terminal.calls) and grounds.are_sound()):
        return UNSERVED
    plan: Any = None

    def find(wrapper: Wrapper) -> Found | None:
        nonlocal plan
        if (found := terminal.find(queryset, args, kwargs, wrapper)) is not None:
            plan = found[0]
        return found

    if terminal.writes:
        queryset._for_write = True
    try:
        alias = queryset.db
    except SynchronousOnlyOperation:  # a router asks the database
        return UNSERVED
    try:
        value = await awaited(alias, find, mode_of(queryset), writes=terminal.writes)
    except OperationalError as exc:
        if terminal.writes or not elsewhere.gone(queryset, exc):
            raise
        return UNSERVED
    if value is UNSERVED:
        routing.keep_of(queryset, alias)
        return UNSERVED
    try:
        return terminal.finish(queryset, plan, value)
    except SynchronousOnlyOperation:  # of whether two instances may be related
        return UNSERVED


def is_djangos(queryset: _Queryset, *names: str) -> bool:
    """Whether the class of a queryset leaves these to Django's."""
    cls: Any = type(queryset)
    return cls is QuerySet or (issubclass(cls, QuerySet) and grounds.inherits(cls, QuerySet, names))


# What is executed


def _count(queryset: _Queryset, args: _Args, kwargs: _Kwargs, wrapper: Wrapper) -> Found | None:
    if args or kwargs or queryset._result_cache is not None:
        return None
    return count_plan(queryset.query, wrapper)


def _exists(queryset: _Queryset, args: _Args, kwargs: _Kwargs, wrapper: Wrapper) -> Found | None:
    if args or kwargs or queryset._result_cache is not None:
        return None
    return exists_plan(queryset.query, wrapper)


def _aggregate(queryset: _Queryset, args: _Args, kwargs: _Kwargs, wrapper: Wrapper) -> Found | None:
    query = queryset.query
    named = {**kwargs, **{each.default_alias: each for each in args}}
    if not named or query.distinct_fields:
        return None
    if not all(hasattr(each, "resolve_expression") for each in named.values()):
        return None
    return aggregate_plan(query.chain(), named, wrapper)


def _fetch(queryset: _Queryset, args: _Args, kwargs: _Kwargs, wrapper: Wrapper) -> Found | None:
    if args or kwargs or queryset._result_cache is not None:
        return None
    return iterating_plan(queryset, wrapper)


def _first(queryset: _Queryset, args: _Args, kwargs: _Kwargs, wrapper: Wrapper) -> Found | None:
    return None if args or kwargs else _one(queryset, "pk", lambda: queryset, wrapper)


def _last(queryset: _Queryset, args: _Args, kwargs: _Kwargs, wrapper: Wrapper) -> Found | None:
    return None if args or kwargs else _one(queryset, "-pk", queryset.reverse, wrapper)


def _one(
    queryset: _Queryset, key: str, ordered: Callable[[], Any], wrapper: Wrapper
) -> Found | None:
    query = queryset.query
    if queryset._result_cache is not None:
        return None
    if queryset.ordered:
        asked = ordered()
    elif query.default_ordering and not isinstance(query.group_by, tuple):
        asked = queryset.order_by(key)
    else:
        return None
    return iterating_plan(asked[:1], wrapper)


def _get(queryset: _Queryset, args: _Args, kwargs: _Kwargs, wrapper: Wrapper) -> Found | None:
    return None if args else get.awaited_plan(queryset, kwargs, wrapper)


def _update(queryset: Any, args: Any, kwargs: Any, wrapper: Any) -> Found | None:
    query = queryset.query
    if type(query) is Recorded and not args:
        found = update_plan(query, kwargs, wrapper)
        if found is not None:
            return None if found is UNPLANNED else found
    if args or query.combinator or query.is_sliced or query.distinct_fields or query.annotations:
        return None
    return plan_for(Written(kwargs).of(query), wrapper, compile_write)


def _delete(queryset: Any, args: Any, kwargs: Any, wrapper: Any) -> Found | None:
    query = queryset.query
    if (
        args
        or kwargs
        or type(query) is not Recorded
        or query.is_sliced
        or query.distinct_fields
        or queryset._fields is not None
        or not instances.deletes_alone(models_query, wrapper.alias, queryset)
    ):
        return None
    query = query.chain()
    query.select_for_update = query.select_related = False
    query.clear_ordering(force=True)
    return raw_delete_plan(query, wrapper)


# What is made of the result


def _keep(queryset: _Queryset, plan: Plan, made: list[Any]) -> None:
    if queryset._result_cache is None:  # another task may have evaluated it meanwhile
        queryset._result_cache = related(queryset, plan, made)


def _take_first(queryset: _Queryset, plan: Plan, made: list[Any]) -> Any:
    return related(queryset, plan, made)[0] if made else None


def _take_only(queryset: _Queryset, plan: Plan, made: list[Any]) -> Any:
    return get.only(queryset, related(queryset, plan, made))


def _forget(queryset: _Queryset, plan: Plan, count: int) -> int:
    queryset._result_cache = None
    return count


def _forget_deleted(queryset: _Queryset, plan: Plan, count: int) -> tuple[int, dict[str, int]]:
    queryset._result_cache = None
    return count, {queryset.model._meta.label: count} if count else {}


_ITERATES = ("query", "_chain", "_clone", "_fetch_all", "__iter__", "__len__", "__getitem__")
_FILTERS = ("filter", "_filter_or_exclude", "_filter_or_exclude_inplace", "order_by", "_add_hints")
_ORDERS = ("ordered", "order_by", "reverse", *_ITERATES)
_METHODS = {
    "count": _Terminal(_count, lambda queryset, plan, made: int(made[0]), ("query",)),
    "exists": _Terminal(_exists, lambda queryset, plan, count: count > 0, ("query",)),
    "aggregate": _Terminal(
        _aggregate, lambda queryset, plan, made: named_values(plan, made),
        ("query", "_validate_values_are_expressions"),
    ),
    "_fetch_all": _Terminal(_fetch, _keep, ("query",)),
    "first": _Terminal(_first, _take_first, _ORDERS),
    "last": _Terminal(_last, _take_first, _ORDERS),
    "get": _Terminal(_get, _take_only, (*_FILTERS, *_ITERATES)),
    "update": _Terminal(
        _update, _forget, ("query", "_not_support_combined_queries"), writes=True
    ),
    "delete": _Terminal(
        _delete, _forget_deleted,
        ("query", "_not_support_combined_queries", "_chain", "_clone", "_raw_delete"), writes=True,
    ),
}  # fmt: skip
_terminals: dict[Any, Callable[[Any, _Args, _Kwargs], Awaitable[Any]]] = {}


def install() -> None:
    """Know these methods as they are now; what is put in their place later is an operation."""
    for name, terminal in _METHODS.items():
        _terminals[getattr(QuerySet, name)] = functools.partial(_awaited, terminal)
    _terminals.update(instances.install())
    elsewhere.replaced = _know_as


def _know_as(original: Callable[..., Any], by: Callable[..., Any]) -> None:
    """What does the same as a method that is known is known, too."""
    if original in _terminals:
        _terminals[by] = _terminals[original]
