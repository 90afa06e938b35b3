"""Many objects, column by column: the INSERT of `bulk_create()`, and the text of a COPY.

Django prepares each value of each object by itself, and psycopg makes each element of an array in
Python. Where all values of a column have the type that its field leaves as it is, the text of the
whole column is made in a few calls; other columns are prepared and dumped as ever. The SQL is
Django's, with arrays for UNNEST; where Django would write something else, it does so itself.
Of many objects the server inserts some while the next are made ready, as Django's batches in one
transaction.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `SQLInsertCompiler`, `InsertQuery.fields`, `.objs`, `.raw`, `.on_conflict`: the INSERT.
- `QuerySet._prepare_for_bulk_create`, `._db`, `Model._is_pk_set`, `._get_pk_val`, `._set_pk_val`,
  `._prepare_related_fields_for_save`, `ModelState.fields_cache`: what `bulk_create()` does with
  each object at first.
- `Field.pre_save`, `.get_db_prep_save`: the values.
- `InsertQuery.insert_values`, `Options.db_returning_fields`: what `QuerySet._insert()` makes.
"""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from operator import attrgetter
from time import monotonic
from types import NoneType
from typing import Any, NamedTuple
from uuid import UUID

import django
from django.db import models, transaction
from django.db.backends.postgresql.compiler import SQLInsertCompiler
from django.db.models.sql.subqueries import InsertQuery
from psycopg.adapt import PyFormat
from psycopg.pq import Format

from . import _events, bridge, grounds, verifying
from ._cache.execute import direct, serves
from ._cache.plan import Plan
from ._wire.statement import Reading, Statement
from .binding import has_djangos_type, writes_as_django
from .grounds import Ground
from .rows import RowMaker, tuple_of
from .shapes import Unfit
from .statements import UNPLANNED, Compiled, count, hit, learn, recall

SLICE = 1000  # objects between two looks whether other tasks are to have a turn
_TEXT_ARRAY, _TIMESTAMPTZ, _TIMESTAMPTZ_ARRAY = 1009, 1184, 1185
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

    def takes(self, value: Any) -> bool:
        """Whether a value is one of those; None is not."""
        return type(value) in self.types and (self.fits is None or bool(self.fits(value)))


_INTEGER = Ready(frozenset({int}))
_BOOLEAN = Ready(frozenset({bool}))
_UUID = Ready(frozenset({UUID}))
_STRING = Ready(frozenset({str}), bare=False)
_JSON = Ready(frozenset({dict, list, str, int, float, bool}), bare=False)
# For fields of exactly these classes, and foreign keys to them.
_READY: dict[type, Ready] = {
    models.AutoField: _INTEGER,
    models.BigAutoField: _INTEGER,
    models.BigIntegerField: _INTEGER,
    models.BooleanField: _BOOLEAN,
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
    models.UUIDField: _UUID,
}


def _ready_of(field: Any) -> Ready | None:
    if type(field) in (models.ForeignKey, models.OneToOneField):
        field = field.target_field
    return _READY.get(type(field))


def as_is(field: Any) -> Ready | None:
    """Which values of a field psycopg takes as they are, None: all have to be prepared."""
    ready = _ready_of(field)
    return None if ready is _JSON else ready


def _texts(field: Any, values: list[Any], style: Style) -> list[str] | None:
    """The values as PostgreSQL reads them; None if each has to be prepared first."""
    ready = _ready_of(field)
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
        Unfit: psycopg would refuse one.
    """
    joined = _SEPARATOR.join(texts)
    if joined.count(_SEPARATOR) != len(texts) - 1:
        raise Unfit
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


def prepared(field: Any, values: list[Any], wrapper: Any) -> list[Any]:
    """The values as Django prepares them.

    Raises:
        Unfit: one is an expression.
    """
    if any(hasattr(value, "resolve_expression") for value in values):
        raise Unfit
    made = [field.get_db_prep_save(value, connection=wrapper) for value in values]
    if any(hasattr(value, "as_sql") for value in made):
        raise Unfit
    return made


# They do nothing but give the value, or the time now, which they set.
PRE_SAVES = {
    cls.pre_save for cls in (models.Field, models.DateField, models.DateTimeField, models.TimeField)
}


def getter(field: Any) -> Callable[[Any], Any]:
    """What gives an object's value to be saved."""
    if type(field).pre_save in PRE_SAVES and not (
        getattr(field, "auto_now", False) or getattr(field, "auto_now_add", False)
    ):
        return attrgetter(field.attname)
    return lambda obj: field.pre_save(obj, True)


