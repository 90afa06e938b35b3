"""Parallel prefetch: the lookups of prefetch_related() that do not depend on each other, at once.

Django's own `prefetch_related_objects()` runs as ever, and decides, checks and assigns everything.
What it will ask for next can be foreseen, for each level of each lookup: those queries are run
beside it by `_Plan`'s workers, each on a connection of its own, and when Django comes to a level
whose rows are there already it takes those. What was foreseen wrongly is not taken.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError, Future, Task, current_task, get_running_loop
from collections import deque
from collections.abc import Iterable, Sequence
from copy import copy
from operator import is_
from typing import Any

from django.core.exceptions import ObjectDoesNotExist
from django.db.models import Model, Prefetch, QuerySet, query
from django.db.models.constants import LOOKUP_SEP
from django.db.models.fields.related_descriptors import ReverseManyToOneDescriptor

from . import bridge, conf, limits, pools, related, sessions
from ._hooks import switch
from ._sessions import scopes
from ._sessions.session import Session
from ._wire.cancelling import CANCEL_TIMEOUT, finish
from .bridge import Runner

# Replaced by seam.py. The latter may be missing (internals.py): this part is off then.
_prefetch_related_objects = query.prefetch_related_objects
_prefetch_one_level: Any = getattr(query, "prefetch_one_level", None)

_MOST = 8  # workers inside a transaction block, where they share a connection
_plans: dict[Runner, _Plan] = {}


def prefetch_related_objects(model_instances: Any, *related_lookups: Any) -> None:
    """Django's, with queries that it will need running beside it."""
    runner = bridge.current()
    if (
        runner is None
        or not isinstance(model_instances, list)  # any iterable, as from Django 6.1 on
        or not model_instances
        or not conf.get("PARALLEL_PREFETCH")
    ):
        return _prefetch_related_objects(model_instances, *related_lookups)
    session = _session(model_instances[0], runner)
    if session is None:
        return _prefetch_related_objects(model_instances, *related_lookups)
    lookups = _as_objects(related_lookups)
    plan = _Plan(session, lookups)
    plan.follow(type(model_instances[0]))
    outer = _plans.get(runner)
    _plans[runner] = plan
    cancelled = False
    try:
        plan.look_ahead("", model_instances, lookups)
        _prefetch_related_objects(model_instances, *lookups)
    except CancelledError:
        cancelled = True
        raise
    finally:
        if outer is None:
            del _plans[runner]
        else:
            _plans[runner] = outer
        plan.end(runner, cancelled)


def prefetch_one_level(
    instances: list[Any], prefetcher: object, lookup: Prefetch[Any], level: int
) -> Any:
    """Django's, with the rows that are there already."""
    runner = bridge.current()
    if runner is None:
        return _prefetch_one_level(instances, prefetcher, lookup, level)
    plan = _plans.get(runner)
    if plan is None or id(lookup) not in plan.known:
        return _one_level(instances, prefetcher, lookup, level)
    fetch = plan.take(instances, lookup, level)
    if fetch is not None and not fetch.future.done():
        bridge.await_(fetch.future)
        if not plan.sound:
            fetch = None
    if fetch is None:
        objs, nested = _one_level(instances, prefetcher, lookup, level)
        nested = _as_objects(nested)
        plan.look_ahead(lookup.get_current_prefetch_to(level), objs, plan.lookups, nested)
    else:
        objs, _ = _assign(fetch, instances, lookup, level)
        nested = fetch.nested
    plan.know(nested)
    return objs, nested


def _one_level(instances: list[Any], prefetcher: object, lookup: Prefetch[Any], level: int) -> Any:
    if not switch.is_on:
        return _prefetch_one_level(instances, prefetcher, lookup, level)
    fetch = _Fetch(instances, prefetcher, lookup, level)
    if fetch.along is None:
        return _prefetch_one_level(instances, prefetcher, lookup, level)
    fetch.ask()
    return _assign(fetch, instances, lookup, level)


