"""The project-wide swap: with ASYNCORM = {"SWAP_MANAGERS": True} Django's own a* methods run
natively.

Every a* method of Django is `sync_to_async(self.<name>)(...)`, with `sync_to_async` imported by
name in a few modules. `dispatch` takes the place of that name: so the whole asynchronous surface is
covered at once, and overridden `get()` or `save()` are honoured. Without the swap it calls
asgiref's.

What stays in threads on purpose: password hashing, file storage, cache backends, and other people's
session and authentication backends.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

from asgiref.sync import sync_to_async
from django.apps import apps
from django.core.exceptions import SynchronousOnlyOperation
from django.core.signals import setting_changed
from django.db import connections
from django.db.models import Model
from django.db.models.manager import BaseManager
from django.db.models.query import QuerySet, RawQuerySet

from . import bridge, conf, observers, patches, pools
from ._hooks import routing, terminals
from ._sessions import engines, scopes

# Module: the app that must be installed for it to be importable.
MODULES = {
    "django.db.models.query": None,
    "django.db.models.base": None,
    "django.db.models.fields.related_descriptors": None,
    "django.core.paginator": None,
    "django.contrib.contenttypes.fields": "django.contrib.contenttypes",
    "django.contrib.sessions.backends.db": "django.contrib.sessions",
    "django.contrib.auth.backends": "django.contrib.auth",
    "django.dispatch.dispatcher": None,
}
_swapped = False
_forced: ContextVar[bool] = ContextVar("asyncorm_forced", default=False)


@contextmanager
def forced() -> Iterator[None]:
    """Run a* methods natively inside, whatever the setting."""
    token = _forced.set(True)
    try:
        yield
    finally:
        _forced.reset(token)


def active() -> bool:
    """Whether a* methods called now run natively (where the alias allows it)."""
    return _swapped or _forced.get()


def dispatch(func: Callable[..., Any] | None = None, **options: Any) -> Any:
    """In place of asgiref's sync_to_async in Django's modules: native when swapped and possible."""
    if func is None:
        return lambda func: dispatch(func, **options)
    if not active():
        return sync_to_async(func, **options)

    def call(*args: Any, **kwargs: Any) -> Awaitable[Any]:
        if is_native(func, args, kwargs) and not _of_thread(func, args, kwargs):
            return terminals.run(func, *args, **kwargs)
        return routing.once(sync_to_async(func, **options)(*args, **kwargs))

    return call


def _dispatch_own(func: Callable[..., Any], **options: Any) -> Any:
    """As `dispatch`, but the methods of other people's subclasses stay in threads."""
    own = type(getattr(func, "__self__", None)).__module__.startswith("django.")
    return (dispatch if own else _dispatch_others)(func, **options)


def _dispatch_others(func: Callable[..., Any], **options: Any) -> Any:
    """Other people's synchronous code (receivers that Signal.asend() calls, authentication
    backends) stays in a thread, except in a transaction block.

    A thread could not take part in the transaction (update_last_login() after alogin()). It runs
    natively then, as receivers of a native save() do.
    """
    if active() and scopes.in_block():
        return partial(bridge.run, func)
    return sync_to_async(func, **options)


