"""Methods of instances that are awaited: `save()`, `create()` and `delete()` of one statement.

Of a plain model (see `saved_plainly()`) it is known what Django's `save()` prepares; for options
that say more, it runs, to where it would execute its statement (`Asked`). What follows is done
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from django.core.exceptions import SynchronousOnlyOperation
from django.db import router
from django.db.models import Manager, Model, base
from django.db.models.query import QuerySet
from greenlet import getcurrent

from .. import bridge, grounds
from .._cache.awaited import UNSERVED, Found, awaited
from ..wrappers import Wrapper
from . import routing, switch
from .create import CALLED, Plain, inserts_alone, made, saved_plainly
from .get import PLAIN_VALUES
from .insert import known_insert
from .iterate import mode_of
from .switch import Asked
from .write import delete_plan, save_plan

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
        obj = made(queryset.model, plain, kwargs)
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
    return (
        grounds.are_djangos(collector)
        and grounds.begins_as_django()
        and collector(using=alias).can_fast_delete(what)
    )


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
        try:
            asked = _known(obj, options, plain, wrapper)
            if asked is None:
                _ask(obj, options, wrapper)
                done = True  # there is nothing to be saved
        except Asked as exc:
            asked = exc.with_traceback(None)  # which refers to all this
        except SynchronousOnlyOperation:
            pass  # an operation may do what was refused here
        except Exception as exc:
            error = exc
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


def _ask(obj: Model, options: _Keywords, wrapper: Wrapper) -> None:
    """Have `save()` raise what it would execute (`Asked`), not execute it."""
    switch.asking[id(obj)] = wrapper
    try:
        obj.save(**options)
    finally:
        del switch.asking[id(obj)]


_of_models = attrgetter("_do_insert", "_do_update")  # what comes before each statement
_FROM_MANAGERS = "using", "get_queryset", "_queryset_class"  # the queryset of an UPDATE does
_of_managers = attrgetter(*_FROM_MANAGERS)
_hooked: Any = None


def _known(obj: Any, options: _Keywords, plain: Plain, wrapper: Wrapper) -> Asked | None:
    """What `save()` would execute, where the fields tell; None: it has to be asked (`_ask()`)."""
    inserts, manager = options.get("force_insert", False), obj._meta.base_manager
    if (
        type(inserts) is not bool
        or not options.keys() <= _OPTIONS
        or options.get("force_update", False) is not False
        or options.get("update_fields") is not None
        or type(manager) is not Manager
        or (_of_models(Model), _of_managers(Manager)) != _hooked
        or not CALLED.isdisjoint(vars(obj))
        or not vars(manager).keys().isdisjoint(_FROM_MANAGERS)
    ):
        return None
    key, using = getattr(obj, plain.key.attname), options["using"]
    fields = None
    if key is None:
        inserts, fields = True, plain.keyless
    elif type(key) in PLAIN_VALUES and (inserts or not obj._state.adding):
        fields = plain.fields if inserts else plain.others
    if fields is None or (not inserts and obj._meta.select_on_save):
        return None
    if plain.relates:
        obj._prepare_related_fields_for_save(operation_name="save")
    if inserts:
        found = known_insert(obj, manager.model, wrapper, fields, plain.returned, raw=False)
        return Asked(found, plain.returned)
    base = lambda: manager.using(using)  # noqa: E731
    update = save_plan(manager.model, base, wrapper, key, fields, plain.values(obj))
    return Asked(None if update is None else (*update, 0))


_OPTIONS = {"using", "force_insert", "force_update", "update_fields"}


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
    _hooked = _of_models(Model), _of_managers(Manager)
    yield Model.save, save
    yield Model.delete, delete
    yield QuerySet.create, create
