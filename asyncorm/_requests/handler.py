"""The ASGI handler that serves a request on the event loop, from the server to the response.

Django's synchronous chain of middleware and views (the one that WSGI uses) is called as one native
operation. What has to be awaited in it is (asynchronous views), what may block goes to the
request's thread (flow.py). So no step of Django's own needs a thread, and each runs Django's own
code.

The handler is Django's but for `handle()`, which hops to a thread for signals and for closing the
response, and which cancels the whole request when the client goes away. What tools replace
(`get_response_async()`, `load_middleware()`, `make_view_atomic()`) is called as ever.
"""

from __future__ import annotations

import asyncio
import warnings
from asyncio import CancelledError, current_task
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing, suppress
from typing import Any

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured, RequestAborted
from django.core.handlers.asgi import ASGIHandler, ASGIRequest, get_script_prefix
from django.core.handlers.base import BaseHandler
from django.http import HttpRequest
from django.http.response import HttpResponseBase, StreamingHttpResponse
from django.urls import set_script_prefix

from .. import bridge, internals
from ..pages import see
from . import blocking, flow, line, middleware, names, signals, streaming, views, watchdog

SENDER = ASGIHandler  # of the requests' signals: receivers are connected for Django's handler


class Chain(BaseHandler):
    """Django's synchronous chain of middleware and views, to be called natively."""

    def load_middleware(self, is_async: bool = False) -> None:
        with middleware.placed():
            super().load_middleware(is_async=False)
        self._template_response_middleware.append(self.place_rendering)  # type: ignore[attr-defined]

    async def respond(self, request: HttpRequest) -> Any:
        """Call the chain natively: what `get_response_async()` awaits in the place of its own."""
        return await flow.on_the_loop(self._middleware_chain)(request)  # type: ignore[attr-defined]

    def _get_response(self, request: HttpRequest) -> Any:
        response: Any = super()._get_response(request)  # type: ignore[misc]
        flow.deliver()
        return response

    def adapt_method_mode(
        self,
        is_async: bool,
        method: Callable[..., Any],
        method_is_async: bool | None = None,
        debug: bool = False,
        name: str | None = None,
    ) -> Any:
        if method_is_async is None:
            method_is_async = iscoroutinefunction(method)
        if is_async == method_is_async:
            return flow.following(method) if is_async else method
        return (flow.on_the_loop if is_async else flow.awaited)(method)

    def make_view_atomic(self, view: Callable[..., Any]) -> Any:
        native = _runs_natively(view)
        if (running := flow.current()) is not None:
            running.native_view = native
        atomic = super().make_view_atomic(view)
        if iscoroutinefunction(atomic):
            return flow.awaited(atomic)
        if not native:
            return flow.in_thread(atomic)
        line.begin()
        return atomic

    def place_rendering(self, request: Any, response: Any) -> Any:
        """Have a response be rendered where its view ran (the last of the template middleware)."""
        render = response.render
        if iscoroutinefunction(render):
            _replace_once(response, flow.awaited(render))
        elif not _runs_natively(request.resolver_match.func) and not getattr(
            response, "is_rendered", False
        ):
            _replace_once(response, flow.in_thread(render))
        return response


def _runs_natively(view: Callable[..., Any]) -> bool:
    # What hooks of middleware have left in the request's thread, the view must find.
    return views.is_native(view) and not flow.goes_to_thread()


def _replace_once(response: Any, call: Callable[[], Any]) -> None:
    def render() -> Any:
        del response.render  # a response may be pickled into a cache
        return call()

    response.render = render