def _assign(fetch: _Fetch, instances: Iterable[Any], lookup: Any, level: int) -> Any:
    """Put what was fetched where it belongs, as Django's prefetch_one_level() does."""
    if fetch.along is not None and fetch.error is None:
        done = related.assign(fetch.along, instances, fetch.result)
        if done is not None:
            return done
    return _prefetch_one_level(instances, fetch, lookup, level)


def _session(instance: Model, runner: Runner) -> Session | None:
    """The session of the operation if queries may run beside it."""
    alias = getattr(getattr(instance, "_state", None), "db", None)
    if alias is None or scopes.keeps_connection():
        # asyncorm.connection() keeps a session whose state, say temporary tables, others lack.
        return None
    session = sessions.session_for(alias, runner)
    return session if session is not None and _is_free(session) else None


def _is_free(session: Session) -> bool:
    """Whether a query on another connection, or of another task of the block, is the same query.

    Others lack what the operation has set in its server session, and what a wrapper that is not
    plainly Django's keeps for it.
    """
    if session.root is not None:
        return True
    wrapper = session.wrapper
    if wrapper is None:  # its block has ended meanwhile: Django's own query will be told
        return False
    conn = wrapper.connection
    return (
        (conn is None or (conn.autocommit and not conn.session_dirty))
        and wrapper.plain
        and wrapper.execute_wrappers == sessions.everywhere
    )


def _as_objects(lookups: Iterable[Any]) -> list[Any]:
    return [x if isinstance(x, Prefetch) else Prefetch(x) for x in lookups]


class _Fetch:
    """The rows of one level of a lookup, fetched before Django asks for them.

    It is a prefetcher as Django knows them, which hands over what the real one returned or raised.
    """

    def __init__(self, instances: list[Any], prefetcher: Any, lookup: Any, level: int) -> None:
        self.instances = instances
        self.prefetcher = prefetcher
        self.lookup = lookup
        self.level = level
        self.along = related.relation(instances, prefetcher, lookup, level)
        self.started = False
        self.future: Future[None] = get_running_loop().create_future()
        self.result: Any = None
        self.error: BaseException | None = None
        self.nested: list[Any] = []

    def ask(self) -> None:
        """Have Django or ourselves make, and perhaps execute, the query."""
        querysets = self.lookup.get_current_querysets(self.level)
        self.result = related.get_prefetch_querysets(
            self.along, self.prefetcher, self.instances, querysets
        )

    def run(self) -> None:
        self.started = True
        try:
            self.ask()
            rows = self.result[0]
            # Lookups of the queryset itself are Django's to merge into those of the whole.
            nested = getattr(rows, "_prefetch_related_lookups", ())
            self.nested = _as_objects(copy(lookup) for lookup in nested)
            if isinstance(rows, QuerySet) and rows._result_cache is None:
                rows._prefetch_related_lookups = ()  # type: ignore[attr-defined]
                rows._fetch_all()
        except BaseException as exc:
            self.error = exc
            if not isinstance(exc, Exception):
                raise
        finally:
            self.prefetcher = None
            if not self.future.done():
                self.future.set_result(None)

    def get_prefetch_querysets(
        self, instances: list[Any], querysets: Sequence[Any] | None = None
    ) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


