"""Where Django uses plans: the methods that are replaced.

In native code they take the statement from the cache if it has or can make a plan; otherwise, and
outside native code, they are Django's.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `ModelIterable.__iter__` and those of its siblings, `RawModelIterable.__iter__`, `QuerySet.get`,
  `QuerySet._prepare_for_bulk_create`, `._batched_insert`, `Model._do_update`, `._do_insert`,
  `DeleteQuery.delete_batch`, `Query.has_results`, `.get_count`, `.get_aggregation`, `execute_sql`
  of the compilers: replaced.
- `QuerySet._iterable_class`, `._fields`, `._fetch_mode`, `._known_related_objects`, `._query` and
  the other flags in `_get_plan()`: what the iteration and `get()` depend on.
- `SQLCompiler.as_sql`, `.get_converters`: what plans are made of.
- `InsertQuery.fields`, `.objs`, `.raw`, `.on_conflict`, `Field.pre_save`, `.get_db_prep_save`:
  the values of an INSERT.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import django
from django.core.signals import setting_changed
from django.db import OperationalError
from django.db.models import Manager, Model, query
from django.db.models.lookups import Lookup
from django.db.models.sql import compiler
from django.db.models.sql.constants import GET_ITERATOR_CHUNK_SIZE as _WHOLE
from django.db.models.sql.constants import ROW_COUNT
from django.db.models.sql.query import Query
from django.db.models.sql.subqueries import DeleteQuery, InsertQuery, UpdateQuery
from django.db.models.utils import create_namedtuple_class
from greenlet import getcurrent
from psycopg.types.numeric import Int2, Int4, Int8

from . import (
    _events,
    bridge,
    bulk,
    conf,
    distributed,
    grounds,
    internals,
    patches,
    rows,
    sessions,
    verifying,
)
from .binding import writes_as_django
from .bridge import Runner
from .driver import SLICE, Connection, LazyConnection, Unanswered
from .grounds import Ground
from .rows import RowMaker
from .shapes import MAX_PARAMS, Shape, Unfit, family
from .statements import (
    UNPLANNED,
    Compiled,
    NotServed,
    Plan,
    Planned,
    chunks,
    clear,
    count,
    count_of,
    hit,
    items,
    learn,
    may_repeat,
    plan_for,
    plans,
    recall,
    remember,
    stand_in,
    told,
)
from .tracing import Resolving

_enabled = True

_Iterate = Callable[[Any], Iterator[Any]]


def native_wrapper(using: str) -> Any:
    """The running operation's wrapper of an alias of ours; None outside native code."""
    if _enabled and type(runner := getcurrent()) is Runner:
        session = sessions.session_for(using, runner)
        return None if session is None else session.wrapper
    return None


def enabled() -> bool:
    """Whether the cache is switched on."""
    return _enabled


def _planned(cls: Any) -> _Iterate:
    """`__iter__` of an iterable class of querysets: from a plan if possible."""
    original: _Iterate = cls.__iter__

    def __iter__(self: Any) -> Iterator[Any]:
        # iterator() without a server-side cursor makes its items one by one.
        whole = not self.chunked_fetch
        if type(getcurrent()) is Runner and not (whole and self.chunk_size != _WHOLE):
            queryset = self.queryset
            wrapper = native_wrapper(queryset.db)
            if wrapper is not None:
                found = queryset_plan(queryset, wrapper, cls)
                models = found[0].maker.models if found is not None else ()  # type: ignore[union-attr]
                if found is not None and not rows.is_watched(models):
                    mode = _mode(queryset)
                    relate = models and queryset._known_related_objects
                    if whole:
                        made = items(*found, wrapper, mode)
                        return iter(_relate(queryset, made) if relate else made)
                    parts = chunks(*found, wrapper, mode, self.chunk_size)
                    return _each(parts, queryset if relate else None)
                return _in_turns(original(self), wrapper)
        return original(self)

    return __iter__


def _in_turns(made: Any, wrapper: Any) -> Iterator[Any]:
    """What Django makes, with turns for other tasks."""
    try:
        for number, item in enumerate(made, 1):
            yield item
            if not number % SLICE:
                give_turn(wrapper)
    finally:
        if hasattr(made, "close"):  # from Django 6.1 on it may be a map
            made.close()


def give_turn(wrapper: Any) -> None:
    """Let other tasks run if this one has kept them waiting."""
    conn = wrapper.connection
    if isinstance(conn, Connection):
        conn.give_turn()


def _raw(original: _Iterate) -> _Iterate:
    """`__iter__` of the iterable class of raw querysets: with turns."""

    def __iter__(self: Any) -> Iterator[Any]:
        wrapper = native_wrapper(self.queryset.db)
        made = original(self)
        return made if wrapper is None else _in_turns(made, wrapper)

    return __iter__


