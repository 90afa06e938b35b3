"""What to do with each attribute of a Query, for its shape."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from django.core.exceptions import FieldDoesNotExist
from django.db.models import Model
from django.db.models.expressions import Col, ColPairs
from django.db.models.fields.related import ForeignObject
from django.db.models.fields.reverse_related import ForeignObjectRel
from django.db.models.query_utils import FilteredRelation
from django.db.models.sql.datastructures import BaseTable, Join
from django.db.models.sql.query import Query
from django.db.models.sql.where import AND, OR, WhereNode

from .. import grounds
from ..binding import has_placeholder
from ..expressions import NotCacheable, add_unresolved, names_in

if TYPE_CHECKING:
    from ..shapes import Shape


MAX_ORDERS = 1024
# Where PostgreSQL compares expressions as they are written, two parameters are not the same.
_COMPARING = re.compile(r"\b(GROUP BY|DISTINCT|OVER)\b")
LITERAL: Any = object()  # in the place of a lookup: parameters that may be sent as such


def unknown(shape: Shape, value: object) -> None:
    raise NotCacheable


def _value(shape: Shape, value: object) -> None:
    shape.key.append(value)


def _absent(shape: Shape, value: object) -> None:
    if value:
        raise NotCacheable


def _aliases(shape: Shape, value: Any) -> None:
    shape.key.append(frozenset(value))


def _subquery(shape: Shape, value: object) -> None:
    if value and not shape.is_inner:
        raise NotCacheable
    shape.key.append(value)


def _locked(shape: Shape, value: object) -> None:
    if value and shape.wrapper.get_autocommit():
        raise NotCacheable  # Django refuses
    shape.key.append(value)


def _items(shape: Shape, value: Any) -> None:
    shape.key.append(tuple(value.items()))


def _annotations(shape: Shape, value: Any) -> None:
    if not value:
        return
    if type(shape.query) is not Query:
        raise NotCacheable
    mask = shape.query.annotation_select_mask
    for name, each in value.items():
        shape.annotation(name, each, selected=mask is None or name in mask)


def _grouped(shape: Shape, value: Any) -> None:
    if value is None or value is True:
        shape.key.append(value)
        return
    shape.key.append(len(value))
    for each in value:
        if type(each) is str:
            shape.key.append(each)
        else:
            params, kinds = shape.expression(each)
            shape.spare += params
            shape.spared += kinds


def _extra(shape: Shape, value: Any) -> None:
    for name, (sql, params) in value.items():
        if params or type(sql) is not str:
            raise NotCacheable
        shape.key += (name, sql)
    shape.key.append(len(value))


def _mask(shape: Shape, value: Any) -> None:
    shape.key.append(value if value is None else (type(value), *sorted(value)))


def _joins(shape: Shape, value: Any) -> None:
    for alias, join in value.items():
        if type(join) is BaseTable:
            shape.key += (alias, join.table_name, join.table_alias)
        elif type(join) is Join and _joins_plainly(*_classes_of(join.join_field)):
            shape.key += (
                alias, join.table_name, join.table_alias, join.parent_alias, join.join_type,
                join.nullable, id(join.join_field),
            )  # fmt: skip
            shape.kept.append(join.join_field)
            if join.filtered_relation is not None:
                _filtered(shape, join.filtered_relation)
        else:
            raise NotCacheable


def _filtered(shape: Shape, value: Any) -> None:
    condition = value.resolved_condition
    if (
        type(value) is not FilteredRelation
        or type(condition) is not WhereNode
        or (condition.connector != AND and condition.connector != OR)
    ):
        raise NotCacheable
    shape.key.append("filtered")
    shape.where(condition)


def _filtered_relations(shape: Shape, value: Any) -> None:
    joins = shape.query.alias_map
    for name, each in value.items():
        # One that is not joined yet may be while Django compiles.
        if getattr(joins.get(name), "filtered_relation", None) is None:
            raise NotCacheable
        shape.key += (name, each.alias, each.relation_name)
    if value and shape.query.select_related:  # it may be selected, and is set as it says
        raise NotCacheable


def _classes_of(join_field: object) -> tuple[Any, Any]:
    return type(join_field), type(getattr(join_field, "field", None))


@functools.cache
def _joins_plainly(cls: type, behind: type) -> bool:
    """Whether a field, or what leads back along one, joins by columns and nothing else: a condition
    of its own, as that of a generic relation, has parameters or may depend on anything."""
    classes: list[tuple[Any, Any]] = [(cls, ForeignObject)]
    if issubclass(cls, ForeignObjectRel):
        classes = [(cls, ForeignObjectRel), (behind, ForeignObject)]
    names = ("get_extra_restriction", "get_joining_fields", "get_joining_columns")
    return all(grounds.inherits(one, base, names) for one, base in classes)


def _tables(shape: Shape, value: Any) -> None:
    shape.key += [(table, *aliases) for table, aliases in value.items()]


def _where(shape: Shape, value: object) -> None:
    if type(value) is not WhereNode or (value.connector != AND and value.connector != OR):
        raise NotCacheable
    if shape.query.group_by is None:
        shape.where(value)
        return
    where, having, qualify = value.split_having_qualify(must_group_by=True)
    if qualify is not None:
        raise NotCacheable
    if where is not None:
        shape.where(where)
    if having is not None:
        shape.key.append("having")
        shape.having = shape.mixed = True
        shape.where(having)


def _columns(shape: Shape, value: Any) -> None:
    for col in value:
        if type(col) is Col:
            shape.key += (col.alias, id(col.target), id(col.output_field))
            shape.kept += (col.target, col.output_field)
        else:  # of a transform in values()
            shape.annotation("", col, selected=True)
    shape.key.append(len(value))


def _deferred(shape: Shape, value: Any) -> None:
    names, defer = value
    shape.key += (frozenset(names), defer)


def _names(shape: Shape, value: Any) -> None:
    if not all(type(name) is str for name in value):
        raise NotCacheable
    shape.key.append(tuple(value))


def _order(shape: Shape, value: Any) -> None:
    if value:
        annotations = shape.query.annotations
        if annotations:
            names = [name.removeprefix("-") for item in value for name in names_in(item)]
            shape.key.append(tuple([item if type(item) is str else None for item in value]))
            shape.compares = shape.compares or not annotations.keys().isdisjoint(names)
            value = tuple(
                item
                for item in value
                if type(item) is not str or item.removeprefix("-") not in annotations
            )
        shape.key.append(ordering(shape.query.model, value, annotations))


plain_orders: dict[Any, bool] = {}


def ordering(model: Any, items: tuple[Any, ...], annotations: Any = ()) -> tuple[Any, ...]:
    """What a query of a model is ordered by, as a key.

    Args:
        annotations: their names, which expressions may have.

    Raises:
        NotCacheable: it is neither columns, nor relations, nor expressions without parameters.
    """
    if all(type(item) is str for item in items):
        known = plain_orders.get((model, items))
        if known is None:
            if len(plain_orders) >= MAX_ORDERS:
                plain_orders.clear()
            known = plain_orders[model, items] = all(_is_column(model, name) for name in items)
        if known:
            return items
    key: list[Any] = []
    for item in items:
        _add_order(model, item, annotations, key, ())
    return tuple(key)


def _add_order(
    model: type[Model],
    item: object,
    annotations: Collection[str],
    key: list[Any],
    seen: tuple[Any, ...],
) -> None:
    if type(item) is not str:
        add_unresolved(item, key)
        if not all(name in annotations or _is_column(model, name) for name in names_in(item)):
            raise NotCacheable
        return
    key.append(item)
    if item == "?" or _is_column(model, item):
        return
    related = _related_model(model, item)
    if related in seen:  # Django raises where it goes round
        raise NotCacheable
    nested = related._meta.ordering or ()
    key.append(len(nested))
    for each in nested:
        _add_order(related, each, (), key, (*seen, related))


def _end_of(model: Any, name: str) -> tuple[Any, str]:
    """The model that a path leads to, and the name that is looked for there.

    Raises:
        NotCacheable: it is no path.
    """
    *path, name = name.removeprefix("-").split("__")
    for step in path:
        try:
            model = model._meta.get_field(step).related_model
        except FieldDoesNotExist:
            raise NotCacheable from None
        if model is None:
            raise NotCacheable
    return model, name


def _is_column(model: type[Model], name: str) -> bool:
    try:
        end, last = _end_of(model, name)
    except NotCacheable:
        return False
    fields = end._meta.pk_fields
    if last == "pk":  # at the end of a path Django takes one that is a relation for that
        return len(fields) == 1 and not (fields[0].is_relation and "__" in name)
    return any(
        last == field.attname or (last == field.name and not field.is_relation)
        for field in end._meta.concrete_fields
    )


def _related_model(model: type[Model], name: str) -> Any:
    """The model of the relation that a name is of: Django orders by what that is ordered by."""
    end, last = _end_of(model, name)
    for field in end._meta.concrete_fields:
        if field.name == last and field.is_relation:
            return field.related_model
    raise NotCacheable


def _selected(shape: Shape, value: Any) -> None:
    if value is not None:
        if not all(type(item) in (int, str) for item in value.values()):
            raise NotCacheable
        _items(shape, value)


def _related(shape: Shape, value: object) -> None:
    shape.key.append(_frozen(value))


def _frozen(value: object) -> Any:
    return tuple((k, _frozen(v)) for k, v in value.items()) if type(value) is dict else value


def kind_of(sql: str) -> Any:
    return None if _COMPARING.search(sql) else LITERAL


def _updated(shape: Shape, value: Any) -> None:
    if shape.query.related_updates or shape.query.count_active_tables() > 1:
        raise NotCacheable
    for field, _, item in value:
        if has_placeholder(field):
            raise NotCacheable
        if hasattr(item, "resolve_expression"):
            if item.contains_aggregate or item.contains_over_clause or type(item) is ColPairs:
                raise NotCacheable
        elif hasattr(item, "prepare_database_save"):
            if not field.remote_field:  # an error of Django's
                raise NotCacheable
            item = item.prepare_database_save(field)
        item = field.get_db_prep_save(item, connection=shape.wrapper)
        if hasattr(item, "as_sql"):
            sql, params = shape.compile(item)
            shape.key += (id(field), sql)
            shape.kept.append(field)
            shape.values.append((kind_of(sql), params, item))
            shape.mixed = shape.mixed or bool(params)
            continue
        shape.values.append((field, (item,), None))
        shape.kept.append(field)
        shape.key += (id(field), item is None)


PARTS: dict[str, Callable[[Shape, Any], None] | None] = {
    "model": _value,
    "alias_refcount": _items,
    "alias_map": _joins,
    "alias_cols": _value,
    "external_aliases": _items,
    "table_map": _tables,
    "used_aliases": None,
    "where": _where,
    "annotations": _annotations,
    "extra": _extra,
    "_filtered_relations": _filtered_relations,
    "base_table": None,
    "contains_aggregate": None,  # these are told from the rest
    "contains_over_clause": None,
    "_annotation_select_cache": None,
    "annotation_select_mask": _mask,
    "_extra_select_cache": None,
    "extra_select_mask": _mask,
    "order_by": _order,
    "extra_order_by": _absent,
    "default_ordering": _value,
    "default_cols": _value,
    "standard_ordering": _value,
    "distinct": _value,
    "distinct_fields": _names,
    "low_mark": None,  # the limit is in the key, see there
    "high_mark": None,
    "deferred_loading": _deferred,
    "select": _columns,
    "values_select": _names,
    "selected": _selected,
    "select_related": _related,
    "max_depth": _value,
    "group_by": _grouped,
    "combinator": _absent,  # Django selects more columns of such queries while it compiles them
    "combinator_all": _value,
    "combined_queries": _absent,
    "select_for_update": _locked,
    "select_for_update_nowait": _value,
    "select_for_update_skip_locked": _value,
    "select_for_update_of": _names,
    "select_for_no_key_update": _value,
    "explain_info": _absent,
    "filter_is_sticky": None,
    "_lookup_joins": None,  # for split_exclude(), while a filter is built
    "subquery": _subquery,
    "alias_prefix": _value,
    "subq_aliases": _aliases,
    "_db": _value,
    "contains_subquery": _value,
    "values": _updated,
    "related_ids": _absent,
    "related_updates": _absent,
}


def unknown_attributes() -> list[str]:
    """The attributes of a Query that this Django has and nothing is known about.

    Every statement is unfit for the cache while there is one (`PARTS`).
    """
    return sorted(vars(Query(None)).keys() - PARTS.keys())
