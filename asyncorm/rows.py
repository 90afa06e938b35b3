"""From the rows of a result to what a queryset gives: code generated for each shape of row.

For model instances that is what `Model.from_db()`, `RelatedPopulator.populate()` and the converters
of the columns would do, in one loop without calls; only for models whose instances nobody watches
being made (`is_plain()`). Two columns are read from the server's text without psycopg's or Django's
Python code between, where the result is the same object: timestamps in UTC, jsonb with the standard
decoder.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `Model.__init__`, `Model.from_db`, `ModelState`: what the generated code does in their place;
  compared with the model's own to see whether they are overridden.
- `DeferredAttribute`, `ForeignKeyDeferredAttribute`, `FileDescriptor`: what assigning a loaded
  value does; any other descriptor has its `__set__` called by Django.
- `SQLCompiler.select`, `.klass_info`, `.annotation_col_map`, `.get_converters`: which column is
  what.
- `FieldCacheMixin.set_cached_value`: what `select_related()` does with a related instance.
- `AltersData`: a harmless base of Model.
- `JSONField.from_db_value`, `psycopg_any.BaseTzLoader`: what the two readers are equal to.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.psycopg_any import BaseTzLoader
from django.db.models import JSONField, Model, query
from django.db.models.base import ModelState
from django.db.models.expressions import Col, ColPairs
from django.db.models.fields.files import FileDescriptor
from django.db.models.fields.mixins import FieldCacheMixin
from django.db.models.fields.related_descriptors import ForeignKeyDeferredAttribute
from django.db.models.query_utils import DeferredAttribute
from django.db.models.signals import ModelSignal, post_init, pre_init
from django.db.models.sql.compiler import SQLCompiler
from django.db.models.utils import AltersData
from psycopg.adapt import AdaptersMap
from psycopg.pq.abc import PGresult
from psycopg.types.string import TextLoader

from ._cache.looks import Last
from ._wire.adapting import types_of
from .driver import SLICE, Connection
from .grounds import is_anothers, of_class
from .shapes import NotCacheable

_TIMESTAMPTZ, _JSONB = 1184, 3802
_NO_TEXTS: frozenset[int] = frozenset()
_plain = AdaptersMap()
_plain.register_loader(_JSONB, TextLoader)
_AS_TEXT = _plain.get_loader(_JSONB, 0)  # type: ignore[arg-type]  # psycopg's in C takes its place
_DESCRIPTORS = (DeferredAttribute, ForeignKeyDeferredAttribute, FileDescriptor)
_WITH_MODES = hasattr(ModelState, "fetch_mode")

_populators = query.get_related_populators
_set_key = ForeignKeyDeferredAttribute.__set__
_send, _of_pre_init, _of_post_init = ModelSignal.send, vars(pre_init), vars(post_init)
_read_json = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_read_timestamp = datetime.datetime.fromisoformat


def is_plain(model: type[Model]) -> bool:
    """Whether loading an instance of `model` does nothing but set the values of its fields."""
    mro = model.__mro__
    return (
        model.__init__ is Model.__init__
        and model.__new__ is object.__new__
        and model.__setattr__ is object.__setattr__
        and model.from_db.__func__ is Model.from_db.__func__  # type: ignore[attr-defined]
        and type(model).__call__ is type.__call__
        and not any(map(is_anothers, (Model.__dict__["__init__"], Model.__dict__["from_db"])))
        and set(mro[mro.index(Model) + 1 :]) <= {AltersData, Last, object}
        and all(
            type(of_class(model, field.attname)) in _DESCRIPTORS
            for field in model._meta.concrete_fields
        )
    )


def is_watched(models: tuple[Any, ...]) -> bool:
    """Whether instances of the models are made by others, too, or with receivers of signals."""
    if (
        query.get_related_populators is not _populators
        or ForeignKeyDeferredAttribute.__set__ is not _set_key
    ):
        return True
    if pre_init.receivers or post_init.receivers:
        return is_heard((pre_init, post_init), models)
    return ModelSignal.send is not _send or "send" in _of_pre_init or "send" in _of_post_init


def is_heard(signals: Iterable[ModelSignal], models: Iterable[Any]) -> bool:
    """Whether somebody hears of one of the models: a receiver, or what stands for `send()`."""
    for signal in signals:
        if signal.receivers and any(map(signal.has_listeners, models)):
            return True
        if "send" in vars(signal):
            return True
    return ModelSignal.send is not _send


class Loaded:
    """The rows of a result as psycopg loads them.

    Attributes:
        size: how many rows.
        parts: the rows, some at a time.
        oids: the types of the columns that are the server's text still; 0 for the others.
        times: psycopg's loader of timestamps, if they are text, in UTC.
    """

    __slots__ = ("oids", "parts", "size", "times")

    def __init__(
        self, size: int, parts: Iterator[list[Any]], oids: tuple[int, ...], times: Any
    ) -> None:
        self.size = size
        self.parts = parts
        self.oids = oids
        self.times = times

    def with_times(self, part: list[Any]) -> list[Any]:
        """Rows in which psycopg has loaded the timestamps, too."""
        load = self.times(_TIMESTAMPTZ, None).load  # without a connection: in UTC, from ISO format
        return [
            tuple(
                load(value.encode()) if oid == _TIMESTAMPTZ and value is not None else value
                for value, oid in zip(row, self.oids, strict=True)
            )
            for row in part
        ]


class RowMaker:
    """Makes the items of one kind of queryset from rows.

    Attributes:
        width: how many columns a row has.
        models: the classes whose instances are made.
        names_of_columns: where the values are known by names.
        calls_others: somebody's code makes something of the values, which may use the database.
    """

    def __init__(self, width: int, converters: dict[int, Any]) -> None:
        self.width = width
        self.calls_others = not all(
            getattr(conv, "__module__", "").startswith("django.")
            for convs, _ in converters.values()
            for conv in convs
        )
        self.models: tuple[Any, ...] = ()
        self.names_of_columns: list[str] = []
        self.converters = converters
        self.names: dict[str, Any] = {}
        self._number = count()
        self.body: list[str] = []
        self.item = ""
        self._made: dict[Any, Callable[..., list[Any]]] = {}
        self._seen: tuple[Any, tuple[int, ...]] = None, ()

    def name(self, value: object) -> str:
        """A name for `value` in the generated code."""
        name = f"v{next(self._number)}"
        self.names[name] = value
        return name

    def load(self, result: PGresult, conn: Connection) -> Loaded:
        """What psycopg makes of a result, as the session was when it ran the statement."""
        oids = types_of(result)
        known: dict[str, Any] = {}
        if _TIMESTAMPTZ in oids or _JSONB in oids:
            transformer, times, texts = conn.per_settings(_loaders)
            if times is not None:  # so it is the one that asks for them
                known = {"oids": oids}
        else:
            transformer, times, texts = conn.transformer, None, _NO_TEXTS
        seen = oids, texts
        if seen != self._seen[0]:  # else they are as those of the last result
            self._seen = seen, tuple([oid if oid in texts else 0 for oid in oids])
        parts = conn.load(result, transformer, **known)
        return Loaded(result.ntuples, parts, self._seen[1], times)

    def made(
        self,
        loaded: Loaded,
        turn: Callable[[], Any],
        db: str,
        wrapper: BaseDatabaseWrapper,
        mode: object,
    ) -> list[Any]:
        """The items for loaded rows; `turn()` may let other tasks run."""
        if loaded.size <= SLICE:
            return self.make_part(loaded, next(loaded.parts), db, wrapper, mode)
        items: list[Any] = []
        for part in loaded.parts:
            turn()
            items += self.make_part(loaded, part, db, wrapper, mode)
        return items

    def make_part(
        self, loaded: Loaded, part: list[Any], db: str, wrapper: BaseDatabaseWrapper, mode: object
    ) -> list[Any]:
        """The items for some of the rows."""
        try:
            return self._code(loaded.oids)(part, db, wrapper, mode)
        except ValueError:
            if loaded.times is None:
                raise
        # A timestamp that Python's datetime does not know: have psycopg say so.
        return self.make_loaded(loaded.with_times(part), db, wrapper, mode)

    def make_loaded(
        self, rows: list[Any], db: str, wrapper: BaseDatabaseWrapper, mode: object
    ) -> list[Any]:
        """The items for rows that a cursor has loaded."""
        return self._code((0,) * self.width)(rows, db, wrapper, mode)

    def _code(self, oids: tuple[int, ...]) -> Callable[..., list[Any]]:
        code = self._made.get(oids)
        if code is None:
            code = self._made[oids] = self._compile(oids)
        return code

    def _compile(self, oids: tuple[int, ...]) -> Callable[..., list[Any]]:
        lines = []
        for i, oid in enumerate(oids[: self.width]):
            convs, expression = self.converters.get(i, ((), None))
            if oid == _TIMESTAMPTZ:
                lines.append(f"if c{i} is not None: c{i} = read_timestamp(c{i})")
            if len(convs) == 1 and oid == _JSONB and _is_standard_json(convs[0], expression):
                lines.append(f"if c{i} is not None: c{i} = read_json(c{i}, 0)[0]")
                continue
            for conv in convs:
                lines.append(f"c{i} = {self.name(conv)}(c{i}, {self.name(expression)}, wrapper)")
        lines += self.body
        row = tuple_of(self.width)
        if not lines:  # no conversion and no instance
            source = (
                "return rows" if self.item == row else f"return [{self.item} for {row} in rows]"
            )
        else:
            loop = "\n        ".join([*lines, f"append({self.item})"])
            source = (
                f"items = []\n    append = items.append\n    for {row} in rows:\n        {loop}"
                "\n    return items"
            )
        scope = {**self.names, "read_timestamp": _read_timestamp, "read_json": _read_json}
        exec(f"def code(rows, db, wrapper, mode):\n    {source}", scope)
        return scope["code"]  # type: ignore[no-any-return]


def _loaders(conn: Connection) -> tuple[Any, Any, frozenset[int]]:
    """The loaders of a connection, that of timestamps if those stay as text, and what does."""
    texts = set()
    times: Any = None
    if conn.adapters.get_loader(_JSONB, 0) is _AS_TEXT:  # type: ignore[arg-type]
        texts.add(_JSONB)  # as Django registers it: nobody else's loader
    if _in_utc(conn):
        texts.add(_TIMESTAMPTZ)
        times = conn.adapters.get_loader(_TIMESTAMPTZ, 0)  # type: ignore[arg-type]
    transformer = conn.transformer if times is None else conn.text_transformer
    return transformer, times, frozenset(texts)


def _in_utc(conn: Connection) -> bool:
    """Whether Django's loader makes of a timestamptz what `fromisoformat()` makes of its text."""
    loader: Any = conn.adapters.get_loader(_TIMESTAMPTZ, 0)  # type: ignore[arg-type]
    status = conn.pgconn.parameter_status
    return (
        loader is not None
        and issubclass(loader, BaseTzLoader)
        and loader.load is BaseTzLoader.load
        and loader.timezone is datetime.UTC
        and status(b"TimeZone") == b"UTC"
        and (status(b"DateStyle") or b"").startswith(b"ISO")
    )


