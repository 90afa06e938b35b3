"""What a task installs on its thread's connection by `sync_to_async()`: execute wrappers, captures.

`async with` of pghistory's context and the like enters `connection.execute_wrapper()` in the thread
that Django's own a* methods run in. It is handed to the task, whose native statements it sees until
it is left there. Such wrappers often keep their state in a `threading.local`: each is called in its
thread, while native code waits.

The other way round, what a request's native code enters (a native middleware) is called by what the
request does in its thread: see `entering()`.

Where the thread's connection is left with an open transaction or settings of its session, the
task's asynchronous methods of Django go on there, as on Django's own backend: see `left_behind()`.

`asgiref.sync.SyncToAsync.threadlocal` is read: whether a thread works for a coroutine.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from asyncio import CancelledError, get_running_loop
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from itertools import chain
from queue import SimpleQueue
from typing import Any, NamedTuple, SupportsIndex

from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from . import bridge
from .bridge import Runner
from .wrappers import Wrapper


class Handed(NamedTuple):
    """What the current task has installed in its thread, for one alias.

    Attributes:
        installed: execute wrappers, each with the list that it is in until it is taken out.
        capturing: the thread's DatabaseWrapper, if its queries are captured.
    """

    installed: tuple[tuple[Wrappers, Callable[..., Any]], ...] = ()
    capturing: Any = None

    @property
    def wrappers(self) -> list[Callable[..., Any]]:
        """Those execute wrappers, to be called by native code."""
        return [in_its_thread(wrapper) for of, wrapper in self.installed if wrapper in of]

    @property
    def captured(self) -> Any:
        """The thread's DatabaseWrapper, if its queries are still captured."""
        return self.capturing if self.capturing and self.capturing.force_debug_cursor else None


NOTHING = Handed()

# asgiref brings what is set in a thread back to the task that waits for it.
_handed: ContextVar[dict[str, Handed]] = ContextVar("asyncorm_handed", default={})  # noqa: B039


def handed(alias: str) -> Handed:
    """What the current task has installed in its thread."""
    by_alias = _handed.get()
    return by_alias.get(alias, NOTHING) if by_alias else NOTHING


def serves_a_loop() -> bool:
    """Whether this thread works for a coroutine."""
    loop = getattr(SyncToAsync.threadlocal, "main_event_loop", None)
    if loop is None or not loop.is_running():
        return False
    return asyncio._get_running_loop() is None


# The wrappers of the current task's thread, by alias; they end with that.
_used: ContextVar[dict[str, weakref.ref[Any]]] = ContextVar("asyncorm_used", default={})  # noqa: B039


def note_use(wrapper: BaseDatabaseWrapper) -> None:
    """Synchronous code of this thread uses its connection; a task may come after it."""
    if serves_a_loop():
        used = _used.get()
        if wrapper.alias not in used or used[wrapper.alias]() is not wrapper:
            _used.set({**used, wrapper.alias: weakref.ref(wrapper)})


def has_threads() -> bool:
    """Whether the current task has used a synchronous connection in a thread."""
    return bool(_used.get())


def left_behind(alias: str | None = None) -> bool:
    """Whether what the current task did in its thread has left something on the connection there,
    which statements elsewhere would miss: middleware that hops (`process_request()`) has begun a
    transaction, or set a tenant."""
    for name, used in _used.get().items():
        wrapper = used() if alias is None or name == alias else None
        if wrapper is not None and wrapper.session is None and wrapper.has_server_state:
            return True
    return False


def _hand(alias: str, **changes: Any) -> None:
    now = handed(alias)._replace(**changes)
    others = {name: one for name, one in _handed.get().items() if name != alias}
    _handed.set(others if now == NOTHING else {**others, alias: now})


