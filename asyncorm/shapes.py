"""The shape of a query: all that its SQL depends on, and the parameters beside it.

A query's SQL depends on its shape and hardly ever on its values. `Shape` reads a `Query` and gives
a key, equal only for queries with the same SQL, and the values as Django's own lookups and fields
convert them. Of the simplest lookups the class and the column are in the key, of all other lookups
and of expressions the SQL that their classes make, and of the expressions of annotations what the
rest of the statement sees of them (expressions.py). What it does not know raises `NotCacheable`.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `Query.__dict__` and its attributes, `WhereNode`, `Col`, `BaseTable`, `Join`: what is read. An
  attribute that is not listed in `PARTS` (_cache/parts.py) is unfit.
- `ForeignObject.get_extra_restriction`, `.get_joining_fields`, `.get_joining_columns` and those of
  `ForeignObjectRel`: overridden, a join does not depend on the field alone.
- `Lookup.process_rhs`: the SQL and the parameters of a lookup's right side; in the key and in the
  parameters. `process_lhs()` and what is around both depend on the class and the column alone, for
  the lookups in `LOOKUPS`.
- `SQLCompiler.compile`, `WhereNode.split_having_qualify`: the SQL of all other lookups and of
  expressions is in the key as it is, their parameters in the parameters.
- `Field.get_db_prep_save`, `.prepare_database_save`: the values of an UPDATE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import django
from django.db import models
from django.db.models import Field, lookups
from django.db.models.expressions import Col, ColPairs, Exists, Subquery
from django.db.models.fields import related_lookups
from django.db.models.fields.tuple_lookups import TupleIn
from django.db.models.lookups import Lookup
from django.db.models.sql.query import Query
from django.db.models.sql.subqueries import DeleteQuery, UpdateQuery
from django.db.models.sql.where import AND, OR, WhereNode

from ._cache.families import LITERALS, TEXT, family, target_of
from ._cache.parts import LITERAL, PARTS, kind_of, ordering, unknown
from .binding import has_placeholder
from .expressions import NotCacheable as NotCacheable
from .expressions import add_field, add_structure, add_unresolved, pattern
from .wrappers import Wrapper

MAX_PARAMS = 2000  # in a list that is no array; one for each object of a chunk is usual

# Lookups whose SQL depends on the column, on what process_rhs() gives, and on nothing else.
_PATTERNS = {
    lookups.IExact, lookups.Contains, lookups.IContains, lookups.StartsWith, lookups.IStartsWith,
    lookups.EndsWith, lookups.IEndsWith, lookups.Regex, lookups.IRegex,
}  # fmt: skip
COMPARISONS = {
    lookups.Exact, lookups.GreaterThan, lookups.GreaterThanOrEqual, lookups.LessThan,
    lookups.LessThanOrEqual, lookups.In, lookups.Range,
    lookups.IntegerFieldExact, lookups.IntegerGreaterThan, lookups.IntegerGreaterThanOrEqual,
    lookups.IntegerLessThan, lookups.IntegerLessThanOrEqual,
    related_lookups.RelatedExact, related_lookups.RelatedIn, related_lookups.RelatedLessThan,
    related_lookups.RelatedGreaterThan, related_lookups.RelatedGreaterThanOrEqual,
    related_lookups.RelatedLessThanOrEqual,
}  # fmt: skip
_ASKS_FOR_NULL = django.VERSION < (5, 2, 1)  # among the keys of a relation, wherever it comes
NULLS = {lookups.IsNull, related_lookups.RelatedIsNull}
_EXACT = {lookups.Exact, lookups.IntegerFieldExact, related_lookups.RelatedExact}
LOOKUPS = _PATTERNS | COMPARISONS
_YEARS = {
    lookups.YearExact, lookups.YearGt, lookups.YearGte, lookups.YearLt, lookups.YearLte,
}  # fmt: skip
_SUBQUERIES = {Exists, Subquery}
_KEYS = {"smallint", "integer", "bigint", "uuid"}
_NUMBERS = {
    models.AutoField, models.BigAutoField, models.SmallAutoField, models.PositiveIntegerField,
    models.PositiveBigIntegerField, models.PositiveSmallIntegerField,
}  # fmt: skip

Place = tuple[Any, int, Any]


class _Keys:
    """A lookup of keys, as far as its left side goes."""

    def __init__(self, lhs: Any) -> None:
        self.lhs = lhs


_LISTS = {lookups.In, related_lookups.RelatedIn, _Keys}
_NONE: tuple[Any, ...] = ()
_NO_NAMES: dict[str, Any] = {}


class Shape:
    """Reads a query: the key of its plan, and its parameters.

    Attributes:
        key: hashable; queries with the same key have the same SQL.
        params: of the lookups, as Django's compiler would make them.
        leaves: for each lookup with parameters of which kind they are, how many, and the node that
            they are of. A kind is the lookup; None or LITERAL for what is compiled.
        values: the same of an UPDATE, with the parameters in place of their number: a kind is the
            field, and there is no node, unless it is an expression.
        selected, spare: the parameters of the annotations that are selected, and of other
            expressions, which the statement may have somewhere or not.
        chosen, spared: of which kinds the parameters in those are, as in `leaves`.
        named: the resolved expressions of `aggregate()` by name.
        grouping: the parameters of what Django leaves out if it is equal, where it groups, makes
            distinct or (`compares`) orders by it.
        mixed: whether there are parameters of expressions.
        offset: what LIMIT begins at, 0 for none.
        lengths: of the lists that may be arrays; they are the key's last part, beside `kind`'s.
        kept: objects whose id() is in the key.
    """

    __slots__ = (
        "chosen", "compares", "compiler", "grouping", "having", "kept", "key", "leaves", "lengths",
        "mixed", "named", "offset", "params", "query", "selected", "spare", "spared", "values",
        "wrapper",
    )  # fmt: skip

    is_inner = False  # of a subquery

    def __init__(self, query: Any, wrapper: Any, *kind: Any) -> None:
        if type(query) not in _QUERIES and query.__class__ not in _QUERIES:  # recorded: made now
            raise NotCacheable
        self.query = query
        self.wrapper = wrapper
        opts = query.model._meta
        columns = opts.concrete_fields
        self.key: list[Any] = [wrapper.alias, type(query), *kind, id(columns), opts.db_table]
        self.params: list[Any] = []
        self.leaves: list[Place] = []
        self.values: list[tuple[Any, Any, Any]] = []
        self.selected = self.chosen = self.spare = self.spared = self.grouping = _NONE
        self.named = _NO_NAMES
        self.lengths: tuple[int, ...] = _NONE
        self.mixed = self.having = self.compares = False
        self.compiler: Any = None
        self.kept: list[Any] = [columns]
        state = query.__dict__
        if len(state) == _NEW and not (
            state["alias_map"]
            or state["where"].children
            or state["annotations"]
            or state["extra"]
            or state["_filtered_relations"]
            or state["external_aliases"]
        ):
            self.key.append("new")  # nobody has done anything to it
            state = {}
        for name, value in state.items():
            part = PARTS.get(name, unknown)
            if part is not None:
                self.key.append(name)
                part(self, value)
        self.offset: int = query.low_mark
        high = query.high_mark
        self.key += (self.offset > 0, None if high is None else high - self.offset)
        if query.default_ordering and not query.order_by:
            self.key.append(ordering(opts.model, tuple(opts.ordering or ())))
        if len(self.grouping) > 1 and self.repeats:
            self.key.append(pattern(self.grouping))
        if self.lengths and not self.is_inner:
            self.key.append(self.lengths)

    def key_of_lengths(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The key, and that for lists of any length."""
        key = tuple(self.key)
        if not (lengths := self.lengths):
            return key, key
        return key, tuple([each for each in key if each is not lengths])

    @property
    def repeats(self) -> bool:
        """Whether an expression may be in the statement more than once, or left out as equal."""
        return bool(self.compares or self.query.group_by is not None or self.query.distinct)

    def kinds(self) -> tuple[Any, ...]:
        """Of the parameters in `selected`, as in `leaves`."""
        return tuple([(None, *rest) for _, *rest in self.chosen]) if self.repeats else self.chosen

    def where(self, node: Any) -> None:
        """A node of the WHERE tree."""
        key = self.key
        key.append((node.connector, node.negated, node.resolved, len(node.children)))
        for child in node.children:
            cls: Any = type(child)
            if cls in LOOKUPS:
                lhs, rhs = child.lhs, child.rhs
                if type(lhs) is not Col or hasattr(rhs, "as_sql") or child.bilateral_transforms:
                    self.compiled(child)
                    continue
                key += (cls, lhs.alias, id(lhs.target), id(lhs.output_field))
                self.kept += (lhs.target, lhs.output_field)
                if type(rhs) is bool and cls in _EXACT and lhs.conditional:
                    key.append(rhs)
                    continue
                sql, params = child.process_rhs(None, self.wrapper)
                count = len(params)
                if (
                    count > 1
                    and cls in _LISTS
                    and self.takes_array(lhs.target)
                    and sql == f"({', '.join(['%s'] * count)})"
                ):
                    self.lengths += (count,)
                    sql = "(...)"
                elif count > MAX_PARAMS:
                    raise NotCacheable
                key.append(tuple(sql) if type(sql) is list else sql)
                self.params += params
                self.leaves.append((child, len(params), child))
            elif cls is WhereNode and (child.connector == AND or child.connector == OR):
                self.where(child)
            elif cls is TupleIn and type(child.lhs) is ColPairs and len(child.lhs) == 1:
                self.keys(child)
            elif cls in NULLS and type(child.lhs) is Col and type(child.rhs) is bool:
                lhs = child.lhs
                key += (cls, lhs.alias, id(lhs.target), id(lhs.output_field), child.rhs)
                self.kept += (lhs.target, lhs.output_field)
            else:
                self.compiled(child)

    def compiled(self, child: Any) -> None:
        """What else may be in the tree: its SQL is its key."""
        cls, key = type(child), self.key
        rhs = getattr(child, "rhs", None)
        if (
            cls in _LISTS
            and type(child.lhs) is Col
            and type(rhs) is Query
            and not child.bilateral_transforms
        ):
            lhs = child.lhs
            key += (cls, lhs.alias, id(lhs.target), id(lhs.output_field))
            self.kept += (lhs.target, lhs.output_field)
            inner: _Inner | None = self.subquery(rhs)
        else:
            inner = self.nested(child)
        if inner is not None:
            params, kinds = inner.parameters()
            self.params += params
            self.leaves += kinds
            return
        if not self.having and (child.contains_aggregate or child.contains_over_clause):
            raise NotCacheable
        sql, params = self.compile(child)
        key += (cls, sql)
        if self.having:
            add_structure(child, key, self.kept)
            self.grouping += tuple(params)
        if params:
            self.params += params
            kind = child if cls in _YEARS else None if self.having else kind_of(sql)
            self.leaves.append((kind, len(params), child))
            self.mixed = True

    def subquery(self, query: Query) -> _Inner:
        """A query within this one, by its own shape."""
        if query.low_mark:
            raise NotCacheable
        inner = _Inner(query, self.wrapper)
        self.key += (len(inner.key), *inner.key)
        self.spare += inner.spare
        self.spared += inner.spared
        self.kept += inner.kept
        self.lengths += inner.lengths
        self.mixed = self.mixed or inner.mixed
        return inner

    def nested(self, node: Any) -> _Inner | None:
        """The shape of a subquery that is an expression; None: it has to be compiled."""
        cls = type(node)
        if cls is not Query and (cls not in _SUBQUERIES or node.extra):
            return None
        if self.query.group_by is not None:  # it may be by the subquery's columns
            return None
        size = len(self.key)
        self.key += (cls, getattr(node, "template", None))
        try:
            return self.subquery(node if cls is Query else node.query)
        except Exception:
            del self.key[size:]
            return None

    def compile(self, node: object) -> Any:
        """The SQL and the parameters of a node, from its own class."""
        if self.compiler is None:
            self.compiler = self.query.get_compiler(connection=self.wrapper)
        sql, params = self.compiler.compile(node)
        if len(params) > MAX_PARAMS:
            raise NotCacheable
        self.key.append(len(params))  # a __range of three values has the SQL of one of two
        return sql, params

    def expression(self, node: object) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The parameters of a resolved expression, whose SQL and structure are in the key.

        Beside them, of which kinds they are: as in `leaves`.
        """
        inner = self.nested(node)
        if inner is not None:
            params, kinds = inner.parameters()
        else:
            sql, found = self.compile(node)
            params, kinds = tuple(found), ((kind_of(sql), len(found), node),)
            self.key.append(sql)
            add_structure(node, self.key, self.kept)
        self.mixed = self.mixed or bool(params)
        self.grouping += params
        return params, kinds

    def annotation(self, name: str, node: Any, *, selected: bool) -> None:
        """An expression by its name; its output field converts its values."""
        self.key.append(name)
        params, kinds = self.expression(node)
        add_field(node.output_field, self.key, self.kept)
        if selected:
            self.selected += params
            self.chosen += kinds
        else:
            self.spare += params
            self.spared += kinds

    def keys(self, lookup: Lookup[Any]) -> None:
        """One column among keys: what a forward relation's prefetch asks for."""
        (col,) = lookup.lhs.get_cols()
        if (
            type(lookup.rhs) is not list
            or has_placeholder(col.output_field)
            or len(lookup.rhs) > MAX_PARAMS
        ):
            raise NotCacheable
        params = []
        for (value,) in lookup.rhs:
            if hasattr(value, "as_sql") or (value is None and _ASKS_FOR_NULL):
                raise NotCacheable
            if value is not None:
                params.append(col.output_field.get_db_prep_value(value, connection=self.wrapper))
        if not params:
            raise NotCacheable
        self.key += (TupleIn, len(params), col.alias, id(col.target), id(col.output_field))
        self.kept += (col.target, col.output_field)
        self.params += params
        self.leaves.append((_Keys(col), len(params), lookup))

    def places(self, *, skips_null: bool) -> list[Place]:
        """All places for parameters, as in `leaves`, in the order of `bind()`."""
        return [
            *(
                (kind, 0 if skips_null and _is_null(params, node) else len(params), node)
                for kind, params, node in self.values
            ),
            *self.kinds(),
            *self.leaves,
            *self.spared,
        ]

    def families(self, *, skips_null: bool) -> list[dict[type, int]]:
        """For each parameter, which values may be parameters of the server."""
        literals = {} if self.wrapper.features.uses_server_side_binding else LITERALS
        found = []
        for kind, count, node in self.places(skips_null=skips_null):
            if kind is None:
                kinds: dict[type, int] = {}
            elif kind is LITERAL:
                kinds = literals
            elif node is None:
                kinds = family(kind, self.wrapper)
            else:
                lhs = kind.lhs.lhs if type(kind) in _YEARS else kind.lhs
                if type(lhs) is not Col:
                    kinds = {}
                elif type(kind) in _PATTERNS:
                    kinds = TEXT
                else:
                    kinds = family(lhs.target, self.wrapper)
            found += [kinds] * count
        return found

    def takes_array(self, column: Field[Any, Any]) -> bool:
        """Whether a list of values of a column may be an array.

        PostgreSQL makes one of the column's type, which may be another one than the field says:
        real, say. No key is that.
        """
        is_key = column.primary_key or column.is_relation
        target = target_of(column)
        if type(target) in _NUMBERS:
            # Asked for a foreign key's type, these make a field: that changes a counter on their
            # class, so that all that rests on it is looked at again.
            column = target
        return column.db_type(self.wrapper) in (_KEYS if is_key else {"uuid"})

    def lists(self, *, skips_null: bool) -> list[tuple[int, int]]:
        """Which parameters are a list that may be an array: where it begins and how long it is."""
        found = []
        at = 0
        for kind, count, _ in self.places(skips_null=skips_null):
            if (
                count > 1
                and type(kind) in _LISTS
                and type(kind.lhs) is Col
                and self.takes_array(kind.lhs.target)
            ):
                found.append((at, count))
            at += count
        return found

    def bind(self, *, skips_null: bool) -> list[Any]:
        """All parameters but the constants and the offset."""
        if not self.values and not self.mixed:
            return self.params
        written = [
            param
            for _, params, node in self.values
            if not (skips_null and _is_null(params, node))
            for param in params
        ]
        return [*written, *self.selected, *self.params, *self.spare]


