"""What is replaced in Django's own handlers while the app is installed.

- `BaseHandler.get_response_async`: with DEBUG on, the context of a request's task gets Django's own
  wrappers, so that the tasks that the request starts find them, and log their queries there:
  `connection.queries` is the whole request's then. With the swap, the first request says that there
  is a handler without threads.
- `BaseHandler.make_view_atomic`, `ASGIHandler.send_response`: where middleware has left something
  on the connection of the request's thread, that waits for an asynchronous view, or stream, which
  gets its connection. A stream that is not sent to its end is closed.
- `BaseHandler.load_middleware`: that of an AsyncClient makes a native chain where that is asked
  for.
- `sync_to_async` in django.core.handlers.base: logging a response of our handler needs no thread.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.conf import settings
from django.core.handlers import base
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.base import BaseHandler
from django.db import connections
from django.http import HttpRequest

from .. import bridge, observers, patches, swap
from .._sessions import engines
from . import flow

_hinted = False


@functools.cache
def install() -> None:
    """Put the replacements in place, once."""
    for name, wrap, why in (
        ("get_response_async", _get_response_async, "a request's tasks log queries in one place"),
        ("load_middleware", _load_middleware, "AsyncClient goes through our handler"),
        ("make_view_atomic", _make_view_atomic, "a view is in what middleware has begun"),
    ):
        patches.replace(BaseHandler, name, wrap(getattr(BaseHandler, name)), why)
    patches.replace(
        ASGIHandler, "send_response", _send_response(ASGIHandler.send_response),
        "a stream is in what middleware has begun, and closed",
    )  # fmt: skip
    patches.replace(base, "sync_to_async", _dispatch, "logging a response needs no thread")


def _keep_logs() -> None:
    """Have Django's own wrappers in this context, which keep the queries of a request's tasks."""
    for alias in connections:
        if engines.native_class(alias) is not None:
            observers.note_log(alias, connections[alias].queries_log)


def _get_response_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def get_response_async(self: Any, request: HttpRequest) -> Any:
        if settings.DEBUG:
            _keep_logs()
        if not _hinted and swap.active():
            _hint(self)
        return await original(self, request)

    return get_response_async


def _hint(handler: Any) -> None:
    global _hinted
    if type(handler) is ASGIHandler:
        from . import checks

        _hinted = True
        checks.hint_once()


def _dispatch(func: Callable[..., Any], **options: Any) -> Any:
    logs = getattr(func, "__name__", None) == "log_response"  # through what tools put around it
    if logs and flow.current() is not None:
        return functools.partial(flow.natively, func)
    return sync_to_async(func, **options)


def _make_view_atomic(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_view_atomic(self: Any, view: Callable[..., Any]) -> Any:
        atomic = original(self, view)
        # In native code our handler sees to that.
        if swap.active() and not bridge.in_native_code() and iscoroutinefunction(atomic):
            return flow.lent(atomic) if observers.left_behind() else atomic
        return atomic

    return make_view_atomic


def _send_response(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def send_response(self: Any, response: Any, send: Any) -> None:
        if not (response.streaming and getattr(response, "is_async", False)) or (
            flow.current() is None and not swap.active()
        ):
            await original(self, response, send)
            return
        try:
            await (flow.lent(original) if observers.left_behind() else original)(
                self, response, send
            )
        finally:
            # Of a client that went away meanwhile: it may hold a connection.
            if isinstance(stream := getattr(response, "_iterator", None), AsyncGenerator):
                await stream.aclose()

    return send_response


def _load_middleware(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_middleware(self: Any, is_async: bool = False) -> None:
        if is_async and type(self).__module__ == "django.test.client":
            from . import client

            if (respond := client.chain_for_client()) is not None:
                self._middleware_chain = respond
                return
        original(self, is_async)

    return load_middleware
