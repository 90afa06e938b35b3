"""Plans for recorded queries: of the statement cache, with the recorded values for parameters.

What is kept for a node is the plan that the query had which Django made of it, and for each of its
parameters the one value that it comes from, by the lookup that was made for that value. It holds as
long as the grounds of such a plan do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import ref

from django.db.models import AutoField, BigAutoField, SmallAutoField
from django.db.models.sql.query import Query
from psycopg.types.numeric import Int2, Int4, Int8

from .. import bridge, grounds, statements, verifying
from .._cache.families import target_of
from .._cache.parts import ordering
from .._cache.plan import Plan
from ..expressions import add_unresolved
from ..grounds import Ground
from ..shapes import COMPARISONS, NotCacheable, Shape, shape_of_aggregates
from ..statements import UNPLANNED, Compiled, hit
from ..wrappers import Wrapper
from . import nodes
from .nodes import Node, made
from .recorded import Recorded, settle
from .twins import djangos
from .values import is_djangos

Found = tuple[Plan, list[Any], int]
Part = tuple[int, Callable[[Any, Any], Any], int | None]
_MOST = {Int2: 1 << 15, Int4: 1 << 31, Int8: 1 << 63}
# Values of these are their own parameters.
_MOST_KEYS = {SmallAutoField: 1 << 15, AutoField: 1 << 31, BigAutoField: 1 << 63}


class Written(Protocol):
    """What an UPDATE sets."""

    def of(self, query: Any) -> Any:
        """Django's UPDATE of what a query selects."""

    def parts(self, shaped: Sequence[Any], start: int) -> list[Part]:
        """Where its parameters come from.

        Args:
            shaped: its values as the shape has them.
            start: the place of the first one.
        """


class _Known:
    """The plan of a node's queries, as long as the statement cache has it.

    Attributes:
        parts: for each value its place, what makes its parameter of it, and 0; for each list how
            many parameters are made of it, or None: any number.
        offset_at: the place of the offset.
    """

    def __init__(self, plan: Plan, parts: list[Part], offset_at: int | None, kept: object) -> None:
        self._plan = ref(plan)
        self.parts = parts
        self.has_lists = any(count != 0 for *_, count in parts)
        self.offset_at = offset_at
        self.kept = kept

    @property
    def plan(self) -> Plan | None:
        """The plan; None if it has been forgotten, or its models have other fields now."""
        plan = self._plan()
        return plan if plan is None or not plan.columns or plan.is_current else None

    @property
    def is_of_any_length(self) -> bool:
        """Whether it serves lists of all lengths, beside those of one value."""
        return all(count is None or count < 2 for *_, count in self.parts)

    def bind(
        self, plan: Plan, values: Sequence[Any], wrapper: Wrapper
    ) -> tuple[Plan, list[Any], int]:
        """The plan for lists as long as these, the parameters and the offset."""
        offset = 0 if self.offset_at is None else values[self.offset_at]
        if not self.has_lists:
            return plan, [make(values[place], wrapper) for place, make, _ in self.parts], offset
        params: list[Any] = []
        lists = []
        for place, make, count in self.parts:
            made = make(values[place], wrapper)
            if count == 0:
                params.append(made)
                continue
            if count is None:
                lists.append((len(params), len(made)))
            if len(made) != (count or max(2, len(made))):  # of equal ones Django takes one
                raise NotCacheable
            params += made
        return plan.of_lists(lists) if lists else plan, params, offset


def plan_for(
    query: Query,
    wrapper: Wrapper,
    compile: Callable[[Any, Any], Compiled],
    *kind: Any,
    expressions: Any = None,
) -> Found | None:
    """`statements.plan_for()`, for recorded queries without making them."""
    if type(query) is Recorded:
        found = plan_of(
            query.chain_node, query.chain_values, wrapper, compile, *kind,
            expressions=expressions, djangos=lambda: djangos(query),
        )  # fmt: skip
        if found is not None:
            return None if found is UNPLANNED else found
        settle(query)
    return statements.plan_for(query, wrapper, compile, *kind, expressions=expressions)


