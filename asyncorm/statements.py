"""The statement cache: what a query's shape is compiled to is kept, and used with other values.

A new plan is made with Django's compiler, and not kept unless each of the compiler's parameters is
known to come from a certain one of the shape's (tracing.py). Whatever is not known to be safe is
left to Django's compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import accumulate, islice
from typing import Any
from weakref import ref

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.lookups import Lookup
from django.db.models.sql.query import Query
from greenlet import getcurrent

from . import _events, bridge, grounds, verifying
from ._cache.parts import plain_orders
from ._cache.plan import Plan, djangos
from ._cache.store import Store
from ._chains import nodes
from .binding import writes_as_django
from .grounds import Ground
from .rows import RowMaker
from .shapes import MAX_PARAMS, NotCacheable, Shape, shape_of_aggregates
from .tracing import Mark, Trace
from .wrappers import Wrapper

plans = Store(4096)  # a plan, or None: not to be planned; and its ground
UNPLANNED: Any = object()  # of a shape that is new
counts = {"hits": 0, "recorded": 0, "misses": 0, "unfit": 0, "verified": 0}


def statement_cache_stats() -> dict[str, int]:
    """How the statement cache of this process is doing, as plain numbers.

    `hits` and `misses` count the statements whose SQL was there and those that were compiled for
    it, `unfit` those that were left to Django's compiler; `size` is the number of shapes known.
    `recorded` counts the hits for which not even the query was made (`RECORD_QUERYSETS`).
    With "verify" for the setting, `verified` counts the hits that Django's compiler confirmed,
    `verified_shapes` how many shapes they were of, `different` those that it did not confirm.
    """
    return {
        **counts,
        "size": len(plans),
        "verified_shapes": len(verifying.shapes),
        "different": verifying.different,
    }


def clear() -> None:
    """Forget all plans."""
    plans.clear()
    plain_orders.clear()
    nodes.clear()


def recall(key: tuple[Any, ...]) -> Any:
    """A plan, None where there is to be none, UNPLANNED if the shape is new."""
    if not grounds.are_sound():
        return None
    found = plans.get(key)
    if found is None:
        return UNPLANNED
    plan, ground = found
    if not ground.holds():
        plans.drop(key)
        return UNPLANNED
    return plan


def remember(key: tuple[Any, ...], plan: object, ground: Ground) -> None:
    """Keep a plan, or None: there is to be none."""
    plans.keep(key, (plan, ground))


_making: set[Any] = set()  # greenlets


def learn(
    key: tuple[Any, ...],
    model: Any,
    make: Callable[[], tuple[Any, Ground]],
    *classes: type,
    compiled: Collection[type] = (),
) -> Any:
    """Make, remember and return what is known by a key, None where making it raises.

    None, too, and nothing is made and remembered, where the cache is full and does not let it in.

    Args:
        classes: what that rests on, beside the model.
        compiled: more of them, which are known once it is made.
    """
    known, ground, me = None, None, getcurrent()
    within = me in _making  # what makes another one needs it
    if not within and not plans.lets_in():
        return None
    _making.add(me)
    try:
        with suppress(Exception):
            known, ground = make()
    finally:
        if not within:
            _making.discard(me)
    remember(key, known, ground or Ground([*classes, *compiled], [model]))
    return known


_OUTCOMES = {"misses": "miss", "unfit": "uncacheable"}


def count(what: str) -> None:
    """Count a statement that is compiled."""
    counts[what] += 1
    if _events.cache:
        _events.cached(_OUTCOMES[what])


def _leave(again: bool) -> None:
    """Count a statement that is left to Django, unless it is asked for again."""
    if not again and bridge.in_native_code():
        count("unfit")


def hit(
    key: tuple[Any, ...],
    plan: Plan,
    params: Any,
    offset: int,
    compile: Callable[[], Compiled],
    *,
    again: bool = False,
) -> bool:
    """Count a hit; where hits are verified, False if Django's SQL is another one each time.

    Args:
        compile: makes Django's statement, of copies of whatever that changes.
        again: see `plan_for()`.

    Raises:
        StatementCacheError: Django's statement is another one.
    """
    if verifying.active:
        sent = (*djangos(plan, params, offset), plan.maker)
        families = list(plan.families)
        for place, _ in plan.constants:
            families.insert(place, _NO_KIND)
        if not verifying.holds(key, sent, families, compile):
            remember(key, None, Ground(()))
            _leave(again)
            return False
        counts["verified"] += 1
    counts["hits"] += 1
    if _events.cache:
        _events.cached("hit")
    return True


Compiled = tuple[str, Any, RowMaker | None]  # SQL, parameters, maker


def plan_for(
    query: Any,
    wrapper: Wrapper,
    compile: Callable[[Any, Any], Compiled],
    *kind: Any,
    expressions: Any = None,
    again: bool = False,
) -> tuple[Plan, list[Any], int] | None:
    """A query's plan, its parameters and its offset; None: leave it to Django.

    Outside native code only what is known is found: to compile may need a connection.

    Args:
        again: it is asked for once more if there is none, and counted then.
    """
    global _unfit
    if (looked_at := _unfit) is not None:
        _unfit = None
        if looked_at() is query:
            _leave(again)
            return None
    try:
        if expressions is None:
            shape = Shape(query, wrapper, *kind)
        else:
            shape = shape_of_aggregates(query, wrapper, kind, expressions)
        whole, of_any = shape.key_of_lengths()
        key, plan = of_any, recall(of_any)
        if plan is _BY_LENGTH:
            if max(shape.lengths) > MAX_PARAMS:
                raise NotCacheable
            key, plan = whole, recall(whole)
        elif plan is not None and plan is not UNPLANNED and shape.lengths:
            plan = plan.of_lists(shape.lists(skips_null=plan.skips_null))
    except Exception as exc:  # whatever is wrong with the query, Django will say
        if isinstance(exc, NotCacheable):
            _note_unfit(query)
        _leave(again)
        return None
    known = plan is not UNPLANNED and (plan is None or plan.holds(shape))
    if (plan is None or not known) and not bridge.in_native_code():
        if plan is None:
            _note_unfit(query)
        return None
    if not known:
        plan = _made(of_any, query, shape, compile)
        count("misses")
        if shape.lengths and plan is not None and not plan.is_of_any_length:
            _by_length(of_any, whole, shape)
    if plan is None:
        _leave(again)
        return None
    params = shape.bind(skips_null=plan.skips_null)
    if plan.picked is not None:
        params = [params[i] for i in plan.picked]
    again_by_django = lambda: compile(query.clone(), wrapper)  # noqa: E731
    if known and not hit(key, plan, params, shape.offset, again_by_django, again=again):
        return None
    return plan, params, shape.offset


_unfit: ref[Any] | None = None  # what a coroutine has looked at last, if it has no plan


def _note_unfit(query: Any) -> None:
    """Spare the operation that executes a query the look that a coroutine has had at it."""
    global _unfit
    if not bridge.in_native_code():
        _unfit = ref(query)


_BY_LENGTH: Any = object()  # in the place of a plan: lists of each length have their own


def _by_length(of_any: tuple[Any, ...], key: tuple[Any, ...], shape: Shape) -> None:
    if (found := plans.get(of_any)) is not None:
        remember(of_any, _BY_LENGTH, found[1])
        if max(shape.lengths) <= MAX_PARAMS:
            remember(key, *found)


def _made(
    key: tuple[Any, ...], query: Any, shape: Shape, compile: Callable[[Any, Any], Compiled]
) -> Plan | None:
    """A new plan, remembered; None if there is to be none."""
    wrapper = shape.wrapper
    lookups = [type(leaf) for leaf, *_ in shape.leaves if isinstance(leaf, Lookup)]

    trace = Trace()

    def make() -> tuple[Plan, Ground]:
        plan = _plan(shape, compile, query, wrapper, trace)
        return plan, grounds.of_query(
            shape.query, shape.kept, plan.maker, wrapper, lookups, *plan.classes
        )

    return learn(key, query.model, make, *lookups, compiled=trace.classes)  # type: ignore[no-any-return]


_NO_KIND: dict[type, int] = {}


def _plan(
    shape: Shape,
    compile: Callable[[Any, Any], Compiled],
    query: Query,
    wrapper: BaseDatabaseWrapper,
    trace: Trace,
) -> Plan:
    places = shape.places(skips_null=False)
    params = iter(shape.bind(skips_null=False))
    for place, (_, count, node) in enumerate(places):
        own = list(islice(params, count))
        if own and node is not None:
            trace.mark(node, place, own)
    trace.named = shape.named
    with trace.running(wrapper):
        sql, compiled, maker = compile(query, wrapper)
    if not all(map(grounds.is_as_made, trace.classes)):
        raise NotCacheable
    plain = [param for param in compiled if type(param) is not Mark]
    skips_null = len(plain) - len(trace.constants) != sum(node is None for _, _, node in places)
    picked: list[int] | None
    picked, constants = _sources(shape, trace, compiled, skips_null=skips_null)
    if shape.offset:
        end = f" OFFSET {shape.offset}"
        if not sql.endswith(end):
            raise NotCacheable
        sql = sql.removesuffix(end)
    families = shape.families(skips_null=skips_null)
    lists = shape.lists(skips_null=skips_null)
    if picked == [*range(len(families))]:
        picked = None
    else:
        lists = [
            (picked.index(at), count)
            for at, count in lists
            if at in picked and picked[picked.index(at) :][:count] == [*range(at, at + count)]
        ]
        # What is there twice has to stay the same to PostgreSQL, which compares no parameters.
        families = [families[i] if picked.count(i) == 1 else _NO_KIND for i in picked]
    plan = Plan(
        sql,
        families,
        maker,
        shape.kept,
        constants=constants,
        skips_null=skips_null,
        with_offset=shape.offset > 0,
        lists=lists,
        picked=picked,
        shared=trace.shared,
        by_server=trace.is_djangos and writes_as_django(wrapper),
    )
    plan.classes = trace.classes
    return plan


def _sources(
    shape: Shape, trace: Trace, compiled: Sequence[Any], *, skips_null: bool
) -> tuple[list[int], list[tuple[int, Any]]]:
    """Which of the shape's parameters each of a statement's is, and which are constants.

    Raises:
        NotCacheable: one has no source.
    """
    places = shape.places(skips_null=skips_null)
    starts = [*accumulate((count for _, count, _ in places), initial=0)]
    # Values of an UPDATE have no marks: Django writes them first, one for each field.
    written = [
        i for i, (_, count, node) in zip(starts, places, strict=False) if count and node is None
    ]
    params = shape.bind(skips_null=skips_null)
    picked: list[int] = []
    constants = []
    for number, param in enumerate(compiled):
        if type(param) is Mark:
            picked.append(starts[param.place] + param.number)
        elif any(param is constant for constant in trace.constants):
            constants.append((number, param))
        elif len(picked) in written and verifying.equal(param, params[len(picked)]):
            picked.append(len(picked))
        else:
            raise NotCacheable
    return picked, constants
