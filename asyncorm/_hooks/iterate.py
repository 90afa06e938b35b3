"""Querysets that are iterated: their rows by a plan, and turns for other tasks meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from itertools import islice
from typing import Any

import django
from django.db import InterfaceError, OperationalError
from django.db.models import query
from django.db.models.query import QuerySet
from django.db.models.sql.constants import GET_ITERATOR_CHUNK_SIZE as _WHOLE
from django.db.models.sql.query import Query
from django.db.models.utils import create_namedtuple_class
from greenlet import getcurrent

from .. import elsewhere, grounds, rows
from .._cache.awaited import Found
from .._cache.execute import chunks, items
from .._cache.plan import Plan
from .._chains.plans import plan_for
from .._chains.recorded import Recorded, used
from ..bridge import Runner
from ..driver import SLICE, Connection
from ..rows import RowMaker
from ..statements import Compiled
from ..wrappers import Wrapper
from . import routing
from .switch import native_wrapper

_Iterate = Callable[[Any], Iterator[Any]]


def planned(cls: type[Any]) -> _Iterate:
    """`__iter__` of an iterable class of querysets: from a plan if possible."""
    original: _Iterate = cls.__iter__

    def __iter__(self: Any) -> Iterator[Any]:
        # iterator() without a server-side cursor makes its items one by one.
        whole = not self.chunked_fetch
        if type(getcurrent()) is Runner and not (whole and self.chunk_size != _WHOLE):
            queryset = self.queryset
            wrapper = native_wrapper(alias := queryset.db)
            if wrapper is not None:
                found = queryset_plan(queryset, wrapper, cls)
                if found is not None and not rows.is_watched(found[0].maker.models):  # type: ignore[union-attr]
                    mode = mode_of(queryset)
                    if whole:
                        return iter(related(queryset, found[0], items(*found, wrapper, mode)))
                    parts = chunks(*found, wrapper, mode, self.chunk_size)
                    return _each(parts, queryset, found[0])
            made = _made(original, self, alias)
            return made if wrapper is None else _in_turns(made, wrapper)
        return original(self)

    _ours[cls] = __iter__
    return __iter__


_ours: dict[Any, _Iterate] = {}


def _made(original: _Iterate, iterable: Any, alias: str) -> Iterator[Any]:
    """What Django makes, on the alias that was chosen."""
    routing.keep_of(iterable.queryset, alias)
    try:
        made = iter(original(iterable))
        first = [*islice(made, 1)]
    finally:
        routing.forget()
    yield from first
    yield from made


def _in_turns(made: Iterable[Any], wrapper: Wrapper) -> Iterator[Any]:
    """What Django makes, with turns for other tasks."""
    try:
        for number, item in enumerate(made, 1):
            yield item
            if not number % SLICE:
                give_turn(wrapper)
    finally:
        if hasattr(made, "close"):  # from Django 6.1 on it may be a map
            made.close()


def give_turn(wrapper: Wrapper) -> None:
    """Let other tasks run if this one has kept them waiting."""
    conn = wrapper.connection
    if isinstance(conn, Connection):
        conn.give_turn()


def raw(original: _Iterate) -> _Iterate:
    """`__iter__` of the iterable class of raw querysets: with turns.

    Each has a cursor of its own: Django keeps one in the query, and tasks that evaluate a raw
    queryset at the same time would read each other's.
    """

    def __iter__(self: Any) -> Iterator[Any]:
        queryset = self.queryset
        wrapper = native_wrapper(queryset.db)
        if wrapper is None:
            return original(self)
        own, own.queryset = copy(self), copy(queryset)
        own.queryset.query = copy(queryset.query)
        return _in_turns(_known(original(own), queryset, own.queryset), wrapper)

    return __iter__


def _known(made: Iterator[Any], queryset: Any, own: Any) -> Iterator[Any]:
    """What is made; what is known of its columns then is known to its queryset, as in Django."""
    try:
        yield from made
    finally:
        queryset.query.cursor = own.query.cursor
        if "columns" in vars(own):
            vars(queryset)["columns"] = own.columns


def fetch_all(original: Callable[[Any], None]) -> Any:
    """`_fetch_all()`: where tasks evaluate a queryset at the same time, it keeps the first items.

    Others in their place would be taken for those that were prefetched for. Nobody sees them
    before that is done.
    """

    def _fetch_all(self: Any) -> None:
        if (
            self._result_cache is None
            and type(getcurrent()) is Runner
            and grounds.is_djangos_function(type(self)._prefetch_related_objects)
        ):
            iterable = getattr(self, "_iterable_class", query.RawModelIterable)
            try:
                made = list(iterable(self))
            except (OperationalError, InterfaceError) as exc:
                if iterable is query.RawModelIterable:  # nobody knows what raw SQL does
                    raise
                made = elsewhere.again(self, exc, lambda: list(iterable(self)))
            prefetched = False
            try:
                if (lookups := self._prefetch_related_lookups) and not self._prefetch_done:
                    query.prefetch_related_objects(made, *lookups)
                    prefetched = True
            finally:  # also if that failed, as in Django
                if self._result_cache is None:
                    self._result_cache = made
                    self._prefetch_done |= prefetched
        original(self)

    return _fetch_all


def _each(parts: Any, queryset: QuerySet[Any], plan: Plan) -> Iterator[Any]:
    try:
        for part in parts:
            yield from related(queryset, plan, part)
    finally:
        parts.close()  # the cursor, now


def iterating_plan(queryset: Any, wrapper: Wrapper) -> Found | None:
    """What iterating over a queryset would execute, if nothing is done but make its items."""
    iterable = queryset._iterable_class
    if iterable.__iter__ is not _ours.get(iterable) or queryset._prefetch_related_lookups:
        return None
    found = queryset_plan(queryset, wrapper, iterable)
    if found is None or rows.is_watched(found[0].maker.models):  # type: ignore[union-attr]
        return None
    return found


def mode_of(queryset: QuerySet[Any]) -> Any:
    """How a queryset fetches what was deferred, from Django 6.1 on."""
    return getattr(queryset, "_fetch_mode", None)


def queryset_plan(queryset: Any, wrapper: Any, iterable: Any) -> Found | None:
    """The plan, parameters and offset of a queryset that is iterated by a class of Django's."""
    mode = mode_of(queryset)
    if mode is not None and mode.track_peers:
        return None
    asked = queryset.query
    if iterable is not query.ModelIterable and type(asked) is not Recorded and asked.extra:
        return None
    found = plan_for(asked, wrapper, compile_of(queryset, iterable), iterable, queryset._fields)
    if found is not None:
        used(asked)
    return found