def _is_standard_json(converter: Any, expression: object) -> bool:
    field = getattr(converter, "__self__", None)
    return (
        type(expression) is Col
        and isinstance(field, JSONField)
        and converter.__func__ is JSONField.from_db_value
        and field.decoder is None
    )


def for_instances(compiler: SQLCompiler) -> RowMaker:
    """What `ModelIterable` does after `compiler` has compiled.

    Raises:
        NotCacheable: not every model is plain.
    """
    maker = _maker(compiler)
    info = compiler.klass_info
    fields = info["select_fields"]
    columns = range(fields[0], fields[-1] + 1)
    names = [compiler.select[i][0].target.attname for i in columns]
    models: list[Any] = []
    maker.item = _instance(maker, compiler, info, dict(zip(names, columns, strict=True)), models, 0)
    for name, position in (compiler.annotation_col_map or {}).items():
        maker.body.append(f"setattr({maker.item}, {name!r}, c{position})")
        maker.calls_others |= of_class(info["model"], name) is not None
    maker.models = tuple(dict.fromkeys(models))
    return maker


def _maker(compiler: SQLCompiler) -> RowMaker:
    expressions = [select[0] for select in compiler.select[: compiler.col_count]]
    if compiler.has_extra_select or any(isinstance(e, ColPairs) for e in expressions):
        raise NotCacheable
    ops = compiler.connection.ops
    if any(ops.get_db_converters(e) for e in expressions if e is not None):
        raise NotCacheable  # a backend's converters may belong to one connection
    return RowMaker(len(expressions), compiler.get_converters(expressions))