def slices(objs: list[Any], turn: Callable[[], None]) -> Iterator[list[Any]]:
    """The objects, some at a time; `turn()` may let other tasks run between."""
    for start in range(0, len(objs), SLICE):
        yield objs[start : start + SLICE]
        turn()


# INSERT


BATCH = 1000  # objects in one INSERT, if the caller does not say


def insert(compiler: Any, wrapper: Any, returning: tuple[Any, ...]) -> list[Any] | None:
    """Execute an INSERT of several rows; what it returns, or None if it is left to Django.

    Raises:
        django.db.Error: as Django's cursor does.
    """
    if (conn := direct(wrapper)) is None:
        return None
    made = _made(compiler, wrapper, returning, conn)
    if made is None:
        return None
    plan, statement = made
    wrapper.validate_no_broken_transaction()
    maker = plan.maker
    with _told(statement, wrapper), wrapper.wrap_database_errors:
        if maker is None:
            conn.run(_events.followed(statement))
            return []
        loaded = conn.run(_events.followed(Reading(statement, maker.load)))
    with wrapper.wrap_database_errors:
        return maker.made(loaded, conn.give_turn, wrapper.alias, wrapper, None)


def insert_batches(
    queryset: Any, objs: list[Any], fields: list[Any], size: int, wrapper: Any
) -> list[Any]:
    """INSERTs in one transaction, `size` objects each: the server executes one while the next is
    made. What they return, empty rows if the objects have it already.

    Raises:
        django.db.Error: as Django's cursor does.
    """
    opts = queryset.model._meta
    returning = tuple(opts.db_returning_fields)
    # Before Django 6.1 objects that have keys keep them as they are, say a str.
    kept = opts.pk if _KEEPS_KEYS and objs[0]._is_pk_set() else None
    batches = [objs[start : start + size] for start in range(0, len(objs), size)]
    rows: list[Any] = []
    with transaction.atomic(using=wrapper.alias, savepoint=False):
        wrapper.ensure_connection()
        conn = wrapper.connection
        ours = serves(conn, wrapper)
        with conn.lock:
            receive: Callable[[], list[Any]] | None = None
            try:
                for batch in batches:
                    query = InsertQuery(queryset.model)
                    query.insert_values(fields, batch)
                    compiler = query.get_compiler(using=wrapper.alias)
                    made = _made(compiler, wrapper, returning, conn) if ours else None
                    if receive is not None:
                        rows += receive()
                        receive = None
                    if made is not None:
                        receive = _start(*made, wrapper, conn)
                    else:  # Django will say what is wrong with a value
                        rows += compiler.execute_sql(returning)
                if receive is not None:
                    rows += receive()
            except BaseException:  # one may be under way
                runner = bridge.current()
                assert runner is not None
                bridge.wait_for(runner, conn.interrupt())
                raise
    if len(rows) != len(objs):
        return rows
    for field, values in zip(returning, zip(*rows, strict=True), strict=True):
        name = field.attname
        for obj, value in zip(objs, values, strict=True) if field is not kept else ():
            setattr(obj, name, value)
    return [()] * len(objs)


def _start(plan: Plan, statement: Statement, wrapper: Any, conn: Any) -> Callable[[], list[Any]]:
    wrapper.validate_no_broken_transaction()
    started = monotonic()
    with wrapper.wrap_database_errors:
        received = conn.start(statement)

    def receive() -> list[Any]:
        with _told(statement, wrapper) as told:
            if told is not None:
                told.began = told.sent = started
                told.connection = conn.pgconn.backend_pid
            with wrapper.wrap_database_errors:
                result = received()
            if told is not None:
                told.rows = int(result.command_tuples or 0)
        with wrapper.wrap_database_errors:
            return _rows(plan, result, wrapper, conn)

    return receive


def _told(statement: Statement, wrapper: Any) -> AbstractContextManager[Any]:
    """An INSERT for those who listen."""
    if not _events.statements:
        return nullcontext()
    text, params = statement.text, statement.params
    return _events.statement(wrapper.alias, text, params, wrapper.in_atomic_block, "hit")


def _rows(plan: Plan, result: Any, wrapper: Any, conn: Any) -> list[Any]:
    maker = plan.maker
    return [] if maker is None else maker.make(result, conn, wrapper.alias, wrapper, None)


