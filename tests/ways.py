"""What the tables of operations and of querysets share: books, and running one synchronously."""

from collections.abc import Callable, Coroutine
from typing import Any

from django.db.models import QuerySet

from tests.project.shop.models import Book


def books(*args: Any, **kwargs: Any) -> QuerySet:
    """In an order, so that two evaluations give the same."""
    return Book.objects.filter(*args, **kwargs).order_by("pk")


def synchronously(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Drive a coroutine that never waits; with no loop, its ORM calls are Django's sync ones."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise AssertionError("the synchronous way waited for something")


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns or raises."""
    try:
        return function(*args)
    except Exception as error:
        return error