def _instance(
    maker: RowMaker,
    compiler: SQLCompiler,
    info: Mapping[str, Any],
    columns: dict[str, int],
    models: list[Any],
    depth: int,
) -> str:
    """Generate code for an instance and what is selected with it; the variable's name."""
    model = info["model"]
    if not is_plain(model):
        raise NotCacheable
    number = len(models)
    models.append(model)
    obj, state, pad = f"o{number}", f"s{number}", "    " * depth
    emit = maker.body.append
    values = []
    foreign = []
    for field in model._meta.concrete_fields:
        if (column := columns.get(field.attname)) is not None:
            values.append(f"{field.attname!r}: c{column}")
            if type(of_class(model, field.attname)) is ForeignKeyDeferredAttribute:
                foreign.append(f"c{column} is not None")
    if len(values) != len(columns):
        raise NotCacheable
    emit(f"{pad}{state} = {maker.name(ModelState)}()")
    if foreign:  # assigning one looks into the cache
        emit(f"{pad}if {' or '.join(foreign)}: {state}.fields_cache = {{}}")
    emit(f"{pad}{state}.adding = False")
    emit(f"{pad}{state}.db = db")
    if _WITH_MODES:
        emit(f"{pad}{state}.fetch_mode = mode")
    cls = maker.name(model)
    emit(f"{pad}{obj} = {maker.name(object.__new__)}({cls})")
    emit(f"{pad}{obj}.__dict__ = {{'_state': {state}, {', '.join(values)}}}")
    for related in info.get("related_klass_infos", ()):
        _related(maker, compiler, related, obj, models, depth)
    return obj


