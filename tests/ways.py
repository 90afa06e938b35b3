"""Running one operation synchronously, and keeping what came of it."""

from collections.abc import Callable, Coroutine
from typing import Any


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