def _made(
    compiler: Any, wrapper: Any, returning: tuple[Any, ...], conn: Any
) -> tuple[Plan, Statement] | None:
    """The INSERT with its values, None if it is left to Django."""
    query = compiler.query
    fields = tuple(query.fields)
    if (
        type(compiler) is not SQLInsertCompiler
        or type(query) is not InsertQuery
        or query.on_conflict  # type: ignore[attr-defined]
        or query.raw
        or not fields
        or not all(type(f).pre_save in PRE_SAVES and has_djangos_type(f) for f in fields)
    ):
        return None
    key = (
        wrapper.alias, insert, query.model, query.get_meta().db_table,
        tuple(map(id, fields)), tuple(map(id, returning)),
    )  # fmt: skip
    plan = recall(key)
    known = plan is not UNPLANNED
    statement = None
    if plan is not None:
        with suppress(Exception):  # Django will say what is wrong with a value
            arrays = [_array(field, query.objs, wrapper, conn) for field in fields]
            params, types, formats = zip(*arrays, strict=True)
            if plan is UNPLANNED:
                count("misses")
                make = functools.partial(_plan, compiler, wrapper, fields, returning)
                plan = learn(key, query.model, make)
            if plan is not None:
                statement = Statement(plan.query, params, types, formats, text=plan.text)
    if statement is None:
        count("unfit")
        return None
    if known:
        elements = _elements(fields, params, formats, conn) if verifying.active else ()
        compile = lambda: _again(compiler, fields, returning, formats, conn)  # noqa: E731
        if not hit(key, plan, elements, 0, compile):
            return None
    return plan, statement


def compiled_again(
    model: Any, fields: Any, objs: list[Any], returning: tuple[Any, ...], wrapper: Any
) -> Compiled:
    """Django's INSERT of objects that `pre_save()` has been called for: their values are there."""
    query = InsertQuery(model)
    query.insert_values(fields, objs, raw=True)
    compiler: Any = query.get_compiler(using=wrapper.alias)
    compiler.returning_fields = list(returning)
    ((sql, params),) = compiler.as_sql()
    return sql, params, maker_of_returned(compiler, wrapper, returning)


def _again(
    compiler: Any, fields: Any, returning: tuple[Any, ...], formats: Any, conn: Any
) -> Compiled:
    """The same of many objects, with its arrays dumped by psycopg."""
    query, wrapper, count = compiler.query, compiler.connection, len(compiler.query.objs)
    objs = [*query.objs, query.objs[0]]  # there may be one left, and Django makes no array of one
    sql, lists, maker = compiled_again(query.model, fields, objs, returning, wrapper)
    lists = [values[:count] for values in lists]
    binary = [PyFormat.BINARY if format else PyFormat.TEXT for format in formats]
    arrays = conn.transformer.dump_sequence(lists, binary)
    return _in_step(sql), _elements(fields, arrays, formats, conn), maker


def _elements(fields: Any, arrays: Any, formats: Any, conn: Any) -> list[Any]:
    """What there is in the arrays: binary ones as they are, the texts of others."""
    read = conn.transformer.get_loader(_TEXT_ARRAY, Format.TEXT).load
    found: list[Any] = []
    for field, array, format in zip(fields, arrays, formats, strict=True):
        texts: Any = bytes(array) if format else read(array)
        ready = _ready_of(field)
        if ready is _UUID:
            texts = [text and text.replace("-", "") for text in texts]
        elif ready is _BOOLEAN:
            texts = [text and text[0].lower() for text in texts]
        found.append(texts)
    return found


def _plan(
    compiler: Any, wrapper: Any, fields: tuple[Any, ...], returning: tuple[Any, ...]
) -> tuple[Plan, Ground]:
    """The plan of an INSERT with an array for each field.

    Raises:
        Unfit: Django makes another one.
    """
    objs = compiler.query.objs
    compiler.returning_fields = list(returning)
    compiler.query.objs = [copy(obj) for obj in objs[:2]]  # pre_save() may change them
    try:
        ((sql, params),) = compiler.as_sql()
    finally:
        compiler.query.objs = objs
    if len(params) != len(fields) or not all(type(p) is list and len(p) == 2 for p in params):
        raise Unfit
    maker = maker_of_returned(compiler, wrapper, returning)
    kinds: list[Any] = [{} for _ in fields]
    plan = Plan(
        _in_step(sql), kinds, maker, (fields, returning), by_server=writes_as_django(wrapper)
    )
    if plan.query is None:
        raise Unfit
    return plan, grounds.of_query(compiler.query, (fields, returning), maker, wrapper, ())


