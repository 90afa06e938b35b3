"""ATOMIC_REQUESTS for asynchronous views, which Django refuses it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any, TypeVar

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction
from django.db import connections
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from .._sessions import engines
from .._transactions.on_commit import set_rollback
from ..pages import see
from ..transactions import atomic

F = TypeVar("F", bound=Callable[..., Any])

# Whether AtomicRequestsMiddleware takes care of the request of this context.
_by_middleware: ContextVar[bool] = ContextVar("asyncorm_by_middleware", default=False)


class _Ours(set[str]):
    """A view's `_non_atomic_requests`, where Django looks before it refuses a coroutine.

    It seems to hold every alias that we make the transaction of; its items are those that the
    project excluded with django.db.transaction.non_atomic_requests().
    """

    decorated = False

    def __contains__(self, alias: object) -> bool:
        if self.excludes(alias):
            return True
        ours = self.decorated or _by_middleware.get()
        return ours and engines.native_class(str(alias)) is not None

    def excludes(self, alias: object) -> bool:
        return super().__contains__(alias)


def _aliases(ours: _Ours) -> list[str]:
    return [
        alias
        for alias, settings in connections.settings.items()
        if settings["ATOMIC_REQUESTS"]
        and not ours.excludes(alias)
        and engines.native_class(alias) is not None
    ]


class _Transactions(AsyncExitStack):
    """Those of one request."""

    aliases: list[str]

    async def begin(self, ours: _Ours) -> None:
        self.aliases = _aliases(ours)
        for alias in self.aliases:
            await self.enter_async_context(atomic(using=alias))

    def look_at(self, response: HttpResponseBase) -> None:
        """Roll back for an error that Django REST framework made a response of.

        It tells Django's own connections to, which have no part in it.
        """
        if getattr(response, "exception", False):
            for alias in self.aliases:
                set_rollback(True, using=alias)


def atomic_requests(view: F) -> F:
    """Give an asynchronous view what the ATOMIC_REQUESTS setting gives a synchronous one.

    A transaction on each alias that has ATOMIC_REQUESTS, for the view, not for middleware and not
    for the rendering of a streaming or template response. An exception of the view rolls back.
    django.db.transaction.non_atomic_requests() is honoured, above and below this decorator.

    Raises:
        TypeError: the view is synchronous.
        RuntimeError (when called, by Django): an alias with ATOMIC_REQUESTS has another engine.
    """
    if not iscoroutinefunction(view):
        raise TypeError(
            f"atomic_requests decorates asynchronous views, not {view!r}; Django makes "
            "synchronous ones atomic itself." + see("asgi#atomic_requests")
        )

    @functools.wraps(view)
    async def inner(*args: Any, **kwargs: Any) -> Any:
        async with _Transactions() as opened:
            await opened.begin(ours)
            response = await view(*args, **kwargs)
            opened.look_at(response)
            return response

    ours = _Ours(getattr(view, "_non_atomic_requests", ()))
    ours.decorated = True
    inner._non_atomic_requests = ours  # type: ignore[attr-defined]
    return inner  # type: ignore[return-value]


class AtomicRequestsMiddleware:
    """ATOMIC_REQUESTS for every asynchronous view, as `atomic_requests` on each would give it.

    Put it last in MIDDLEWARE: the transaction begins when the ones before have let the request
    pass.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response
        self.asynchronous = iscoroutinefunction(get_response)
        if self.asynchronous:
            markcoroutinefunction(self)
            # Django decides by the method's kind where it runs.
            self.process_view: Any = self._begin
            self.process_exception = self._roll_back
            self.process_template_response = self._commit
        else:
            self.process_view = self._run

    def __call__(self, request: Any) -> Any:
        return self._call(request) if self.asynchronous else self.get_response(request)

    async def _call(self, request: HttpRequest) -> Any:
        try:
            response = await self.get_response(request)
        except BaseException as exc:  # the request was cancelled
            await self._leave(request, exc)
            raise
        finally:
            _by_middleware.set(False)
        await self._leave(request, None)
        return response

    async def _begin(
        self, request: Any, view: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        ours = self._mark(view)
        if ours is None:
            return
        _by_middleware.set(True)
        request.asyncorm_transactions = _Transactions()
        await request.asyncorm_transactions.begin(ours)

    async def _roll_back(self, request: HttpRequest, exception: Exception) -> None:
        await self._leave(request, exception)

    async def _commit(self, request: HttpRequest, response: HttpResponseBase) -> Any:
        if (opened := request.__dict__.get("asyncorm_transactions")) is not None:
            opened.look_at(response)
        await self._leave(request, None)
        return response

    @staticmethod
    async def _leave(request: HttpRequest, exc: BaseException | None) -> None:
        opened = request.__dict__.pop("asyncorm_transactions", None)
        if opened is not None:
            await opened.__aexit__(type(exc) if exc else None, exc, exc and exc.__traceback__)

    def _run(
        self,
        request: HttpRequest,
        view: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # Django's synchronous handler (WSGI, the test client) runs each coroutine on a loop of its
        # own: the transaction must be begun on the view's.
        ours = self._mark(view)
        if ours is None or not _aliases(ours):
            return None
        return async_to_sync(atomic_requests(view))(request, *args, **kwargs)

    @staticmethod
    def _mark(view: Any) -> _Ours | None:
        """What the project excluded; None for a view that is not ours to make atomic."""
        if not iscoroutinefunction(view):
            return None
        ours = getattr(view, "_non_atomic_requests", ())
        if not isinstance(ours, _Ours):
            ours = _Ours(ours)
            try:
                getattr(view, "__func__", view)._non_atomic_requests = ours
            except AttributeError:
                return None  # Django refuses it
        return None if ours.decorated else ours