class NativeHandler(ASGIHandler):
    """Django's handler, all on the loop: what `asyncorm.asgi.get_asgi_application()` returns."""

    def load_middleware(self, is_async: bool = True) -> None:
        if not apps.is_installed("asyncorm"):
            raise ImproperlyConfigured(
                'asyncorm.asgi.get_asgi_application() needs "asyncorm" in INSTALLED_APPS.'
                + see("asgi#start-and-stop")
            )
        internals.require_for_requests()
        if problems := names.problems():
            raise ImproperlyConfigured(" ".join(problems) + see("requests#naming-middleware"))
        signals.install()
        blocking.install()
        self._watches = watchdog.limit() is not None
        chain = Chain()
        chain.load_middleware()
        self._middleware_chain = chain.respond

    async def handle(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        if self._watches:
            watchdog.watch()
        try:
            body_file = await self.read_body(receive)
        except RequestAborted:
            return
        running = flow.Running()
        task = asyncio.create_task(flow.shielded(self._serve, running, scope, body_file, send))
        await self._watch(running, task, receive)

    async def _watch(
        self, running: flow.Running, task: asyncio.Task[None], receive: Callable[..., Any]
    ) -> None:
        """Wait for the request, and tell it when the client goes away or it is to be cancelled.

        The request has a task of its own: a cancellation must not reach native code.
        """
        watching = current_task()
        assert watching is not None
        cancelling = watching.cancelling()
        listens, woken = True, False

        def wake(_: object) -> None:
            nonlocal woken
            if listens:
                woken = watching.cancel()

        task.add_done_callback(wake)
        failure: BaseException | None = None
        try:
            await self.listen_for_disconnect(receive)
        except RequestAborted:
            pass
        except BaseException as exc:
            failure = exc
        listens = False
        if woken and watching.uncancel() <= cancelling and isinstance(failure, CancelledError):
            failure = None
        if not task.done():
            running.leave()
        while not task.done():
            try:
                await asyncio.wait([task])
            except CancelledError as exc:
                failure = exc
                running.leave()
        if failure is None:
            return task.result()
        if not task.cancelled():
            task.exception()  # so that asyncio does not report it as well
        raise failure

    async def _serve(
        self, running: flow.Running, scope: dict[str, Any], body_file: Any, send: Callable[..., Any]
    ) -> None:
        flow.begin(running)
        with closing(body_file):
            set_script_prefix(get_script_prefix(scope))
            await signals.send(signals.request_started, SENDER, scope=scope)
            request, response = self.create_request(scope, body_file)
            try:
                if request is not None:
                    response = await self.run_get_response(request)
                if not running.gone:
                    with suppress(CancelledError):  # of a stream that cancels itself
                        await flow.cancellable(self.send_response, response, send)
            except CancelledError:
                if not running.gone:
                    raise
            finally:
                await self._finish(running, response)

    async def run_get_response(self, request: HttpRequest) -> Any:
        response: Any = await super().run_get_response(request)
        response._handler_class = SENDER
        return response

    async def _finish(self, running: flow.Running, response: Any) -> None:
        running.finished = finished = [SENDER] if response is None else []
        try:
            if response is not None:
                await self._close(running, response)
        finally:
            running.finished = None
            for sender in finished:
                await signals.send(signals.request_finished, sender)

    async def _close(self, running: flow.Running, response: Any) -> None:
        if _only_closes_the_request(response):
            response.close()
        elif running.native_view and not flow.goes_to_thread():
            await bridge.run(response.close)
        else:
            await sync_to_async(response.close)()

    async def send_response(self, response: Any, send: Any) -> None:
        if not (response.streaming and _streams_as_django(response)) or response.is_async:
            return await super().send_response(response, send)
        warnings.warn(
            "StreamingHttpResponse must consume synchronous iterators in order to "
            "serve them asynchronously. Use an asynchronous iterator instead.",
            Warning,
            stacklevel=2,
        )
        running = flow.current()
        # Reading a file may block, whatever the view is.
        in_thread = (
            getattr(response, "file_to_stream", None)
            or not (running is not None and running.native_view)
            or flow.goes_to_thread()
        )
        content = iter(response.streaming_content)
        response.streaming_content = _nothing()

        async def send_part(part: bytes) -> None:
            for chunk, _ in self.chunk_bytes(part):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})

        async def send_content_first(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await (streaming.from_thread if in_thread else streaming.natively)(
                    content, send_part
                )
            await send(message)

        await super().send_response(response, send_content_first)


_AITER, _CONTENT = StreamingHttpResponse.__aiter__, StreamingHttpResponse.streaming_content


def _streams_as_django(response: Any) -> bool:
    """Whether a streaming response gives its parts in Django's way, not in one of its class."""
    cls: Any = type(response)
    return (
        getattr(cls, "__aiter__", None) is _AITER
        and getattr(cls, "streaming_content", None) is _CONTENT
    )


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield


def _only_closes_the_request(response: Any) -> bool:
    """Whether closing a response runs nothing but Django's own code, which does not block."""
    return type(response).close is HttpResponseBase.close and all(
        getattr(closer, "__func__", None) is ASGIRequest.close
        for closer in response._resource_closers
    )
