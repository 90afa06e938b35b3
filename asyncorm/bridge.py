"""Run synchronous code on the event loop: a greenlet that suspends only where it waits.

`native(fn)` runs `fn` in a greenlet on the loop's own thread. When code inside has to wait (for the
database, or because it calls `await_`), the greenlet hands an awaitable to the task that started it
and is resumed with the result. Nothing below this module knows about Django or psycopg, and this
module knows about neither.
"""

from __future__ import annotations

import functools
import inspect
import threading
from asyncio import get_running_loop
from collections.abc import Awaitable, Callable, Coroutine
from sys import getrecursionlimit, setrecursionlimit
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from greenlet import getcurrent, greenlet

from .pages import see

P = ParamSpec("P")
T = TypeVar("T")

_FINISHED = object()
_this: Callable[[], Any] = getcurrent  # the runner, in what only runners run
_MAX_IDLE = 128  # greenlets kept for reuse in each thread: creating one costs more than a call


class Resource(Protocol):
    """What an operation holds until it ends, for instance a connection."""

    def suspend(self) -> Callable[[BaseException | None], None] | None:
        """The operation is about to await something that is not a statement of its own.

        Returns:
            what to call when it has ended, with the exception if there is one; usually nothing.
        """

    def release(self) -> None:
        """The operation has ended."""


class Runner(greenlet):
    """A greenlet that runs one operation after another.

    Attributes:
        resources: what the running operation holds, by key; released when it ends.
        shield_depth: how many `shield()` blocks are open.
        cancelled: a cancellation that arrived while shielded and is still to be delivered.
        cleaning_until: the operation cleans up after a cancellation, and has until then
            (time.monotonic()).
        session_override: the resource that the operation was started for, before any other of its
            kind (a stream, a block).
    """

    resources: dict[str, Any]
    session_override: Any
    shield_depth: int
    cancelled: BaseException | None
    cleaning_until: float | None
    outcome: Any
    failure: BaseException | None

    def __init__(self) -> None:
        super().__init__()
        self.resources = {}
        self.session_override = None
        self.shield_depth = 0
        self.cancelled = None
        self.cleaning_until = None
        self.outcome = None
        self.failure = None

    @staticmethod
    def run() -> None:
        # No method, no argument, and no reference to the greenlet while it is suspended: it would
        # keep itself alive when it is dropped, and the first operation's objects until then.
        while True:
            # `parent` is whoever resumed us last; it comes back with the next operation.
            func, args, kwargs = _this().parent.switch(_FINISHED)
            try:
                _this().outcome = func(*args, **kwargs)
            except BaseException as exc:
                _this().failure = exc
            del func, args, kwargs


def _new_runner() -> Runner:
    runner = Runner()
    runner.switch()  # to where it takes an operation
    return runner


class _Idle(threading.local):
    def __init__(self) -> None:
        self.runners: list[Runner] = []


_idle = _Idle()


def current() -> Runner | None:
    """The runner of the operation that the caller is part of, None outside native code."""
    runner = getcurrent()
    return runner if type(runner) is Runner else None


def running() -> Runner:
    """The runner of the operation that the caller is part of: for what only native code calls."""
    runner = getcurrent()
    assert type(runner) is Runner
    return runner


def in_native_code() -> bool:
    """Whether the caller runs inside `native()`, where synchronous ORM calls are allowed."""
    return type(getcurrent()) is Runner


def loop_runs() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        get_running_loop()
    except RuntimeError:
        return False
    return True


