"""Which values of a filter may be recorded, and of which lookups they have to be.

A filter is recorded only if whatever value of the same type does the same to the query, and is
refused by nobody: `filter(pk="5")` says nothing about `filter(pk="abc")`. So it is a list of
Django's own fields and lookups that take each value of a type as it is. None and booleans are part
of the filter's form, and of an instance its key is taken at once, as Django does.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `Query.build_lookup`: gives the lookup of each condition, replaced on the query that is watched.
- `Col`, `RelatedExact`, `Join`: what a lookup compares with what, and where it is.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import uuid
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, NamedTuple

from django.db import models
from django.db.models import Model, Q, lookups
from django.db.models.expressions import Col
from django.db.models.fields.related_lookups import RelatedExact, RelatedIn
from django.db.models.sql.datastructures import Join
from django.utils.functional import SimpleLazyObject

from .. import grounds
from .._cache.families import TO_ONE, target_of
from ..shapes import LOOKUPS, NULLS

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
_OF_LISTS = {lookups.In, RelatedIn}
_LOOKUPS = LOOKUPS - {*_OF_LISTS, lookups.Range}


class Digits(str):
    """Stands for strings of digits, which fields of integers take, too."""

    __slots__ = ()


_ALL_FIELDS: set[Any] = set().union(*_FIELDS.values())
_FIELDS[Digits] = _FIELDS[int] | _FIELDS[str]
_MOST_DIGITS = 18
_HUGE = 1 << 1024  # Python refuses to write out some that are larger
_AS_TEXT = {int, uuid.UUID}  # what fields of strings take, too
_LISTS = {list, tuple, set, frozenset}


class Many(NamedTuple):
    """Stands for lists, tuples and sets of values of one type.

    Attributes:
        kind: of the values.
        is_one: there is just one.
    """

    kind: Any
    is_one: bool


Form = tuple[Any, ...]


class Key:
    """Where the key of an instance is that was given to a filter.

    Attributes:
        place: of the value, or of the list of them.
        name: the instance's attribute.
        kind: the key's type.
        is_list: whether it is a list.
    """

    def __init__(self, place: int, name: str, kind: type, is_list: bool) -> None:
        self.place = place
        self.name = name
        self.kind = kind
        self.is_list = is_list

    def of(self, value: Any) -> Any:
        """The key of an instance, or the keys of many; None if one is of another type."""
        if not self.is_list:
            key = value.__dict__.get(self.name)
            return key if type(key) is self.kind else None
        keys = tuple([each.__dict__.get(self.name) for each in value])
        return keys if set(map(type, keys)) == {self.kind} else None


def kind_of(value: Any) -> Any:
    """The type of a value, or what stands for it; None if it cannot be recorded."""
    kind = type(value)
    if kind in _LISTS:
        each = _kind_of_each(value)
        return None if each is None else Many(each, len(value) == 1)
    if kind is str:
        return Digits if _is_number(value) else str
    if kind in _FIELDS:
        if kind is int and not -_HUGE < value < _HUGE:
            return None
        if kind is datetime.datetime and value.tzinfo is None:
            return None  # what Django makes of it depends on settings
        return None if kind is decimal.Decimal and not value.is_finite() else kind
    if isinstance(value, Model) or (isinstance(value, enum.Enum) and isinstance(value, int | str)):
        return kind
    return None


def _kind_of_each(values: Any) -> Any:
    """What all values of a list are; None if there are none, or of different types."""
    kinds: set[Any] = set(map(type, values))
    if kinds == {str}:
        return Digits if all(map(_is_number, values)) else str
    if len(kinds) != 1:
        return None
    if kinds == {int}:
        return int if min(values) > -_HUGE and max(values) < _HUGE else None
    kinds = set(map(kind_of, values))
    kind = kinds.pop()
    return None if kinds or type(kind) is Many else kind


def _plain(value: Any) -> Any:
    """A value as it is recorded: what is lazy made, of a list all that is in it now."""
    kind = type(value)
    if kind is SimpleLazyObject:
        made = value.__reduce__()[1][0]
        return made if isinstance(made, Model) else value
    return tuple(value) if kind in _LISTS else value


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
        value = _plain(value)
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
            is_value = isinstance(kind, type | Many)
            children.append((part, next(values) if is_value else kind))
    return Q(*children, _connector=connector, _negated=negated)


def add_watched(query: Any, q: Any, by: Any = None) -> list[tuple[Any, Any]]:
    """`query.add_q(q)`; the values with the lookups that they were given to, in that order.

    Args:
        by: what makes the lookups; None: as Django finds them.
    """
    seen: list[tuple[Any, Any]] = []
    build = query.build_lookup

    def build_lookup(lookups: Any, lhs: Any, rhs: Any) -> Any:
        lookup = build(lookups, lhs, rhs) if by is None else by[len(seen)].again(lhs, rhs)
        seen.append((rhs, lookup))
        return lookup

    query.build_lookup = build_lookup
    try:
        query.add_q(q)
    finally:
        del query.build_lookup
    return seen


class Prepared:
    """A lookup as Django has made it, for other values of the type: they are prepared likewise.

    Whatever somebody has put in the place of Django's functions since then is not called.
    """

    def __init__(self, given: Any, lookup: Any) -> None:
        self._class = type(lookup)
        self._is_constant = given is None or type(given) is bool
        own = {"lhs"} if self._is_constant else {"lhs", "rhs"}
        self._state = {name: value for name, value in vars(lookup).items() if name not in own}
        self._is_list = type(given) in _LISTS
        each = (next(iter(given)), lookup.rhs[0]) if self._is_list else (given, lookup.rhs)
        before, after = map(type, each)
        is_kept = before is after or issubclass(before, Model)
        self._prepare: Callable[[Any], Any] = _itself if is_kept else after

    def again(self, lhs: Any, value: Any) -> Any:
        """The lookup for another value."""
        lookup = object.__new__(self._class)
        vars(lookup).update(self._state, lhs=lhs)
        if not self._is_constant:
            prepare = self._prepare
            lookup.rhs = [*map(prepare, value)] if self._is_list else prepare(value)
        return lookup


def _itself(value: Any) -> Any:
    return value


def of_values(seen: list[tuple[Any, Any]], values: list[Any]) -> list[Any] | None:
    """The lookup of each value that is no constant; None if it is not one for each."""
    found = [(rhs, lookup) for rhs, lookup in seen if rhs is not None and type(rhs) is not bool]
    if len(found) != len(values) or not all(
        _is_same(_plain(rhs), value) for (rhs, _), value in zip(found, values, strict=True)
    ):
        return None
    return [lookup for _, lookup in found]


def _is_same(rhs: Any, value: Any) -> bool:
    if type(value) is tuple:
        return type(rhs) is tuple and len(rhs) == len(value) and all(map(is_, rhs, value))
    return rhs is value


def fields_of(seen: list[tuple[Any, Any]]) -> list[Any] | None:
    """The fields that a filter compares; None if it may depend on when it is made.

    A lookup is found, and prepares its value, when somebody filters: it has to be the same later.
    """
    fields: list[Any] = []
    for _, lookup in seen:
        lhs = lookup.lhs
        if (
            type(lhs) is not Col
            or lookup.bilateral_transforms
            or type(lookup) not in _LOOKUPS | _OF_LISTS | NULLS
        ):
            return None
        there = [getattr(each, "field", each) for each in (lhs.target, lhs.output_field)]
        fields += {*there, *map(target_of, there)}
    return fields if all(map(is_told, fields)) else None


def is_told(field: Any) -> bool:
    """Whether a field finds and prepares as Django's do, whenever that is."""
    return (
        isinstance(field, models.Field)
        and grounds.speaks_for_itself(field, short=True)
        and all(
            getattr(getattr(type(field), name), "__module__", "").startswith("django.")
            for name in ("get_prep_value", "to_python")
        )
    )


