"""`asyncorm.compiled()`: a function that makes a queryset is called once, its plan then bound."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from django.db.models import QuerySet, prefetch_related_objects

from . import bridge, planned, rows
from .shapes import Shape
from .statements import Plan, generation, hit, items
from .verifying import equal

_MAX_TYPES = 32  # combinations of arguments' types for which a function keeps a plan


class _Parameter:
    """Stands for an argument while the function is called: a value that only a lookup may take."""

    conditional = False
    contains_aggregate = contains_over_clause = contains_column_references = False
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, number: int) -> None:
        self.number = number

    def resolve_expression(self, *args: Any, **kwargs: Any) -> _Parameter:
        return self

    def get_source_expressions(self) -> list[Any]:
        return []

    def _refuse(self, *args: Any) -> NoReturn:
        raise TypeError("The function looks at its argument.")

    def __eq__(self, other: object) -> bool:
        if type(other) is str and not other:  # Django asks, for Oracle; "" is not compiled
            return False
        self._refuse()

    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __str__ = __format__ = __len__ = __index__ = __int__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __mod__ = __neg__ = _refuse
    __contains__ = __getitem__ = __call__ = _refuse


class _Bound:
    """How arguments of certain types become parameters.

    Attributes:
        queryset: made with the first arguments; tells alias, prefetches and the rest.
        parts: for each lookup, its class, its left side and the argument's number; or parameters
            that are always the same.
    """

    def __init__(
        self, queryset: Any, plan: Plan, offset: int, parts: list[Any], generation: int
    ) -> None:
        self.queryset = queryset
        self.alias = queryset.db
        self.plan = plan
        self.offset = offset
        self.parts = parts
        self.generation = generation


class compiled:
    """Make a query of a function from values to a queryset: built and compiled once, then run::

        by_author = asyncorm.compiled(
            lambda author, since: Book.objects.filter(author_id=author, published__gte=since)
        )
        books = await by_author(7, date(2024, 1, 1))  # a list, as from anative()

    The function is called with the first arguments, and again for arguments of other types. What
    it takes from elsewhere (the time, a setting) is taken then. Its arguments have to go into
    lookups as they are: a function that computes with one or decides by its value is called each
    time, as it is for arguments whose value decides what the SQL is (None, True and False, "",
    lists, instances, expressions). The statement cache helps there too.

    Args:
        func: a synchronous function without side effects, of positional or keyword arguments; its
            querysets may have any method applied that is not an evaluation.

    Raises (when awaited):
        TypeError: the function returns something else than a queryset.
        What evaluating the queryset raises.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        if not callable(func):
            raise TypeError(
                f"compiled() takes a function that returns a queryset, not a {type(func).__name__}."
            )
        self.func = func
        self._bound: dict[Any, _Bound | None] = {}
        functools.update_wrapper(self, func)

    async def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        return await bridge.run(self._run, args, kwargs)

    def __repr__(self) -> str:
        return f"compiled({self.func!r})"

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        values = (*args, *kwargs.values())
        types = tuple(map(type, values))
        if planned.PLAIN_VALUES.issuperset(types) and "" not in values:
            key = (types, *kwargs)
            bound = self._bound.get(key, _NEW)
            if bound is _NEW or (bound is not None and bound.generation != generation()):
                bound = None
                if planned.enabled() and len(self._bound) < _MAX_TYPES:
                    bound = self._bound[key] = self._bind(args, kwargs)
            if bound is not None:
                found = _found(bound, values, lambda: self._make(args, kwargs))
                if found is not None:
                    return found
        return list(self._make(args, kwargs))

    def _make(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        queryset = self.func(*args, **kwargs)
        if not isinstance(queryset, QuerySet):
            raise TypeError(f"{self!r} returned a {type(queryset).__name__}, which is no queryset.")
        return queryset

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound | None:
        queryset = self._make(args, kwargs)
        numbers = [_Parameter(number) for number in range(len(args) + len(kwargs))]
        named = dict(zip(kwargs, numbers[len(args) :], strict=True))
        try:
            skeleton = self.func(*numbers[: len(args)], **named)
            wrapper = planned.native_wrapper(queryset.db)
            if wrapper is None or queryset._iterable_class is not skeleton._iterable_class:
                return None
            parts = list(_parts(queryset.query.where, skeleton.query.where, wrapper))
            # All but the lookups has to be the same, too.
            skeleton.query.where = queryset.query.where
            shape, other = [Shape(each.query, wrapper) for each in (queryset, skeleton)]
            found = planned.queryset_plan(queryset, wrapper, queryset._iterable_class)
            if found is None or found[0].picked is not None:
                return None
            # With expressions the order is another one than that of the lookups in the tree.
            if shape.mixed or shape.key != other.key or queryset._known_related_objects:
                return None
            bound = _Bound(queryset, found[0], found[2], parts, generation())
            params = _params(bound, (*args, *kwargs.values()), wrapper)
            return bound if params is not None and equal(params, found[1]) else None
        except Exception:  # the arguments are used otherwise than as values
            return None


_NEW: Any = object()


def _parts(node: Any, twin: Any, wrapper: Any) -> Iterator[Any]:
    """Compare two trees, of lookups of values and of parameters: what the values come from."""
    if (node.connector, node.negated) != (twin.connector, twin.negated):
        raise TypeError
    for leaf, other in zip(node.children, twin.children, strict=True):
        if type(leaf) is not type(other):
            raise TypeError
        if hasattr(leaf, "children"):
            yield from _parts(leaf, other, wrapper)
        elif leaf.lhs != other.lhs:
            raise TypeError
        elif type(other.rhs) is _Parameter:
            yield type(leaf), leaf.lhs, other.rhs.number
        elif leaf.rhs != other.rhs:
            raise TypeError
        elif type(leaf.rhs) is not bool:
            yield list(leaf.process_rhs(None, wrapper)[1])


def _params(bound: _Bound, values: tuple[Any, ...], wrapper: Any) -> list[Any] | None:
    params: list[Any] = []
    for part in bound.parts:
        if type(part) is list:
            params += part
        else:
            cls, lhs, number = part
            sql, more = cls(lhs, values[number]).process_rhs(None, wrapper)
            if sql != "%s":
                return None
            params += more
    return params


def _found(bound: _Bound, values: tuple[Any, ...], make: Callable[[], Any]) -> list[Any] | None:
    queryset, plan = bound.queryset, bound.plan
    if queryset.db != bound.alias:  # the router has changed its mind
        return None
    wrapper = planned.native_wrapper(bound.alias)
    assert plan.maker is not None
    if wrapper is None or rows.is_watched(plan.maker.models):
        return None
    try:
        params = _params(bound, values, wrapper)
    except Exception:  # Django will say what is wrong with a value
        return None
    if params is None or not hit(
        ("compiled", id(bound)), plan, params, bound.offset,
        lambda: planned.compile_of(made := make(), made._iterable_class)(made.query, wrapper),
    ):  # fmt: skip
        return None
    made = items(plan, params, bound.offset, wrapper, getattr(queryset, "_fetch_mode", None))
    if queryset._prefetch_related_lookups:
        prefetch_related_objects(made, *queryset._prefetch_related_lookups)
    return made
