"""Where the steps of a request run, and which of them a client that goes away cancels.

A request's middleware and views are called as synchronous code that runs natively. From there one
step may be awaited (`awaited`), another work in the request's thread (`in_thread`); what is called
from a coroutine or a thread comes back by `on_the_loop`. Coroutines of the project are cancelled
when the client goes away. Native code is not, as it would not be in a thread: a payment must not
stop between two statements. Nor does it when middleware cancels it, with `asyncio.timeout()` say:
that waits until it has ended.
"""

from __future__ import annotations

import sys
from asyncio import CancelledError, Task, create_task, current_task, get_running_loop, sleep, wait
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, cast

from asgiref.sync import async_to_sync, sync_to_async
from greenlet import getcurrent

from .. import bridge, conf, observers
from .._sessions.scopes import current_scope


class Running:
    """A request on its way.

    Attributes:
        gone: the client has gone away, or the server wants the request to end.
        native_view: the view runs natively, and so does what its response leaves to be done.
        finished: while the response is being closed, the senders of each `request_finished` that
            is to be sent after that; None before and afterwards.
    """

    def __init__(self) -> None:
        self.gone = False
        self.native_view = False
        self.finished: list[Any] | None = None
        self._told = False
        self._inside: Task[Any] | None = None

    def enter(self, inside: Task[Any] | None) -> Task[Any] | None:
        """Say which task may be cancelled from now on, if any; which it was before."""
        before, self._inside = self._inside, inside
        if self.gone and not self._told:
            self._cancel()
        return before

    def leave(self) -> None:
        """Cancel what may be, now or as soon as that is reached."""
        self.gone = True
        self._cancel()

    def _cancel(self) -> None:
        if self._inside is not None:
            self._told = True
            self._inside.cancel()


_running: ContextVar[Running | None] = ContextVar("asyncorm_running_request", default=None)


def current() -> Running | None:
    """The request that the caller belongs to, if a handler of ours serves it."""
    return _running.get()


def begin(running: Running | None) -> None:
    """Have the current task, and those that it starts, belong to a request, or to none."""
    _running.set(running)


class Shield:
    """Stands for the `cancel()` of a request's task: nothing is cancelled while native code runs.

    The cancellation is kept until that has ended, or awaits something. Any task can have one,
    whatever factory of the project's has made it.

    Attributes:
        kept: how many there are.
    """

    def __init__(self, task: Task[Any]) -> None:
        self._task, self._cancel = task, task.cancel
        self._protects = False
        self._message: Any = None  # anyio knows its own cancellations by that
        self.kept = 0

    def __call__(self, msg: Any | None = None) -> bool:
        if self._protects and not self._task.done():
            self.kept += 1
            self._message = msg
            return True
        return self._cancel(msg)

    def protect(self, protects: bool) -> tuple[bool, bool]:
        """Say whether native code runs from now on; whether it did before, and whether the task is
        to be cancelled now."""
        before, self._protects = self._protects, protects
        if protects or not self.kept:
            return before, False
        for _ in range(self.kept):  # who has asked takes his back by uncancel()
            self._cancel(self._message)
        self.kept = 0
        return before, True


def _shield_of(task: Task[Any] | None) -> Shield | None:
    shield: Any = getattr(task, "cancel", None)
    return shield if isinstance(shield, Shield) else None


async def shielded(
    call: Callable[..., Coroutine[Any, Any, Any]], /, *args: Any, **kwargs: Any
) -> Any:
    """Await code of a request, in a task that has nothing else to do."""
    task: Any = current_task()
    task.cancel = Shield(task)
    try:
        return await call(*args, **kwargs)
    finally:
        del task.cancel  # or the task would keep itself


def _in_own_task(coro: Coroutine[Any, Any, Any]) -> Task[Any]:
    """Go on in another task, which is in the current context, where tools look for new tasks.

    The project's factory has no part in it: on Django's handler there is no other task, and an
    eager one would enter the context twice.
    """
    loop = get_running_loop()
    factory = loop.get_task_factory()
    loop.set_task_factory(None)
    try:
        return create_task(coro, context=getcurrent().gr_context)
    finally:
        loop.set_task_factory(factory)


async def cancellable(
    call: Callable[..., Coroutine[Any, Any, Any]], /, *args: Any, **kwargs: Any
) -> Any:
    """Await code that is cancelled when the client goes away."""
    return await _awaited(current_task(), False, call, *args, **kwargs)


async def protected(
    call: Callable[..., Coroutine[Any, Any, Any]], /, *args: Any, **kwargs: Any
) -> Any:
    """Await code that goes on to its end, as synchronous code in a thread does."""
    return await _awaited(None, call is bridge.run, call, *args, **kwargs)


