"""COPY, PostgreSQL's bulk transfer: `copy_to()`, and bulk_create() with method="copy"."""

from __future__ import annotations

import codecs
import csv
import inspect
import io
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import IO, Any

import anyio.to_thread
import psycopg
from django.db import NotSupportedError, connections, models, transaction
from django.db.models import Field, QuerySet
from django.db.models.expressions import DatabaseDefault
from django.db.models.manager import BaseManager
from psycopg import generators
from psycopg.adapt import Transformer
from psycopg.copy import Writer

from . import bridge, columnar, sessions
from .backends import cursors
from .driver import Steps
from .pages import see
from .shapes import NotCacheable
from .turns import Turns
from .wrappers import Wrapper

FORMATS = ("csv", "text", "binary")
_PIECE = 64 * 1024  # bytes sent or written at a time


# To a file


async def copy_to(
    queryset: QuerySet[Any] | BaseManager[Any],
    destination: Any,
    format: str = "csv",
    *,
    header: bool = False,
) -> int:
    """Write what a queryset selects to a file, by COPY (query) TO STDOUT; return how many rows.

    The rows are those of the queryset: its model's fields and annotations, or what `values()` and
    `values_list()` name. They are written as PostgreSQL writes values (see "COPY" in its
    documentation), not as Python does: timestamps in the connection's time zone, which is UTC
    under USE_TZ, booleans as t and f, NULL as nothing (csv) or a backslash and N (text), arrays as
    {1,2}, JSON as its text. `from_db_value()` of fields is not called; `prefetch_related()` and
    `select_related()` have no effect.

    The rows are never in memory as a whole. The statement takes the connection until all is written
    (inside `atomic()` the block's): a writer must not use the same block.

    Args:
        queryset: a QuerySet or a manager.
        destination: a path; or an object with a `write()` method, which may be a coroutine function
            (asyncio.StreamWriter is drained). It gets bytes, or text if it has an `encoding`, as
            files opened for text have. A path is written in a thread, and is there only when the
            whole is.
        format: "csv", "text" or "binary".
        header: begin with a line of names (not with "binary").

    Raises:
        TypeError: not a queryset, or not a destination.
        ValueError: an unknown format, or a header in a binary file.
        django.db.NotSupportedError: the alias has another engine.
        django.db.Error: what the server refuses.
    """
    if isinstance(queryset, BaseManager):
        queryset = queryset.all()
    if not isinstance(queryset, QuerySet):
        raise TypeError(
            f"copy_to() takes a QuerySet or a manager, not {type(queryset).__name__}."
            + see("querysets#bulk-copy")
        )
    if format not in FORMATS:
        raise ValueError(
            f"format must be one of {', '.join(FORMATS)}, not {format!r}."
            + see("querysets#bulk-copy")
        )
    if header and format == "binary":
        raise ValueError("The binary format has no header." + see("querysets#bulk-copy"))
    binary = format == "binary"
    if isinstance(destination, str | os.PathLike):
        return await _to_path(queryset, os.fspath(destination), format, header)
    if not callable(getattr(destination, "write", None)):
        raise TypeError(
            f"destination must be a path or have a write() method; {destination!r} has none."
            + see("querysets#bulk-copy")
        )
    if binary and _takes_text(destination):
        raise TypeError(
            "The binary format cannot be written to a text file." + see("querysets#bulk-copy")
        )
    return await bridge.run(_copy_to, queryset, _writer(destination), format, header)


def _takes_text(destination: object) -> bool:
    return isinstance(destination, io.TextIOBase) or hasattr(destination, "encoding")


def _writer(destination: Any) -> Callable[[bytes], Any]:
    """A function that writes bytes to the destination and may return an awaitable."""
    if not _takes_text(destination):
        write, drain = destination.write, getattr(destination, "drain", None)
        return write if drain is None else lambda data: (write(data), drain())[1]
    decoder = codecs.getincrementaldecoder("utf-8")()
    return lambda data: destination.write(decoder.decode(data))


async def _to_path(queryset: QuerySet[Any], path: str, format: str, header: bool) -> int:
    """Write beside the path and rename: a file there is whole, or the one from before."""
    part = _Part(await anyio.to_thread.run_sync(os.path.realpath, path))
    try:
        await anyio.to_thread.run_sync(part.open)
        with part.file as file:
            rows = await bridge.run(_copy_to, queryset, _threaded(file), format, header)
        if file.name != part.path:
            os.replace(file.name, part.path)
    except BaseException:
        part.drop()
        raise
    return rows


