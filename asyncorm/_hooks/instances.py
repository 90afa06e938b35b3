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
from . import routing, switch
from .create import CALLED, Plain, inserts_alone, saved_plainly
from .get import PLAIN_VALUES
from .iterate import mode_of
from .switch import Asked
from .write import delete_plan

_Arguments = tuple[Any, ...]
_Keywords = dict[str, Any]


async def save(obj: Model, args: _Arguments, kwargs: _Keywords) -> Any:
    """`Model.save()`; UNSERVED if it has to be an operation."""
    if args or (plain := saved_plainly(type(obj))) is None or obj.get_deferred_fields():
        return UNSERVED
    alias = _alias_of(obj, kwargs)
    if alias is None:
        return UNSERVED
    done = await _saved(obj, {**kwargs, "using": alias}, plain)
    return _unserved(obj, kwargs, alias) if done is UNSERVED else done


async def create(queryset: Any, args: _Arguments, kwargs: _Keywords) -> Any:
    """`QuerySet.create()`; UNSERVED if it has to be an operation."""
    if args or (plain := inserts_alone(queryset, kwargs)) is None:
        return UNSERVED
    try:
        obj = queryset.model(**kwargs)
        queryset._for_write = True
        options = {"force_insert": True, "using": queryset.db}
    except SynchronousOnlyOperation:
        return UNSERVED
    if await _saved(obj, options, plain) is UNSERVED:
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
    if alias is None:
        return UNSERVED
    if not deletes_alone(base, alias, obj):
        return _unserved(obj, kwargs, alias)
    key = obj.pk

    def find(wrapper: Wrapper) -> Found | None:
        found = delete_plan(cls, wrapper, [key])
        return None if found is None else (*found, 0)

    count = await awaited(alias, find, writes=True)
    if count is not UNSERVED:
        setattr(obj, cls._meta.pk.attname, None)
        return count, {cls._meta.label: count}
    return _unserved(obj, kwargs, alias)


def _unserved(obj: Model, kwargs: _Keywords, alias: str) -> Any:
    if not kwargs.get("using"):
        routing.keep(alias, "db_for_write", type(obj), {"instance": obj})
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


async def _saved(obj: Model, options: _Keywords, plain: Plain) -> Any:
    asked: Any = None
    error: Exception | None = None
    done = False

    def find(wrapper: Wrapper) -> Found | None:
        nonlocal asked, error, done
        switch.asking[id(obj)] = wrapper  # what it would execute is raised, not executed
        try:
            _ask(obj, options, plain)
            obj.save(**options)
            done = True  # there is nothing to be saved
        except Asked as exc:
            asked = exc.with_traceback(None)  # which refers to all this
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


_hooked: Any = None  # what comes before each statement
_NO_OPTIONS: _Keywords = {
    "using": None, "force_insert": False, "force_update": False, "update_fields": None,
}  # fmt: skip


def _ask(obj: Any, options: _Keywords, plain: Plain) -> None:
    """Raise `Asked` as `save()` does, without what it does for other models than such a one."""
    others = {**_NO_OPTIONS, **options}
    inserts = others["force_insert"]
    if (
        type(inserts) is not bool
        or {**others, "using": None, "force_insert": False} != _NO_OPTIONS
        or (Model._do_insert, Model._do_update) != _hooked
        or not CALLED.isdisjoint(vars(obj))
    ):
        return
    key, using, manager = getattr(obj, plain.key.attname), options["using"], obj._meta.base_manager
    fields = None
    if key is None:
        inserts, fields = True, plain.keyless
    elif type(key) in PLAIN_VALUES and (inserts or not obj._state.adding):
        fields = plain.fields if inserts else plain.others
    if fields is None:
        return
    obj._prepare_related_fields_for_save(operation_name="save")
    if inserts:
        obj._do_insert(manager, using, fields, plain.returned, False)
    values = [(field, None, field.pre_save(obj, False)) for field in fields]
    obj._do_update(manager.using(using), using, key, values, None, False)


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
    global _hooked
    _hooked = Model._do_insert, Model._do_update
    yield Model.save, save
    yield Model.delete, delete
    yield QuerySet.create, create