class Wrappers(list[Any]):
    """`execute_wrappers` of a synchronous DatabaseWrapper."""

    def __init__(self, alias: str, wrappers: Iterable[Any] = ()) -> None:
        super().__init__()
        self.alias = alias
        self._threads: dict[int, int] = {}
        self.extend(wrappers)

    def _added(self, wrapper: Any) -> None:
        self._threads[id(wrapper)] = threading.get_ident()
        if serves_a_loop():
            _hand(self.alias, installed=(*handed(self.alias).installed, (self, wrapper)))

    def _removed(self, wrapper: Any) -> None:
        if wrapper not in self:
            self._threads.pop(id(wrapper), None)
        installed = handed(self.alias).installed
        for at in reversed(range(len(installed))):
            if installed[at][0] is self and installed[at][1] is wrapper:
                _hand(self.alias, installed=(*installed[:at], *installed[at + 1 :]))
                return

    def append(self, wrapper: Any) -> None:
        super().append(wrapper)
        self._added(wrapper)

    def insert(self, index: Any, wrapper: Any) -> None:
        super().insert(index, wrapper)
        self._added(wrapper)

    def extend(self, wrappers: Iterable[Any]) -> None:
        for wrapper in wrappers:
            self.append(wrapper)

    def pop(self, index: SupportsIndex = -1) -> Any:
        wrapper = super().pop(index)
        self._removed(wrapper)
        return wrapper

    def remove(self, wrapper: Any) -> None:
        super().remove(wrapper)
        self._removed(wrapper)

    def clear(self) -> None:
        while self:
            self.pop()

    def __reversed__(self) -> Iterator[Any]:
        """As Django calls them. In a thread those of native code around it come last; in native
        code on a connection that a thread has lent, those of the thread are called there."""
        wrappers = super().__reversed__()
        if not bridge.in_native_code():
            if not (entered := _entered.get()):
                return wrappers
            return chain(
                wrappers, (each for alias, each in reversed(entered) if alias == self.alias)
            )
        here = threading.get_ident()
        return (
            in_its_thread(wrapper) if self._threads.get(id(wrapper), here) != here else wrapper
            for wrapper in wrappers
        )


class ExecuteWrappers:
    """The attribute `execute_wrappers` of synchronous DatabaseWrappers."""

    def __get__(self, wrapper: BaseDatabaseWrapper, owner: object) -> Any:
        return self if wrapper is None else wrapper.__dict__["execute_wrappers"]

    def __set__(self, wrapper: Wrapper, value: Any) -> None:
        before = wrapper.__dict__.get("execute_wrappers")
        if before:
            before.clear()
        wrapper.__dict__["execute_wrappers"] = Wrappers(wrapper.alias, value)


# The log of queries of each alias that native code of the current task writes to.
_logs: ContextVar[dict[str, Any]] = ContextVar("asyncorm_logs", default={})  # noqa: B039


def note_log(alias: str, log: object) -> None:
    """Native code of the current task logs a query there; its threads may want to read it."""
    if (logs := _logs.get()).get(alias) is not log:
        _logs.set({**logs, alias: log})


def logged(alias: str, own: object) -> Iterable[Any]:
    """What the coroutine that this thread works for has logged natively, elsewhere than in the
    thread's own log; in native code, what the task has logged in its thread."""
    log: Any = None
    if serves_a_loop():
        log = _logs.get().get(alias)
    elif bridge.in_native_code() and (used := _used.get().get(alias)) is not None:
        log = getattr(used(), "queries_log", None)
    return () if log is None or log is own else list(log)


class ForceDebugCursor:
    """The attribute `force_debug_cursor` of synchronous DatabaseWrappers."""

    def __get__(self, wrapper: BaseDatabaseWrapper, owner: object) -> Any:
        return self if wrapper is None else wrapper.__dict__["force_debug_cursor"]

    def __set__(self, wrapper: Wrapper, value: Any) -> None:
        wrapper.__dict__["force_debug_cursor"] = value
        if value and serves_a_loop():
            _hand(wrapper.alias, capturing=wrapper)
        elif not value and handed(wrapper.alias).capturing is wrapper:
            _hand(wrapper.alias, capturing=None)


def in_its_thread(func: Callable[..., Any]) -> Callable[..., Any]:
    """An execute wrapper that native code calls, run in the thread that works for the task."""

    def wrapper(execute: Callable[..., Any], *args: Any) -> Any:
        return _Call(bridge.running(), func, execute).run(*args)

    return wrapper