_UNNEST = re.compile(r"SELECT \* FROM UNNEST\((.*\[\])\)", re.DOTALL)
_BETWEEN_ARRAYS = re.compile(r", (?=\(%s\))")


def _in_step(sql: str) -> str:
    """The SQL with an UNNEST for each array: the server keeps no copy of the rows then."""

    def each(match: re.Match[str]) -> str:
        arrays = _BETWEEN_ARRAYS.split(match[1])
        return f"SELECT {', '.join(f'UNNEST({array})' for array in arrays)}"

    return _UNNEST.sub(each, sql)


def maker_of_returned(compiler: Any, wrapper: Any, returning: tuple[Any, ...]) -> RowMaker | None:
    """Makes tuples of the columns that an INSERT returns, None if there are none.

    Raises:
        Unfit: they have converters of the backend, which may belong to one connection.
    """
    if not returning:
        return None
    columns = [field.get_col(compiler.query.get_meta().db_table) for field in returning]
    if any(wrapper.ops.get_db_converters(column) for column in columns):
        raise Unfit
    maker = RowMaker(len(columns), compiler.get_converters(columns))
    maker.item = tuple_of(len(columns))
    return maker


def _array(field: Any, objs: list[Any], wrapper: Any, conn: Any) -> tuple[Any, int, int]:
    """The values of a field as a parameter, its type (0 is that of the column) and its format."""
    get = getter(field)
    if type(field) is models.DateTimeField:
        with suppress(Unfit):
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
    return array, 0 if oid == _TEXT_ARRAY else oid, Format.TEXT


_EPOCH, _MICROSECOND = datetime(2000, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


def _times(objs: list[Any], get: Callable[[Any], Any], conn: Any) -> bytes:
    """Aware datetimes as a binary array: both sides read and write text several times slower."""
    # One dimension, no nulls, the elements' type, how many, the first one's number.
    parts = [struct.pack(">iiIii", 1, 0, _TIMESTAMPTZ, len(objs), 1)]
    for some in slices(objs, conn.give_turn):
        values = list(map(get, some))
        if set(map(type, values)) != {datetime}:
            raise Unfit
        items = [8] * (2 * len(values))  # each after its length
        try:
            items[1::2] = [(value - _EPOCH) // _MICROSECOND for value in values]
        except TypeError:  # a naive one
            raise Unfit from None
        parts.append(struct.pack(f">{'iq' * len(values)}", *items))
    return b"".join(parts)


# COPY


def copy_lines(objs: list[Any], fields: list[Any], wrapper: Any, transformer: Any) -> bytes:
    """The rows of some objects in COPY's text format.

    Raises:
        Unfit: a value is an expression, or psycopg would refuse it.
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


# bulk_create()

# From Django 6.0 on it is told which objects have keys.
_TELLS_KEYS = django.VERSION >= (6, 0)
_KEEPS_KEYS = django.VERSION < (6, 1)
_KEYS = (models.AutoField, models.BigAutoField, models.SmallAutoField)


def prepare(queryset: Any, objs: list[Any]) -> Any:
    """What `_prepare_for_bulk_create()` would do and return; Unfit if the objects are not all new,
    with keys that the database makes."""
    model = queryset.model
    key = model._meta.pk
    if (
        type(key) not in _KEYS
        or not _prepares_as_django(model)
        or key.has_default()
        or set(map(type, objs)) != {model}
        or list(map(attrgetter(key.attname), objs)).count(None) != len(objs)
    ):
        raise Unfit
    queryset._db = queryset.db  # asked for each object later on
    if any(f.is_relation for f in (*model._meta.concrete_fields, *model._meta.private_fields)):
        for obj in objs:
            if obj._state.fields_cache:
                obj._prepare_related_fields_for_save(operation_name="bulk_create")
    return ([], objs) if _TELLS_KEYS else None


def _prepares_as_django(model: Any) -> bool:
    names = ("pk", "_is_pk_set", "_get_pk_val", "_set_pk_val", "_prepare_related_fields_for_save")
    return all(
        getattr(model, name) is getattr(models.Model, name)
        and not grounds.is_anothers(vars(models.Model)[name])
        for name in names
    )
