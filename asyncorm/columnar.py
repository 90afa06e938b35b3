"""Values of many objects, column by column: as arrays for UNNEST, as lines of a COPY.

Django prepares each value of each object by itself, and psycopg makes each element of an array in
Python. Where all values of a column have the type that its field leaves as it is, the text of the
whole column is made in a few calls; other columns are prepared and dumped as ever.

`Field.pre_save()` and `.get_db_prep_save()` give the values, as they do for Django.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from operator import attrgetter
from types import NoneType
from typing import Any, NamedTuple
from uuid import UUID

from django.db import models
from django.db.models import Field
from psycopg.adapt import PyFormat
from psycopg.pq import Format

from .shapes import NotCacheable
from .wrappers import Wrapper

SLICE = 1000  # objects between two looks whether other tasks are to have a turn
TEXT_ARRAY, _TIMESTAMPTZ, _TIMESTAMPTZ_ARRAY = 1009, 1184, 1185
_SEPARATOR = "\0"  # between texts of PostgreSQL, which have none


class Style(NamedTuple):
    """How texts are written beside each other."""

    escapes: tuple[tuple[str, str], ...]
    quote: str
    null: str


ARRAY = Style((("\\", "\\\\"), ('"', '\\"')), '"', "NULL")
COPY = Style((("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")), "", "\\N")


class Ready(NamedTuple):
    """Values that `get_db_prep_save()` leaves as they are.

    Attributes:
        types: of theirs.
        fits: whether a value of such a type is one; None: all are.
        bare: their text needs no escapes.
    """

    types: frozenset[type]
    fits: Callable[[Any], Any] | None = None
    bare: bool = True

    def takes(self, value: object) -> bool:
        """Whether a value is one of those; None is not."""
        return type(value) in self.types and (self.fits is None or bool(self.fits(value)))


_INTEGER = Ready(frozenset({int}))
OF_BOOLEANS = Ready(frozenset({bool}))
OF_UUIDS = Ready(frozenset({UUID}))
_STRING = Ready(frozenset({str}), bare=False)
_JSON = Ready(frozenset({dict, list, str, int, float, bool}), bare=False)
# For fields of exactly these classes, and foreign keys to them.
_READY: dict[type, Ready] = {
    models.AutoField: _INTEGER,
    models.BigAutoField: _INTEGER,
    models.BigIntegerField: _INTEGER,
    models.BooleanField: OF_BOOLEANS,
    models.CharField: _STRING,
    models.DateField: Ready(frozenset({date})),
    models.DateTimeField: Ready(frozenset({datetime}), lambda v: v.utcoffset() is not None),
    models.DecimalField: Ready(frozenset({Decimal}), Decimal.is_finite),
    models.EmailField: _STRING,
    models.FloatField: Ready(frozenset({float})),
    models.IntegerField: _INTEGER,
    models.JSONField: _JSON,
    models.PositiveBigIntegerField: _INTEGER,
    models.PositiveIntegerField: _INTEGER,
    models.PositiveSmallIntegerField: _INTEGER,
    models.SlugField: _STRING,
    models.SmallAutoField: _INTEGER,
    models.SmallIntegerField: _INTEGER,
    models.TextField: _STRING,
    models.TimeField: Ready(frozenset({time}), lambda v: v.tzinfo is None),
    models.URLField: _STRING,
    models.UUIDField: OF_UUIDS,
}


def ready_of(field: Any) -> Ready | None:
    if type(field) in (models.ForeignKey, models.OneToOneField):
        field = field.target_field
    return _READY.get(type(field))


def as_is(field: Field[Any, Any]) -> Ready | None:
    """Which values of a field psycopg takes as they are, None: all have to be prepared."""
    ready = _READY.get(type(field)) or ready_of(field)
    return None if ready is _JSON else ready


_MOST_KINDS = 64  # combinations of types that are kept


class Preparing:
    """What `get_db_prep_save()` makes of the values of one object.

    Of values of the same types the same ones are as they are: those are found once.

    Args:
        ready: for each field which of its values are; None: all have to be prepared.
    """

    def __init__(self, fields: Sequence[Any], ready: Sequence[Ready | None]) -> None:
        self._fields = fields
        self._ready = ready
        self._others: dict[Any, list[tuple[int, Any, Callable[[Any], Any] | None]]] = {}

    def params(self, values: Sequence[Any], wrapper: Wrapper) -> list[Any] | None:
        """The values as Django prepares them, None if that is to be left to it: an expression, or
        the column's default."""
        kinds = tuple(map(type, values))
        others = self._others.get(kinds)
        if others is None:
            others = self._find_others(kinds)
        params = list(values)
        for place, field, fits in others:
            value = params[place]
            if fits is not None and fits(value):
                continue
            if hasattr(value, "resolve_expression") or hasattr(value, "prepare_database_save"):
                return None
            made = field.get_db_prep_save(value, connection=wrapper)
            if hasattr(made, "as_sql"):
                return None
            params[place] = made
        return params

    def _find_others(self, kinds: tuple[type, ...]) -> Any:
        places = enumerate(zip(self._fields, self._ready, kinds, strict=True))
        others: list[Any] = []
        for place, (field, ready, kind) in places:
            known = ready is not None and kind in ready.types
            fits = ready.fits if ready is not None and known else None
            if not known or fits is not None:
                others.append((place, field, fits))
        if len(self._others) >= _MOST_KINDS:
            self._others.clear()
        self._others[kinds] = others
        return others


