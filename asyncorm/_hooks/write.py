"""UPDATE and DELETE: of querysets, of `save()`, and of one row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import is_
from typing import Any

import django
from django.db import transaction
from django.db.models import Model, query
from django.db.models.query import QuerySet
from django.db.models.sql.constants import ROW_COUNT
from django.db.models.sql.query import Query
from django.db.models.sql.subqueries import DeleteQuery, UpdateQuery
from greenlet import getcurrent

from .. import bridge, columnar, grounds, verifying
from .._cache.execute import count_of
from .._cache.plan import Plan
from .._chains.plans import Found, Part, maker, maker_of_list, of_integers, plan_of
from .._chains.plans import plan_for as plan_of_recorded
from .._chains.recorded import Recorded, is_untouched
from .._chains.twins import djangos
from ..grounds import Ground
from ..shapes import NotCacheable
from ..statements import UNPLANNED, Compiled, hit, learn, plan_for, recall
from ..wrappers import Wrapper
from . import routing, switch
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


class Written:
    """What `update()` sets, given its keywords: values of types that are no expressions."""

    def __init__(self, named: dict[str, Any]) -> None:
        self._named = named

    def of(self, query: Any) -> Any:
        """What `QuerySet.update()` executes."""
        update = query.chain(UpdateQuery)
        update.add_update_values(self._named)
        update.order_by = tuple(update.order_by)  # so it is in the key
        if _CLEARS_SELECT:
            update.clear_select_clause()
        else:
            update.annotations = {}
        return update

    def parts(self, shaped: Sequence[Any], start: int) -> list[Part]:
        """Where the parameters come from (plans.py)."""
        parts: list[Part] = []
        pairs = zip(self._named.values(), shaped, strict=True)
        for place, (value, (field, (param, *_), node)) in enumerate(pairs, start):
            is_null = param is None
            if node is not None or is_null != (value is None) or (is_null and _is_others(field)):
                raise NotCacheable
            if not is_null:
                parts.append((place, _preparing(field, value, param), 0))
            elif _SENDS_NULL:
                parts.append((place, _as_is, 0))
        return parts


# Django 5.2.0 clears the annotations instead, which is another shape.
_CLEARS_SELECT = django.VERSION >= (5, 2, 1)
# Earlier versions of Django write it into the statement.
_SENDS_NULL = django.VERSION >= (6, 1)


def _as_is(value: Any, wrapper: Any) -> Any:
    return value


def _is_others(field: Any) -> bool:
    return not type(field).__module__.startswith("django.")


def _preparing(field: Any, value: Any, param: Any) -> Callable[[Any, Any], Any]:
    """What makes the parameter of a value of this type that a field is set to."""
    ready = columnar.as_is(field)

    def prepared(value: Any, wrapper: Any) -> Any:
        value = field.get_db_prep_save(value, connection=wrapper)
        if value is None or hasattr(value, "as_sql"):
            raise NotCacheable
        return value

    if ready is None or not ready.takes(value):
        return prepared
    if type(param) is not type(value):
        return of_integers(param, prepared)
    return lambda value, wrapper: value if ready.takes(value) else prepared(value, wrapper)


_WRITABLE = PLAIN_VALUES | {type(None), bool, bytes, dict, list}


def update_plan(query: Any, named: dict[str, Any], wrapper: Wrapper) -> Any:
    """The plan of `update()` for a recorded query; UNPLANNED where an operation has to make it."""
    kinds = tuple(map(type, named.values()))
    if not kinds or not _WRITABLE.issuperset(kinds) or query.is_sliced or query.distinct_fields:
        return None
    written = Written(named)
    return plan_of(
        query.chain_node, (*query.chain_values, *named.values()), wrapper, compile_write,
        "update", tuple(named), kinds, written=written,
        djangos=lambda: written.of(djangos(query)),
    )  # fmt: skip


def update(original: Callable[..., Any]) -> Any:
    """`QuerySet.update()`: of a recorded query, without making it."""

    @functools.wraps(original)
    def update(self: Any, **kwargs: Any) -> Any:
        query = self.query
        if type(query) is Recorded and bridge.in_native_code():
            self._for_write = True
            using = self.db
            wrapper = native_wrapper(using)
            found: Found | None = None
            if wrapper is not None:
                found = update_plan(query, kwargs, wrapper)
            if found is not None:
                with transaction.mark_for_rollback_on_error(using):
                    count = count_of(*found, wrapper)
                self._result_cache = None
                return count
            routing.keep_of(self, using)
        try:
            return original(self, **kwargs)
        finally:
            routing.forget()

    return update


def raw_delete(original: Callable[..., Any]) -> Any:
    """`QuerySet._raw_delete()`: of a recorded query, without making it."""

    def raw_delete(self: Any, using: str) -> Any:
        query = self.query
        if type(query) is Recorded and (wrapper := native_wrapper(using)) is not None:
            found = raw_delete_plan(query, wrapper)
            if found is not None:
                return count_of(*found, wrapper)
        return original(self, using)

    return raw_delete


def raw_delete_plan(query: Query, wrapper: Wrapper) -> Found | None:
    return plan_of_recorded(query, wrapper, _compile_raw_delete, "delete")


def _compile_raw_delete(query: Query, wrapper: Wrapper) -> Compiled:
    delete = query.clone()
    delete.__class__ = DeleteQuery
    return compile_write(delete, wrapper)


class _ByKey:
    """The UPDATE of `save()` for certain fields of a model, or the DELETE of one row.

    Attributes:
        lookup: that of the primary key: its class and left side.
        preparing: of an UPDATE, what prepares its values.
        nulls: which of them are NULL.
    """

    preparing: columnar.Preparing
    nulls: list[bool]

    def __init__(self, found: Found, leaf: Any, key: Any, kept: Any = ()) -> None:
        self.plan, params, _ = found
        self.lookup = type(leaf), leaf.lhs
        self.kept = kept
        is_list = type(key) is list
        self._make = maker_of_list(leaf, params) if is_list else maker(leaf, key, params[-1])
        self._is_list = is_list

    def params(self, key: Any, wrapper: Wrapper) -> list[Any]:
        """The parameters for a key, or for a list of one."""
        made = self._make(key, wrapper)
        return made if self._is_list else [made]


def do_update(original: Callable[..., Any]) -> Any:
    """`Model._do_update()`: the UPDATE without a queryset, after the first time."""

    def do_update(
        self: Any, base_qs: Any, using: str, pk_val: object, values: list[Any],
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
            fields, _, objs = zip(*values, strict=True)
            found = None
            if is_untouched(base_qs._query):  # type: ignore[attr-defined]
                base = lambda: base_qs  # noqa: E731
                found = save_plan(base_qs.model, base, wrapper, pk_val, fields, objs)
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


def save_plan(
    model: Any,
    base: Callable[[], QuerySet[Any]],
    wrapper: Wrapper,
    pk: Any,
    fields: Sequence[Any],
    objs: Sequence[Any],
) -> tuple[Plan, list[Any]] | None:
    """The UPDATE of one row, if it is known; in an operation it is made.

    Args:
        base: gives the queryset that it would be made of.
        objs: the values of the fields.
    """
    if type(pk) not in PLAIN_VALUES:
        return None
    try:
        kinds = tuple(map(type, objs))
        whole = wrapper.alias, UpdateQuery, model, type(pk), tuple(map(id, fields)), kinds
        known: Any = recall(whole)
        if known is None:
            return None
        if known is UNPLANNED:
            if not bridge.in_native_code():  # to compile may need a connection
                return None
            make = functools.partial(_plan_save, base(), wrapper, pk, fields, objs)
            known = learn(whole, model, make)
            if known is None:
                return None
        params = known.preparing.params(objs, wrapper)
        if params is None or _nulls(params) != known.nulls:
            return None
        plan: Plan = known.plan
        if plan.skips_null:
            params = [value for value in params if value is not None]
        params += known.params(pk, wrapper)
    except Exception:
        return None
    compile = lambda: compile_write(_update_of(base(), pk, fields, objs), wrapper)  # noqa: E731
    return (plan, params) if hit(whole, plan, params, 0, compile) else None


def _nulls(params: list[Any]) -> list[bool]:
    return [*map(is_, params, repeat(None))]


def _update_of(base_qs: QuerySet[Any], pk: object, fields: Any, objs: Any) -> Any:
    """What `QuerySet._update()` would execute."""
    update: Any = base_qs.filter(pk=pk).query.chain(UpdateQuery)
    update.add_update_fields([*zip(fields, repeat(None), objs)])
    return update


def _plan_save(
    base_qs: QuerySet[Any], wrapper: Wrapper, pk: object, fields: Any, objs: Any
) -> tuple[_ByKey, Ground]:
    update = _update_of(base_qs, pk, fields, objs)
    found = plan_for(update, wrapper, compile_write)
    if found is None or len(update.where.children) != 1 or len(update.values) != len(objs):
        raise NotCacheable
    known = _ByKey(found, update.where.children[0], pk, fields)
    known.preparing = columnar.Preparing(fields, [*map(columnar.as_is, fields)])
    params = known.preparing.params(objs, wrapper)
    if params is None:
        raise NotCacheable
    known.nulls = _nulls(params)
    if not verifying.equal(known.params(pk, wrapper), found[1][-1:]):
        raise NotCacheable
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
    known = _ByKey(found, delete.where.children[0], keys)
    if not verifying.equal(known.params(keys, wrapper), found[1]):
        raise NotCacheable
    return known, _ground_by_key(delete, known, wrapper)
