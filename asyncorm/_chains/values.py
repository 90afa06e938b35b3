"""Which values of a filter may be recorded, and of which lookups they have to be.

A filter is recorded only if whatever value of the same type does the same to the query, and is
refused by nobody: `filter(pk="5")` says nothing about `filter(pk="abc")`. So it is a list of
Django's own fields and lookups that take each value of a type as it is. None and booleans are part
of the filter's form, and of an instance its key is taken at once, as Django does.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `Query.build_lookup`: gives the lookup of each condition, replaced on the query that is watched.
- `Col`, `RelatedExact`: what a lookup compares with what.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import uuid
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.db import models
from django.db.models import Model, Q, lookups
from django.db.models.expressions import Col
from django.db.models.fields.related_lookups import RelatedExact, RelatedIn

from ..shapes import LOOKUPS

_FIELDS: dict[type, set[Any]] = {
    int: {
        models.AutoField, models.BigAutoField, models.SmallAutoField, models.IntegerField,
        models.BigIntegerField, models.SmallIntegerField, models.PositiveIntegerField,
        models.PositiveBigIntegerField, models.PositiveSmallIntegerField,
    },
    str: {
        models.CharField, models.TextField, models.SlugField, models.EmailField, models.URLField,
    },
    float: {models.FloatField},
    decimal.Decimal: {models.DecimalField},
    datetime.datetime: {models.DateTimeField},
    datetime.date: {models.DateField},
    uuid.UUID: {models.UUIDField},
}  # fmt: skip
_LOOKUPS = LOOKUPS - {lookups.In, lookups.Range, RelatedIn}
_TO_ONE: Any = (models.ForeignKey, models.OneToOneField)


class Digits(str):
    """Stands for strings of digits, which fields of integers take, too."""

    __slots__ = ()


_ALL_FIELDS: set[Any] = set().union(*_FIELDS.values())
_FIELDS[Digits] = _FIELDS[int] | _FIELDS[str]
_MOST_DIGITS = 18

Form = tuple[Any, ...]


class Key:
    """Where the key of an instance is that was given to a filter.

    Attributes:
        place: of the value.
        name: the instance's attribute.
        kind: the key's type.
    """

    def __init__(self, place: int, name: str, kind: type) -> None:
        self.place = place
        self.name = name
        self.kind = kind


def kind_of(value: Any) -> Any:
    """The type of a value, or what stands for it; None if it cannot be recorded."""
    kind = type(value)
    if kind is str:
        return Digits if _is_number(value) else str
    if kind in _FIELDS:
        if kind is datetime.datetime and (value.tzinfo is None) is settings.USE_TZ:
            return None  # Django warns, or refuses
        return None if kind is decimal.Decimal and not value.is_finite() else kind
    if isinstance(value, Model) or (isinstance(value, enum.Enum) and isinstance(value, int | str)):
        return kind
    return None


def read(q: Any, values: list[Any]) -> Form | None:
    """The form of a Q object, hashable, whose values are put into the list.

    None: something of it cannot be recorded.
    """
    if type(q) is not Q:
        return None
    form: list[Any] = [q.connector, q.negated]
    for child in q.children:
        if type(child) is not tuple:
            if (inner := read(child, values)) is None:
                return None
            form.append(inner)
            continue
        name, value = child
        if value is None or type(value) is bool:
            form += (name, value)
            continue
        if (kind := kind_of(value)) is None:
            return None
        values.append(value)
        form += (name, kind)
    return tuple(form)


def _is_number(value: str) -> bool:
    return value.isdigit() and value.isascii() and len(value) <= _MOST_DIGITS


def write(form: Form, values: Iterator[Any]) -> Q:
    """A Q object of such a form."""
    connector, negated, *rest = form
    children: list[Any] = []
    parts = iter(rest)
    for part in parts:
        if type(part) is tuple:
            children.append(write(part, values))
        else:
            kind = next(parts)
            is_value = isinstance(kind, type)
            children.append((part, next(values) if is_value else kind))
    return Q(*children, _connector=connector, _negated=negated)


def add_watched(query: Any, q: Any) -> list[tuple[Any, Any]]:
    """`query.add_q(q)`; the values with the lookups that they were given to, in that order."""
    seen: list[tuple[Any, Any]] = []
    build = query.build_lookup

    def build_lookup(lookups: Any, lhs: Any, rhs: Any) -> Any:
        lookup = build(lookups, lhs, rhs)
        seen.append((rhs, lookup))
        return lookup

    query.build_lookup = build_lookup
    try:
        query.add_q(q)
    finally:
        del query.build_lookup
    return seen


def of_values(seen: list[tuple[Any, Any]], values: list[Any]) -> list[Any] | None:
    """The lookup of each value that is no constant; None if it is not one for each."""
    found = [(rhs, lookup) for rhs, lookup in seen if rhs is not None and type(rhs) is not bool]
    if len(found) != len(values) or any(
        rhs is not value for (rhs, _), value in zip(found, values, strict=True)
    ):
        return None
    return [lookup for _, lookup in found]


def keys_of(found: list[Any], values: list[Any]) -> list[Key] | None:
    """The keys of the instances among the values.

    None: another value of the same type might not be taken by its lookup.
    """
    keys = []
    for place, (lookup, value) in enumerate(zip(found, values, strict=True)):
        if type(lookup.lhs) is not Col or lookup.bilateral_transforms:
            return None
        field: Any = lookup.lhs.output_field
        if isinstance(value, Model):
            if type(lookup) is not RelatedExact or type(field) not in _TO_ONE:
                return None
            target = field.target_field
            key = value.__dict__.get(target.attname)
            if not (
                target.primary_key
                and isinstance(value, target.model)
                and type(key) is type(lookup.rhs)
                and key == lookup.rhs
                and takes(target, type(key))
            ):
                return None
            keys.append(Key(place, target.attname, type(key)))
        elif type(lookup) not in _LOOKUPS or not takes(field, kind_of(value)):
            return None
    return keys


def takes(field: Any, kind: Any) -> bool:
    """Whether a field takes each value of a type."""
    cls: Any = type(_of_values(field))
    return _takes(cls, kind)


def is_djangos(field: Any) -> bool:
    """Whether a field is one of Django's own, not one of somebody's subclass of it."""
    return type(_of_values(field)) in _ALL_FIELDS


def _of_values(field: Any) -> Any:
    """The field that a foreign key's values are of; itself, if it is none."""
    found: Any = field
    while type(found) in _TO_ONE:
        found = found.target_field
    return found


@functools.lru_cache(maxsize=1024)
def _takes(cls: Any, kind: Any) -> bool:
    if issubclass(kind, enum.Enum):
        kind = int if issubclass(kind, int) else str
    return any(
        issubclass(cls, base)
        and cls.get_prep_value is base.get_prep_value
        and cls.to_python is base.to_python
        for base in _FIELDS.get(kind, ())
    )


def snapshot(keys: list[Key], values: list[Any]) -> bool:
    """Put the instances' keys into their places; False if one has none of the kind."""
    for key in keys:
        value = values[key.place].__dict__.get(key.name)
        if type(value) is not key.kind:
            return False
        values[key.place] = value
    return True
