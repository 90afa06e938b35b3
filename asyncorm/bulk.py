"""`bulk_create()`: the INSERT of many objects, with an array for each column.

The SQL is Django's, with arrays for UNNEST (columnar.py); where Django would write something else,
it does so itself. Of many objects the server inserts some while the next are made ready, as
Django's batches in one transaction.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING, Any

import django
from django.db import models, transaction
from django.db.backends.postgresql.compiler import SQLInsertCompiler
from django.db.models import Field, Model
from django.db.models.query import QuerySet
from django.db.models.sql.compiler import SQLCompiler
from django.db.models.sql.subqueries import InsertQuery
from psycopg.adapt import PyFormat
from psycopg.pq import Format

from . import _events, bridge, columnar, grounds, verifying
from ._cache.execute import direct, serves
from ._cache.plan import Plan
from ._wire.statement import Reading, Statement
from .binding import has_djangos_type, writes_as_django
from .columnar import PRE_SAVES
from .grounds import Ground
from .rows import RowMaker, tuple_of
from .shapes import NotCacheable
from .statements import UNPLANNED, Compiled, count, hit, learn, recall
from .wrappers import Wrapper

if TYPE_CHECKING:
    from .driver import Connection


BATCH = 1000  # objects in one INSERT, if the caller does not say


def insert(
    compiler: SQLInsertCompiler, wrapper: Wrapper, returning: tuple[Any, ...]
) -> list[Any] | None:
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
    queryset: QuerySet[Any], objs: list[Any], fields: list[Any], size: int, wrapper: Wrapper
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
                bridge.wait_for(bridge.running(), conn.interrupt())
                raise
    if len(rows) != len(objs):
        return rows
    for field, values in zip(returning, zip(*rows, strict=True), strict=True):
        name = field.attname
        for obj, value in zip(objs, values, strict=True) if field is not kept else ():
            setattr(obj, name, value)
    return [()] * len(objs)


def _start(
    plan: Plan, statement: Statement, wrapper: Wrapper, conn: Connection
) -> Callable[[], list[Any]]:
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
        if (maker := plan.maker) is None:
            return []
        with wrapper.wrap_database_errors:
            loaded = maker.load(result, conn)
            return maker.made(loaded, conn.give_turn, wrapper.alias, wrapper, None)

    return receive


def _told(statement: Statement, wrapper: Wrapper) -> AbstractContextManager[Any]:
    """An INSERT for those who listen."""
    if not _events.statements:
        return nullcontext()
    text, params = statement.text, statement.params
    return _events.statement(wrapper.alias, text, params, wrapper.in_atomic_block, "hit")


def _made(
    compiler: Any, wrapper: Wrapper, returning: tuple[Any, ...], conn: Any
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
            arrays = [columnar.array(field, query.objs, wrapper, conn) for field in fields]
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
    model: Any,
    fields: Iterable[Field[Any, Any]],
    objs: list[Any],
    returning: tuple[Any, ...],
    wrapper: Wrapper,
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


def _elements(
    fields: Sequence[Field[Any, Any]],
    arrays: Sequence[Any],
    formats: Sequence[int],
    conn: Connection,
) -> list[Any]:
    """What there is in the arrays: binary ones as they are, the texts of others."""
    read = conn.transformer.get_loader(columnar.TEXT_ARRAY, Format.TEXT).load
    found: list[Any] = []
    for field, array, format in zip(fields, arrays, formats, strict=True):
        texts: Any = bytes(array) if format else read(array)
        ready = columnar.ready_of(field)
        if ready is columnar.OF_UUIDS:
            texts = [text and text.replace("-", "") for text in texts]
        elif ready is columnar.OF_BOOLEANS:
            texts = [text and text[0].lower() for text in texts]
        found.append(texts)
    return found


def _plan(
    compiler: Any, wrapper: Any, fields: tuple[Any, ...], returning: tuple[Any, ...]
) -> tuple[Plan, Ground]:
    """The plan of an INSERT with an array for each field.

    Raises:
        NotCacheable: Django makes another one.
    """
    objs = compiler.query.objs
    compiler.returning_fields = list(returning)
    compiler.query.objs = [copy(obj) for obj in objs[:2]]  # pre_save() may change them
    try:
        ((sql, params),) = compiler.as_sql()
    finally:
        compiler.query.objs = objs
    if len(params) != len(fields) or not all(type(p) is list and len(p) == 2 for p in params):
        raise NotCacheable
    maker = maker_of_returned(compiler, wrapper, returning)
    kinds: list[Any] = [{} for _ in fields]
    plan = Plan(
        _in_step(sql), kinds, maker, (fields, returning), by_server=writes_as_django(wrapper)
    )
    if plan.query is None:
        raise NotCacheable
    return plan, grounds.of_query(compiler.query, (fields, returning), maker, wrapper, ())


_UNNEST = re.compile(r"SELECT \* FROM UNNEST\((.*\[\])\)", re.DOTALL)
_BETWEEN_ARRAYS = re.compile(r", (?=\(%s\))")


def _in_step(sql: str) -> str:
    """The SQL with an UNNEST for each array: the server keeps no copy of the rows then."""

    def each(match: re.Match[str]) -> str:
        arrays = _BETWEEN_ARRAYS.split(match[1])
        return f"SELECT {', '.join(f'UNNEST({array})' for array in arrays)}"

    return _UNNEST.sub(each, sql)


def maker_of_returned(
    compiler: SQLCompiler, wrapper: Wrapper, returning: tuple[Any, ...]
) -> RowMaker | None:
    """Makes tuples of the columns that an INSERT returns, None if there are none.

    Raises:
        NotCacheable: they have converters of the backend, which may belong to one connection.
    """
    if not returning:
        return None
    columns = [field.get_col(compiler.query.get_meta().db_table) for field in returning]
    if any(wrapper.ops.get_db_converters(column) for column in columns):
        raise NotCacheable
    maker = RowMaker(len(columns), compiler.get_converters(columns))
    maker.item = tuple_of(len(columns))
    return maker


# From Django 6.0 on it is told which objects have keys.
_TELLS_KEYS = django.VERSION >= (6, 0)
_KEEPS_KEYS = django.VERSION < (6, 1)
_KEYS = (models.AutoField, models.BigAutoField, models.SmallAutoField)


def prepare(queryset: Any, objs: list[Any]) -> Any:
    """What `_prepare_for_bulk_create()` would do and return.

    Raises:
        NotCacheable: the objects are not all new, with keys that the database makes.
    """
    model = queryset.model
    key = model._meta.pk
    if (
        type(key) not in _KEYS
        or not _prepares_as_django(model)
        or key.has_default()
        or set(map(type, objs)) != {model}
        or list(map(attrgetter(key.attname), objs)).count(None) != len(objs)
    ):
        raise NotCacheable
    queryset._db = queryset.db  # asked for each object later on
    if any(f.is_relation for f in (*model._meta.concrete_fields, *model._meta.private_fields)):
        for obj in objs:
            if obj._state.fields_cache:
                obj._prepare_related_fields_for_save(operation_name="bulk_create")
    return ([], objs) if _TELLS_KEYS else None


def _prepares_as_django(model: type[Model]) -> bool:
    names = ("pk", "_is_pk_set", "_get_pk_val", "_set_pk_val", "_prepare_related_fields_for_save")
    return grounds.inherits(model, models.Model, names) and not any(
        grounds.is_anothers(vars(models.Model)[name]) for name in names
    )
