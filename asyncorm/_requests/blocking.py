"""What may block and is called through an interface of Django's waits for a thread in native code.

Caches that talk to a network or a disk, file storages, e-mail backends, password hashers, and the
session engines, authentication backends and message storages that are not Django's: the methods of
the classes that the settings name are replaced, once, by ones that work in a thread when native
code calls them. Outside native code, and so in that thread, they are what they were.

In a transaction block what may use the ORM is called natively: a thread could not take part in it.

Replaced besides: `sync_to_async` in django.core.cache.backends.base and
django.contrib.sessions.backends.base, so that the asynchronous methods of caches and sessions that
cannot block need no thread; `BaseEmailBackend.__init__`, which sees backends that no setting names;
`compress_string` of django.middleware.gzip; `URLResolver.resolve_error_handler` and
`_get_failure_view` of django.middleware.csrf, whose views are the project's.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import django.contrib.sessions.backends.base
import django.core.cache.backends.base
import django.middleware.csrf
import django.middleware.gzip
from asgiref.sync import iscoroutinefunction, sync_to_async
from django.apps import apps
from django.conf import settings
from django.core.cache.backends.db import BaseDatabaseCache
from django.core.mail.backends.base import BaseEmailBackend
from django.core.signals import setting_changed
from django.db import router
from django.db.models import FileField
from django.template import TemplateDoesNotExist
from django.template.loader import get_template
from django.urls import URLResolver
from django.utils.module_loading import import_string
from django.views import defaults

from .. import bridge, observers, patches, swap
from .._sessions import engines, scopes
from . import flow, views

_CACHES = "django.core.cache.backends."
_DIRECT_CACHES = (_CACHES + "locmem.LocMemCache", _CACHES + "dummy.DummyCache")
_DATABASE_CACHE = _CACHES + "db.DatabaseCache"
_DIRECT_EMAIL = tuple(
    f"django.core.mail.backends.{name}.EmailBackend" for name in ("locmem", "dummy", "console")
)
_DIRECT_STORAGE = "django.core.files.storage.memory.InMemoryStorage"
_SESSIONS = tuple(
    f"django.contrib.sessions.backends.{name}"
    for name in ("base", "db", "cached_db", "cache", "signed_cookies")
)
# Methods of Django's own storages that only compute.
_OF_NAMES = {
    "deconstruct", "generate_filename", "get_alternative_name", "get_valid_name", "hashed_name",
    "path", "stored_name", "url",
}  # fmt: skip
_OF_FILES = ("close", "flush", "read", "readline", "readlines", "seek", "write")
# Views of Django's that render a template of the project with its context processors.
_ERROR_TEMPLATES: dict[Any, str] = {
    defaults.page_not_found: defaults.ERROR_404_TEMPLATE_NAME,
    defaults.permission_denied: defaults.ERROR_403_TEMPLATE_NAME,
}
_GZIP_BYTES = 64 * 1024  # half a millisecond of work or so

Method = Callable[..., Any]


def _named(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _methods(cls: type, names: Iterable[str] | None = None) -> Iterator[tuple[str, Method]]:
    """The synchronous methods of a class, its bases' included."""
    for name in dir(cls) if names is None else names:
        method = inspect.getattr_static(cls, name, None)
        public = names is not None or not name.startswith("_") or name == "__contains__"
        if public and inspect.isfunction(method) and not iscoroutinefunction(method):
            yield name, method


def _replace(
    cls: type,
    chosen: Iterable[tuple[str, Method]],
    *,
    database: bool = False,
    sensitive: bool = True,
    stays: Callable[[Any], bool] = lambda self: False,
) -> None:
    """Have methods of a class work in a thread when native code calls them.

    Args:
        database: they may use the ORM.
        sensitive: in the request's thread, rather than in any.
        stays: whether those of an object do not block.
    """
    for name, method in list(chosen):
        if not hasattr(method, "asyncorm_original"):
            by = _in_thread(method, database, sensitive, stays)
            patches.replace(cls, name, by, "what may block native code waits for a thread")