def _texts(field: Field[Any, Any], values: list[Any], style: Style) -> list[str] | None:
    """The values as PostgreSQL reads them; None if each has to be prepared first."""
    ready = ready_of(field)
    types = set(map(type, values))
    if ready is None or not types - {NoneType} <= ready.types:
        return None
    there = [v for v in values if v is not None] if NoneType in types else values
    if ready.fits is not None and not all(map(ready.fits, there)):
        return None
    if ready.bare:
        texts = list(map(str, there))
    elif not there:
        texts = []
    else:
        texts = escaped(_json(field, there) if ready is _JSON else _joined(there), style)
    return texts if there is values else _with_nulls(texts, values, style)


def _with_nulls(texts: list[str], values: list[Any], style: Style) -> list[str]:
    rest = iter(texts)
    return [style.null if value is None else next(rest) for value in values]


def _joined(texts: list[str]) -> str:
    """One text of many.

    Raises:
        NotCacheable: psycopg would refuse one.
    """
    joined = _SEPARATOR.join(texts)
    if joined.count(_SEPARATOR) != len(texts) - 1:
        raise NotCacheable
    return joined


_MARK = "\0"
_DUMPED_MARK = f", {json.dumps(_MARK)}, "


def _json(field: Any, values: list[Any]) -> str:
    """The JSON of the values, joined: they are dumped as one list, which takes half the time."""
    encoder = field.encoder or json.JSONEncoder
    if (
        encoder.encode is json.JSONEncoder.encode
        and encoder.iterencode is json.JSONEncoder.iterencode
    ):
        marked = [_MARK] * (2 * len(values) - 1)
        marked[::2] = values
        joined = json.dumps(marked, cls=field.encoder)[1:-1]
        if joined.count(_DUMPED_MARK) == len(values) - 1:
            return joined.replace(_DUMPED_MARK, _SEPARATOR)
    return _joined([json.dumps(value, cls=field.encoder) for value in values])


def escaped(joined: str, style: Style) -> list[str]:
    """The joined texts, with escapes and quotes."""
    for char, escape in style.escapes:
        joined = joined.replace(char, escape)
    if quote := style.quote:
        joined = quote + joined.replace(_SEPARATOR, quote + _SEPARATOR + quote) + quote
    return joined.split(_SEPARATOR)


def prepared(field: Field[Any, Any], values: list[Any], wrapper: Wrapper) -> list[Any]:
    """The values as Django prepares them.

    Raises:
        NotCacheable: one is an expression.
    """
    if any(hasattr(value, "resolve_expression") for value in values):
        raise NotCacheable
    made = [field.get_db_prep_save(value, connection=wrapper) for value in values]
    if any(hasattr(value, "as_sql") for value in made):
        raise NotCacheable
    return made


# They do nothing but give the value, or the time now, which they set.
PRE_SAVES = {
    cls.pre_save for cls in (models.Field, models.DateField, models.DateTimeField, models.TimeField)
}