class _Plan:
    """What one call of prefetch_related_objects() will need, as far as can be foreseen.

    Attributes:
        lookups: all lookups known so far, with their prefixes.
        known: the id() of each lookup that Django works on for this call.
    """

    def __init__(self, session: Session, lookups: list[Any]) -> None:
        self.session = session
        self.lookups = lookups
        self.known = set(map(id, lookups))
        self._kept: list[Any] = []  # or an id() might come again
        self._fetches: dict[Any, list[_Fetch]] = {}
        self._waiting: deque[_Fetch] = deque()
        self._workers: dict[Task[None], Session | None] = {}
        self._starting = 0
        self._ended = False
        self._stateful = False
        # Where each relation of each model is followed first. The same one elsewhere may lead back
        # to the same objects, and is fetched already when Django comes there: it is not foreseen.
        self._first: dict[Any, str] = {}
        self._block = session.innermost() if session.root is not None else None
        if self._block is not None:
            self._block.batching += 1

    def follow(self, model: Any) -> None:
        """Note the relations that the lookups will follow from a model, in Django's order."""
        for lookup in self.lookups:
            at, prefix = model, ""
            path = zip(
                lookup.prefetch_through.split(LOOKUP_SEP),
                lookup.prefetch_to.split(LOOKUP_SEP),
                strict=True,
            )
            for through, to in path:
                if at is None:
                    break
                self._first.setdefault((at._meta.concrete_model, through), prefix)
                at = _related(at, through)
                prefix = f"{prefix}{LOOKUP_SEP}{to}" if prefix else to

    def know(self, lookups: list[Any]) -> None:
        self._kept += lookups
        self.known.update(map(id, lookups))

    def look_ahead(
        self, prefix: str, objs: list[Any], lookups: list[Any], nested: Iterable[Any] = ()
    ) -> None:
        """Foresee what follows the objects that `prefix` led to, and have it fetched."""
        before = len(self._waiting)
        inner = []
        for lookup in nested:
            within = object.__new__(type(lookup))  # copy() would make another queryset of its own
            within.__dict__.update(lookup.__dict__)
            within.add_prefix(prefix)
            inner.append(within)
        self.lookups = [*inner, *self.lookups]
        self._descend(prefix, objs, [*inner, *lookups])
        if len(self._waiting) > before:
            self._hire()

    def _descend(self, prefix: str, objs: list[Any], lookups: list[Any]) -> None:
        level = prefix.count(LOOKUP_SEP) + 1 if prefix else 0
        below: dict[str, list[Any]] = {}
        for lookup in lookups:
            path = lookup.prefetch_to.split(LOOKUP_SEP)
            if len(path) > level and LOOKUP_SEP.join(path[:level]) == prefix:
                below.setdefault(LOOKUP_SEP.join(path[: level + 1]), []).append(lookup)
        for to, group in below.items():
            if not objs:
                return
            try:
                found = _examine(objs, group[0], level)
            except Exception:
                continue  # Django will meet it too, if it comes so far
            through = group[0].prefetch_through.split(LOOKUP_SEP)[level]
            relation = type(objs[0])._meta.concrete_model, through
            if self._first.setdefault(relation, prefix) != prefix:
                continue
            if isinstance(found, _Fetch):
                self._fetches.setdefault(_key(found.lookup, level), []).append(found)
                self._waiting.append(found)
            elif found is not None:
                self._descend(to, found, group)

    def take(self, instances: list[Any], lookup: Prefetch[Any], level: int) -> _Fetch | None:
        """What was fetched, or is being fetched, for this very level of these very objects."""
        if not self.sound:
            self._waiting.clear()
            return None
        fetches = self._fetches.get(_key(lookup, level), [])
        for fetch in fetches:
            if len(fetch.instances) == len(instances) and all(map(is_, fetch.instances, instances)):
                fetches.remove(fetch)
                if fetch.started:
                    return fetch
                self._waiting.remove(fetch)
                return None
        return None

    @property
    def sound(self) -> bool:
        """Whether what was fetched is what the operation itself would fetch.

        Not once code on the way, here or there, has set something in a server session.
        """
        if self._stateful or not _is_free(self.session):
            self._stateful = True
        return not self._stateful

    def _hire(self) -> None:
        if not self.sound:
            return
        # One of those that wait is for whoever has found them.
        wanted = len(self._waiting) - 1 - self._starting
        room = _MOST - len(self._workers) if self._block is not None else _room(self.session)
        for _ in range(min(wanted, room - self._starting)):
            self._starting += 1
            task = get_running_loop().create_task(bridge.run(self._work))
            self._workers.setdefault(task, None)  # it may have begun
            task.add_done_callback(self._gone)

    def _gone(self, task: Task[None]) -> None:
        del self._workers[task]
        if not task.cancelled():
            task.exception()  # Django's call does itself what a worker could not

    def _work(self) -> None:
        session = sessions.require(self.session.alias)
        self._workers[current_task()] = session  # type: ignore[index]
        try:
            if self._block is None and self._waiting:
                # Nothing is begun before there is a connection: until then it can be taken back.
                session.wrapper.ensure_connection()
        finally:
            self._starting -= 1
        while self._waiting and not self._ended and self.sound:
            fetch = self._waiting.popleft()
            fetch.run()
            if not _is_free(session):
                self._stateful = True
            elif fetch.error is None and not self._ended:
                to = fetch.lookup.get_current_prefetch_to(fetch.level)
                self.look_ahead(to, list(fetch.result[0]), self.lookups, fetch.nested)

    def end(self, runner: Runner, cancelled: bool) -> None:
        """Nothing of the call goes on beyond it."""
        self._ended = True
        self._waiting.clear()
        if self._block is not None:
            self._block.batching -= 1
        workers = dict(self._workers)
        if self._block is None or cancelled:  # or a cancelled statement would end the transaction
            for task, session in workers.items():
                # A new connection that Django configures just now will serve others: to stop that
                # would be to close it, at each call that is sooner done.
                if cancelled or session is None or session.taken is None:
                    task.cancel()
        if workers:
            bridge.wait_for(runner, _all_ended(workers, None if self._block else CANCEL_TIMEOUT))