class _Part:
    """The file beside a path that becomes it when it is whole.

    Threads open it, and go on when the task is cancelled: one that comes too late removes it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: Any = None
        self._dropped = False
        self._lock = threading.Lock()

    def open(self) -> None:
        """Open it; a pipe or a device is written to itself."""
        exists = os.path.exists(self.path)
        beside = not exists or os.path.isfile(self.path)
        name = f"{self.path}.{secrets.token_hex(4)}.part" if beside else self.path
        file = open(name, "xb" if beside else "wb")  # noqa: SIM115
        if exists and beside:
            shutil.copymode(self.path, name)
        with self._lock:
            self.file = file
            if self._dropped:
                self._remove()

    def drop(self) -> None:
        """Leave nothing behind."""
        with self._lock:
            self._dropped = True
            if self.file is not None:
                self._remove()

    def _remove(self) -> None:
        self.file.close()
        if self.file.name != self.path:
            os.unlink(self.file.name)


def _threaded(file: IO[bytes]) -> Callable[[bytes], Any]:
    return lambda data: anyio.to_thread.run_sync(file.write, data)


def _copy_to(
    queryset: QuerySet[Any], write: Callable[[bytes], Any], format: str, header: bool
) -> int:
    session = sessions.require(queryset.db)
    query, names = _compile(queryset, session.wrapper)
    options = [f"FORMAT {format}", *(["ENCODING 'UTF8'"] if format != "binary" else [])]
    statement = f"COPY ({query}) TO STDOUT WITH ({', '.join(options)})"

    def transfer(cursor: Any, statement: str) -> int:
        conn = cursor.connection
        conn.wait(cursor._start_copy_gen(statement))
        rows = None
        try:
            if header:
                _written(write(_header(names, format)))
            while rows is None:
                data, rows = conn.wait(_reading(cursor, _PIECE))
                if data:
                    _written(write(bytes(data)))
        except BaseException:
            if rows is None and not conn.closed:
                runner = bridge.running()
                with bridge.shield(runner):
                    bridge.wait_for(runner, session.interrupt())
            raise
        return int(rows)

    return cursors.copy(session.wrapper, statement, transfer)


def _written(result: object) -> None:
    if inspect.isawaitable(result):
        bridge.await_(result)


def _compile(queryset: Any, wrapper: Wrapper) -> tuple[str, list[str]]:
    """The queryset's SQL, its parameters bound, and the names of its columns."""
    query = queryset.query.clone()
    query.select_related = False
    compiler = query.get_compiler(connection=wrapper, elide_empty=False)
    sql, params = compiler.as_sql()
    if queryset._fields is None:
        fields = set(compiler.klass_info["select_fields"])
        names = [
            column.target.attname if number in fields else alias
            for number, (column, _, alias) in enumerate(compiler.select)
        ]
    else:
        names = list(
            query.selected or [*query.extra_select, *query.values_select, *query.annotation_select]
        )
    return wrapper.ops.compose_sql(sql, params), names


def _header(names: list[str], format: str) -> bytes:
    if format == "text":
        return "\t".join(names).encode() + b"\n"
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(names)
    return line.getvalue().encode()


# From objects


def bulk_create(queryset: Any, objs: Iterable[Any], batch_size: int | None) -> list[Any]:
    """Django's bulk_create() with COPY in place of INSERT."""
    if isinstance(queryset, BaseManager):
        if not hasattr(getattr(queryset, "bulk_create"), "__wrapped__"):  # noqa: B009
            raise NotSupportedError(
                f"{type(queryset).__name__} overrides bulk_create(): method='copy' would pass it "
                "by. Call it on a queryset, for instance on all()." + see("querysets#bulk-copy")
            )
        queryset = queryset.get_queryset()
    if not hasattr(QuerySet, "_batched_insert"):  # internals.py says so at start
        raise NotSupportedError(
            "bulk_create(method='copy') does not work with this Django."
            + see("querysets#bulk-copy")
        )
    queryset = queryset._chain()
    queryset._batched_insert = partial(_insert, queryset)
    return queryset.bulk_create(objs, batch_size)  # type: ignore[no-any-return]


