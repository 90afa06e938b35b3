"""UPDATE and DELETE: of querysets, of `save()`, and of one row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.db.models import Model, query
from django.db.models.query import QuerySet
from django.db.models.sql.constants import ROW_COUNT
from django.db.models.sql.query import Query
from django.db.models.sql.subqueries import DeleteQuery, UpdateQuery
from greenlet import getcurrent

from .. import bridge, columnar, grounds, verifying
from .._cache.execute import count_of
from .._cache.plan import Plan
from .._chains.plans import plan_for as plan_of_recorded
from .._chains.recorded import Recorded, is_untouched
from ..grounds import Ground
from ..shapes import NotCacheable
from ..statements import UNPLANNED, Compiled, hit, learn, plan_for, recall
from ..wrappers import Wrapper
from . import switch
from .get import PLAIN_VALUES
from .switch import Asked, native_wrapper


def compile_write(query: Query, wrapper: Wrapper) -> Compiled:
    sql, params = query.get_compiler(using=wrapper.alias).as_sql()
    return sql, params, None


def execute_write(original: Callable[..., Any]) -> Any:
    """`execute_sql()` of the compilers of UPDATE and DELETE."""

    def execute_sql(self: Any, result_type: object) -> Any:
        if result_type == ROW_COUNT and self.using is not None:
            wrapper = native_wrapper(self.using)
            if wrapper is not None and wrapper is self.connection:
                found = plan_for(self.query, wrapper, compile_write)
                if found is not None:
                    return count_of(*found, wrapper)
        return original(self, result_type)

    return execute_sql


def raw_delete(original: Callable[..., Any]) -> Any:
    """`QuerySet._raw_delete()`: of a recorded query, without making it."""

    def raw_delete(self: Any, using: str) -> Any:
        query = self.query
        if type(query) is Recorded and (wrapper := native_wrapper(using)) is not None:
            found = plan_of_recorded(query, wrapper, _compile_raw_delete, "delete")
            if found is not None:
                return count_of(*found, wrapper)
        return original(self, using)

    return raw_delete


def _compile_raw_delete(query: Query, wrapper: Wrapper) -> Compiled:
    delete = query.clone()
    delete.__class__ = DeleteQuery
    return compile_write(delete, wrapper)


class _ByKey:
    """The UPDATE of `save()` for certain fields of a model, or the DELETE of one row.

    Attributes:
        lookup: that of the primary key: its class and left side.
        sql: of its right side.
    """

    def __init__(self, plan: Plan, leaf: Any, wrapper: Wrapper, kept: Any = ()) -> None:
        self.plan = plan
        self.lookup = type(leaf), leaf.lhs
        self.sql = leaf.process_rhs(None, wrapper)[0]
        self.kept = kept

    def params(self, key: Any, wrapper: Wrapper) -> list[Any]:
        """The parameters for a key, or for a list of one."""
        cls, lhs = self.lookup
        sql, params = cls(lhs, key).process_rhs(None, wrapper)
        if sql != self.sql:
            raise NotCacheable
        return list(params)


def do_update(original: Callable[..., Any]) -> Any:
    """`Model._do_update()`: the UPDATE without a queryset, after the first time."""

    def do_update(
        self: Any, base_qs: QuerySet[Any], using: str, pk_val: object, values: list[Any],
        update_fields: object, forced_update: object, *returning: Any, **named: Any,
    ) -> Any:  # fmt: skip
        if switch.missed and switch.missed.get(me := getcurrent()) is self:
            del switch.missed[me]
            return [] if returning else False
        asked = switch.asking.get(id(self)) if switch.asking else None
        if (
            values
            and not named
            and type(base_qs) is query.QuerySet
            and not (returning and returning[0])  # fields, from Django 6 on
            and not self._meta.select_on_save
            and (wrapper := asked or native_wrapper(using)) is not None
        ):
            found = _save_plan(base_qs, wrapper, pk_val, values)
            if found is not None and asked and not self._state.adding:
                raise Asked((*found, 0))
            if found is not None and not asked:
                count = count_of(*found, 0, wrapper)
                return [()] * count if returning else count > 0
        if asked:
            raise Asked(None)
        return original(
            self, base_qs, using, pk_val, values, update_fields, forced_update, *returning, **named
        )

    return do_update


def _save_plan(
    base_qs: Any, wrapper: Wrapper, pk: Any, values: list[Any]
) -> tuple[Plan, list[Any]] | None:
    if type(pk) not in PLAIN_VALUES or not is_untouched(base_qs._query):
        return None
    params: list[Any] = []
    key: list[Any] = [wrapper.alias, UpdateQuery, base_qs.model, type(pk)]
    try:
        for field, _, value in values:
            if type(value) not in PLAIN_VALUES and (
                hasattr(value, "resolve_expression") or hasattr(value, "prepare_database_save")
            ):
                return None
            as_is = columnar.as_is(field)
            if as_is is None or not as_is.takes(value):
                value = field.get_db_prep_save(value, connection=wrapper)
            key += (id(field), value is None)
            params.append(value)
        whole = tuple(key)
        known: Any = recall(whole)
        if known is None:
            return None
        if known is UNPLANNED:
            if not bridge.in_native_code():  # to compile may need a connection
                return None
            make = functools.partial(_plan_save, base_qs, wrapper, pk, values)
            known = learn(whole, base_qs.model, make)
            if known is None:
                return None
        plan: Plan = known.plan
        if plan.skips_null:
            params = [value for value in params if value is not None]
        params += known.params(pk, wrapper)
    except Exception:
        return None
    compile = lambda: compile_write(_update_of(base_qs, pk, values), wrapper)  # noqa: E731
    return (plan, params) if hit(whole, plan, params, 0, compile) else None


def _update_of(base_qs: QuerySet[Any], pk: object, values: list[Any]) -> Any:
    """What `QuerySet._update()` would execute."""
    update: Any = base_qs.filter(pk=pk).query.chain(UpdateQuery)
    update.add_update_fields(values)
    return update


def _plan_save(
    base_qs: QuerySet[Any], wrapper: Wrapper, pk: object, values: list[Any]
) -> tuple[_ByKey, Ground]:
    update = _update_of(base_qs, pk, values)
    found = plan_for(update, wrapper, compile_write)
    if found is None or len(update.where.children) != 1 or len(update.values) != len(values):
        raise NotCacheable
    kept = [field for field, _, _ in values]
    known = _ByKey(found[0], update.where.children[0], wrapper, kept)
    return known, _ground_by_key(update, known, wrapper)


def _ground_by_key(written: Query, known: _ByKey, wrapper: Wrapper) -> Ground:
    cls, lhs = known.lookup
    kept = [*known.kept, lhs.target, lhs.output_field]
    return grounds.of_query(written, kept, None, wrapper, [cls], *known.plan.classes, short=True)


def delete_batch(original: Callable[..., Any]) -> Any:
    """`DeleteQuery.delete_batch()`: one row without a filter, after the first time."""

    def delete_batch(self: Any, pk_list: list[Any], using: str) -> Any:
        if len(pk_list) == 1 and (wrapper := native_wrapper(using)) is not None:
            found = delete_plan(self.model, wrapper, pk_list)
            if found is not None:
                return count_of(*found, 0, wrapper)
        return original(self, pk_list, using)

    return delete_batch


def delete_plan(model: Any, wrapper: Wrapper, keys: list[Any]) -> tuple[Plan, list[Any]] | None:
    if type(keys[0]) not in PLAIN_VALUES:
        return None
    try:
        whole = wrapper.alias, DeleteQuery, model, model._meta.db_table, type(keys[0])
        known: Any = recall(whole)
        if known is UNPLANNED:
            if not bridge.in_native_code():
                return None
            make = functools.partial(_plan_delete, model, wrapper, keys)
            known = learn(whole, model, make)
        if known is None:
            return None
        params = known.params(keys, wrapper)
    except Exception:
        return None
    plan: Plan = known.plan
    compile = lambda: compile_write(_delete_of(model, keys), wrapper)  # noqa: E731
    return (plan, params) if hit(whole, plan, params, 0, compile) else None


def _delete_of(model: type[Model], keys: list[Any]) -> Any:
    """What `DeleteQuery.delete_batch()` would execute."""
    delete: Any = DeleteQuery(model)
    delete.add_filter(f"{model._meta.pk.attname}__in", keys)
    return delete


def _plan_delete(model: Any, wrapper: Any, keys: list[Any]) -> tuple[_ByKey, Ground]:
    delete = _delete_of(model, keys)
    found = plan_for(delete, wrapper, compile_write)
    if found is None or found[0].picked is not None or len(delete.where.children) != 1:
        raise NotCacheable
    known = _ByKey(found[0], delete.where.children[0], wrapper)
    if not verifying.equal(known.params(keys, wrapper), found[1]):
        raise NotCacheable
    return known, _ground_by_key(delete, known, wrapper)