def is_stored(field: Any) -> bool:
    """Whether what an object has is saved as it is, at least for now."""
    return type(field).pre_save in PRE_SAVES and not (
        getattr(field, "auto_now", False) or getattr(field, "auto_now_add", False)
    )


def getter(field: Field[Any, Any]) -> Callable[[Any], Any]:
    """What gives an object's value to be saved."""
    if is_stored(field):
        return attrgetter(field.attname)
    return lambda obj: field.pre_save(obj, True)


def row_getter(fields: Sequence[Any], *, raw: bool = False, add: bool = True) -> Any:
    """What gives the values of an object that are to be saved, as `pre_save()` does."""
    others = [] if raw else [f for f in fields if type(f).pre_save is not models.Field.pre_save]
    get = attrgetter(*(field.attname for field in fields))

    def values(obj: Any) -> Sequence[Any]:
        if all(map(is_stored, others)):
            return get(obj) if len(fields) > 1 else (get(obj),)
        return [getattr(obj, f.attname) if raw else f.pre_save(obj, add) for f in fields]

    return values


def slices(objs: list[Any], turn: Callable[[], None]) -> Iterator[list[Any]]:
    """The objects, some at a time; `turn()` may let other tasks run between."""
    for start in range(0, len(objs), SLICE):
        yield objs[start : start + SLICE]
        turn()


def array(
    field: Field[Any, Any], objs: list[Any], wrapper: Wrapper, conn: Any
) -> tuple[Any, int, int]:
    """The values of a field as a parameter, its type (0 is that of the column) and its format."""
    get = getter(field)
    if type(field) is models.DateTimeField:
        with suppress(NotCacheable):
            return _times(objs, get, conn), _TIMESTAMPTZ_ARRAY, Format.BINARY
    parts = []
    for some in slices(objs, conn.give_turn):
        texts = _texts(field, list(map(get, some)), ARRAY)
        if texts is None:
            break
        parts.append(",".join(texts))
    else:
        return f"{{{','.join(parts)}}}".encode(conn.info.encoding), 0, Format.TEXT
    values = prepared(field, list(map(get, objs)), wrapper)
    transformer = conn.transformer
    (array,) = transformer.dump_sequence([values], [PyFormat.TEXT])
    oid = transformer.types[0]
    return array, 0 if oid == TEXT_ARRAY else oid, Format.TEXT


_EPOCH, _MICROSECOND = datetime(2000, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


def _times(objs: list[Any], get: Callable[[Any], Any], conn: Any) -> bytes:
    """Aware datetimes as a binary array: both sides read and write text several times slower."""
    # One dimension, no nulls, the elements' type, how many, the first one's number.
    parts = [struct.pack(">iiIii", 1, 0, _TIMESTAMPTZ, len(objs), 1)]
    for some in slices(objs, conn.give_turn):
        values = list(map(get, some))
        if set(map(type, values)) != {datetime}:
            raise NotCacheable
        items = [8] * (2 * len(values))  # each after its length
        try:
            items[1::2] = [(value - _EPOCH) // _MICROSECOND for value in values]
        except TypeError:  # a naive one
            raise NotCacheable from None
        parts.append(struct.pack(f">{'iq' * len(values)}", *items))
    return b"".join(parts)


def copy_lines(objs: list[Any], fields: list[Any], wrapper: Any, transformer: Any) -> bytes:
    """The rows of some objects in COPY's text format.

    Raises:
        NotCacheable: a value is an expression, or psycopg would refuse it.
    """
    encoding = transformer.encoding
    columns = []
    for field in fields:
        values = list(map(getter(field), objs))
        texts = _texts(field, values, COPY)
        if texts is None:
            made = prepared(field, values, wrapper)
            dumped = transformer.dump_sequence(made, [PyFormat.TEXT] * len(made))
            there = [str(text, encoding) for text in dumped if text is not None]
            texts = _with_nulls(escaped(_joined(there), COPY) if there else [], dumped, COPY)
        columns.append(texts)
    lines = "\n".join(map("\t".join, zip(*columns, strict=True)))
    return f"{lines}\n".encode(encoding)