def _is_null(params: Sequence[Any], node: object) -> bool:
    """Whether a value of an UPDATE is NULL: Django may write it into the SQL."""
    return node is None and params[0] is None


def shape_of_aggregates(
    query: Query, wrapper: Wrapper, kind: tuple[Any, ...], named: Mapping[str, Any]
) -> Shape:
    """The shape of a query that aggregates, by expressions that are not resolved yet."""
    shape = Shape(query, wrapper, *kind)
    key: list[Any] = []
    try:
        add_unresolved(named, key)
    except NotCacheable:
        # Annotations would be referred to, or be in a subquery with all that is slice and group.
        if query.annotations or query.group_by is not None or query.distinct or query.is_sliced:
            raise
        query = query.clone()  # it gets the joins that they need
        nodes = [
            each.resolve_expression(query, allow_joins=True, reuse=None, summarize=True)
            for each in named.values()
        ]
        shape = Shape(query, wrapper, *kind, "resolved")
        shape.named = dict(zip(named, nodes, strict=True))
        for name, node in shape.named.items():
            shape.annotation(name, node, selected=True)
    else:
        shape.key += key
    return shape


class _Inner(Shape):
    """Of a subquery."""

    __slots__ = ()
    is_inner = True

    def parameters(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """All that it surely has, and of which kinds they are."""
        return (*self.selected, *self.params), (*self.kinds(), *self.leaves)


_QUERIES = {Query, UpdateQuery, DeleteQuery}
_NEW = len(vars(Query(None)))
