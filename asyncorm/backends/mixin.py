"""What a PostgreSQL DatabaseWrapper needs for native code: the seam to Django's database wrappers.

For backends other than the one shipped, put the mixin first:

    class DatabaseWrapper(NativeBackendMixin,
    django.contrib.gis.db.backends.postgis.base.DatabaseWrapper): pass

Synchronous code gets the class itself, unchanged but for two checks. Native code gets
`native_class`, a subclass that is in Django's own pooled mode with asyncorm's pool in place of
psycopg_pool's synchronous one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from django.core.checks import register

from .. import checks
from .cursors import has_djangos_cursors
from .native import NativeWrapper
from .synchronous import SynchronousWrapper


class _Class:
    """`native_class` of a backend class: the subclass made from that very class."""

    def __get__(self, instance: object, owner: object) -> Any:
        return _native_class(owner)  # one for each class, made once


@cache
def _native_class(cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}  # repr() shows these
    names["acts_in_cursors"] = not has_djangos_cursors(cls)
    return type(f"Native{cls.__name__}", (NativeWrapper, cls), names)


class NativeBackendMixin(SynchronousWrapper):
    """Adds the native side to a DatabaseWrapper class for PostgreSQL (see the module)."""

    native_class = _Class()


register(checks.check_installed, "asyncorm")  # here, where the app may not be
