"""Run an atomic function again when the server could not serialise it with others."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from django.db import DEFAULT_DB_ALIAS
from django.db.transaction import TransactionManagementError
from psycopg.errors import DeadlockDetected, SerializationFailure

from . import fate
from ._sessions import scopes
from .fate import CommitUnknown
from .pages import see

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def retrying(
    attempts: int = 3,
    on: type[BaseException] | tuple[type[BaseException], ...] = (
        SerializationFailure,
        DeadlockDetected,
    ),
    backoff: float | Callable[[int], float] = 0.05,
    using: str | None = None,
    settle: bool | float = False,
) -> Callable[[F], F]:
    """Decorate a coroutine function that is a transaction of its own: run it again if it fails so.

        @asyncorm.retrying(attempts=5)
        @asyncorm.atomic(isolation_level=IsolationLevel.SERIALIZABLE)
        async def transfer(...): ...

    Args:
        attempts: how often to run it at most; the last failure is raised.
        on: which exceptions to run it again for. Matched against the exception and what caused it
            (`__cause__`), so that psycopg's classes work beside Django's, and against the members
            of an exception group. Where CommitUnknown is among these it is not run again, for that
            might do it twice, unless `on` names that very class.
        backoff: seconds to wait after the first failure, doubled after each further one; or a
            function of the number of the failed attempt (1, 2, ...). The wait is a random part of
            that time, so that those who collided do not collide again.
        using: the alias of the transaction; the default one by default.
        settle: as for `atomic()`, for the transactions that begin inside.

    Raises (when called):
        django.db.transaction.TransactionManagementError: inside a transaction block, where only the
            whole block could be run again.
    """
    if attempts < 1:
        raise ValueError(
            "attempts must be at least 1." + see("transactions#isolation-time-limits-retries")
        )

    limit = fate.seconds(settle)

    def decorate(func: F) -> F:
        if not inspect.iscoroutinefunction(func):
            raise TypeError(
                f"asyncorm.retrying decorates coroutine functions, not {func!r}."
                + see("transactions#isolation-time-limits-retries")
            )

        @functools.wraps(func)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            scope = scopes.find_scope(using or DEFAULT_DB_ALIAS)
            if scope is not None and scope.block is not None:
                raise TransactionManagementError(
                    f"{func.__qualname__}() is retrying and was called inside the transaction "
                    f"block that began at {scope.block.origin}: only that whole block can be run "
                    "again. Put asyncorm.retrying around it, or call this under "
                    "asyncorm.detached()." + see("transactions#isolation-time-limits-retries")
                )
            around = sys.exc_info()[1]  # whoever calls may be handling one already
            with fate.settling(limit):
                for attempt in range(1, attempts):
                    try:
                        return await func(*args, **kwargs)
                    except Exception as exc:
                        if not _matches(exc, on) or _is_unknown(exc, on, around):
                            raise
                    seconds = (
                        backoff(attempt) if callable(backoff) else backoff * 2 ** (attempt - 1)
                    )
                    await asyncio.sleep(random.uniform(0, seconds))
                return await func(*args, **kwargs)

        return inner  # type: ignore[return-value]

    return decorate


def _matches(exc: BaseException, on: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, on):
            return True
        if isinstance(cause, BaseExceptionGroup):
            return any(_matches(member, on) for member in cause.exceptions)
        cause = cause.__cause__
    return False


def _is_unknown(
    exc: BaseException,
    on: type[BaseException] | tuple[type[BaseException], ...],
    around: BaseException | None,
) -> bool:
    """Whether what failed may have been done nevertheless, and is not named for that.

    Args:
        around: what was handled before.
    """
    named = on if isinstance(on, tuple) else (on,)
    if any(issubclass(cls, CommitUnknown) for cls in named):
        return False
    seen = {id(around)}  # one that is raised again may be in the context of its own context
    left: list[BaseException | None] = [exc]
    while left:
        if (each := left.pop()) is None or id(each) in seen:
            continue
        if isinstance(each, CommitUnknown):
            return True
        seen.add(id(each))
        left += each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        left.append(each.__cause__ if each.__suppress_context__ else each.__context__)
    return False
