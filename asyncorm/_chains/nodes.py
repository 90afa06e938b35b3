"""A trie of what is done to queries: each way to do it leads from one node to the next.

A node stands for all queries that the same was done to, with values of the same types. What it says
of them was seen on the first one, which Django made; the next node is found by the form of a call.
Another query of that kind is made, when somebody asks for it, by doing all of it again.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `Query` and its attributes in `Node`: what querysets ask a query for before they do something.
- `Query.join`, and whichever functions `Query` has: done again what was recorded by them.
- `RegisterLookupMixin.get_class_lookups`: another lookup may be the one that is meant.
"""

from __future__ import annotations

import functools
from threading import Lock
from types import FunctionType
from typing import Any

from django.db.models.sql.datastructures import Join
from django.db.models.sql.query import Query

from .. import grounds
from .values import Form, Key, Prepared, add_watched, is_told, of_values, write

UNKNOWN: Any = object()
MAX_NODES = 8192
MAX_CHILDREN = 256  # names that come from users fill one node at most

FACTS = (
    "is_sliced", "order_by", "default_ordering", "standard_ordering", "distinct_fields",
    "values_select", "select_related", "filter_is_sticky",
)  # fmt: skip


class Node:
    """All queries that the same was done to.

    Attributes:
        call: what was done to the parent's last.
        start, stop: the places of the values of that call.
        lists: the places of those that are lists of more than one.
        is_untouched: whether its queries select all rows, as new ones do.
        offset_at: the place of the value that LIMIT begins at.
        chained: what `copies()` gives, once it was asked for.
        children: by the form of the next call; None: it cannot be recorded.
        gets: the nodes that `get()` leads to, by its keywords and the types of their values.
        plans: what is executed for its queries, by the way in which they are (plans.py).
        tables: of its models and those that it joins, as they were.
        was_used: since somebody last looked for a child to forget.
        era: of the trie; another one once something has changed that all nodes depend on.
    """

    __slots__ = (
        "call", "chained", "children", "era", "gets", "is_untouched", "lists", "model", "offset_at",
        "parent", "plans", "start", "stop", "tables", "was_used", *FACTS,
    )  # fmt: skip

    filter_is_sticky: bool

    def __init__(self, parent: Node | None, call: Any, query: Any, count: int) -> None:
        self.parent = parent
        self.call = call
        self.model = query.model
        self.start: int = 0 if parent is None else parent.stop
        self.stop: int = self.start + count
        self.lists: list[int] = [] if parent is None else parent.lists
        if type(call) is Filter and call.lists:
            self.lists = [*self.lists, *(self.start + place for place in call.lists)]
        self.is_untouched: bool = parent is None or (call is None and parent.is_untouched)
        self.offset_at: int | None = None if parent is None else parent.offset_at
        self.chained: Node | None = None
        self.children: dict[Any, Node | None] = {}
        self.gets: dict[Any, Node] = {}
        self.plans: dict[Any, Any] = {}
        self.was_used = False
        self.era = _era
        self.tables: tuple[tuple[Any, str], ...] = (
            _tables(query) if type(query) is Query else query.tables
        )
        for name in FACTS:
            setattr(self, name, getattr(query, name))

    def keep(self, form: Any, child: Node | None) -> None:
        """Lead to a child by the form of a call."""
        global _count
        with _keeping:
            if _count >= MAX_NODES:
                clear()
            if self.era is not _era:
                return
            children = self.children
            while len(children) >= MAX_CHILDREN:
                oldest = next(iter(children))
                node = children.pop(oldest)
                if node is not None and node.was_used:
                    node.was_used = False
                    children[oldest] = node
                else:
                    _count -= _size(node)
            _count += form not in children
            children[form] = child

    def child(self, form: Any) -> Any:
        """The node that a call leads to by its form; None: it cannot be recorded.

        UNKNOWN, too, where it does not lead there any more.
        """
        child = self.children.get(form, UNKNOWN)
        return UNKNOWN if type(child) is Node and not is_current(child) else child

    def copies(self) -> Node:
        """The node of the copies that `Query.chain()` makes."""
        node = self.chained
        if node is None:
            node = Node(self, None, self, 0)
            # A copy of a copy is the same again, unless it may join what the first one has joined.
            if not self.filter_is_sticky:
                node.chained = node
            node.filter_is_sticky = False
            self.chained = node
        return node


def _tables(query: Any) -> tuple[tuple[Any, str], ...]:
    """The options of a query's models, its own first, and their tables."""
    opts = query.model._meta
    joins: Any = (join for join in query.alias_map.values() if type(join) is Join)
    joined = {join.join_field.related_model._meta: join.table_name for join in joins}
    return tuple({opts: opts.db_table, **joined}.items())


def _size(node: Node | None) -> int:
    size, nodes = 0, [node]
    while nodes:
        size += 1
        if (each := nodes.pop()) is not None:
            nodes += each.children.values()
            if each.chained is not None and each.chained is not each:
                nodes.append(each.chained)
    return size


class _Era:
    """Of a trie: until lookups are registered, models made or settings changed."""


_keeping = Lock()
_era = _Era()
_count = 0
_roots: dict[Any, Node] = {}
_lookups: Any = None