def plan_of(
    node: Node,
    values: Sequence[Any],
    wrapper: Wrapper,
    compile: Callable[[Any, Any], Compiled],
    *kind: Any,
    djangos: Callable[[], Any],
    expressions: Any = None,
    written: Written | None = None,
) -> Any:
    """The same for what was recorded; UNPLANNED where an operation has to make the plan.

    Args:
        djangos: returns the query that Django makes, a copy.
        written: of an UPDATE, whose values follow those that were recorded.
    """
    if not nodes.is_current(node):
        return None
    try:
        base = key = _key(node, wrapper, kind, expressions)
        known, ground = node.plans.get(key, _UNKNOWN)
        if known is _BY_LENGTH:
            key = (*base, *_lengths(node, values))
            known, ground = node.plans.get(key, _UNKNOWN)
        if known is None and ground.holds():
            return None
        plan = known.plan if type(known) is _Known and ground.holds() else None
        is_new = plan is None
        if is_new:
            make = functools.partial(
                _learn, node, values, wrapper, compile, kind, expressions, written
            )
            known = _learnt(node, base, values, make)
            if known is None or known is UNPLANNED:
                return known
            plan = known.plan
        if plan is None:
            return None
        plan, params, offset = known.bind(plan, values, wrapper)
    except Exception:  # whatever is wrong with it, Django will say
        return None
    again = lambda: compile(djangos(), wrapper)  # noqa: E731
    if not is_new and not hit((node, key), plan, params, offset, again):
        node.plans[key] = None, Ground(())
        return None
    statements.counts["recorded"] += not is_new
    return plan, params, offset


_UNKNOWN = UNPLANNED, None
_BY_LENGTH: Any = object()  # in the place of a plan: lists of each length have their own
_MAX_KINDS = 64
_MAX_LENGTH = 16  # of lists that have a plan for each length


def _lengths(node: Node, values: Sequence[Any]) -> tuple[int, ...]:
    lengths = tuple([len(values[place]) for place in node.lists])
    if max(lengths) > _MAX_LENGTH:
        raise NotCacheable
    return lengths


def _key(
    node: Any, wrapper: Wrapper, kind: tuple[Any, ...], expressions: object
) -> tuple[Any, ...]:
    """What a node's plans depend on beside the node."""
    key: list[Any] = [wrapper.alias, *kind]
    if items := node.order_by or (node.default_ordering and tuple(node.model._meta.ordering)):
        key += ordering(node.model, items)  # a relation's has what its model is ordered by
    if expressions is not None:
        add_unresolved(expressions, key)
    return tuple(key)


class _Unknown(NotCacheable):
    """The statement cache does not keep a plan for now."""


def _learnt(node: Any, key: Any, values: Any, make: Callable[[], tuple[_Known, Ground]]) -> Any:
    """What a node's statement is, kept from now on; None if there is to be none.

    UNPLANNED, too, where only what is known already may be used: to compile may need a connection.
    """
    known: _Known | None = None
    ground = None
    try:
        known, ground = make()
    except Exception as exc:
        if not bridge.in_native_code():
            return UNPLANNED
        if type(exc) is _Unknown:
            return None
    if len(node.plans) >= _MAX_KINDS:
        node.plans.clear()
    by_length = node.plans.get(key, _UNKNOWN)[0] is _BY_LENGTH
    if by_length or (known is not None and not known.is_of_any_length):
        node.plans[key] = _BY_LENGTH, None
        key = (*key, *_lengths(node, values))
    node.plans[key] = known, ground or Ground((), [node.model])
    return known


def _learn(
    node: Any, values: Any, wrapper: Any, compile: Any, kind: Any, expressions: Any,
    written: Written | None,
) -> tuple[_Known, Ground]:  # fmt: skip
    """What is to be known about a node's queries, as seen on this one."""
    sources: list[tuple[Any, int]] = []
    query = made(node, values, sources)
    if written is not None:
        query, kind = written.of(query), ()
    if expressions is None:
        shape = Shape(query, wrapper, *kind)
    else:
        shape = shape_of_aggregates(query, wrapper, kind, expressions)
    found = statements.plan_for(query, wrapper, compile, *kind, expressions=expressions, again=True)
    keys = shape.key_of_lengths()
    if found is None and statements.plans.keys().isdisjoint(keys):
        raise _Unknown
    if found is None or shape.mixed or shape.selected or shape.spare:
        raise NotCacheable
    asked, params, offset = found
    # That may be one for lists of this length, of the one that is kept.
    plan = next((kept for kept in map(statements.recall, keys[::-1]) if type(kept) is Plan), asked)
    set_first = [] if written is None else written.parts(shape.values, node.stop)
    places = {id(lookup): place for lookup, place in sources}
    parts = _parts(shape, asked, places, values, set_first)
    if plan.shared or (node.offset_at is None) != (not offset):
        raise NotCacheable
    known = _Known(plan, parts, node.offset_at, shape.kept)
    bound, *rest = known.bind(plan, values, wrapper)
    if bound.sql != asked.sql or not verifying.equal(rest, [params, offset]):
        raise NotCacheable
    targets = [target_of(field) for field, *_ in shape.values]  # what makes a relation's values
    ground = grounds.of_query(
        query, [*shape.kept, *targets], plan.maker, wrapper, [type(each) for each, _ in sources],
        *plan.classes, short=True,
    )  # fmt: skip
    return known, ground


