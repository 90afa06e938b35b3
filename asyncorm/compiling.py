"""`asyncorm.compiled()`: a function that makes a queryset, as a query to await."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.db.models import QuerySet

from . import bridge
from .pages import see


class compiled:
    """Make a query of a function from values to a queryset::

        by_author = asyncorm.compiled(
            lambda author, since: Book.objects.filter(author_id=author, published__gte=since)
        )
        books = await by_author(7, date(2024, 1, 1))  # a list, as from anative()

    The function is called each time: it may look at its arguments, at context variables, at the
    time. What is not done again is compiling: the statement cache has the SQL of each shape that
    its querysets have.

    Args:
        func: a synchronous function; its querysets may have any method applied that is not an
            evaluation.

    Raises (when awaited):
        TypeError: the function returns something else than a queryset.
        What the function and evaluating the queryset raise.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        if not callable(func):
            raise TypeError(
                f"compiled() takes a function that returns a queryset, not a {type(func).__name__}."
                + see("speed#queries-compiled-beforehand")
            )
        self.func = func
        functools.update_wrapper(self, func)

    async def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        return await bridge.run(self._run, args, kwargs)

    def __repr__(self) -> str:
        return f"compiled({self.func!r})"

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        queryset = self.func(*args, **kwargs)
        if not isinstance(queryset, QuerySet):
            raise TypeError(
                f"{self!r} returned a {type(queryset).__name__}, which is no queryset."
                + see("speed#queries-compiled-beforehand")
            )
        return list(queryset)