def _compiling(make: Callable[[Any], RowMaker]) -> Callable[[Any, Any], Compiled]:
    def compile(query: Query, wrapper: Wrapper) -> Compiled:
        compiler = query.get_compiler(using=wrapper.alias)
        sql, params = compiler.as_sql()
        return sql, params, make(compiler)

    return compile


compile_instances = _compiling(rows.for_instances)
compile_tuples = _compiling(rows.for_tuples)
compile_first_values = _compiling(rows.for_first_values)


def _compile_dicts(queryset: QuerySet[Any]) -> Any:
    query: Any = queryset.query
    names = list(query.selected or [*query.values_select, *query.annotation_select])
    return _compiling(lambda compiler: rows.for_dicts(compiler, names))


def _compile_named_tuples(queryset: Any) -> Any:
    asked: Any = queryset.query
    names = queryset._fields or [*asked.values_select, *asked.annotation_select]
    cls = create_namedtuple_class(*names)
    return _compiling(lambda compiler: rows.for_named_tuples(compiler, cls))


ITERABLES: dict[Any, Callable[[Any], Any]] = {
    query.ModelIterable: lambda queryset: compile_instances,
    query.ValuesIterable: _compile_dicts,
    query.ValuesListIterable: lambda queryset: compile_tuples,
    query.NamedValuesListIterable: _compile_named_tuples,
    query.FlatValuesListIterable: lambda queryset: compile_first_values,
}


def compile_of(queryset: QuerySet[Any], iterable: type[Any]) -> Callable[[Any, Any], Compiled]:
    """What compiles the query of a queryset that is iterated by a class of Django's."""
    return ITERABLES[iterable](queryset)  # type: ignore[no-any-return]


# Before Django 6.1 a deferred foreign key is fetched for that.
_FETCHES_TO_RELATE = django.VERSION < (6, 1)


def related(queryset: Any, plan: Plan, made: list[Any]) -> list[Any]:
    """Put the instance that a related manager belongs to into the instances that it found."""
    if not plan.maker.models:  # type: ignore[union-attr]
        return made
    for field, objects in queryset._known_related_objects.items():
        names = [
            field.attname if name == "self" else queryset.model._meta.get_field(name).attname
            for name in field.from_fields
        ]
        for obj in made:
            if not field.is_cached(obj) and (
                _FETCHES_TO_RELATE or all(name in obj.__dict__ for name in names)
            ):
                values = tuple([getattr(obj, name) for name in names])
                related = objects.get(values[0] if len(values) == 1 else values)
                if related is not None:
                    setattr(obj, field.name, related)
    return made
