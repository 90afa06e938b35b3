"""Whether a read whose server is gone may be answered by another one: `replicas` knows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container
from typing import Any

from django.db import router
from django.db.models.query import QuerySet

# Aliases for which others stand in: a pool of theirs does not wait for a server that is away.
stood_in: Container[str] = frozenset()


def routers() -> list[Any]:
    """The ReplicaRouters of the project; asyncorm.replicas is not imported for who has none."""
    if not router.routers:  # these may import it
        return []
    module = sys.modules.get("asyncorm.replicas.router")
    return [] if module is None else list(module.routers())


def _none(queryset: QuerySet[Any], exc: Exception) -> bool:
    return False


def _nobody(original: Callable[..., Any], by: Callable[..., Any]) -> None:
    pass


def _raise(queryset: QuerySet[Any], exc: Exception, read: Callable[[], Any]) -> Any:
    raise exc


# `gone(queryset, exc)`: whether the server that a router has chosen for a queryset is gone, as an
# error tells, and may be replaced; it is not chosen any more then.
gone: Callable[[Any, Exception], bool] = _none

# `again(queryset, exc, read)`: what `read()` gives where the router then chooses another server.
# Raises the error where nothing is to be read again.
again: Callable[[Any, Exception, Callable[[], Any]], Any] = _raise

# `replaced(original, by)`: tells that a method of querysets is now one that calls `again()`.
replaced: Callable[[Any, Any], None] = _nobody
