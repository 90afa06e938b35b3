"""Which middleware runs natively, and how the others are put into a native chain.

Django's own (by the dotted name in MIDDLEWARE) and those in ASYNCORM["NATIVE_MIDDLEWARE"] are
called as synchronous code that runs natively. The others keep Django's rules: asynchronous ones run
on the loop, synchronous ones in the request's thread, together with their neighbours.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction
from django.core.handlers import base
from django.core.handlers.exception import convert_exception_to_response
from django.http import HttpRequest
from django.utils.deprecation import MiddlewareMixin
from django.utils.module_loading import import_string

from .. import conf, patches
from . import flow
from .thread_locals import thread_local_of

ALL = "__all__"
_METHODS = ("process_view", "process_template_response", "process_exception")
_OURS = ("asyncorm.asgi.AtomicRequestsMiddleware", "asyncorm.replicas.ReplicaMiddleware")
_import_lock = threading.Lock()


@contextmanager
def placed() -> Iterator[None]:
    """Have Django's `load_middleware()` put each middleware where it belongs."""
    inner = _Inner()
    with _import_lock:
        # Sentry replaces the name, too, to put a class of its own around each.
        original = base.import_string  # type: ignore[attr-defined]

        def place(path: str) -> Any:
            return _place(path, original(path), inner)

        convert = base.convert_exception_to_response  # type: ignore[attr-defined]

        def convert_once(get_response: Callable[..., Any]) -> Any:
            done = isinstance(get_response, _Guest) and get_response.threaded is not None
            return get_response if done else convert(get_response)

        why = "each middleware where it belongs"
        with (
            patches.replaced(base, "import_string", place, why),
            patches.replaced(base, "convert_exception_to_response", convert_once, why),
        ):
            yield


def is_own(path: str) -> bool:
    """Whether an entry of MIDDLEWARE is Django's own; a subclass elsewhere is not."""
    return path.startswith("django.") and _raw(path).__module__.startswith("django.")


def is_named(path: str) -> bool:
    """Whether the project says that an entry of MIDDLEWARE runs natively."""
    names = conf.get("NATIVE_MIDDLEWARE")
    if path in _OURS:
        return True
    middleware = _raw(path)
    if names == ALL:
        return thread_local_of(middleware.__module__) is None
    return path in names or any(_raw(name) is middleware for name in names)


def problem(name: str) -> str | None:
    """What is wrong with an entry of NATIVE_MIDDLEWARE, in words for the user."""
    try:
        middleware = import_string(name)
    except ImportError as exc:
        return f"cannot be imported ({exc})"
    if not callable(middleware):
        return "is no middleware: it cannot be called with get_response"
    if inspect.isclass(middleware) and not any("__call__" in vars(cls) for cls in middleware.mro()):
        return "is no middleware: the class has no __call__()"
    try:
        inspect.signature(middleware).bind(lambda request: None)
    except TypeError:
        return "is no middleware: it cannot be called with get_response"
    except ValueError:  # no signature to be had
        pass
    return None


def _raw(path: str) -> Any:
    """What a dotted name stands for, without what tools put around it while it is loaded."""
    return import_string(path)


class _Inner:
    """What has been loaded so far, from the view outwards.

    Attributes:
        threaded: on Django's handler the chain would be synchronous here.
    """

    threaded = False


def _place(path: str, factory: Callable[..., Any], inner: _Inner) -> Any:
    can_sync = getattr(factory, "sync_capable", True)
    can_async = getattr(factory, "async_capable", False)
    if not can_sync and not can_async:
        return factory  # Django refuses it
    if is_own(path) or is_named(path):
        return _Native(factory, asynchronous=has_async_form(path, factory))
    asynchronous = can_async and not (inner.threaded and can_sync)
    # What only hops works in the thread as a whole: it may leave a transaction open there.
    threaded = not (asynchronous and has_async_form(path, factory))
    return _Foreign(factory, inner, threaded, asynchronous)


def has_async_form(path: str, factory: Callable[..., Any]) -> bool:
    """Whether a middleware that runs natively is better used as a coroutine.

    What was written for the loop does not block it, and may differ: Django 5.2's remote users have
    another header there. But what only hops to threads by sync_to_async, as MiddlewareMixin does,
    is better called natively.
    """
    if not getattr(factory, "async_capable", False):
        return False
    if not getattr(factory, "sync_capable", True):
        return True
    middleware = _raw(path)
    form = getattr(middleware, "__acall__", middleware)
    if form.__module__.startswith("django."):
        return form is not MiddlewareMixin.__acall__
    return not hasattr(sys.modules.get(form.__module__), "sync_to_async")


class _Native:
    """A middleware that runs natively, as Django's loader sees it: in one form only."""

    def __init__(self, factory: Callable[..., Any], asynchronous: bool) -> None:
        self.sync_capable = not asynchronous
        self.async_capable = asynchronous
        self._factory = factory

    def __call__(self, get_response: Callable[..., Any]) -> Any:
        middleware = self._factory(get_response)
        try:
            for name in (*_METHODS, "process_request", "process_response"):
                method = getattr(middleware, name, None)
                if method is not None and not iscoroutinefunction(method):
                    setattr(middleware, name, flow.after_others(method))
        except AttributeError:  # __slots__, or a property
            return _Guest(middleware, middleware, flow.after_others)
        return middleware


class _Foreign:
    """Other people's middleware, which keeps Django's rules.

    Args:
        threaded: it works in the request's thread.
        asynchronous: on Django's handler it would be a coroutine.
    """

    def __init__(
        self, factory: Callable[..., Any], inner: _Inner, threaded: bool, asynchronous: bool
    ) -> None:
        self.sync_capable = threaded
        self.async_capable = not threaded
        self._factory = factory
        self._inner = inner
        self._threaded = threaded
        self._asynchronous = asynchronous

    def __call__(self, get_response: Callable[..., Any]) -> Any:
        if self._threaded:
            # Neighbours in the same thread call each other.
            neighbour = getattr(get_response, "threaded", None)
            get_response = neighbour or async_to_sync(flow.on_the_loop(get_response))
        middleware = self._factory(get_response)
        self._inner.threaded = not self._asynchronous
        if middleware is None:
            return None  # Django refuses it
        if not self._threaded:
            return _Guest(middleware, middleware, flow.in_thread)
        threaded = convert_exception_to_response(middleware)
        return _Guest(middleware, flow.in_thread(threaded), flow.in_thread, threaded)


class _Guest:
    """A middleware in a native chain that is called, or whose hooks are, in another way.

    Args:
        call: what stands for the middleware.
        hook: makes its synchronous hooks what the chain calls.
        threaded: what a neighbour in the request's thread calls; it converts exceptions there.
    """

    def __init__(
        self,
        middleware: Any,
        call: Callable[..., Any],
        hook: Callable[..., Any],
        threaded: Callable[..., Any] | None = None,
    ) -> None:
        self._call = call
        self.threaded = threaded
        if iscoroutinefunction(call):
            markcoroutinefunction(self)
        for name in _METHODS:
            method = getattr(middleware, name, None)
            if method is not None:
                setattr(self, name, method if iscoroutinefunction(method) else hook(method))

    def __call__(self, request: HttpRequest) -> Any:
        return self._call(request)