async def _all_ended(tasks: Iterable[Task[None]], timeout: float | None) -> None:
    try:
        _, late = await asyncio.wait(tasks, timeout=timeout)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
    except CancelledError:
        for task in tasks:
            task.cancel()
        for task in tasks:
            await finish(task, 2 * CANCEL_TIMEOUT)
        raise


def _related(model: type[Model], name: str) -> Any:
    """The model that an attribute of a model leads to, None if that cannot be told."""
    for field in model._meta.get_fields():
        accessor = getattr(field, "get_accessor_name", None)  # of relations to the model
        if name == (accessor() if accessor is not None else field.name):
            return field.related_model
    return None


def _key(lookup: Prefetch[Any], level: int) -> Any:
    through = lookup.prefetch_through.split(LOOKUP_SEP)[level]
    queryset = getattr(lookup, "queryset", None) if lookup.get_current_querysets(level) else None
    return through, lookup.get_current_to_attr(level), id(queryset)


def _examine(objs: list[Any], lookup: Prefetch[Any], level: int) -> _Fetch | list[Any] | None:
    """What Django will do for a level of a lookup: fetch, or go on with objects that are there.

    None where only doing it would tell.
    """
    through = lookup.prefetch_through.split(LOOKUP_SEP)[level]
    to_attr = lookup.get_current_to_attr(level)[0]
    for obj in objs:
        if not hasattr(obj, "_prefetched_objects_cache"):
            obj._prefetched_objects_cache = {}
    descriptor = getattr(type(objs[0]), through, None)
    if not (
        hasattr(descriptor, "get_prefetch_querysets")
        or isinstance(descriptor, ReverseManyToOneDescriptor)  # many-to-many ones, too
    ):
        return None  # a property, which may rest on what lookups before it have fetched
    prefetcher, _, _, is_fetched = query.get_prefetcher(objs[0], through, to_attr)
    missing = [obj for obj in objs if not is_fetched(obj)]  # type: ignore[operator]
    if missing:
        return _Fetch(missing, prefetcher, lookup, level)
    if through != to_attr:
        return None
    found: list[Any] = []
    for obj in objs:
        if through in obj._prefetched_objects_cache:
            found += obj._prefetched_objects_cache[through]
        else:
            try:
                value = getattr(obj, through)
            except ObjectDoesNotExist:
                continue
            if value is not None:
                found.append(value)
    return found


def _room(session: Session) -> int:
    """How many connections more could be had without waiting for anybody."""
    pool = pools.find(session.alias)
    return 0 if pool is None else limits.source(pool).room
