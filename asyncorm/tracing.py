"""Where each parameter of a statement comes from: Django compiles it with marks in their place.

That a parameter equals one of the shape's does not make that its source. So the nodes that the
shape has read are marked, and the compilers put a `Mark` in the place of each parameter that such a
node gives: through copies, new aliases and subqueries, in whatever order Django writes them. A
parameter without a mark is nobody's (say of a join's own condition), unless it is a constant that
Django itself puts into every such statement.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `DatabaseOperations.compiler`, `SQLCompiler.compile`: what makes the SQL of a node; replaced on
  the wrapper and for the greenlet that traces, while it does.
- `Expression.__dict__`: copies of a node have what it has, so its mark, too.
- `Query.exists`: selects `Value(1)` as `a`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from django.db.models import Value
from django.db.models.sql.compiler import SQLCompiler
from django.db.models.sql.query import Query
from greenlet import getcurrent

from . import binding
from .expressions import NotCacheable
from .verifying import equal


class Mark:
    """A parameter: the `number`th of a place of the shape. It compares as its value does."""

    __slots__ = ("number", "place", "value")

    def __init__(self, place: int, number: int, value: object) -> None:
        self.place = place
        self.number = number
        self.value = value

    def __eq__(self, other: object) -> bool:
        return bool(self.value == (other.value if type(other) is Mark else other))

    def __hash__(self) -> int:
        return hash(self.value)


_numbers = count()
_traces: dict[Any, Trace] = {}  # by the greenlet that compiles


class Trace:
    """One compilation with marks.

    Attributes:
        shared: pairs of places with one and the same node, whose parameters are the first one's.
        constants: parameters that Django puts into every statement of this kind.
        is_djangos: whether all SQL is that of Django's own classes (binding.py).
        classes: of all nodes that were compiled.
    """

    def __init__(self) -> None:
        self.name = f"_asyncorm_mark_{next(_numbers)}"  # copies from another trace have another one
        self.marked: list[Any] = []
        self.shared: list[tuple[int, int]] = []
        self.constants: list[Any] = []
        self.named: dict[str, Any] = {}
        self.is_djangos = True
        self.classes: set[type] = set()
        self._inside = False

    def mark(self, node: object, place: int, params: Sequence[Any]) -> None:
        """Expect a node to give these parameters."""
        known = vars(node).get(self.name)
        if known is not None:
            self.shared.append((known[0], place))
            return
        vars(node)[self.name] = place, params
        self.marked.append(node)

    def compile(self, compile: Callable[..., Any], compiler: SQLCompiler, node: object) -> Any:
        """`SQLCompiler.compile()`, with marks for the parameters of the outermost marked node."""
        self.classes.add(type(node))
        self.is_djangos = self.is_djangos and binding.is_djangos(node)
        known = None if self._inside else getattr(node, "__dict__", {}).get(self.name)
        if known is None:
            sql, params = compile(node)
            if not self._inside and _is_of_exists(compiler.query, node):
                self.constants += params
            return sql, params
        place, expected = known
        self._inside = True
        try:
            sql, params = compile(node)
        finally:
            self._inside = False
        if not equal(list(params), list(expected)):
            raise NotCacheable
        marks = [Mark(place, number, value) for number, value in enumerate(params)]
        return sql, tuple(marks) if type(params) is tuple else marks

    @contextmanager
    def running(self, wrapper: Any) -> Iterator[None]:
        """Have what this greenlet compiles for the wrapper traced."""
        me, ops = getcurrent(), wrapper.ops
        outer, before = _traces.get(me), vars(ops).get("compiler")
        original = ops.compiler
        _traces[me] = self
        ops.compiler = lambda name: _tracing(original(name))
        try:
            yield
        finally:
            if before is None:
                del ops.compiler
            else:
                ops.compiler = before
            if outer is None:
                del _traces[me]
            else:
                _traces[me] = outer
            for node in self.marked:
                vars(node).pop(self.name, None)


def _is_of_exists(query: Query, node: object) -> bool:
    return (
        type(node) is Value
        and type(node.value) is int
        and node.value == 1
        and node is query.annotations.get("a")
    )


@functools.cache
def _tracing(cls: type) -> Any:
    """A class of compilers, those that trace."""

    def compile(self: SQLCompiler, node: object) -> Any:
        own = super(tracing, self).compile
        trace = _traces.get(getcurrent())
        return own(node) if trace is None else trace.compile(own, self, node)

    tracing: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "compile": compile})
    return tracing


class Resolving:
    """An expression that is not resolved yet: what becomes of it is marked by its name."""

    def __init__(self, name: str, expression: Any) -> None:
        self.name = name
        self.expression = expression

    def resolve_expression(self, *args: Any, **kwargs: Any) -> Any:
        node = self.expression.resolve_expression(*args, **kwargs)
        trace = _traces.get(getcurrent())
        known = trace and vars(trace.named.get(self.name, self)).get(trace.name)
        if known is not None:
            vars(node)[trace.name] = known  # type: ignore[union-attr]
        return node