def _in_thread(
    original: Method, database: bool, sensitive: bool, stays: Callable[[Any], bool]
) -> Method:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        __traceback_hide__ = True  # the arguments may be secrets, which an error page would show
        if not bridge.in_native_code() or (database and scopes.in_block()) or stays(self):
            return original(self, *args, **kwargs)
        result = _wait(original, self, *args, sensitive=sensitive, **kwargs)
        if original.__name__ == "open" and not type(result).__module__.startswith("django."):
            _replace(type(result), _methods(type(result), _OF_FILES))  # a remote file
        return result

    method.asyncorm_original = original  # type: ignore[attr-defined]
    return method


def _wait(func: Method, /, *args: Any, sensitive: bool, **kwargs: Any) -> Any:
    __traceback_hide__ = True  # as above
    call = observers.with_entered(_Call(func, args, kwargs))
    return bridge.await_(sync_to_async(call, thread_sensitive=sensitive)())


class _Call:
    """A call whose arguments no repr() shows: asgiref's frames have it."""

    # No __dict__, as observers.with_entered().
    __slots__ = ("__name__", "_args", "_kwargs", "func")

    def __init__(self, func: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self._args, self._kwargs = func, args, kwargs  # as partial's: who looks at it
        self.__name__ = func.__name__

    def __call__(self) -> Any:
        return self.func(*self._args, **self._kwargs)


# What the settings name


def _classes(*paths: str) -> Iterator[Any]:
    """What dotted names stand for; a wrong one is for Django to complain about."""
    for path in paths:
        try:
            yield import_string(path)
        except ImportError:
            continue


def _prepare_caches() -> None:
    for cls in _classes(*(options["BACKEND"] for options in settings.CACHES.values())):
        if _named(cls) == _DATABASE_CACHE:
            _replace(cls, _except_of(_methods(cls), _CACHES + "base"), stays=_is_native_cache)
        elif _named(cls) not in _DIRECT_CACHES:
            database = issubclass(cls, BaseDatabaseCache)
            _replace(cls, _except_of(_methods(cls), _CACHES + "base"), database=database)


def _is_native_cache(cache: Any) -> bool:
    if not swap.has_foreign():
        return True
    model = cache.cache_model_class
    aliases = {router.db_for_read(model), router.db_for_write(model)}
    return all(engines.native_class(alias) is not None for alias in aliases)


def _prepare_storages() -> None:
    classes = set(_classes(*(options["BACKEND"] for options in settings.STORAGES.values())))
    for model in apps.get_models():
        for field in model._meta.local_fields:
            if isinstance(field, FileField):
                classes.add(field.storage.__class__)  # of the object behind a lazy one
    for cls in classes:
        if _named(cls) != _DIRECT_STORAGE:
            _replace(
                cls,
                (
                    (name, method)
                    for name, method in _methods(cls)
                    if name not in _OF_NAMES or not method.__module__.startswith("django.")
                ),
            )


def _prepare_email() -> None:
    mailers: dict[str, Any] = getattr(settings, "MAILERS", None) or {}
    backends = [options["BACKEND"] for options in mailers.values() if "BACKEND" in options]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Django 6.1 deprecates the setting
        if backend := getattr(settings, "EMAIL_BACKEND", None):
            backends.append(backend)
    for cls in _classes(*backends):
        _prepare_email_class(cls)


def _prepare_email_class(cls: type) -> None:
    if _named(cls) not in _DIRECT_EMAIL:
        _replace(cls, _methods(cls, ("open", "close", "send_messages")))


def _prepare_hashers() -> None:
    for cls in _classes(*settings.PASSWORD_HASHERS):
        _replace(cls, _methods(cls, ("encode", "verify", "harden_runtime")), sensitive=False)


def _prepare_auth() -> None:
    if apps.is_installed("django.contrib.auth"):
        for cls in _classes(*settings.AUTHENTICATION_BACKENDS):
            _replace(cls, _except_of(_methods(cls), "django.contrib.auth.backends"), database=True)


def _prepare_sessions() -> None:
    if not apps.is_installed("django.contrib.sessions"):
        return
    for cls in _classes(f"{settings.SESSION_ENGINE}.SessionStore"):
        names = ("load", "save", "create", "delete", "exists", "cycle_key", "flush")
        database = any(_named(base) == f"{_SESSIONS[1]}.SessionStore" for base in cls.__mro__)
        _replace(cls, _except_of(_methods(cls, names), *_SESSIONS), database=database)


def _prepare_messages() -> None:
    if not apps.is_installed("django.contrib.messages"):
        return
    for cls in _classes(settings.MESSAGE_STORAGE):
        methods = list(_methods(cls, ("_get", "_store", "update")))
        _replace(
            cls,
            [each for each in methods if not each[1].__module__.startswith("django.")],
            database=True,
        )


def _except_of(
    methods: Iterable[tuple[str, Method]], *modules: str
) -> Iterator[tuple[str, Method]]:
    return ((name, method) for name, method in methods if method.__module__ not in modules)


_PREPARE: dict[str, Callable[[], None]] = {
    "CACHES": _prepare_caches,
    "STORAGES": _prepare_storages,
    "EMAIL_BACKEND": _prepare_email,
    "MAILERS": _prepare_email,
    "PASSWORD_HASHERS": _prepare_hashers,
    "AUTHENTICATION_BACKENDS": _prepare_auth,
    "SESSION_ENGINE": _prepare_sessions,
    "MESSAGE_STORAGE": _prepare_messages,
}


def _changed(*, setting: str, **kwargs: Any) -> None:
    if prepare := _PREPARE.get(setting):
        prepare()


# Asynchronous methods that need no thread


def _dispatch_cache(func: Any, **options: Any) -> Any:
    """In place of sync_to_async in the base class of caches."""
    name = _named(type(getattr(func, "__self__", None)))
    if name in _DIRECT_CACHES:
        return _at_once(func)
    if name == _DATABASE_CACHE and _is_native_cache(func.__self__):
        return functools.partial(bridge.run, func)
    return sync_to_async(func, **options)


def _dispatch_session(func: Callable[..., Any], **options: Any) -> Any:
    """In place of sync_to_async in the base class of sessions."""
    if type(getattr(func, "__self__", None)).__module__ in _SESSIONS:
        return functools.partial(bridge.run, func)
    return sync_to_async(func, **options)


def _at_once(func: Method) -> Method:
    async def call(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return call


# Hooks


def _init_email(original: Method) -> Method:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _prepare_email_class(type(self))
        original(self, *args, **kwargs)

    return __init__


def _compress(original: Method) -> Method:
    @functools.wraps(original)
    def compress_string(content: bytes, **kwargs: Any) -> Any:
        if len(content) < _GZIP_BYTES or not bridge.in_native_code():
            return original(content, **kwargs)
        return _wait(original, content, sensitive=False, **kwargs)

    return compress_string


def _view_in_thread(original: Method) -> Method:
    """For what gets a view of the project's that Django calls by itself."""

    @functools.wraps(original)
    def get(*args: Any, **kwargs: Any) -> Any:
        view = original(*args, **kwargs)
        if not bridge.in_native_code() or _is_djangos(view) or views.is_native(view):
            return view
        return flow.in_thread(view)

    return get


def _is_djangos(view: Callable[..., Any]) -> bool:
    """Whether a view runs no code of the project: neither its own, nor a template's."""
    if not view.__module__.startswith("django."):
        return False
    if template := _ERROR_TEMPLATES.get(view):
        try:
            get_template(template)
        except TemplateDoesNotExist:
            return True
        return False
    return True


_OF_PROJECT = "a view of the project's runs where its views do"


@functools.cache
def install() -> None:
    """Put the replacements in place, once."""
    for module, dispatch in (
        (django.core.cache.backends.base, _dispatch_cache),
        (django.contrib.sessions.backends.base, _dispatch_session),
    ):
        patches.replace(module, "sync_to_async", dispatch, "what cannot block needs no thread")
    for owner, name, wrap, why in (
        (BaseEmailBackend, "__init__", _init_email, "sees backends that no setting names"),
        (django.middleware.gzip, "compress_string", _compress, "long work waits for a thread"),
        (django.middleware.csrf, "_get_failure_view", _view_in_thread, _OF_PROJECT),
        (URLResolver, "resolve_error_handler", _view_in_thread, _OF_PROJECT),
    ):
        patches.replace(owner, name, wrap(getattr(owner, name)), why)
    for prepare in dict.fromkeys(_PREPARE.values()):
        prepare()
    setting_changed.connect(_changed, dispatch_uid="asyncorm.blocking")