async def _awaited(
    cancelled: Task[Any] | None, native: bool, call: Callable[..., Any], /, *args: Any, **kw: Any
) -> Any:
    if (running := _running.get()) is None:
        return await call(*args, **kw)
    before = running.enter(cancelled)
    task: Any = current_task()
    if (shield := _shield_of(task)) is not None:
        was_native, _ = shield.protect(native)
        told = task.cancelling()
    try:
        return await call(*args, **kw)
    finally:
        ending = isinstance(sys.exception(), CancelledError | GeneratorExit)
        late = running.gone and cancelled is not None
        if shield is not None and task.cancelling() > told:
            late = True
        try:
            if late and not ending:
                await sleep(0)  # a cancellation that is still to come is not for the next step
        finally:
            running.enter(before)
            if shield is not None and shield.protect(was_native)[1] and not ending:
                await sleep(0)  # the one that was kept arrives here


def goes_to_thread() -> bool:
    """Whether native steps go to the request's thread, which has a transaction or settings of a
    session for them."""
    return observers.left_behind()


async def natively(func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a step of the request natively; it is not cancelled unless the project wants that.

    In the request's thread where that has a transaction, or settings of a session, for the step.
    """
    if goes_to_thread():
        return await protected(sync_to_async(func), *args, **kwargs)
    wait = cancellable if conf.get("CANCEL_NATIVE_VIEWS") else protected
    return await wait(bridge.run, func, *args, **kwargs)


def after_others(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make a hook of native middleware that works in the request's thread where others have left
    something for it there."""
    threaded = in_thread(func)

    @wraps(func)  # tools name it
    def call(*args: Any, **kwargs: Any) -> Any:
        return (threaded if goes_to_thread() else func)(*args, **kwargs)

    return _method_like(func, call)


def deliver() -> None:
    """Raise the cancellation that was kept while a native view ran: middleware around it sees that,
    as on Django's handler."""
    shield = _shield_of(current_task()) if bridge.in_native_code() else None
    if shield is not None and shield.kept:
        bridge.await_(cancellable(sleep, 0))


def _has_scope() -> bool:
    """Whether the current task is in something that another one would not be in."""
    scope = current_scope.get()
    return scope is not None and (scope.block is None or scope.task is current_task())


def on_the_loop(func: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Make a coroutine function of a native step."""

    async def call(*args: Any) -> Any:
        if _running.get() is None or _shield_of(current_task()) or _has_scope():
            return await natively(func, *args)
        # A task of the project's, or of asgiref's, which may be cancelled: not what it waits for.
        task = _in_own_task(shielded(natively, func, *args))
        while not task.done():
            try:
                await wait([task])
            except CancelledError as exc:
                task.cancel(*exc.args)
        return task.result()

    return call


def awaited(func: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Make a step, native or in the request's thread, of a coroutine function."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not bridge.in_native_code():
            return async_to_sync(partial(cancellable, func))(*args, **kwargs)
        return bridge.await_(cancellable(following(func), *args, **kwargs))

    return _method_like(func, call)


def lent(
    func: Callable[..., Coroutine[Any, Any, Any]],
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Have the request's thread wait for a coroutine function, which gets its connection."""
    return sync_to_async(async_to_sync(func))


def following(
    func: Callable[..., Coroutine[Any, Any, Any]],
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Make a step of a coroutine function that is in what others have left in the thread."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        return await (lent(func) if goes_to_thread() else func)(*args, **kwargs)

    return call


def in_thread(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make a step of a function that works in the request's thread, as on Django's handler.

    Like asgiref, it sees the exception that is being handled; and the execute wrappers that native
    middleware has entered.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if not bridge.in_native_code():
            return func(*args, **kwargs)
        threaded = sync_to_async(observers.with_entered(func), thread_sensitive=True)
        return bridge.await_(while_handling(sys.exception(), threaded, *args, **kwargs))

    return _method_like(func, call)


async def while_handling(
    exc: BaseException | None,
    call: Callable[..., Coroutine[Any, Any, Any]],
    /,
    *args: Any,
    **kw: Any,
) -> Any:
    """Await a call as in the `except` block of an exception of another greenlet."""
    if exc is None:
        return await protected(call, *args, **kw)
    traceback = exc.__traceback__
    try:
        raise exc
    except BaseException:
        exc.__traceback__ = traceback
        return await protected(call, *args, **kw)


def _method_like(func: Callable[..., Any], call: Any) -> Callable[..., Any]:
    # Django names the class of a middleware whose method returned nothing.
    if (owner := getattr(func, "__self__", None)) is not None:
        call.__self__ = owner
    return cast(Callable[..., Any], call)