def _each(parts: Any, queryset: Any) -> Iterator[Any]:
    try:
        for part in parts:
            yield from part if queryset is None else _relate(queryset, part)
    finally:
        parts.close()  # the cursor, now


def queryset_plan(queryset: Any, wrapper: Any, iterable: Any) -> tuple[Plan, list[Any], int] | None:
    """The plan, parameters and offset of a queryset that is iterated by a class of Django's."""
    mode = _mode(queryset)
    if mode is not None and mode.track_peers:
        return None
    asked = queryset.query
    if asked.extra and iterable is not query.ModelIterable:
        return None
    found = plan_for(asked, wrapper, compile_of(queryset, iterable), iterable, queryset._fields)
    if found is not None and not asked.alias_map:  # it has its table once it is compiled
        asked.unref_alias(asked.get_initial_alias())
    return found


def _compiling(make: Callable[[Any], RowMaker]) -> Callable[[Any, Any], Compiled]:
    def compile(query: Any, wrapper: Any) -> Compiled:
        compiler = query.get_compiler(using=wrapper.alias)
        sql, params = compiler.as_sql()
        return sql, params, make(compiler)

    return compile


_compile_instances = _compiling(rows.for_instances)
_compile_tuples = _compiling(rows.for_tuples)
_compile_first_values = _compiling(rows.for_first_values)


def _compile_dicts(queryset: Any) -> Any:
    query: Any = queryset.query
    names = list(query.selected or [*query.values_select, *query.annotation_select])
    return _compiling(lambda compiler: rows.for_dicts(compiler, names))


def _compile_named_tuples(queryset: Any) -> Any:
    asked: Any = queryset.query
    names = queryset._fields or [*asked.values_select, *asked.annotation_select]
    cls = create_namedtuple_class(*names)
    return _compiling(lambda compiler: rows.for_named_tuples(compiler, cls))


_ITERABLES: dict[Any, Callable[[Any], Any]] = {
    query.ModelIterable: lambda queryset: _compile_instances,
    query.ValuesIterable: _compile_dicts,
    query.ValuesListIterable: lambda queryset: _compile_tuples,
    query.NamedValuesListIterable: _compile_named_tuples,
    query.FlatValuesListIterable: lambda queryset: _compile_first_values,
}


def compile_of(queryset: Any, iterable: Any) -> Callable[[Any, Any], Compiled]:
    """What compiles the query of a queryset that is iterated by a class of Django's."""
    return _ITERABLES[iterable](queryset)  # type: ignore[no-any-return]


# Before Django 6.1 a deferred foreign key is fetched for that.
_FETCHES_TO_RELATE = django.VERSION < (6, 1)


def _relate(queryset: Any, made: list[Any]) -> list[Any]:
    """Put the instance that a related manager belongs to into what it found."""
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


# The types of values that a filter treats alike, whatever their value.
PLAIN_VALUES = {
    int, str, float, decimal.Decimal, datetime.datetime, datetime.date, uuid.UUID,
}  # fmt: skip


class _Get:
    """`get()` with certain keywords on a queryset of a certain shape.

    Attributes:
        lookups: for each keyword in the order of the statement, the lookup's class and left side.
    """

    def __init__(self, plan: Plan, lookups: list[tuple[Any, Any]], kept: Any) -> None:
        self.plan = plan
        self.lookups = lookups
        self.kept = kept

    def params(self, base: list[Any], values: list[Any], wrapper: Any) -> list[Any]:
        """The parameters of the queryset and of the keywords."""
        params = list(base)
        for (cls, lhs), value in zip(self.lookups, values, strict=True):
            sql, more = cls(lhs, value).process_rhs(None, wrapper)
            if sql != "%s":
                raise Unfit
            params += more
        return params


def _filters_as_django(cls: Any) -> bool:
    """Whether a queryset class leaves to Django what `get()` is made of."""
    return all(
        getattr(cls, name) is getattr(query.QuerySet, name)
        for name in (
            "filter", "_filter_or_exclude", "_filter_or_exclude_inplace", "_chain", "_clone",
            "order_by", "__len__", "_fetch_all", "db", "query", "using", "_add_hints",
        )
    )  # fmt: skip


