"""What a statement depends on in its expressions, beside the SQL that their own classes make.

The SQL of an expression is in the key of a statement (shapes.py), so nothing that its `as_sql()`
looks at can be forgotten. The rest of the statement looks at more: whether it is an aggregate, its
output field's converters, the columns that it groups by. These follow from the classes of the
expression and of what it is made of, and from a few attributes.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `Expression._constructor_args`: whether an output field was given to an aggregate.
- `BaseExpression.get_source_expressions`, `Query.get_external_cols`, `Col.possibly_multivalued`:
  what an expression is made of, and what a subquery groups by.
- `TimezoneMixin.tzinfo`: what `Trunc` converts to, a parameter of its SQL.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import uuid
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

from django.db import models
from django.db.models import F, Field, aggregates, functions
from django.db.models.expressions import Col, CombinedExpression, OrderBy, Star
from django.db.models.sql.query import Query
from django.utils.hashable import make_hashable
from psycopg.types.numeric import Int2, Int4, Int8


class NotCacheable(Exception):
    """What is asked for is left to Django."""


# Fields whose attributes in _STATE are all that they do by.
_FIELDS = {
    models.BigIntegerField, models.BooleanField, models.CharField, models.DateField,
    models.DateTimeField, models.DecimalField, models.DurationField, models.EmailField,
    models.FloatField, models.IntegerField, models.JSONField, models.PositiveBigIntegerField,
    models.PositiveIntegerField, models.PositiveSmallIntegerField, models.SlugField,
    models.SmallIntegerField, models.TextField, models.TimeField, models.URLField, models.UUIDField,
}  # fmt: skip
_STATE = ("max_length", "db_collation", "max_digits", "decimal_places", "encoder", "decoder")
# What Django compares by value when it leaves out what it has already grouped or ordered by.
_PLAIN = {
    int, str, float, bool, bytes, decimal.Decimal, datetime.date, datetime.datetime, datetime.time,
    datetime.timedelta, uuid.UUID, Int2, Int4, Int8,
}  # fmt: skip
_MAX_COMPARED = 100


def add_field(field: Field[Any, Any], key: list[Any], kept: list[Any]) -> None:
    """Put a field into a key."""
    state = vars(field)
    if "model" in state:
        key.append(id(field))
        kept.append(field)
    elif type(field) in _FIELDS:
        key += (type(field), *map(state.get, _STATE))
    else:
        raise NotCacheable


def add_structure(node: Any, key: list[Any], kept: list[Any]) -> None:
    """Put into a key what the rest of the statement sees of a compiled expression."""
    cls = type(node)
    if cls is Col:
        key += (cls, id(node.target), id(node.output_field))
        kept += (node.target, node.output_field)
        return
    if cls is Query:
        key += (cls, tuple([col.possibly_multivalued for col in node.get_external_cols()]))
        return
    if not cls.__module__.startswith("django."):
        raise NotCacheable
    state = vars(node)
    for each in (state.get("value"), state.get("rhs")):
        if type(each) not in _PLAIN and not hasattr(each, "as_sql"):
            make_hashable(each)  # or Django fails where it compares expressions
    key += (cls, state.get("tzinfo"))
    sources = node.get_source_expressions()
    key.append(len(sources))
    for source in sources:
        if source is None:
            key.append(None)
        else:
            add_structure(source, key, kept)


def names_in(value: Any) -> list[str]:
    """The names that an expression has, or that one stands for: of columns, annotations, paths."""
    cls = type(value)
    if cls is str:
        return [value]
    if cls is F:
        return [value.name]
    sources = value.get_source_expressions() if hasattr(value, "get_source_expressions") else ()
    return [name for source in sources if source is not None for name in names_in(source)]


def pattern(params: tuple[Any, ...]) -> tuple[int, ...]:
    """Which parameters are equal: Django leaves out expressions that are."""
    if len(params) > _MAX_COMPARED or not _PLAIN.issuperset(map(type, params)):
        raise NotCacheable
    return tuple(map(params.index, params))


# Expressions whose SQL depends on what their attributes say and on nothing else, say a time zone.
_EXPRESSIONS = {
    Star, CombinedExpression, OrderBy, aggregates.Count, aggregates.Sum, aggregates.Avg,
    aggregates.Max, aggregates.Min, aggregates.StdDev, aggregates.Variance, functions.Lower,
    functions.Upper, functions.Length, functions.Trim, functions.LTrim, functions.RTrim,
    functions.Reverse, functions.Abs, functions.Ceil, functions.Floor, functions.Sign,
    functions.Sqrt, functions.Coalesce, functions.Greatest, functions.Least, functions.NullIf,
}  # fmt: skip
# What expressions keep of their own making, beside what makes their SQL.
_DERIVED = {
    "_constructor_args", "identity", "output_field", "_output_field_or_none", "convert_value",
    "contains_aggregate", "contains_over_clause", "contains_column_references",
    "contains_subquery", "conditional", "field", "select_format",
}  # fmt: skip


class _Form:
    """What is alike in expressions of one class whose attributes are of the same types.

    Args:
        plain: the names of the attributes whose values can be in a key as they are.
        others: those of the rest.

    Attributes:
        pick: gives the values of the former.
    """

    __slots__ = ("others", "pick")

    def __init__(self, plain: list[str], others: list[str]) -> None:
        self.pick: Callable[[Any], Iterable[Any]] = (
            itemgetter(*plain) if len(plain) > 1 else lambda state: map(state.get, plain)
        )
        self.others = others


@functools.lru_cache(maxsize=1024)
def _form(cls: type, state: tuple[Any, ...], args: tuple[type, ...]) -> _Form:
    """The form of an expression: in a key in the place of what it is asked by.

    Args:
        state: the names of its attributes, then the types of their values.
        args: the types of what it was made with.

    Raises:
        NotCacheable: a field is among these.
    """
    if any(issubclass(each, Field) for each in args):
        raise NotCacheable
    told = zip(state, state[len(state) // 2 :], strict=False)
    return _form_of(cls, tuple(each for each in told if each[0] not in _DERIVED))


@functools.lru_cache(maxsize=1024)
def _form_of(cls: type, told: tuple[tuple[str, type], ...]) -> _Form:
    # One for all expressions that differ in what they have found out about themselves.
    plain = [name for name, kind in told if kind in _IN_KEYS]
    return _Form(plain, [name for name, kind in told if kind not in _IN_KEYS])


_IN_KEYS = {type(None), bool, str}


def add_unresolved(value: Any, key: list[Any]) -> None:
    """Put an expression of names without parameters, or an attribute of one, into a key."""
    cls: Any = type(value)
    if cls is list or cls is tuple:
        key += (cls, len(value))
        for each in value:
            add_unresolved(each, key)
    elif cls is dict:
        key += (cls, *value)
        for each in value.values():
            add_unresolved(each, key)
    elif cls is F:
        key += (cls, value.name)
    elif cls in _EXPRESSIONS:
        state = value.__dict__
        args, named = value._constructor_args
        kinds, made_with = map(type, state.values()), map(type, (*args, *named.values()))
        form = _form(cls, (*state, *kinds), tuple(made_with))
        key.append(form)
        key += form.pick(state)
        for name in form.others:
            add_unresolved(state[name], key)
    elif cls in _IN_KEYS:
        key += (cls, value)
    else:
        raise NotCacheable