def _insert(
    queryset: QuerySet[Any],
    objs: list[Any],
    fields: list[Any],
    batch_size: int | None,
    **options: Any,
) -> list[tuple[()]]:
    """In place of QuerySet._batched_insert(); for each object it returns no columns."""
    for field in fields:
        _check_field(field)
    wrapper: Any = connections[queryset.db]
    quote = wrapper.ops.quote_name
    table = quote(queryset.model._meta.db_table)
    size = batch_size or len(objs)
    with transaction.atomic(queryset.db, savepoint=False):
        for start in range(0, len(objs), size):
            for columns, run, data in _encoded(wrapper, objs[start : start + size], fields):
                if columns:
                    names = ", ".join(quote(field.column) for field in columns)
                    statement = f"COPY {table} ({names}) FROM STDIN"
                    cursors.copy(wrapper, statement, partial(_transfer, data))
                else:  # COPY needs a column
                    QuerySet._batched_insert(  # type: ignore[attr-defined]
                        queryset, run, fields, batch_size, **options
                    )
    return [()] * len(objs)


def _transfer(data: list[bytes], cursor: Any, statement: str) -> int:
    return int(cursor.connection.wait(_sending(cursor, statement, data)))


def _check_field(field: Field[Any, Any]) -> None:
    """Refuse a field that is inserted as more than a value, with perhaps a cast to its type."""
    for name in ("get_placeholder", "get_placeholder_sql"):  # before Django 6.1, since
        method = getattr(field, name, None)
        if method is not None and not method.__module__.startswith(
            ("django.db.models.", "django.contrib.postgres.")
        ):
            raise NotSupportedError(
                f"bulk_create(method='copy') cannot write {field}: {type(field).__name__} puts its "
                "value into an SQL expression. Use method='insert'." + see("querysets#bulk-copy")
            )


# Those that may be called again.
_PRE_SAVES = {*columnar.PRE_SAVES, models.FileField.pre_save}


def _encoded(
    wrapper: Wrapper, objs: list[Any], fields: list[Any]
) -> Iterator[tuple[list[Any], list[Any], list[bytes]]]:
    """For each run of objects with the same columns: the columns, the objects, their data."""
    turn = Turns().give
    if fields and all(type(field).pre_save in _PRE_SAVES for field in fields):
        pieces = _Pieces()
        transformer = Transformer(wrapper.connection)
        with suppress(NotCacheable):
            for some in columnar.slices(objs, turn):
                pieces.write(columnar.copy_lines(some, fields, wrapper, transformer))
            yield fields, objs, pieces.pieces
            return
    for columns, rows in groupby(_rows(wrapper, objs, fields, turn), itemgetter(0)):
        pieces = _Pieces()
        run = []
        with wrapper.wrap_database_errors, wrapper.create_cursor() as cursor:
            copy = psycopg.Copy(cursor, binary=False, writer=pieces)
            for _, obj, row in rows:
                copy.write_row(row)
                run.append(obj)
            copy.finish(None)
        yield columns, run, pieces.pieces


def _rows(
    wrapper: Wrapper, objs: list[Any], fields: list[Any], turn: Callable[[], None]
) -> Iterator[tuple[list[Any], Any, list[Any]]]:
    """For each object: the columns that it gives values for, it, the values."""
    for number, obj in enumerate(objs):
        if not number % 50:
            turn()
        row = []
        columns = fields
        for field in fields:
            value = field.pre_save(obj, True)
            if not hasattr(value, "resolve_expression") or isinstance(value, models.Value):
                value = field.get_db_prep_save(value, connection=wrapper)
            if hasattr(value, "resolve_expression"):
                if not isinstance(value, DatabaseDefault):
                    raise NotSupportedError(
                        f"bulk_create(method='copy') takes values only: {field} of an object "
                        f"is the expression {value!r}. Use method='insert'."
                        + see("querysets#bulk-copy")
                    )
                columns = [column for column in columns if column is not field]
                continue
            row.append(value)
        yield columns, obj, row


class _Pieces(Writer):
    """Collects the formatted rows."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Any) -> None:
        view = memoryview(data)
        self.pieces += (bytes(view[n : n + _PIECE]) for n in range(0, len(view), _PIECE))


def _sending(cursor: psycopg.Cursor[Any], statement: str, data: Iterable[bytes]) -> Steps:
    """A generator for `wait()`: run COPY ... FROM STDIN, send the data, return the row count.

    Pieces of more than some 100 KB slow libpq down.
    """
    pgconn = cursor.connection.pgconn
    yield from cursor._start_copy_gen(statement)
    for piece in data:
        yield from generators.copy_to(pgconn, piece)
    result = yield from generators.copy_end(pgconn, None)
    return result.command_tuples


def _reading(cursor: psycopg.Cursor[Any], size: int) -> Steps:
    """A generator for `wait()`: return at least `size` bytes, and the row count at the end."""
    data = bytearray()
    while len(data) < size:
        row = yield from generators.copy_from(cursor.connection.pgconn)
        if not isinstance(row, memoryview):
            return data, row.command_tuples
        data += row
    return data, None