def is_native(
    func: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> bool:
    """Whether an ORM callable works on an alias of ours."""
    if not has_foreign():
        return True
    try:
        alias = alias_of(func, args, kwargs or {})
    except SynchronousOnlyOperation:  # a router asks the database
        return False
    return alias is None or _swapped_alias(alias)


def _swapped_alias(alias: str) -> bool:
    """Whether a* methods of an alias run natively.

    Outside a scope of ours not where the backend acts in its cursors by what a middleware has put
    on the synchronous connection (a tenant's schema): another connection would not have it.
    """
    cls: Any = engines.native_class(alias)
    return cls is not None and not (
        cls.acts_in_cursors and scopes.find_scope(alias, outlived=False) is None
    )


def _of_thread(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is to run where synchronous code waits for the current task, or has left something
    that it would miss elsewhere, as on Django's own backend."""
    if not (scopes.of_thread() or observers.has_threads()):
        return False
    try:
        alias = alias_of(func, args, kwargs)
    except SynchronousOnlyOperation:
        alias = None
    if scopes.of_thread():
        return scopes.of_thread(alias)
    return observers.left_behind(alias) and not _in_scope(alias)


def _in_scope(alias: str | None) -> bool:
    names = connections.settings if alias is None else (alias,)
    return any(scopes.find_scope(name, outlived=False) is not None for name in names)


def alias_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The alias that an ORM callable will use, as far as one can tell before the call."""
    if kwargs.get("using"):
        return str(kwargs["using"])
    target: Any = getattr(func, "__self__", None)
    if target is None:
        # list(queryset), prefetch_related_objects(instances), a closure over `using`
        code = getattr(func, "__code__", None)
        if code is not None and "using" in code.co_freevars:
            return str(func.__closure__[code.co_freevars.index("using")].cell_contents)
        target = args[0] if args else None
        if code is not None and "self" in code.co_freevars:  # the next chunk of an iterable
            iterable = func.__closure__[code.co_freevars.index("self")].cell_contents
            target = getattr(iterable, "queryset", target)
        if isinstance(target, list | tuple) and target:
            target = target[0]
    return _routed(target, getattr(func, "__name__", "") in _WRITING)


_WRITING = {
    "save", "delete", "create", "get_or_create", "update_or_create", "bulk_create", "bulk_update",
    "update", "add", "remove", "clear", "set",
}  # fmt: skip


def _routed(target: Any, writes: bool) -> str | None:
    """The alias of an instance, a queryset or a manager."""
    known = None
    model: Any = type(target)
    hints: Any = {"instance": target}
    if isinstance(target, Model):
        known = None if writes else target._state.db
    elif isinstance(target, BaseManager) and writes and hasattr(target, "instance"):
        model, hints = getattr(target, "through", target.model), {"instance": target.instance}
    elif issubclass(model, QuerySet | RawQuerySet | BaseManager):
        known, model, hints = target._db, target.model, target._hints
        writes = writes or getattr(target, "_for_write", False)
    else:
        return None
    return known or routing.ask("db_for_write" if writes else "db_for_read", model, **hints)


def has_foreign() -> bool:
    """Whether the project has a database of another engine, or of one with cursors of its own."""
    global _foreign
    if _foreign is None:
        classes: list[Any] = [engines.native_class(alias) for alias in connections.settings]
        _foreign = any(cls is None or cls.acts_in_cursors for cls in classes)
    return _foreign


_foreign: bool | None = None


def _aiterator(self: Any, chunk_size: int = 2000) -> AsyncIterator[Any]:
    """QuerySet.aiterator(): asynchronous iteration in chunks from a server-side cursor."""
    positive = isinstance(chunk_size, int) and chunk_size > 0  # or Django complains when iterated
    if positive and active() and is_native(self.iterator) and not _of_thread(self.iterator, (), {}):
        # Not in a generator around it: aclose() closes it.
        return self.native_iterator(chunk_size)  # type: ignore[no-any-return]
    return _django_aiterator(self, chunk_size)  # type: ignore[no-any-return]


_django_aiterator: Any = None


# In modules that call other people's code, or whose classes are bases of other people's.
_BY = {
    "django.dispatch.dispatcher": _dispatch_others,
    "django.contrib.auth.backends": _dispatch_own,
}
_WHY = "a* methods run natively with SWAP_MANAGERS"


def _replace_in(module: ModuleType) -> None:
    patches.replace(module, "sync_to_async", _BY.get(module.__name__, dispatch), _WHY)


def install() -> None:
    """Put `dispatch` in the place of sync_to_async, once, and follow the setting."""
    global _django_aiterator
    for name, app in MODULES.items():
        if app is None or apps.is_installed(app):
            _replace_in(importlib.import_module(name))
    if _django_aiterator is None:
        _django_aiterator = QuerySet.aiterator
        patches.replace(QuerySet, "aiterator", _aiterator, _WHY)
        setting_changed.connect(_settings_changed, dispatch_uid="asyncorm.swap")
    _read_setting()


def _read_setting() -> None:
    global _swapped
    conf.validate()
    _swapped = bool(conf.get("SWAP_MANAGERS"))


def _settings_changed(*, setting: str, **kwargs: Any) -> None:
    global _foreign
    if setting == "ASYNCORM":
        _read_setting()
    elif setting == "DATABASES":
        _foreign = None
    elif setting in ("TIME_ZONE", "USE_TZ"):
        pools.discard_pools()
    elif setting == "INSTALLED_APPS" and apps.is_installed("asyncorm"):
        for name, app in MODULES.items():
            if name in sys.modules and (app is None or apps.is_installed(app)):
                _replace_in(sys.modules[name])