async def run(func: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Run `func(*args, **kwargs)` as one operation: what `native(func)(*args, **kwargs)` does."""
    if _guard is not None:
        _guard()
    try:
        get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "asyncorm runs native code on a running asyncio event loop, and there is none here. "
            "Await it in a coroutine that asyncio runs, for instance by asyncio.run(); synchronous "
            "code calls the ORM without native()." + see("short-loops#celery-commands-wsgi-scripts")
        ) from None
    runners = _idle.runners
    runner = runners.pop() if runners else _new_runner()
    parent = getcurrent()
    runner.parent = parent
    out: Any = None
    # The task's own Context, not a copy: context variables set on either side are seen on the
    # other.
    runner.gr_context = parent.gr_context
    try:
        out = runner.switch(func, args, kwargs)
        while out is not _FINISHED:
            try:
                value = await out
            except BaseException as exc:
                if runner.parent is not (parent := getcurrent()):
                    runner.parent = parent
                out = runner.throw(type(exc), exc, exc.__traceback__)
                if isinstance(exc, GeneratorExit):
                    out = _unwind(runner, out)
            else:
                if runner.parent is not (parent := getcurrent()):
                    runner.parent = parent
                out = runner.switch(value)
        if runner.cancelled is not None:
            # Before a failure, as if it had been raised where it arrived, in the clean-up.
            raise runner.cancelled from runner.failure
        if runner.failure is not None:
            raise runner.failure
        return cast(T, runner.outcome)
    finally:
        runner.failure = runner.outcome = runner.session_override = None
        if runner.resources:
            held = list(runner.resources.values())
            runner.resources.clear()
            for resource in held:
                release(resource)
        runner.shield_depth = 0
        runner.cancelled = runner.cleaning_until = None
        runner.gr_context = None  # do not keep the task's context alive
        if out is _FINISHED and len(runners) < _MAX_IDLE:
            runners.append(runner)


def release(resource: Any) -> None:
    """Have a resource given back, however deep coroutines are nested here."""
    try:
        resource.release()
    except RecursionError:  # operations are not nested so deep
        limit = getrecursionlimit()
        setrecursionlimit(limit + 200)
        try:
            resource.release()
        finally:
            try:
                setrecursionlimit(limit)
            except RecursionError:  # refused at the very depth that it allows
                get_running_loop().call_soon(setrecursionlimit, limit)


def _unwind(runner: Runner, out: object) -> Any:
    """The coroutine is being closed and cannot await any more: refuse until `func` ends."""
    while out is not _FINISHED:
        if inspect.iscoroutine(out):
            out.close()
        out = runner.throw(RuntimeError("The coroutine was closed: native code cannot await."))
    return out


class native(Generic[P, T]):
    """Run synchronous ORM code on the event loop, without a thread.

    `await native(fn)(*args, **kwargs)` calls `fn` on the loop's own thread. The calls of the ORM
    inside suspend at their input and output only, so other tasks run meanwhile. Context variables
    are shared both ways, exceptions keep their type, and a cancellation is raised at the statement
    being waited for. Code that computes for long blocks the loop, as it would in a coroutine.

    Can decorate a function: calling it then returns a coroutine.

    Raises (when awaited):
        RuntimeError: no asyncio event loop is running.
        django.core.exceptions.ImproperlyConfigured: "asyncorm" is not in INSTALLED_APPS.
    """

    def __init__(self, func: Callable[P, T]) -> None:
        if not callable(func) or iscoroutinefunction(func):
            raise TypeError(
                f"native() takes a synchronous callable, not {func!r}; "
                "a coroutine function is awaited as it is."
                + see("native-code#as-a-decorator-and-back")
            )
        self.func = func
        functools.update_wrapper(self, func)
        markcoroutinefunction(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        return run(self.func, *args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else native(self.func.__get__(instance, owner))

    def __repr__(self) -> str:
        return f"native({self.func!r})"


# Called with the runner that is about to await something: may add to its resources.
before_await: list[Callable[[Runner], None]] = []

_guard: Callable[[], None] | None = None


def set_guard(guard: Callable[[], None] | None) -> None:
    """Have `guard` called before each operation, until it is taken away (see apps.py)."""
    global _guard
    _guard = guard


def check() -> None:
    """What `run()` checks first, for who does without it."""
    if _guard is not None:
        _guard()


def await_(awaitable: Awaitable[T]) -> T:
    """Await something from synchronous code that runs natively, and return its result.

    An operation with no transaction gives its connection back while it waits, so that nothing is
    held meanwhile. One that has set something in its server session (SET, a temporary table, an
    advisory lock) keeps it, and what is awaited uses the same connection.

    Raises:
        RuntimeError: called outside native code.
    """
    runner = getcurrent()
    if type(runner) is not Runner:
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise RuntimeError(
            "await_() works only in synchronous code that asyncorm runs natively: start it "
            "with 'await asyncorm.native(function)(...)'. In a coroutine use 'await'."
            + see("native-code#as-a-decorator-and-back")
        )
    for find in before_await:
        find(runner)
    resumptions = [
        resume
        for resource in runner.resources.values()
        if (resume := resource.suspend()) is not None
    ]
    if not resumptions:
        return cast(T, runner.parent.switch(awaitable))  # type: ignore[union-attr]
    failure: BaseException | None = None
    try:
        return cast(T, runner.parent.switch(awaitable))  # type: ignore[union-attr]
    except BaseException as exc:
        failure = exc
        raise
    finally:
        for resume in resumptions:
            resume(failure)


def wait_for(runner: Runner, awaitable: Awaitable[T]) -> T:
    """Await a statement of the operation itself: what it holds stays held."""
    return cast(T, runner.parent.switch(awaitable))  # type: ignore[union-attr]


class shield:
    """Let the statements inside finish when the task is cancelled.

    The cancellation is kept in `runner.cancelled`; `deliver()` raises it.
    """

    __slots__ = ("_runner",)

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __enter__(self) -> None:
        self._runner.shield_depth += 1

    def __exit__(self, *exc: object) -> None:
        self._runner.shield_depth -= 1


def deliver(runner: Runner) -> None:
    """Raise the cancellation that arrived while shielded, if any (`run()` at the latest)."""
    if runner.cancelled is not None and not runner.shield_depth:
        exc, runner.cancelled = runner.cancelled, None
        raise exc
