"""A query that is not made yet: what querysets do to it is recorded.

It is a `Query` to whoever asks. Whatever it cannot say by its node makes it one: then Django does
to it all that was recorded, and it has the class, the attributes and the methods of one.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `Query` and all of its names: each makes the query, but those that are answered here.
"""

from __future__ import annotations

from operator import attrgetter
from threading import Lock
from types import MappingProxyType
from typing import Any

from django.db.models.sql.query import Query

from .. import verifying
from ..grounds import are_djangos
from . import nodes
from .nodes import UNKNOWN, Call, Filter, Limits, Node, Set
from .values import (
    add_watched,
    fields_of,
    joins_plainly,
    keys_of,
    of_values,
    read,
    snapshot,
)

_set: Any = object.__setattr__
_new: Any = object.__new__
_settling = Lock()
_SETTABLE = {"select_for_update", "select_related", "standard_ordering", "filter_is_sticky"}
_NONE: Any = MappingProxyType({})


class Recorded(Query):
    """A query by what was done to it.

    Attributes:
        chain_node: which calls, and with which types of values.
        chain_values: of all calls.
        chain_used: whether it was executed, which gives a query its first table.
        chain_twin: the query that Django makes of the same calls, where hits are verified.
    """

    chain_node: Any
    chain_values: Any
    chain_used = False
    chain_twin: Any = None
    combinator = None
    extra_order_by = ()
    group_by = None
    select_for_update = False
    _filtered_relations = _NONE

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return Query(*args, **kwargs)  # type(query)(model)

    def chain(self, klass: Any = None) -> Any:
        node = getattr(self, "chain_node", None)  # another thread may have made the query just now
        if klass is not None or node is None:
            settle(self)
            return self.chain(klass)
        query = _new(Recorded)
        _set(query, "chain_node", node.chained or node.copies())
        _set(query, "chain_values", self.chain_values)
        return query

    def add_q(self, q_object: Any, reuse_all: bool = False) -> None:
        node = self.chain_node
        values: list[Any] = []
        try:
            form = None if reuse_all else read(q_object, values)
        except Exception:  # of what is lazy: Django asks for it if it comes to that
            form = None
        child = UNKNOWN if form is None else node.child(form)
        if (
            type(child) is Node
            and child.call.holds()
            and (not child.call.keys or snapshot(child.call.keys, values))
        ):
            _follow(self, child, values)
            return
        settle(self)
        if form is None or child is not UNKNOWN:
            self.add_q(q_object, reuse_all)
            return
        seen = add_watched(self, q_object)
        fields = fields_of(seen)
        lookups = None if fields is None else of_values(seen, values)
        keys = None if lookups is None else keys_of(lookups, values)
        lists = [i for i, value in enumerate(values) if type(value) is tuple and len(value) > 1]
        call = None
        if fields is not None and keys is not None and are_djangos(*map(type, lookups or ())):
            call = Filter(form, keys, lists, seen, fields)
        _learn(node, form, call, self, len(values))

    def set_limits(self, low: Any = None, high: Any = None) -> None:
        size = None if high is None else high - (low or 0)
        offset = (low,) if low else ()
        if self.chain_node.is_sliced or (size is not None and size <= 0) or not (offset or high):
            settle(self)
            self.set_limits(low, high)
        else:
            least = 0 if low == 0 else None
            _step(self, (Limits, size, least, len(offset)), Limits, (size, least), offset)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTABLE and type(value) is bool:
            _step(self, (Set, name, value), Set, (name, value))
        else:
            settle(self)
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        settle(self)  # of what Django keeps once something was done to a query, no class tells
        return getattr(self, name)

    def __delattr__(self, name: str) -> None:
        settle(self)
        delattr(self, name)

    def can_filter(self) -> bool:
        return not self.is_sliced

    def is_empty(self) -> bool:
        return False

    @property
    def select_related(self) -> Any:  # type: ignore[override]
        found = self.chain_node.select_related
        if type(found) is not bool:  # Django adds to it
            settle(self)
            found = self.select_related
        return found

    def get_meta(self) -> Any:
        return self.chain_node.model._meta

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        settle(self)
        return vars(self)

    def _class_of(self) -> Any:
        settle(self)
        return type(self)

    __class__ = property(_class_of)


def _follow(query: Any, child: Node, values: Any) -> None:
    child.was_used = True
    _set(query, "chain_node", child)
    if values:
        _set(query, "chain_values", (*query.chain_values, *values))