class _Call:
    """One call of a function in the thread; the statement that it asks for runs here."""

    def __init__(
        self, runner: Runner, func: Callable[..., Any], execute: Callable[..., Any]
    ) -> None:
        self.runner = runner
        self.func = func
        self.execute = execute
        self.loop = get_running_loop()
        self.changed = asyncio.Event()
        self.asked: tuple[Any, ...] | None = None
        self.inbox: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self.answered = self.done = False
        self.result: Any = None
        self.failure: BaseException | None = None
        self.cancelled: CancelledError | None = None

    def run(self, *args: Any) -> Any:
        """Call the function, and wait."""
        outer = _calls.get(self.runner)
        _calls[self.runner] = self
        try:
            if outer is not None:  # the thread is there, and waits for the statement of that one
                outer.inbox.put(lambda: self._work(args))
                task = None
            else:
                task = self.loop.create_task(sync_to_async(self._work)(args))
                task.add_done_callback(lambda _: self.changed.set())
            while not self.done:
                try:
                    bridge.wait_for(self.runner, self.changed.wait())
                except CancelledError as exc:  # the thread cannot be interrupted
                    self.cancelled = exc
                self.changed.clear()
                if self.asked is not None:
                    self._answer()
                elif task is not None and task.done() and not self.done:
                    task.result()  # there is no thread
                    raise RuntimeError("The thread has not called the execute wrapper.")
        finally:
            if outer is None:
                del _calls[self.runner]
            else:
                _calls[self.runner] = outer
        if self.cancelled is not None:
            raise self.cancelled
        if self.failure is not None:
            raise self.failure
        return self.result

    def _answer(self) -> None:
        assert self.asked is not None
        args, self.asked = self.asked, None
        result, failure = None, None
        try:
            if self.cancelled is not None:
                raise self.cancelled
            result = self.execute(*args)
        except BaseException as exc:
            failure = exc
            if isinstance(exc, CancelledError):
                self.cancelled = exc

        def give() -> Any:
            self.answered = True
            if failure is not None:
                raise failure
            return result

        self.inbox.put(give)

    # In the thread

    def _work(self, args: tuple[Any, ...]) -> None:
        try:
            self.result = self.func(self._ask, *args)
        except BaseException as exc:
            self.failure = exc
        self.done = True
        self.loop.call_soon_threadsafe(self.changed.set)

    def _ask(self, *args: Any) -> Any:
        self.asked, self.answered = args, False
        self.loop.call_soon_threadsafe(self.changed.set)
        while True:
            result = self.inbox.get()()
            if self.answered:
                return result


# The innermost call that each operation waits for.
_calls: dict[Runner, _Call] = {}


# What native code enters, for its work in threads

_entered: ContextVar[tuple[tuple[str, Any], ...]] = ContextVar("asyncorm_entered", default=())


@contextmanager
def entering(own: Wrapper, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Have an execute wrapper of native code on Django's own DatabaseWrapper of the task."""
    before = _entered.get()
    with own.execute_wrapper(wrapper):
        _entered.set((*before, (own.alias, wrapper)))
        try:
            yield
        finally:
            _entered.set(before)


class _WithEntered:
    """Calls a function with what native code has entered.

    Attributes:
        func: the function, as partial's, for who looks at what it calls.
    """

    # No __dict__: older versions of asgiref copy it into what they have made of this, which has a
    # `func` of its own.
    __slots__ = ("_entered", "func")

    def __init__(self, func: Callable[..., Any], entered: Any) -> None:
        self.func, self._entered = func, entered

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for alias, wrapper in self._entered:
                # Not as what this thread installs: native code inside has it already.
                wrappers = connections[alias].execute_wrappers
                list.append(wrappers, wrapper)
                stack.callback(list.remove, wrappers, wrapper)
            stack.callback(_entered.set, self._entered)
            _entered.set(())  # they are there
            return self.func(*args, **kwargs)


def with_entered(func: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function that is to work in a thread call what native code around it has entered."""
    entered = _entered.get()
    if not entered:
        return func

    return _WithEntered(func, entered)