def _get(original: Any) -> Any:
    """`QuerySet.get()` by keywords: without making another queryset, after the first time."""

    def get(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(getcurrent()) is Runner and kwargs and not args:
            found = _got(self, kwargs)
            if found is not None:
                return _only(self, found)
        return original(self, *args, **kwargs)

    global _own_get
    _own_get = functools.wraps(original)(get)
    return _own_get


_own_get: Any = object()


def _only(queryset: Any, found: list[Any]) -> Any:
    """The only item; otherwise what Django's `get()` raises."""
    return found[0] if len(found) == 1 else _own_get.__wrapped__(_Found(queryset.model, found))


class _Found:
    """What `QuerySet.get()` needs of a queryset to say what is wrong with its result."""

    def __init__(self, model: Any, result: list[Any]) -> None:
        self.model = model
        self.query = Query(model)
        self._result_cache = result

    def filter(self) -> _Found:
        return self

    order_by = filter

    def __len__(self) -> int:
        return len(self._result_cache)


def _got(queryset: Any, kwargs: dict[str, Any]) -> list[Any] | None:
    if (wrapper := native_wrapper(queryset.db)) is None:
        return None
    found = _get_plan(queryset, kwargs, wrapper)
    return None if found is None else items(*found, 0, wrapper, _mode(queryset))


def is_get(func: Any) -> bool:
    """Whether a function is a queryset's `get`, and nobody else's."""
    return getattr(func, "__func__", None) is _own_get


async def run_get(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a queryset's `get` natively.

    While all connections are in use it does without an operation, which would do nothing but wait.
    """
    if is_get(method) and kwargs and not args and _enabled:
        queryset = method.__self__
        found = await _without_operation(
            queryset.db, lambda wrapper: _get_plan(queryset, kwargs, wrapper), _mode(queryset)
        )
        if found is not None:
            return _only(queryset, found)
    return await bridge.run(method, *args, **kwargs)


async def _without_operation(
    alias: str, find: Callable[[Any], tuple[Plan, list[Any]] | None], mode: Any
) -> list[Any] | None:
    """The items of a plan whose statement travels with others; None if it has to be an operation.

    Args:
        find: returns the plan and the parameters, given a wrapper.
    """
    if (found := stand_in(alias)) is None:
        return None
    pool, wrapper = found
    if (planned := find(wrapper)) is None:
        return None
    plan, params = planned
    queue = sessions.queue_without_session(pool, plan.text)
    if queue is None:
        return None
    bridge.check()
    command = Planned(plan, params, 0, wrapper)
    with wrapper.wrap_database_errors:
        try:
            if not _events.statements:
                loaded = await queue.submit(command)
            else:
                with told(plan, params, 0, wrapper) as statement, wrapper.wrap_database_errors:
                    loaded = await queue.submit(_events.followed(command, statement))
        except NotServed:
            return None
        except (Unanswered, OperationalError) as exc:
            if not may_repeat(plan, exc):
                raise
            return None  # and another connection is waited for
        # A get() asks for no more rows than are taken apart in one turn.
        return plan.maker.make_part(loaded, next(loaded.parts), alias, wrapper, mode)  # type: ignore[union-attr]


def _mode(queryset: Any) -> Any:
    return getattr(queryset, "_fetch_mode", None)


def _get_plan(queryset: Any, kwargs: dict[str, Any], wrapper: Any) -> tuple[Plan, list[Any]] | None:
    mode = _mode(queryset)
    if (
        queryset._iterable_class is not query.ModelIterable
        or queryset._prefetch_related_lookups
        or queryset._sticky_filter
        or queryset._known_related_objects
        or queryset._deferred_filter
        or queryset._defer_next_filter
        or (mode is not None and mode.track_peers)
    ):
        return None
    names = sorted(kwargs)
    values = [kwargs[name] for name in names]
    types = tuple(map(type, values))
    if not PLAIN_VALUES.issuperset(types):
        return None
    try:
        shape = Shape(queryset._query, wrapper, "get", type(queryset), *names, types)
        base = queryset._query
        if base.distinct_fields or base.low_mark or base.high_mark is not None:
            return None
        key = tuple(shape.key)
        known: Any = recall(key)
        if known is None:
            return None
        if known is UNPLANNED or not known.plan.is_current:
            if not bridge.in_native_code():  # to compile may need a connection
                return None
            known = learn(
                key,
                queryset.model,
                lambda: _plan_get(queryset, wrapper, shape, names, values),
                type(queryset),
            )
            if known is None:
                return None
        params = known.params(shape.params, values, wrapper)
    except Exception:
        return None
    plan: Plan = known.plan
    if rows.is_watched(plan.maker.models):  # type: ignore[union-attr]
        return None
    compile = lambda: _compile_instances(_narrowed(queryset, names, values).query, wrapper)  # noqa: E731
    return (plan, params) if hit(key, plan, params, 0, compile) else None


def _narrowed(queryset: Any, names: list[str], values: list[Any]) -> Any:
    """The queryset that `QuerySet.get()` would make."""
    filtered = queryset.filter(**dict(zip(names, values, strict=True))).order_by()
    filtered.query.set_limits(high=query.MAX_GET_RESULTS)
    return filtered


def _plan_get(
    queryset: Any, wrapper: Any, base: Shape, names: list[str], values: list[Any]
) -> tuple[_Get, Ground]:
    """What `QuerySet.get()` would execute, as seen on the queryset that it would make."""
    filtered = _narrowed(queryset, names, values)
    shape = Shape(filtered.query, wrapper)
    leaves = shape.leaves[len(base.leaves) :]
    lookups = [
        (type(leaf), leaf.lhs) for leaf, count, _ in leaves if hasattr(leaf, "lhs") and count == 1
    ]
    found = queryset_plan(filtered, wrapper, query.ModelIterable)
    if (
        found is None
        or found[0].picked is not None
        or shape.mixed
        or not (_filters_as_django(type(queryset)) and grounds.clones_as_django())
        or len(lookups) != len(names)
        or base.params != shape.params[: len(base.params)]
    ):
        raise Unfit
    known = _Get(found[0], lookups, base.kept)
    if not verifying.equal(known.params(base.params, values, wrapper), found[1]):
        raise Unfit
    ground = grounds.of_query(
        filtered.query, shape.kept, known.plan.maker, wrapper,
        [cls for cls, _ in lookups], type(queryset), *known.plan.classes, short=True,
    )  # fmt: skip
    return known, ground


def by_keys(
    queryset: Any, what: Any, keys: list[Any], narrow: Callable[[], Any]
) -> list[Any] | None:
    """The rows of a fresh queryset, narrowed to those with one of different keys of one type.

    Args:
        what: tells one way of narrowing this queryset from another.
        narrow: returns the narrowed queryset, where the statement is not known yet.

    None: have Django do it.
    """
    wrapper = native_wrapper(queryset.db)
    if wrapper is None or queryset._iterable_class is not query.ModelIterable:
        return None
    mode = _mode(queryset)
    if mode is not None and mode.track_peers:
        return None
    try:
        many = len(keys) > 1
        shape = Shape(queryset.query, wrapper, "keys", type(queryset), what, many, type(keys[0]))
        key = tuple(shape.key)
        known: Any = recall(key)
        if known is _BY_LENGTH:
            key = (*key, len(keys))
            known = recall(key)
        if known is UNPLANNED:
            if len(keys) > MAX_PARAMS:
                return None
            make = functools.partial(_plan_keys, queryset, narrow, wrapper, keys)
            known = learn(key, queryset.model, make, type(queryset))
            if many and known is not None and not known[0].is_of_keys:
                whole = *key, len(keys)
                plans[whole] = found = plans[key]
                remember(key, _BY_LENGTH, found[1])
        if known is None:
            return None
        plan, kind = known
        if many and plan.is_of_keys:
            plan = plan.of_length(len(keys))
        params = keys if kind is type(keys[0]) else [kind(value) for value in keys]
    except Exception:
        return None
    if rows.is_watched(plan.maker.models) or not hit(
        key, plan, params, 0, lambda: _compile_instances(narrow().query, wrapper)
    ):
        return None
    return items(plan, params, 0, wrapper, mode)


def _plan_keys(
    queryset: Any, narrow: Callable[[], Any], wrapper: Any, keys: list[Any]
) -> tuple[tuple[Plan, type], Ground]:
    """The plan of a narrowed queryset, and the type that its field gives the keys."""
    narrowed = narrow()
    found = queryset_plan(narrowed, wrapper, query.ModelIterable)
    shape = Shape(narrowed.query, wrapper)
    kinds = set(map(type, found[1])) if found is not None else ()
    columns = [leaf.lhs.target for leaf, *_ in shape.leaves]
    if (
        found is None
        or found[0].picked is not None
        or len(kinds) != 1
        # Any other field is asked for each key.
        or not all(map(bulk.as_is, columns))
    ):
        raise Unfit
    (kind,) = kinds
    if kind not in _KEY_TYPES or not verifying.equal(found[1], [kind(value) for value in keys]):
        raise Unfit
    targets = [getattr(field, "target_field", field) for field in columns]
    ground = grounds.of_query(
        narrowed.query, [*shape.kept, *targets], found[0].maker, wrapper,
        [type(leaf) for leaf, *_ in shape.leaves if isinstance(leaf, Lookup)],
        type(queryset), *found[0].classes, short=True,
    )  # fmt: skip
    return (found[0], kind), ground


_BY_LENGTH: Any = object()  # lists of each length have a plan of their own
_KEY_TYPES = {int, str, uuid.UUID, Int2, Int4, Int8}  # Django wraps integers for psycopg


def _has_results(original: Any) -> Any:
    def compile(query: Any, wrapper: Any) -> Compiled:
        sql, params = query.exists().get_compiler(using=wrapper.alias).as_sql()
        return sql, params, None

    def has_results(self: Any, using: str) -> bool:
        wrapper = native_wrapper(using)
        if wrapper is None or not (found := plan_for(self, wrapper, compile, "exists")):
            return bool(original(self, using))
        return count_of(*found, wrapper) > 0

    return has_results


def _get_count(original: Any) -> Any:
    def compile(query: Any, wrapper: Any) -> Compiled:
        # What get_aggregation() does with the query is best seen from its statement.
        sql, params = _watched(lambda: original(query, wrapper.alias)).as_sql()
        maker = RowMaker(1, {})
        maker.item = "c0"
        return sql, params, maker

    def get_count(self: Any, using: str) -> int:
        wrapper = native_wrapper(using)
        if wrapper is None or not (found := plan_for(self, wrapper, compile, "count")):
            return int(original(self, using))
        return int(items(*found, wrapper)[0])

    return get_count


def _get_aggregation(original: Any) -> Any:
    """`aggregate()`: the names and the row of values."""

    def compile(exprs: Any, query: Any, wrapper: Any) -> Compiled:
        named = {name: Resolving(name, expression) for name, expression in exprs.items()}
        seen = _watched(lambda: original(query.clone(), wrapper.alias, named))
        columns = list(seen.query.annotation_select.values())
        sql, params = seen.as_sql()
        if seen.has_composite_fields(columns) or wrapper.ops.get_db_converters(columns[0]):
            raise Unfit
        maker = RowMaker(len(columns), seen.get_converters(columns))
        maker.item = rows.tuple_of(len(columns))
        maker.names_of_columns = [*seen.query.annotation_select]
        return sql, params, maker

    def get_aggregation(self: Any, using: str, aggregate_exprs: Any) -> Any:
        wrapper = native_wrapper(using)
        if wrapper is not None and aggregate_exprs and getcurrent() not in _watching:
            found = plan_for(
                self, wrapper, functools.partial(compile, aggregate_exprs), "aggregate",
                expressions=aggregate_exprs,
            )  # fmt: skip
            if found is not None:
                (row,) = items(*found, wrapper)
                return dict(zip(found[0].maker.names_of_columns, row, strict=True))  # type: ignore[union-attr]
        return original(self, using, aggregate_exprs)

    return get_aggregation


class _Seen(Exception):
    """Carries the compiler of a statement that is not executed."""


_watching: set[Any] = set()  # greenlets that do not want what they compile executed


def _execute_select(original: Any) -> Any:
    """`SQLCompiler.execute_sql()`: Django's, unless only the statement is asked for."""

    def execute_sql(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _watching and getcurrent() in _watching:
            raise _Seen(self)
        return original(self, *args, **kwargs)

    return execute_sql


def _watched(function: Callable[[], Any]) -> Any:
    """The compiler of the first statement that `function` would execute."""
    me = getcurrent()
    _watching.add(me)
    try:
        function()
    except _Seen as seen:
        return seen.args[0]
    finally:
        _watching.discard(me)
    raise Unfit


def _compile_write(query: Any, wrapper: Any) -> Compiled:
    sql, params = query.get_compiler(using=wrapper.alias).as_sql()
    return sql, params, None


def _execute_write(original: Any) -> Any:
    """`execute_sql()` of the compilers of UPDATE and DELETE."""

    def execute_sql(self: Any, result_type: Any) -> Any:
        if result_type == ROW_COUNT and self.using is not None:
            wrapper = native_wrapper(self.using)
            if wrapper is not None and wrapper is self.connection:
                found = plan_for(self.query, wrapper, _compile_write)
                if found is not None:
                    return count_of(*found, wrapper)
        return original(self, result_type)

    return execute_sql


class _ByKey:
    """The UPDATE of `save()` for certain fields of a model, or the DELETE of one row.

    Attributes:
        lookup: that of the primary key: its class and left side.
        sql: of its right side.
    """

    def __init__(self, plan: Plan, leaf: Any, wrapper: Any, kept: Any = ()) -> None:
        self.plan = plan
        self.lookup = type(leaf), leaf.lhs
        self.sql = leaf.process_rhs(None, wrapper)[0]
        self.kept = kept

    def params(self, key: Any, wrapper: Any) -> list[Any]:
        """The parameters for a key, or for a list of one."""
        cls, lhs = self.lookup
        sql, params = cls(lhs, key).process_rhs(None, wrapper)
        if sql != self.sql:
            raise Unfit
        return list(params)


def _do_update(original: Any) -> Any:
    """`Model._do_update()`: the UPDATE without a queryset, after the first time."""

    def do_update(
        self: Any, base_qs: Any, using: str, pk_val: Any, values: Any, update_fields: Any,
        forced_update: Any, *returning: Any, **named: Any,
    ) -> Any:  # fmt: skip
        if (
            values
            and not named
            and type(getcurrent()) is Runner
            and type(base_qs) is query.QuerySet
            and not (returning and returning[0])  # fields, from Django 6 on
            and not self._meta.select_on_save
            and (wrapper := native_wrapper(using)) is not None
        ):
            found = _save_plan(base_qs, wrapper, pk_val, values)
            if found is not None:
                count = count_of(*found, 0, wrapper)
                return [()] * count if returning else count > 0
        return original(
            self, base_qs, using, pk_val, values, update_fields, forced_update, *returning, **named
        )

    return do_update


def _save_plan(base_qs: Any, wrapper: Any, pk: Any, values: Any) -> tuple[Plan, list[Any]] | None:
    if type(pk) not in PLAIN_VALUES or base_qs._query.where.children or base_qs._query.alias_map:
        return None
    params: list[Any] = []
    key: list[Any] = [wrapper.alias, UpdateQuery, base_qs.model, type(pk)]
    try:
        for field, _, value in values:
            if type(value) not in PLAIN_VALUES and (
                hasattr(value, "resolve_expression") or hasattr(value, "prepare_database_save")
            ):
                return None
            as_is = bulk.as_is(field)
            if as_is is None or not as_is.takes(value):
                value = field.get_db_prep_save(value, connection=wrapper)
            key += (id(field), value is None)
            params.append(value)
        whole = tuple(key)
        known: Any = recall(whole)
        if known is None:
            return None
        if known is UNPLANNED:
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
    compile = lambda: _compile_write(_update_of(base_qs, pk, values), wrapper)  # noqa: E731
    return (plan, params) if hit(whole, plan, params, 0, compile) else None


def _update_of(base_qs: Any, pk: Any, values: Any) -> Any:
    """What `QuerySet._update()` would execute."""
    update: Any = base_qs.filter(pk=pk).query.chain(UpdateQuery)
    update.add_update_fields(values)
    return update


def _plan_save(base_qs: Any, wrapper: Any, pk: Any, values: Any) -> tuple[_ByKey, Ground]:
    update = _update_of(base_qs, pk, values)
    found = plan_for(update, wrapper, _compile_write)
    if found is None or len(update.where.children) != 1 or len(update.values) != len(values):
        raise Unfit
    kept = [field for field, _, _ in values]
    known = _ByKey(found[0], update.where.children[0], wrapper, kept)
    return known, _ground_by_key(update, known, wrapper)


def _ground_by_key(written: Any, known: _ByKey, wrapper: Any) -> Ground:
    cls, lhs = known.lookup
    kept = [*known.kept, lhs.target, lhs.output_field]
    return grounds.of_query(written, kept, None, wrapper, [cls], *known.plan.classes, short=True)


def _delete_batch(original: Any) -> Any:
    """`DeleteQuery.delete_batch()`: one row without a filter, after the first time."""

    def delete_batch(self: Any, pk_list: Any, using: str) -> Any:
        if len(pk_list) == 1 and (wrapper := native_wrapper(using)) is not None:
            found = _delete_plan(self.model, wrapper, pk_list)
            if found is not None:
                return count_of(*found, 0, wrapper)
        return original(self, pk_list, using)

    return delete_batch


def _delete_plan(model: Any, wrapper: Any, keys: list[Any]) -> tuple[Plan, list[Any]] | None:
    if type(keys[0]) not in PLAIN_VALUES:
        return None
    try:
        whole = wrapper.alias, DeleteQuery, model, model._meta.db_table, type(keys[0])
        known: Any = recall(whole)
        if known is UNPLANNED:
            make = functools.partial(_plan_delete, model, wrapper, keys)
            known = learn(whole, model, make)
        if known is None:
            return None
        params = known.params(keys, wrapper)
    except Exception:
        return None
    plan: Plan = known.plan
    compile = lambda: _compile_write(_delete_of(model, keys), wrapper)  # noqa: E731
    return (plan, params) if hit(whole, plan, params, 0, compile) else None


def _delete_of(model: Any, keys: list[Any]) -> Any:
    """What `DeleteQuery.delete_batch()` would execute."""
    delete: Any = DeleteQuery(model)
    delete.add_filter(f"{model._meta.pk.attname}__in", keys)
    return delete


def _plan_delete(model: Any, wrapper: Any, keys: list[Any]) -> tuple[_ByKey, Ground]:
    delete = _delete_of(model, keys)
    found = plan_for(delete, wrapper, _compile_write)
    if found is None or found[0].picked is not None or len(delete.where.children) != 1:
        raise Unfit
    known = _ByKey(found[0], delete.where.children[0], wrapper)
    if not verifying.equal(known.params(keys, wrapper), found[1]):
        raise Unfit
    return known, _ground_by_key(delete, known, wrapper)


def _execute_insert(original: Any) -> Any:
    """`execute_sql()` of the compiler of INSERT."""

    def execute_sql(self: Any, returning_fields: Any = None) -> Any:
        if self.using is not None:
            wrapper = native_wrapper(self.using)
            if wrapper is None or wrapper is not self.connection:
                pass
            elif len(self.query.objs) > 1:
                inserted = bulk.insert(self, wrapper, tuple(returning_fields or ()))
                if inserted is not None:
                    return inserted
            else:
                found = _insert_plan(self, wrapper, tuple(returning_fields or ()))
                if found is not None:
                    return _inserted(*found, wrapper)
        return original(self, returning_fields)

    return execute_sql


def _do_insert(original: Any) -> Any:
    """`Model._do_insert()`: the INSERT without a query and a compiler, after the first time."""

    def do_insert(
        self: Any, manager: Any, using: str, fields: Any, returning_fields: Any, raw: bool
    ) -> Any:
        if type(manager) is Manager and (wrapper := native_wrapper(using)) is not None:
            columns, returning = tuple(fields), tuple(returning_fields or ())
            key = _insert_key(wrapper, manager.model, raw, columns, returning)
            plan = recall(key)
            if plan is not None and plan is not UNPLANNED:
                params = _insert_params(columns, self, raw, wrapper, plan.ready)
                if params is not None and hit(
                    key, plan, params, 0, lambda: bulk.compiled_again(
                        manager.model, columns, [self], returning, wrapper
                    ),
                ):  # fmt: skip
                    return _inserted(plan, params, wrapper)
        return original(self, manager, using, fields, returning_fields, raw)

    return do_insert


def _insert_key(
    wrapper: Any, model: Any, raw: bool, fields: tuple[Any, ...], returning: tuple[Any, ...]
) -> tuple[Any, ...]:
    return (
        wrapper.alias, InsertQuery, model, model._meta.db_table, raw,
        tuple(map(id, fields)), tuple(map(id, returning)),
    )  # fmt: skip


def _insert_params(
    fields: tuple[Any, ...], obj: Any, raw: bool, wrapper: Any, ready: Any
) -> list[Any] | None:
    """The values of an object as Django prepares them, None if that is to be left to it."""
    params = []
    try:
        for field, as_is in zip(fields, ready, strict=True):
            value = getattr(obj, field.attname) if raw else field.pre_save(obj, True)
            if as_is is not None and as_is.takes(value):
                params.append(value)
                continue
            if hasattr(value, "resolve_expression"):
                return None  # an expression or the column's default
            value = field.get_db_prep_save(value, connection=wrapper)
            if hasattr(value, "as_sql"):
                return None
            params.append(value)
    except Exception:
        return None
    return params


def _inserted(plan: Plan, params: list[Any], wrapper: Any) -> list[Any]:
    if plan.maker is None:
        count_of(plan, params, 0, wrapper)
        return []
    return items(plan, params, 0, wrapper)


def _insert_plan(
    compiler: Any, wrapper: Any, returning: tuple[Any, ...]
) -> tuple[Plan, list[Any]] | None:
    query = compiler.query
    if type(query) is not InsertQuery or query.on_conflict or not query.fields:  # type: ignore[attr-defined]
        return None
    fields = tuple(query.fields)
    key = _insert_key(wrapper, query.model, query.raw, fields, returning)
    plan = recall(key)
    params: Any = None
    if plan is not None and all(type(field).pre_save in bulk.PRE_SAVES for field in fields):
        params = _insert_params(fields, query.objs[0], query.raw, wrapper, [None] * len(fields))
    if params is None:
        count("unfit")
        return None
    if plan is UNPLANNED:
        make = functools.partial(_plan_insert, compiler, wrapper, fields, returning, params)
        plan = learn(key, query.model, make)
        count("misses")
    elif not hit(
        key, plan, params, 0,
        lambda: bulk.compiled_again(query.model, fields, query.objs, returning, wrapper),
    ):  # fmt: skip
        return None
    return None if plan is None else (plan, params)


def _plan_insert(
    compiler: Any, wrapper: Any, fields: Any, returning: tuple[Any, ...], params: list[Any]
) -> tuple[Plan, Ground]:
    """The plan of an INSERT; `params` become those of its first statement."""
    compiler.returning_fields = list(returning)
    ((sql, found),) = compiler.as_sql()
    # A time of pre_save() is another one by now, and the object has that.
    if [type(value) for value in found] != [type(value) for value in params] or any(
        hasattr(field, "get_placeholder") or hasattr(field, "get_placeholder_sql")
        for field in fields
    ):
        raise Unfit
    maker = bulk.maker_of_returned(compiler, wrapper, returning)
    kinds = [family(field, wrapper) for field in fields]
    plan = Plan(sql, kinds, maker, (fields, returning), by_server=writes_as_django(wrapper))
    plan.ready = [bulk.as_is(field) for field in fields]
    params[:] = found
    return plan, grounds.of_query(compiler.query, (fields, returning), maker, wrapper, ())


def _prepare_for_bulk_create(original: Any) -> Any:
    """What `bulk_create()` does with each object at first."""

    def prepare(self: Any, objs: list[Any]) -> Any:
        if native_wrapper(self.db) is not None:
            with suppress(Unfit):
                return bulk.prepare(self, objs)
        return original(self, objs)

    return prepare


_OURS = {type(None), Connection, LazyConnection}


def _batched_insert(original: Any) -> Any:
    """The INSERTs of `bulk_create()`."""

    def insert(self: Any, objs: Any, fields: Any, batch_size: Any, **options: Any) -> Any:
        if len(objs) > 1 and distributed.concerns(self.db):
            return distributed.insert(self, original, objs, fields, batch_size, **options)
        size = batch_size or bulk.BATCH
        insert = getattr(type(self), "_insert")  # noqa: B009
        if (
            len(objs) > size
            and options.get("on_conflict") is None
            and insert is query.QuerySet._insert  # type: ignore[attr-defined]
            and grounds.are_sound()
        ):
            wrapper = native_wrapper(self.db)
            # In a test's transaction the connection is Django's own.
            if wrapper is not None and type(wrapper.connection) in _OURS and not wrapper.watched:
                size = min(size, max(wrapper.ops.bulk_batch_size(fields, objs), 1))
                return bulk.insert_batches(self, objs, fields, size, wrapper)
        return original(self, objs, fields, batch_size, **options)

    return insert


_ROWS = "rows are read by a plan of the statement cache"
_WRITES = "writes take their SQL from the statement cache"
_BULK = "bulk_create() takes its values by columns"


def _replacements() -> Iterator[tuple[Any, str, Any, str]]:
    """What is replaced: owner, name, by what, and why."""
    querysets: Any = query.QuerySet
    for cls in _ITERABLES:
        yield cls, "__iter__", _planned(cls), _ROWS
    raw = query.RawModelIterable
    yield raw, "__iter__", _raw(raw.__iter__), _ROWS
    yield querysets, "get", _get(querysets.get), _ROWS
    yield Query, "has_results", _has_results(Query.has_results), _ROWS
    yield Query, "get_count", _get_count(Query.get_count), _ROWS
    yield Query, "get_aggregation", _get_aggregation(Query.get_aggregation), _ROWS
    select = compiler.SQLCompiler
    yield select, "execute_sql", _execute_select(select.execute_sql), _ROWS
    for writer in (compiler.SQLUpdateCompiler, compiler.SQLDeleteCompiler):
        yield writer, "execute_sql", _execute_write(writer.execute_sql), _WRITES
    insert = compiler.SQLInsertCompiler
    yield insert, "execute_sql", _execute_insert(insert.execute_sql), _WRITES
    yield Model, "_do_update", _do_update(Model._do_update), _WRITES
    yield Model, "_do_insert", _do_insert(Model._do_insert), _WRITES
    yield DeleteQuery, "delete_batch", _delete_batch(DeleteQuery.delete_batch), _WRITES
    for name, wrap in (
        ("_prepare_for_bulk_create", _prepare_for_bulk_create),
        ("_batched_insert", _batched_insert),
    ):
        yield querysets, name, wrap(getattr(querysets, name)), _BULK


def install() -> None:
    """Put the replacements in place, once, and follow the settings."""
    if internals.CACHE in internals.lost() or patches.replaced_by_us(Query, "has_results"):
        return
    for owner, name, by, why in list(_replacements()):
        patches.replace(owner, name, by, why)
    setting_changed.connect(_settings_changed, dispatch_uid="asyncorm.planned")
    _settings_changed()


def _settings_changed(**kwargs: Any) -> None:
    global _enabled
    _enabled = bool(conf.get("STATEMENT_CACHE"))
    verifying.active = conf.get("STATEMENT_CACHE") == "verify"
    clear()