def _step(query: Any, form: Any, kind: Any, args: Any, values: Any = ()) -> None:
    """Follow a call by its form; one that is not known is made on the query itself."""
    node = query.chain_node
    try:
        child = node.child(form)
    except TypeError:  # an argument of another kind
        child = None
    if type(child) is Node:
        _follow(query, child, values)
        return
    settle(query)
    call = kind(*args)
    call.repeat(query, values, None, 0)
    if child is UNKNOWN and _is_plain(form):
        _learn(node, form, call, query, len(values))


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, bool, int, type)


def _learn(node: Node, form: Any, call: Any, made: Any, count: int) -> None:
    """Keep what a call does to the queries of a node, as seen on one that Django made.

    Args:
        call: None: it cannot be recorded.
    """
    if not nodes.is_current(node):
        return
    if (
        call is None
        or made.is_empty()
        or any(getattr(made, name) != value for name, value in _CONSTANTS.items())
        or not joins_plainly(made)
    ):
        node.keep(form, None)
        return
    child = Node(node, call, made, count)
    if type(call) is Limits and count:
        child.offset_at = child.start
    node.keep(form, child)


def new(model: Any) -> Any:
    """A query that nothing was done to."""
    query = _new(Recorded)
    _set(query, "chain_node", nodes.root(model))
    _set(query, "chain_values", ())
    return query


def is_untouched(query: Any) -> bool:
    """Whether nothing was done to a query that selects some of its rows."""
    if type(query) is Recorded:
        return bool(query.chain_node.is_untouched)
    return not (query.where.children or query.alias_map)


def used(query: Any) -> None:
    """Give a query that was executed by a plan its first table, as compiling it would have."""
    if type(query) is Recorded:
        _set(query, "chain_used", True)
    elif not query.alias_map:
        query.unref_alias(query.get_initial_alias())


def settle(query: Any) -> None:
    """Make a query what Django would have made it, if it is recorded."""
    if type(query) is not Recorded:
        return
    made = nodes.made(query.chain_node, query.chain_values)
    if query.chain_twin is not None:
        verifying.compare_queries(made, query.chain_twin)
    if query.chain_used and not made.alias_map:
        made.unref_alias(made.get_initial_alias())
    with _settling:
        if type(query) is Recorded:
            state = _state(query)
            state.update(made.__dict__)
            _set_class(query, Query)
            for name in ("chain_node", "chain_values", "chain_used", "chain_twin"):
                state.pop(name, None)


_state: Any = next(filter(None, (vars(cls).get("__dict__") for cls in Query.__mro__))).__get__
_set_class: Any = object.__dict__["__class__"].__set__
# What is so of each query that is recorded; its class answers for most of it.
_CONSTANTS: dict[str, Any] = {
    "combinator": None, "extra": {}, "extra_order_by": (), "group_by": None,
    "_filtered_relations": {}, "select_for_update": False,
}  # fmt: skip


class _Made:
    """A name of a query's: it makes the query."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, query: Any, owner: Any = None) -> Any:
        if query is None:
            return getattr(Query, self.name)
        settle(query)
        return getattr(query, self.name)


def _recording(name: str) -> Any:
    """A method of names."""

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        _step(self, (name, args, *kwargs.items()), Call, (name, args, kwargs))

    return method


_METHODS = (
    "clear_ordering", "add_ordering", "add_select_related", "add_deferred_loading",
    "add_immediate_loading", "clear_deferred_loading", "set_values", "add_distinct_fields",
)  # fmt: skip
# What changes a recorded query, or gives another one.
RECORDING = ("chain", "add_q", "set_limits", "__setattr__", *_METHODS)
# These go through plans, which know recorded queries.
_PLANNED = {"has_results", "get_count", "get_aggregation"}
_OF_OBJECTS = {
    "__class__", "__delattr__", "__eq__", "__ge__", "__getattribute__", "__gt__", "__hash__",
    "__init__", "__init_subclass__", "__le__", "__lt__", "__ne__", "__new__", "__setattr__",
    "__subclasshook__", "__doc__", "__module__", "__weakref__", "__firstlineno__",
    "__static_attributes__",
}  # fmt: skip


def _complete() -> None:
    """Give `Recorded` all names of a query's."""
    for name in _METHODS:
        setattr(Recorded, name, _recording(name))
    for name in {"model", *nodes.FACTS} - vars(Recorded).keys():
        setattr(Recorded, name, property(attrgetter(f"chain_node.{name}")))
    for name in {*dir(Query), *vars(Query(None))} - vars(Recorded).keys() - _OF_OBJECTS - _PLANNED:
        setattr(Recorded, name, _Made(name))


_complete()
