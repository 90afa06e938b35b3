"""Scopes: which block, `connection()` or `detached()` the code that runs now is in.

They form a chain in a context variable, where the tasks started inside find it.
"""

from __future__ import annotations

import logging
import os
import types
import weakref
from asyncio import Task, _get_running_loop, current_task
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

from django.db import connections
from django.db.transaction import TransactionManagementError
from greenlet import getcurrent

from .. import bridge, generators
from ..bridge import Runner
from ..generators import Place
from ..pages import see
from ..tasks import represented
from .leaving import discard_all, later, unpin

if TYPE_CHECKING:
    from .blocks import Block
    from .session import Session

T = TypeVar("T")
logger = logging.getLogger("asyncorm")


class Scope:
    """A session that a context carries: that of a transaction block, of `connection()`, or none
    (`detached()`).

    Attributes:
        alias: the database alias; None means every alias.
        session: what to use, None to use nothing of the scopes outside.
        block: the transaction block, if it is one.
        task, context: where it was entered. A context variable alone does not identify a task:
            tasks may share a Context (Django 6.1 runs async receivers so) and a fixture is entered
            in one task and used in others. Neither is kept alive: when nobody is left who could
            leave the scope, it ends.
        prev: the scope outside.
        places: the asynchronous generators that it was entered in.
        left: those of them that were dropped: only what closes them is still inside.
    """

    __slots__ = (
        "__weakref__", "_context", "_task", "alias", "block", "ended", "left", "places", "prev",
        "session",
    )  # fmt: skip

    def __init__(
        self, alias: str | None, session: Session | None, block: Block | None = None
    ) -> None:
        self.alias = alias
        self.session = session
        self.block = block
        task = current_task_or_none()
        self._task = None if task is None else weakref.ref(task)
        self._context: weakref.ref[Context] | None = None
        self.ended = False
        self.prev: Scope | None = None
        self.places: tuple[Place, ...] = ()
        self.left: tuple[Place, ...] = ()

    @property
    def task(self) -> Task[Any] | None:
        """The task that entered it, None if there was none or it is no more."""
        return None if self._task is None else self._task()

    @property
    def context(self) -> Context | None:
        """Where it was entered, None if it was not or that is no more."""
        return None if self._context is None else self._context()

    def is_of(self, task: Task[Any] | None) -> bool:
        """Whether `task` entered it."""
        return self._task is None if task is None else self.task is task

    def is_mine(self, task: Task[Any] | None, around: tuple[Place, ...]) -> bool:
        """Whether `task` entered it, or runs in a generator that did, in whichever task."""
        return self.is_of(task) or self.is_within(around)

    def is_within(self, around: tuple[Place, ...]) -> bool:
        """Whether one of the generators `around` entered it."""
        return bool(around) and not set(around).isdisjoint(self.places)

    def is_plainly(self, alias: str, task: Task[Any] | None) -> bool:
        """Whether a task uses `alias` in it, and that needs no further look (`find_scope()`)."""
        session, mine = self.session, self._task
        return (
            self.alias == alias
            and not (self.ended or self.places or self.left)
            and task is not None
            and mine is not None
            and mine() is task
            and session is not None
            and not session.is_lost
        )

    def is_for(self, task: Task[Any] | None) -> bool:
        """Whether `task` stands for the one that entered it; other child tasks do not inherit
        `connection()`.
        """
        return any(self.is_of(other) for other in represented(task))

    def is_over(self, around: tuple[Place, ...]) -> bool:
        """Whether it is, for code that runs in the generators `around`."""
        return self.ended or (bool(self.left) and not set(self.left).issubset(around))

    def push(self) -> None:
        """Enter the scope in the current context."""
        context = getcurrent().gr_context
        self._context = None if context is None else weakref.ref(context)
        task = self.task
        around = generators.around()
        prev = _innermost(task, around)
        while prev is not None and prev.is_over(around) and prev.is_of(task):
            prev = prev.prev
        self.prev = prev
        generators.enter(self)
        current_scope.set(self)
        if task is not None:
            _entered[task] = self

    def pop(self) -> None:
        """Leave the scope, in whichever task and order, and however often."""
        self.ended = True
        generators.leave(self)
        top = value = current_scope.get()
        while (
            value is not None and value.ended and (value is self or value.context is self.context)
        ):
            value = value.prev
        if value is not top:
            current_scope.set(value)
        task = self.task
        if task is not None and (value := _entered.get(task)) is not None:
            while value is not None and value.ended and value.is_of(task):
                value = value.prev
            if value is not None and value.is_of(task):
                _entered[task] = value
            else:
                del _entered[task]

    def __del__(self) -> None:
        # No task and no context is in it, and nobody is there who would leave it.
        if self._context is None or self.ended or self.session is None or self.session.is_lost:
            return
        logger.warning("Nobody has left %s: its connection is given back.", self.session)
        self.ended = True
        generators.leave(self)
        work = unpin(self.session, discard_all) if self.block is None else _roll_back(self.block)
        later(self.session, work)

    def dropped(self, place: Place) -> None:
        """Nobody can continue a generator that it was entered in (generators.Entry).

        The consumer is outside at once, and so is what it starts from now on.
        """
        self.left += (place,)
        top = value = current_scope.get()
        task, context = current_task_or_none(), getcurrent().gr_context
        while (
            value is not None
            and value.is_over(())
            and (value.is_of(task) or value.context is context)
        ):
            value = value.prev
        if value is not top:
            current_scope.set(value)