def clear() -> None:
    """Forget all nodes: those that querysets still have lead nowhere any more."""
    global _count, _era
    _era = _Era()
    _count = 0
    _roots.clear()


def is_current(node: Node) -> bool:
    """Whether a node may still be followed: Django would do what it did."""
    if node.era is not _era or _lookups is not grounds.registered_lookups():
        return False
    for opts, table in node.tables:
        if opts.db_table != table:
            return False
    return grounds.are_sound()


def root(model: Any) -> Node:
    """The node of queries that nothing was done to."""
    global _lookups
    if _lookups is not (now := grounds.registered_lookups()):
        _lookups = now
        clear()
    node = _roots.get(model)
    if node is None or node.tables[0][1] != model._meta.db_table:
        _own()  # the methods that it is recorded by
        node = _roots[model] = Node(None, None, Query(model), 0)
    return node


class Filter:
    """`add_q()`.

    Attributes:
        keys: of the instances among the values.
        lists: the places of lists of more than one.
    """

    def __init__(
        self,
        form: Form,
        keys: list[Key],
        lists: list[int],
        seen: list[tuple[Any, Any]],
        fields: list[Any],
    ) -> None:
        self.form = form
        self.keys = keys
        self.lists = lists
        self._lookups = [Prepared(rhs, lookup) for rhs, lookup in seen]
        self._registered = grounds.registered_lookups()
        self._fields = {field: len(vars(field)) for field in fields}
        classes = {type(lookup) for _, lookup in seen}
        self._classes = grounds.Classes({*classes, *map(type, fields)})

    def holds(self) -> bool:
        """Whether Django would find the same lookups now."""
        if not self._classes.are_as_they_were():
            return False
        for field, size in self._fields.items():
            if len(state := vars(field)) != size:  # something it keeps, or a mock
                if not is_told(field):
                    return False
                self._fields[field] = len(state)
        return True

    def repeat(self, query: Any, values: Any, sources: Any, start: int) -> None:
        q = write(self.form, iter(values))
        found = self._registered is grounds.registered_lookups() and self.holds()
        if sources is None and found:
            query.add_q(q)
            return
        seen = add_watched(query, q, None if found else self._lookups)
        if sources is None:
            return
        lookups = of_values(seen, values)
        if lookups is None:
            raise ValueError  # it does not use its values one by one: there is no plan
        sources += [(lookup, place) for place, lookup in enumerate(lookups, start)]


class Call:
    """A method with names for arguments."""

    def __init__(self, name: str, args: Any, kwargs: Any) -> None:
        self.name = name
        self.args = args
        self.kwargs = kwargs

    def repeat(self, query: Any, values: Any, sources: Any, start: int) -> None:
        getattr(query, self.name)(*self.args, **self.kwargs)


class Set:
    """An attribute that is set."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value

    def repeat(self, query: Any, values: Any, sources: Any, start: int) -> None:
        setattr(query, self.name, self.value)


class Limits:
    """`set_limits()`, whose offset is a value, unless it is 0.

    Attributes:
        size: how many rows; None: all.
        low: None or 0 where there is no value.
    """

    def __init__(self, size: int | None, low: int | None) -> None:
        self.size = size
        self.low = low

    def repeat(self, query: Any, values: Any, sources: Any, start: int) -> None:
        low = values[0] if values else self.low
        query.set_limits(low, None if self.size is None else (low or 0) + self.size)


def _chain(query: Any) -> None:
    """What `query.chain()` gives, where nobody has the query that it copies."""
    state = query.__dict__
    state["_annotation_select_cache"] = None
    state.pop("base_table", None)
    if not query.filter_is_sticky:
        state["used_aliases"] = set()
    state["filter_is_sticky"] = False


def made(node: Node, values: Any, sources: Any = None) -> Any:
    """The query that Django makes of what was recorded.

    Args:
        sources: a list, for each value its lookup and its place are put into it.
    """
    path, end = [], node
    while node.parent is not None:
        path.append(node)
        node = node.parent
    then = {opts.db_table: table for opts, table in end.tables}
    as_it_was = grounds.are_sound() and all(now == table for now, table in then.items())
    query: Any = Query(node.model) if as_it_was else _own()(node.model)
    if not as_it_was:
        query.tables_then = then
    for step in reversed(path):
        if step.call is None:
            _chain(query)
        else:
            step.call.repeat(query, values[step.start : step.stop], sources, step.start)
    if not as_it_was:
        del query.tables_then
        query.__class__ = Query
    return query


@functools.cache
def _own() -> Any:
    """A query with the methods that Django's has now, whatever is put in their places later.

    What is recorded was done by them, and with the tables that the models had then.
    """

    class Own(Query):
        tables_then: dict[str, str]

        def join(self, join: Any, *args: Any, **kwargs: Any) -> Any:
            join.table_name = self.tables_then.get(join.table_name, join.table_name)
            return by_django(self, join, *args, **kwargs)

    by_django: Any = Query.join
    for name, value in vars(Query).items():
        if type(value) is FunctionType and name not in vars(Own):
            setattr(Own, name, value)
    return Own
