"""The rows of a relation, by the keys that it leads to."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import Any

from django.db import OperationalError
from django.db.models import query
from django.db.models.lookups import Lookup
from django.db.models.query import QuerySet
from psycopg.types.numeric import Int2, Int4, Int8

from .. import columnar, elsewhere, grounds, rows, verifying
from .._cache.execute import items
from .._cache.plan import Plan
from ..grounds import Ground
from ..shapes import MAX_PARAMS, NotCacheable, Shape
from ..statements import UNPLANNED, hit, learn, plans, recall, remember
from ..wrappers import Wrapper
from . import routing
from .iterate import compile_instances, mode_of, queryset_plan
from .switch import native_wrapper

_BY_LENGTH: Any = object()  # lists of each length have a plan of their own
_KEY_TYPES = {int, str, uuid.UUID, Int2, Int4, Int8}  # Django wraps integers for psycopg


def by_keys(
    queryset: QuerySet[Any], what: object, keys: list[Any], narrow: Callable[[], Any]
) -> list[Any] | None:
    """The rows of a fresh queryset, narrowed to those with one of different keys of one type.

    Args:
        what: tells one way of narrowing this queryset from another.
        narrow: returns the narrowed queryset, where the statement is not known yet.

    None: have Django do it.
    """
    alias = queryset.db
    found = _of_keys(queryset, native_wrapper(alias), what, keys, narrow)
    if found is None:
        routing.keep_of(queryset, alias)
    return found


def _of_keys(
    queryset: QuerySet[Any],
    wrapper: Wrapper | None,
    what: object,
    keys: list[Any],
    narrow: Callable[[], Any],
) -> list[Any] | None:
    if wrapper is None or queryset._iterable_class is not query.ModelIterable:
        return None
    mode = mode_of(queryset)
    if mode is not None and mode.track_peers:
        return None
    try:
        many = len(keys) > 1
        shape = Shape(queryset.query, wrapper, "keys", type(queryset), what, many, type(keys[0]))
        key = tuple(shape.key)
        known: Any = recall(key)
        if known is _BY_LENGTH:
            key = (*key, len(keys))
            known = recall(key)
        if known is UNPLANNED:
            if len(keys) > MAX_PARAMS:
                return None
            make = functools.partial(_plan_keys, queryset, narrow, wrapper, keys)
            known = learn(key, queryset.model, make, type(queryset))
            found = plans.get(key)
            if many and known is not None and found and not known[0].is_of_keys:
                remember((*key, len(keys)), *found)
                remember(key, _BY_LENGTH, found[1])
        if known is None:
            return None
        plan, kind = known
        if many and plan.is_of_keys:
            plan = plan.of_lists([(0, len(keys))])
        params = keys if kind is type(keys[0]) else [kind(value) for value in keys]
    except Exception:
        return None
    if rows.is_watched(plan.maker.models) or not hit(
        key, plan, params, 0, lambda: compile_instances(narrow().query, wrapper)
    ):
        return None
    try:
        return items(plan, params, 0, wrapper, mode)
    except OperationalError as exc:
        if not elsewhere.gone(queryset, exc):
            raise
        return None


def _plan_keys(
    queryset: QuerySet[Any], narrow: Callable[[], Any], wrapper: Wrapper, keys: list[Any]
) -> tuple[tuple[Plan, type], Ground]:
    """The plan of a narrowed queryset, and the type that its field gives the keys."""
    narrowed = narrow()
    found = queryset_plan(narrowed, wrapper, query.ModelIterable)
    shape = Shape(narrowed.query, wrapper)
    kinds = set(map(type, found[1])) if found is not None else ()
    columns = [leaf.lhs.target for leaf, *_ in shape.leaves]
    if (
        found is None
        or found[0].picked is not None
        or len(kinds) != 1
        # Any other field is asked for each key.
        or not all(map(columnar.as_is, columns))
    ):
        raise NotCacheable
    (kind,) = kinds
    if kind not in _KEY_TYPES or not verifying.equal(found[1], [kind(value) for value in keys]):
        raise NotCacheable
    targets = [getattr(field, "target_field", field) for field in columns]
    ground = grounds.of_query(
        narrowed.query, [*shape.kept, *targets], found[0].maker, wrapper,
        [type(leaf) for leaf, *_ in shape.leaves if isinstance(leaf, Lookup)],
        type(queryset), *found[0].classes, short=True,
    )  # fmt: skip
    return (found[0], kind), ground
