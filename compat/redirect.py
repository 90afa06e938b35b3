"""Sends the synchronous ORM calls that tests make through their a* twins, awaited.

So that the suite exercises the swap (asyncorm.swap), and not only the bridge, with Django's few
asynchronous tests.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from django.contrib.contenttypes import fields as generic
from django.db import connections
from django.db.models import Model
from django.db.models.fields import related_descriptors
from django.db.models.manager import BaseManager
from django.db.models.query import QuerySet, RawQuerySet

from asyncorm import bridge


def install(record: Any, tests: str) -> None:
    """Redirect from now on.

    Args:
        record: counts the redirected calls.
        tests: the folder of the code whose calls are redirected.
    """

    def redirected(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(plain)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                not sys._getframe(1).f_code.co_filename.startswith(tests)
                or not bridge.in_native_code()
                # Not what self.save() calls, as super().save() in an overridden save(): the twin
                # would call the override.
                or getattr(type(self), name, None) is not method
                # Deprecated in both, with their own names in the message.
                or (name == "save" and args)
                or _autocommit_off()
            ):
                return plain(self, *args, **kwargs)
            record.count("redirected")
            if name == "__iter__":
                return iter(bridge.await_(_rows(self)))
            return bridge.await_(getattr(self, f"a{name}")(*args, **kwargs))

        return method

    def patch(cls: type) -> type:
        for name, plain in list(vars(cls).items()):
            twin = getattr(cls, f"a{name}", None)
            if inspect.isfunction(plain) and _is_async(twin):
                setattr(cls, name, redirected(plain, name))
        if "__iter__" in vars(cls) and hasattr(cls, "__aiter__"):
            cls.__iter__ = redirected(cls.__iter__, "__iter__")  # type: ignore[attr-defined]
        return cls

    def patching(factory: Callable[..., type]) -> Callable[..., type]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> type:
            return patch(factory(*args, **kwargs))

        return make

    for base in (QuerySet, RawQuerySet, BaseManager, Model):
        for cls in {base, *_subclasses(base)}:
            patch(cls)
    for module, name in (
        (related_descriptors, "create_reverse_many_to_one_manager"),
        (related_descriptors, "create_forward_many_to_many_manager"),
        (generic, "create_generic_related_manager"),
    ):
        setattr(module, name, patching(getattr(module, name)))


def _is_async(method: Any) -> bool:
    # Managers' methods are plain functions that wrap those of the queryset.
    return inspect.iscoroutinefunction(inspect.unwrap(method)) if method is not None else False


def _autocommit_off() -> bool:
    """A transaction without a block belongs to its operation: the twin, another one, has no part in
    it and would wait for its locks.
    """
    connection = connections["default"]
    return not (connection.autocommit or connection.in_atomic_block)


async def _rows(queryset: Any) -> list[Any]:
    return [row async for row in queryset]


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