def _related(
    maker: RowMaker,
    compiler: SQLCompiler,
    info: Mapping[str, Any],
    owner: str,
    models: list[Any],
    depth: int,
) -> None:
    model, selected = info["model"], info["select_fields"]
    places = selected if info["from_parent"] else range(selected[0], selected[-1] + 1)
    by_name = {compiler.select[i][0].target.attname: i for i in places}
    columns = {
        field.attname: by_name[field.attname]
        for field in model._meta.concrete_fields
        if field.attname in by_name
    }
    key = columns[model._meta.pk_fields[0].attname]
    pad, emit = "    " * depth, maker.body.append
    emit(f"{pad}if c{key} is None:")
    emit(f"{pad}    {_setting(maker, info['local_setter'], owner, 'None')}")
    emit(f"{pad}else:")
    obj = _instance(maker, compiler, info, columns, models, depth + 1)
    emit(f"{pad}    {_setting(maker, info['local_setter'], owner, obj)}")
    emit(f"{pad}    {_setting(maker, info['remote_setter'], obj, owner)}")


def _setting(maker: RowMaker, setter: Any, obj: str, value: str) -> str:
    if getattr(setter, "__func__", None) is FieldCacheMixin.set_cached_value:
        return f"{obj}._state.fields_cache[{setter.__self__.cache_name!r}] = {value}"
    return f"{maker.name(setter)}({obj}, {value})"


def tuple_of(width: int) -> str:
    """The code of a tuple of a whole row."""
    return f"({', '.join(f'c{i}' for i in range(width))},)"


def for_tuples(compiler: SQLCompiler) -> RowMaker:
    """Rows as tuples: `values_list()`."""
    maker = _maker(compiler)
    maker.item = tuple_of(maker.width)
    return maker


def for_first_values(compiler: SQLCompiler) -> RowMaker:
    """The first value of each row: `values_list(flat=True)`."""
    maker = _maker(compiler)
    maker.item = "c0"
    return maker


def for_dicts(compiler: SQLCompiler, names: list[str]) -> RowMaker:
    """Rows as dicts: `values()`."""
    maker = _maker(compiler)
    pairs = [f"{name!r}: c{i}" for i, name in enumerate(names)]
    maker.item = f"{{{', '.join(pairs)}}}"
    return maker


def for_named_tuples(compiler: SQLCompiler, cls: type) -> RowMaker:
    """Rows as named tuples: `values_list(named=True)`."""
    maker = for_tuples(compiler)
    maker.item = f"{maker.name(tuple.__new__)}({maker.name(cls)}, {maker.item})"
    return maker
