"""The native_* methods: a twin of each a* method that the installed Django defines."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from django.db import NotSupportedError
from django.db.models import Manager, Model
from django.db.models.fields import related_descriptors
from django.db.models.manager import BaseManager
from django.db.models.query import QuerySet, RawQuerySet

from . import bridge, copying, patches, streams, swap
from ._hooks import routing, terminals
from ._sessions import engines
from .pages import see

_NOT_DATABASE = {"acheck_password"}  # hashes in a thread


def _check(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if swap.has_foreign():
        alias = swap.alias_of(method, args, kwargs)
        if alias is not None and engines.native_class(alias) is None:
            raise engines.refuse_foreign(alias)


def _is_plain(cls: type, name: str) -> bool:
    """Whether a method of a manager's class does nothing but call that of its querysets."""
    own = getattr(Manager, name, None)
    return (
        own is not None
        and getattr(cls, name) is own
        and getattr(cls, "get_queryset", None) is BaseManager.get_queryset
    )


def _twin(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """native_<name> for the a* method `a<name>`."""
    plain = name[1:]
    names = method.__code__.co_names
    if "sync_to_async" in names and plain in names:

        async def twin(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _is_plain(type(self), plain):
                self = self.get_queryset()
            method = getattr(self, plain)
            _check(method, args, kwargs)
            return await terminals.run(method, *args, **kwargs)

    else:  # calls other a* methods, which shall be native too

        async def twin(self: Any, *args: Any, **kwargs: Any) -> Any:
            method = getattr(self, name)
            _check(method, args, kwargs)
            with swap.forced():
                return await method(*args, **kwargs)

    twin.__name__ = f"native_{plain}"
    twin.__qualname__ = f"{method.__qualname__.rpartition('.')[0]}.{twin.__name__}"
    twin.__module__ = __name__
    twin.__doc__ = f"Like `{plain}()`, run natively (see Django's documentation of `{name}()`)."
    twin.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    for mark in ("alters_data", "queryset_only"):  # for templates; for Manager.from_queryset()
        if hasattr(method, mark):
            setattr(twin, mark, getattr(method, mark))
    return twin


def add_twins(target: type, source: type | None = None) -> type:
    """Give `target` a native_* twin of each a* method that `source` (by default itself) defines."""
    for name, method in list(vars(source or target).items()):
        if (
            name.startswith("a")
            and inspect.iscoroutinefunction(method)
            and name not in _NOT_DATABASE
            # Django keeps such methods, like delete(), off managers.
            and not (source is not None and getattr(method, "queryset_only", False))
        ):
            native_name = f"native_{name[1:]}"
            if native_name not in vars(target):
                setattr(target, native_name, _twin(name, method))
    return target


async def _anative(self: QuerySet[Any] | RawQuerySet[Any]) -> list[Any]:
    """Evaluate natively; the list of instances, or of rows of values() and values_list()."""
    _check(self.__iter__, (), {})
    if isinstance(self, QuerySet):
        return await terminals.fetched(self)
    return await routing.once(bridge.run(list, self))


async def _anative_of_manager(self: BaseManager[Any]) -> list[Any]:
    """Evaluate all() natively and return the list of instances."""
    return await _anative(self.all())


async def native_bulk_create(
    self: Any, objs: Iterable[Any], *args: Any, method: str = "insert", **options: Any
) -> list[Any]:
    """Like `bulk_create()`, run natively (see Django's documentation of `abulk_create()`).

    With method="copy" the rows are sent by COPY, which is several times faster for many. They are
    the same rows; but nothing comes back, as on a database that returns no keys: primary keys and
    columns that the database makes up are not set on the objects. There is no handling of
    conflicts, and expressions as values are refused. Fields' `pre_save()` and
    `get_db_prep_save()` are called, and defaults of the database are used, as ever.

    Args:
        objs, args, options: those of `bulk_create()`; with "copy" only `batch_size`, which is all
            rows by default.
        method: "insert" or "copy".

    Raises:
        ValueError: another method.
        django.db.NotSupportedError: with "copy", an option for conflicts, an expression, or a field
            whose value is put into an SQL expression.
    """
    if method not in ("insert", "copy"):
        raise ValueError(
            f'method must be "insert" or "copy", not {method!r}.' + see("querysets#bulk-copy")
        )
    _check(self.bulk_create, (), {})
    if method == "insert":
        return await routing.once(bridge.run(self.bulk_create, objs, *args, **options))
    given = inspect.signature(QuerySet.bulk_create).bind(self, objs, *args, **options).arguments
    del given["self"], given["objs"]
    batch_size = given.pop("batch_size", None)
    if any(given.values()):
        raise NotSupportedError(
            "bulk_create(method='copy') cannot handle conflicts." + see("querysets#bulk-copy")
        )
    return await bridge.run(copying.bulk_create, self, objs, batch_size)


native_bulk_create.alters_data = True  # type: ignore[attr-defined]
_parameters = inspect.signature(QuerySet.abulk_create).parameters.values()
_method = inspect.Parameter("method", inspect.Parameter.KEYWORD_ONLY, default="insert")
native_bulk_create.__signature__ = inspect.Signature([*_parameters, _method])  # type: ignore[attr-defined]


def native_iterator(
    self: QuerySet[Any], chunk_size: int = 2000, *, read_ahead: int = 0
) -> AsyncIterator[Any]:
    """Iterate natively in chunks from a server-side cursor, without filling the queryset's cache.

    As QuerySet.iterator(): prefetch_related() works chunk by chunk. Outside a transaction the
    stream keeps one connection until it ends or is closed; inside one it uses the block's.

    With `read_ahead` the next chunks are read, prefetches included, while the current one is used.
    Inside a transaction block the block's other tasks then wait for a chunk as they would for a
    nested block, and leaving the stream early waits for the chunk that is on its way. Inside
    `connection()`, which belongs to one task, chunks are read when they are asked for.

    Args:
        chunk_size: rows fetched at a time.
        read_ahead: how many chunks may be read before they are asked for.

    Raises:
        ValueError: a chunk size that is not positive, or a negative read_ahead.
        django.db.NotSupportedError: the alias has another engine.
    """
    if chunk_size is None or chunk_size <= 0:
        raise ValueError("Chunk size must be strictly positive.")
    if isinstance(read_ahead, bool) or not isinstance(read_ahead, int) or read_ahead < 0:
        raise ValueError(
            "read_ahead must be a number of chunks, 0 or more." + see("querysets#streams")
        )
    _check(self.iterator, (), {})
    return streams.stream(self, chunk_size, read_ahead)


def _iterator_of_manager(
    self: BaseManager[Any], chunk_size: int = 2000, *, read_ahead: int = 0
) -> AsyncIterator[Any]:
    """Iterate over all() natively, in chunks from a server-side cursor."""
    return native_iterator(self.all(), chunk_size, read_ahead=read_ahead)


def _adding_twins(factory: Callable[..., type]) -> Callable[..., type]:
    """Related managers' classes are made by functions: add the twins to what they return."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> type:
        return add_twins(factory(*args, **kwargs))

    return make


_FACTORIES = (
    (related_descriptors, "create_reverse_many_to_one_manager"),
    (related_descriptors, "create_forward_many_to_many_manager"),
)


def _patch_factories(factories: Iterable[tuple[Any, str]]) -> None:
    for module, name in factories:
        if not patches.replaced_by_us(module, name):
            twins = _adding_twins(getattr(module, name))
            patches.replace(module, name, twins, "related managers have native_* methods")


def install() -> None:
    """Add the native_* methods to Django's classes, once."""
    from django.apps import apps

    add_twins(QuerySet)
    add_twins(BaseManager, QuerySet)
    add_twins(Model)
    add_twins(RawQuerySet)
    for target, name, method in (
        (QuerySet, "anative", _anative),
        (RawQuerySet, "anative", _anative),
        (BaseManager, "anative", _anative_of_manager),
        (QuerySet, "native_iterator", native_iterator),
        (BaseManager, "native_iterator", _iterator_of_manager),
        (QuerySet, "native_bulk_create", native_bulk_create),
        (BaseManager, "native_bulk_create", native_bulk_create),
    ):
        setattr(target, name, method)
    _patch_factories(_FACTORIES)
    if apps.is_installed("django.contrib.contenttypes"):
        from django.contrib.contenttypes import fields

        _patch_factories([(fields, "create_generic_related_manager")])
    for base in (Manager, Model):  # UserManager.acreate_user, PermissionsMixin.ahas_perm, ...
        for cls in _subclasses(base):
            if cls.__module__.startswith("django."):
                add_twins(cls)


def _subclasses(cls: type) -> set[type]:
    found: set[type] = set(cls.__subclasses__())
    for sub in list(found):
        found |= _subclasses(sub)
    return found
