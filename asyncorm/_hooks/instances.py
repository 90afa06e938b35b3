"""Methods of instances that are awaited: `save()`, `create()` and `delete()` of one statement.

Django's own `save()` runs, to where it would execute its statement (`Asked`): by then it has
prepared everything. What follows is done here. So it is only for models of which that is all (see
`saved_plainly()`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from django.core.exceptions import SynchronousOnlyOperation
from django.db import router
from django.db.models import Model, base
from django.db.models.query import QuerySet
from greenlet import getcurrent

from .. import bridge, grounds
from .._cache.awaited import UNSERVED, Found, awaited
from ..wrappers import Wrapper
from . import switch
from .create import inserts_alone, saved_plainly
from .iterate import mode_of
from .switch import Asked
from .write import delete_plan

_Arguments = tuple[Any, ...]
_Keywords = dict[str, Any]


async def save(obj: Model, args: _Arguments, kwargs: _Keywords) -> Any:
    """`Model.save()`; UNSERVED if it has to be an operation."""
    cls = type(obj)
    if args or saved_plainly(cls) is None or obj.get_deferred_fields():
        return UNSERVED
    alias = _alias_of(obj, kwargs)
    return UNSERVED if alias is None else await _saved(obj, {**kwargs, "using": alias})


async def create(queryset: Any, args: _Arguments, kwargs: _Keywords) -> Any:
    """`QuerySet.create()`; UNSERVED if it has to be an operation."""
    if args or not inserts_alone(queryset, kwargs):
        return UNSERVED
    try:
        obj = queryset.model(**kwargs)
        queryset._for_write = True
        options = {"force_insert": True, "using": queryset.db}
    except SynchronousOnlyOperation:
        return UNSERVED
    if await _saved(obj, options) is UNSERVED:
        await bridge.run(obj.save, **options)
    if (mode := mode_of(queryset)) is not None:
        obj._state.fetch_mode = mode
    return obj


async def delete(obj: Any, args: _Arguments, kwargs: _Keywords) -> Any:
    """`Model.delete()`; UNSERVED if it has to be an operation."""
    cls = type(obj)
    if args or kwargs.get("keep_parents") or cls._meta.proxy or not obj._is_pk_set():
        return UNSERVED
    alias = _alias_of(obj, kwargs)
    if alias is None or not deletes_alone(base, alias, obj):
        return UNSERVED
    key = obj.pk

    def find(wrapper: Wrapper) -> Found | None:
        found = delete_plan(cls, wrapper, [key])
        return None if found is None else (*found, 0)

    count = await awaited(alias, find, writes=True)
    if count is not UNSERVED:
        setattr(obj, cls._meta.pk.attname, None)
        return count, {cls._meta.label: count}
    return UNSERVED


def deletes_alone(module: Any, alias: str, what: Any) -> bool:
    """Whether an instance, or what a queryset selects, is deleted by one statement.

    Args:
        module: Django's, whose code would delete it.
    """
    collector = module.Collector
    return grounds.are_djangos(collector) and collector(using=alias).can_fast_delete(what)


def _alias_of(obj: Model, kwargs: _Keywords) -> str | None:
    """Where an instance is written; None if its router asks the database."""
    try:
        return kwargs.get("using") or router.db_for_write(type(obj), instance=obj)
    except SynchronousOnlyOperation:
        return None


async def _saved(obj: Model, options: _Keywords) -> Any:
    asked: Any = None
    error: Exception | None = None
    done = False

    def find(wrapper: Wrapper) -> Found | None:
        nonlocal asked, error, done
        switch.asking[id(obj)] = wrapper  # what it would execute is raised, not executed
        try:
            obj.save(**options)
            done = True  # there is nothing to be saved
        except Asked as exc:
            asked = exc
        except SynchronousOnlyOperation as exc:  # Django may have marked the block
            if wrapper.in_atomic_block and wrapper.rollback_exc is exc:
                wrapper.needs_rollback, wrapper.rollback_exc = False, None
        except Exception as exc:
            error = exc
        finally:
            del switch.asking[id(obj)]
        return None if asked is None else asked.found

    result = await awaited(options["using"], find, writes=True)
    if error is not None:
        raise error
    if done:
        return None
    if asked is None or result is UNSERVED:
        return UNSERVED
    if asked.fields is None and not result:
        return await bridge.run(_go_on, obj, options)
    if asked.fields and result:
        for value, field in zip(result[0], asked.fields, strict=True):
            setattr(obj, field.attname, value)
    obj._state.db = options["using"]
    obj._state.adding = False
    return None


def _go_on(obj: Model, options: _Keywords) -> None:
    """Do what `save()` does after an UPDATE that found no row: insert it, or refuse."""
    runner = getcurrent()
    switch.missed[runner] = obj
    try:
        obj.save(**options)
    finally:
        switch.missed.pop(runner, None)


def install() -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Django's methods as they are now, each with what is awaited in its place."""
    yield Model.save, save
    yield Model.delete, delete
    yield QuerySet.create, create