current_scope: ContextVar[Scope | None] = ContextVar("asyncorm_scope", default=None)

# The innermost scope that each task has entered itself and not left. The context variable alone
# would lose it: tasks that share a Context set it in turns, and asgiref and Django's Signal copy
# the variables of a Context into another.
_entered: WeakKeyDictionary[Task[Any], Scope] = WeakKeyDictionary()
_tasks: Any = _entered.data  # type: ignore[attr-defined]  # of which one asks each time: a dict

# Blocks that synchronous code in other threads, which waits, is in: usually there are none.
of_threads: WeakSet[Block] = WeakSet()
_of_threads: Any = of_threads.data  # type: ignore[attr-defined]  # of which one asks each time: a set

_roll_back: Callable[[Block], Coroutine[Any, Any, None]]


def roll_back_by(leave: Callable[[Block], Coroutine[Any, Any, None]]) -> None:
    """Have blocks that nobody leaves left by `leave` (transactions.py)."""
    global _roll_back
    _roll_back = leave


@types.coroutine
def in_own_scope(coro: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await `coro` in a task that shares its Context with others.

    While it runs, and not while it waits, the context variable has this task's value: a task that
    it starts copies that and not a sibling's.
    """
    mine = current_scope.get()
    step: Callable[[Any], Any] = coro.send
    value: Any = None
    while True:
        outside = current_scope.get()
        current_scope.set(mine)
        try:
            future = step(value)
        except StopIteration as stop:
            return cast(T, stop.value)
        finally:
            mine = current_scope.get()
            current_scope.set(outside)
        try:
            value = yield future
            step = coro.send
        except BaseException as exc:
            value, step = exc, coro.throw


def _leave_to_parent() -> None:
    """A child process that was forked inside a scope is not in it."""
    current_scope.set(None)
    _entered.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _innermost(task: Task[Any] | None, around: tuple[Place, ...] = ()) -> Scope | None:
    """The scope to begin with: the task's own, else that of its context; in a generator that others
    drive, that of the generator.
    """
    scope = None if task is None else _entered.get(task)
    if scope is None:
        scope = current_scope.get()
    for place in around:
        for entry in reversed(list(place.entries)):
            if isinstance(entry, Scope) and not entry.is_over(around):
                inner = scope
                while inner is not None and inner is not entry:
                    inner = inner.prev
                return scope if inner is entry else entry
    return scope


def current_task_or_none() -> Task[Any] | None:
    """asyncio.current_task(), None also where no loop runs in this thread."""
    try:
        return current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def find_scope(alias: str, *, outlived: bool = True, detached: bool = True) -> Scope | None:
    """The innermost scope of `alias` that the current task is in.

    Args:
        outlived: raise TransactionManagementError when the task was started in a block that has
            ended, or has left the loop over a generator that holds the block.
        detached: stop at `detached()`.
    """
    if current_scope.get() is None and not generators.places and not _tasks:  # _is_outside()
        return None
    task = current_task_or_none()
    around = generators.around()
    scope = _innermost(task, around)
    if scope is not None and not around and scope.is_plainly(alias, task):
        return scope
    context = None
    while scope is not None:
        if scope.alias == alias or scope.alias is None:
            mine = scope.is_mine(task, around)
            if not mine and context is None:
                context = getcurrent().gr_context
            shared = not mine and scope.context is context
            lost = scope.session is not None and scope.session.is_lost
            if lost or scope.is_over(around):
                if mine or shared or lost:
                    if scope is current_scope.get():  # for the tasks that are started from here
                        current_scope.set(scope.prev)
                elif outlived and (block := scope.block) is not None and block.is_transaction:
                    task = None  # it keeps the error, whose traceback keeps this
                    raise block.outlived_error()
            elif mine or not shared or scope.task is None or scope.task.done():
                # A scope that shares this Context but belongs to another running task is a
                # sibling's.
                if scope.session is None:
                    if detached:
                        return None
                elif mine or scope.block is not None or scope.is_for(task):
                    block = scope.block
                    if block is not None and scope.places and not scope.is_within(around):
                        if outlived and generators.is_left(scope):
                            task = None
                            raise block.left_error()
                        block.joined = True
                    return scope
        scope = scope.prev
    return None


def _is_outside() -> bool:
    """Whether the current task is certainly in no scope."""
    return current_scope.get() is None and not generators.places and not _tasks


def _blocks(alias: str | None) -> Iterator[Block]:
    """The blocks that the current task is in, of one alias or of all."""
    if _is_outside():
        return
    for name in connections.settings if alias is None else (alias,):
        scope = find_scope(name, outlived=False)
        if scope is not None and scope.block is not None:
            yield scope.block


def in_block() -> bool:
    """Whether the current task is in a transaction block of any alias that no thread is in."""
    return any(not block.of_thread for block in _blocks(None))


def of_thread(alias: str | None = None) -> bool:
    """Whether the current task belongs to synchronous code whose connection has something of its
    own, and is to use it there.

    Not while native blocks are open on it: a statement would wait for those, and keep the thread
    from others.
    """
    if not _of_threads or _is_outside():
        return False
    scope = _innermost(current_task_or_none(), generators.around())
    while scope is not None and not (scope.block is not None and scope.block.of_thread):
        scope = scope.prev
    if scope is None:  # whichever of them the task is in
        return False
    return any(block.of_thread and block.inner is None for block in _blocks(alias))


def block_of_coroutine(alias: str) -> Block | None:
    """The transaction block that the caller is in, on the thread of its loop."""
    if _get_running_loop() is None:
        return None
    scope = find_scope(alias, outlived=False)
    block = None if scope is None else scope.block
    return block if block is not None and block.session.on_this_loop else None


def refuse_beside_block(alias: str) -> None:
    """Raise when another thread uses a synchronous connection from inside a native block."""
    if current_scope.get() is not None:
        scope = find_scope(alias, outlived=False)
        if scope is not None and scope.block is not None and not scope.block.of_thread:
            raise TransactionManagementError(
                f"A synchronous connection of database {alias!r} was used in another thread "
                f"inside {scope.block}: it would not be part of the transaction. Use 'await "
                "asyncorm.native(function)(...)' instead of "
                "sync_to_async, or asyncorm.detached() to work outside the block."
                + see("native-code#what-it-is-not-for")
            )


def outer() -> Scope | None:
    """The scope that the current context is in."""
    return current_scope.get()


@contextmanager
def unscoped(scope: Scope | None = None) -> Iterator[None]:
    """Run what is inside in no scope, or in another one, and be in that of now again afterwards."""
    before = current_scope.get()
    current_scope.set(scope)
    try:
        yield
    finally:
        current_scope.set(before)


def keeps_connection() -> bool:
    """Whether the current task is inside `connection()`, of whichever alias."""
    around = generators.around()
    scope = _innermost(current_task_or_none(), around)
    while scope is not None:
        if scope.session is not None and scope.block is None and not scope.is_over(around):
            return True
        scope = scope.prev
    return False


def find_kept(runner: Runner) -> None:
    """Have the sessions of `connection()` told before `runner` awaits something.

    What it awaits may start child tasks, which do not inherit them.
    """
    task, around = current_task_or_none(), generators.around()
    scope = _innermost(task, around)
    while scope is not None:
        session = scope.session
        if session is None:
            return
        mine = scope.is_mine(task, around) or scope.is_for(task)
        if scope.block is None and mine and not scope.is_over(around):
            runner.resources[session.key] = session
        scope = scope.prev


bridge.before_await.append(find_kept)