def joins_plainly(query: Any) -> bool:
    """Whether what a query selects and joins does not depend on when that is made."""
    if any(type(col) is not Col for col in query.select):
        return False
    joins = [join.join_field for join in query.alias_map.values() if type(join) is Join]
    fields: list[Any] = [*joins, *(col.target for col in query.select)]
    return all(
        grounds.speaks_for_itself(getattr(field, "field", field), short=True) for field in fields
    )


def keys_of(found: list[Any], values: list[Any]) -> list[Key] | None:
    """The keys of the instances among the values.

    None: another value of the same type might not be taken by its lookup.
    """
    keys = []
    for place, (lookup, value) in enumerate(zip(found, values, strict=True)):
        is_list = type(value) is tuple
        if isinstance(value[0] if is_list else value, Model):
            key = _key_of(lookup, value, place, is_list)
            if key is None:
                return None
            keys.append(key)
            continue
        kind = kind_of(value)
        if (
            type(lookup) not in (_OF_LISTS if is_list else _LOOKUPS)
            or kind is None
            or not takes(lookup.lhs.output_field, kind.kind if is_list else kind)
        ):
            return None
    return keys


def _key_of(lookup: Any, value: Any, place: int, is_list: bool) -> Key | None:
    """The key of an instance, or those of many; None if its lookup has taken something else."""
    field: Any = lookup.lhs.output_field
    if type(lookup) is not (RelatedIn if is_list else RelatedExact) or type(field) not in TO_ONE:
        return None
    target = field.target_field
    for each, rhs in zip(value, lookup.rhs, strict=True) if is_list else [(value, lookup.rhs)]:
        key = each.__dict__.get(target.attname)
        if not (
            target.primary_key
            and isinstance(each, target.model)
            and type(key) is type(rhs)
            and key == rhs
            and takes(target, type(key))
        ):
            return None
    made = Key(place, target.attname, type(key), is_list)
    return None if made.of(value) is None else made


def takes(field: Any, kind: Any) -> bool:
    """Whether a field takes each value of a type."""
    cls: Any = type(target_of(field))
    return _takes(cls, kind)


def is_djangos(field: Any) -> bool:
    """Whether a field is one of Django's own, not one of somebody's subclass of it."""
    return type(target_of(field)) in _ALL_FIELDS


@functools.lru_cache(maxsize=1024)
def _takes(cls: Any, kind: Any) -> bool:
    bases = _FIELDS.get(kind, set()) | (_FIELDS[str] if kind in _AS_TEXT else set())
    if issubclass(kind, enum.Enum):
        bases = _FIELDS[int if issubclass(kind, int) else str]
    return any(
        issubclass(cls, base)
        and cls.get_prep_value is base.get_prep_value
        and cls.to_python is base.to_python
        for base in bases
    )


def snapshot(keys: list[Key], values: list[Any]) -> bool:
    """Put the instances' keys into their places; False if one has none of the kind."""
    for key in keys:
        if (found := key.of(values[key.place])) is None:
            return False
        values[key.place] = found
    return True
