"""Database aliases: which are for native code, and their pools."""

from __future__ import annotations

import functools
import os
from asyncio import _get_running_loop

from django.core.exceptions import ImproperlyConfigured
from django.db import NotSupportedError, connections
from django.db.utils import load_backend
from django.utils.connection import ConnectionDoesNotExist

from .. import bridge, pools
from ..pages import see


@functools.cache
def _native_class(engine: str) -> type | None:
    return getattr(load_backend(engine).DatabaseWrapper, "native_class", None)


def native_class(alias: str) -> type | None:
    """The wrapper class that native code uses for `alias`; None when its ENGINE is not ours."""
    settings_dict = connections.settings.get(alias)
    return None if settings_dict is None else _native_class(settings_dict["ENGINE"])


def refuse_foreign(alias: str) -> NotSupportedError:
    """For native code that uses an alias of another engine."""
    if alias not in connections.settings:
        raise ConnectionDoesNotExist(f"The connection '{alias}' doesn't exist.")
    engine = connections.settings[alias]["ENGINE"]
    return NotSupportedError(
        f"Database {alias!r} has ENGINE {engine!r}, which cannot run natively. Use ENGINE "
        "'asyncorm.backends.postgresql' for a PostgreSQL "
        "database; for others use Django's own a* methods or sync_to_async."
        + see("deployment#other-backends")
    )


def refuses_synchronous_code(alias: str) -> bool:
    """Whether a coroutine calls, on the loop's thread, what uses a database of ours."""
    return (
        _get_running_loop() is not None
        and not bridge.in_native_code()
        and not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE")
        and native_class(alias) is not None
    )


def pool_of(alias: str, cls: type) -> pools.Pool:
    """The pool of an alias, with the settings of now; its wrappers are made by `cls`."""
    pool = pools.find(alias)
    if pool is None or pool.outdated:
        if pool is not None:
            pools.discard_pools(alias)
        settings_dict = connections.settings[alias]
        if not settings_dict["AUTOCOMMIT"]:
            raise ImproperlyConfigured(
                f"DATABASES[{alias!r}]['AUTOCOMMIT'] is False, which native code does not "
                "support: use asyncorm.atomic()." + see("settings#databases")
            )
        pool = pools.Pool(alias, settings_dict, lambda: cls(settings_dict, alias))
        pools.add(pool)
    return pool