def _parts(
    shape: Shape, plan: Plan, places: dict[int, int], values: Sequence[Any], parts: list[Part]
) -> list[Part]:
    """Where the parameters of a plan come from.

    Args:
        places: by the identity of each value's lookup.
        parts: of what is set, which comes first.
    """
    before = len(parts)
    arrays = {start - before for start, _ in plan.lists} if plan.is_of_any_length else ()
    start = 0
    for _, count, leaf in shape.leaves:
        place = places.pop(id(leaf))
        value, own = values[place], shape.params[start : start + count]
        if type(value) is tuple:
            if count != len(value):
                raise _Unknown  # of equal ones Django takes one: wait for others
            parts.append((place, maker_of_list(leaf, own), None if start in arrays else count))
        elif count == 1:
            parts.append((place, maker(leaf, value, own[0]), 0))
        else:
            raise NotCacheable
        start += count
    if places:
        raise NotCacheable
    if plan.picked is not None:
        if any(type(value) is tuple for value in values):
            raise NotCacheable
        parts = [parts[i] for i in plan.picked]
    return parts


def maker_of_list(lookup: Any, params: Any) -> Callable[[Any, Any], Any]:
    """What makes the parameters of a list of values of one type, as the lookup does."""
    cls, lhs = type(lookup), lookup.lhs

    def prepared(values: Any, wrapper: Any) -> Any:
        sql, params = cls(lhs, values).process_rhs(None, wrapper)
        if sql != f"({', '.join(['%s'] * len(params))})":
            raise NotCacheable
        return list(params)

    kinds = set(map(type, params))
    kind = kinds.pop()
    most = _most(kind, lhs.output_field)
    if kinds or most is None or not is_djangos(lhs.output_field):
        return prepared

    def numbered(values: Sequence[Any], wrapper: Wrapper) -> Any:
        if type(values[0]) is not int or min(values) < 0 or max(values) >= most:
            return prepared(values, wrapper)
        return [*map(kind, dict.fromkeys(values))]

    return numbered


def _most(kind: Any, field: Any) -> int | None:
    """What integers are below that a field makes parameters of a class of."""
    return _MOST_KEYS.get(type(target_of(field))) if kind is int else _MOST.get(kind)


def of_integers(param: Any, prepared: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """What makes integers of the class that the parameter is of; `prepared`, if that is none."""
    most = _MOST.get(type(param))
    return prepared if most is None else _numbered(type(param), most, prepared)


def _numbered(
    kind: Callable[[int], Any], most: int, prepared: Callable[[Any, Any], Any]
) -> Callable[[Any, Any], Any]:
    def numbered(value: Any, wrapper: Any) -> Any:
        return kind(value) if 0 <= value < most else prepared(value, wrapper)

    return numbered


def maker(lookup: Any, value: Any, param: Any) -> Callable[[Any, Any], Any]:
    """What makes the parameter of a value of this type, as the lookup does."""
    cls, lhs = type(lookup), lookup.lhs

    def prepared(value: Any, wrapper: Any) -> Any:
        sql, params = cls(lhs, value).process_rhs(None, wrapper)
        if sql != "%s" or len(params) != 1:
            raise NotCacheable
        return params[0]

    if cls not in COMPARISONS or not is_djangos(lhs.output_field):
        return prepared  # for one value it may be as it is, for another not
    kind: Any = type(param)
    most = _most(kind, lhs.output_field)
    if type(value) is int and most is not None and param == value:
        return _numbered(kind, most, prepared)
    if type(value) is str and param is value:
        return lambda value, wrapper: value
    return prepared
