"""INSERT: of one object, and of `bulk_create()`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any

from django.db.models import Field, Manager, Model, query
from django.db.models.query import QuerySet
from django.db.models.sql.compiler import SQLInsertCompiler
from django.db.models.sql.subqueries import InsertQuery

from .. import bulk, columnar, distributed, grounds
from .._cache.awaited import Found
from .._cache.execute import count_of, items
from .._cache.families import family
from .._cache.plan import Plan
from .._wire.lazy import DeferredConnection
from ..binding import has_placeholder, writes_as_django
from ..driver import Connection
from ..grounds import Ground
from ..shapes import NotCacheable
from ..statements import UNPLANNED, count, hit, learn, recall
from ..wrappers import Wrapper
from . import switch
from .switch import Asked, native_wrapper

_Fields = tuple[Any, ...]


def execute_insert(original: Callable[..., Any]) -> Any:
    """`execute_sql()` of the compiler of INSERT."""

    def execute_sql(self: Any, returning_fields: Iterable[Any] | None = None) -> Any:
        if self.using is not None:
            wrapper = native_wrapper(self.using)
            if wrapper is None or wrapper is not self.connection:
                pass
            elif len(self.query.objs) > 1:
                inserted = bulk.insert(self, wrapper, tuple(returning_fields or ()))
                if inserted is not None:
                    return inserted
            else:
                found = _insert_plan(self, wrapper, tuple(returning_fields or ()))
                if found is not None:
                    return _inserted(*found, wrapper)
        return original(self, returning_fields)

    return execute_sql


def do_insert(original: Any) -> Any:
    """`Model._do_insert()`: the INSERT without a query and a compiler, after the first time."""

    def do_insert(
        self: Any,
        manager: Any,
        using: str,
        fields: Iterable[Field[Any, Any]],
        returning_fields: Sequence[Any],
        raw: bool,
    ) -> Any:
        asked = switch.asking.get(id(self)) if switch.asking else None
        wrapper = asked or native_wrapper(using)
        if type(manager) is Manager and _of_manager(Manager) is _insert and wrapper is not None:
            columns, returning = tuple(fields), tuple(returning_fields or ())
            found = known_insert(self, manager.model, wrapper, columns, returning, raw=raw)
            if found is not None:
                if asked:
                    raise Asked(found, returning)
                return _inserted(*found[:2], wrapper)
        if asked:
            raise Asked(None)
        return original(self, manager, using, fields, returning_fields, raw)

    return do_insert


_of_manager = attrgetter("_insert")
_insert = _of_manager(Manager)


def known_insert(
    obj: Any, model: Any, wrapper: Wrapper, fields: _Fields, returning: _Fields, *, raw: bool
) -> Found | None:
    """The INSERT of one object, if it is known."""
    key = _insert_key(wrapper, model, raw, fields, returning)
    plan = recall(key)
    if plan is None or plan is UNPLANNED:
        return None
    params = _insert_params(obj, wrapper, *plan.ready)
    again = lambda: bulk.compiled_again(model, fields, [obj], returning, wrapper)  # noqa: E731
    if params is None or not hit(key, plan, params, 0, again):
        return None
    return plan, params, 0


def _insert_key(
    wrapper: Wrapper, model: Any, raw: bool, fields: _Fields, returning: _Fields
) -> tuple[Any, ...]:
    return (
        wrapper.alias, InsertQuery, model, model._meta.db_table, raw,
        tuple(map(id, fields)), tuple(map(id, returning)),
    )  # fmt: skip


def _insert_params(
    obj: Model,
    wrapper: Wrapper,
    values: Callable[[Any], Sequence[Any]],
    preparing: columnar.Preparing,
) -> list[Any] | None:
    """The values of an object as Django prepares them, None if that is to be left to it."""
    try:
        return preparing.params(values(obj), wrapper)
    except Exception:
        return None


def _inserted(plan: Plan, params: list[Any], wrapper: Wrapper) -> list[Any]:
    if plan.maker is None:
        count_of(plan, params, 0, wrapper)
        return []
    return items(plan, params, 0, wrapper)


def _insert_plan(
    compiler: SQLInsertCompiler, wrapper: Any, returning: tuple[Any, ...]
) -> tuple[Plan, list[Any]] | None:
    query = compiler.query
    if type(query) is not InsertQuery or query.on_conflict or not query.fields:  # type: ignore[attr-defined]
        return None
    fields = tuple(query.fields)
    key = _insert_key(wrapper, query.model, query.raw, fields, returning)
    plan = recall(key)
    params: Any = None
    if plan is not None and all(type(field).pre_save in columnar.PRE_SAVES for field in fields):
        whole = columnar.Preparing(fields, [None] * len(fields))
        params = _insert_params(
            query.objs[0], wrapper, columnar.row_getter(fields, raw=query.raw), whole
        )
    if params is None:
        count("unfit")
        return None
    if plan is UNPLANNED:
        make = functools.partial(_plan_insert, compiler, wrapper, fields, returning, params)
        plan = learn(key, query.model, make)
        count("misses")
    elif not hit(
        key, plan, params, 0,
        lambda: bulk.compiled_again(query.model, fields, query.objs, returning, wrapper),
    ):  # fmt: skip
        return None
    return None if plan is None else (plan, params)


def _plan_insert(
    compiler: SQLInsertCompiler,
    wrapper: Wrapper,
    fields: tuple[Any, ...],
    returning: tuple[Any, ...],
    params: list[Any],
) -> tuple[Plan, Ground]:
    """The plan of an INSERT; `params` become those of its first statement."""
    compiler.returning_fields = list(returning)
    ((sql, found),) = compiler.as_sql()
    # A time of pre_save() is another one by now, and the object has that.
    if list(map(type, found)) != list(map(type, params)) or any(map(has_placeholder, fields)):
        raise NotCacheable
    maker = bulk.maker_of_returned(compiler, wrapper, returning)
    kinds = [family(field, wrapper) for field in fields]
    plan = Plan(sql, kinds, maker, (fields, returning), by_server=writes_as_django(wrapper))
    preparing = columnar.Preparing(fields, [*map(columnar.as_is, fields)])
    plan.ready = columnar.row_getter(fields, raw=compiler.query.raw), preparing
    params[:] = found
    return plan, grounds.of_query(compiler.query, (fields, returning), maker, wrapper, ())


def prepare_for_bulk_create(original: Callable[..., Any]) -> Any:
    """What `bulk_create()` does with each object at first."""

    def prepare(self: QuerySet[Any], objs: list[Any]) -> Any:
        if native_wrapper(self.db) is not None:
            with suppress(NotCacheable):
                return bulk.prepare(self, objs)
        return original(self, objs)

    return prepare


_OURS = {type(None), Connection, DeferredConnection}


def batched_insert(original: Any) -> Any:
    """The INSERTs of `bulk_create()`."""

    def insert(self: Any, objs: Any, fields: Any, batch_size: Any, **options: Any) -> Any:
        if len(objs) > 1 and distributed.concerns(self.db):
            return distributed.insert(self, original, objs, fields, batch_size, **options)
        size = batch_size or bulk.BATCH
        insert = getattr(type(self), "_insert")  # noqa: B009
        if (
            len(objs) > size
            and options.get("on_conflict") is None
            and insert is query.QuerySet._insert  # type: ignore[attr-defined]
            and grounds.are_sound()
        ):
            wrapper = native_wrapper(self.db)
            # In a test's transaction the connection is Django's own.
            if wrapper is not None and type(wrapper.connection) in _OURS and not wrapper.watched:
                size = min(size, max(wrapper.ops.bulk_batch_size(fields, objs), 1))
                return bulk.insert_batches(self, objs, fields, size, wrapper)
        return original(self, objs, fields, batch_size, **options)

    return insert
