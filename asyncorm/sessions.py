"""Which server connection the code that runs now uses.

A `Session` is a Django wrapper with, while needed, a connection from the pool. An operation outside
a transaction has one of its own. Transaction blocks and `asyncorm.connection()` put theirs into a
chain of `Scope`s in a context variable, where the tasks started inside find it.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import types
import weakref
from asyncio import (
    AbstractEventLoop,
    CancelledError,
    Task,
    TimerHandle,
    _get_running_loop,
    current_task,
    get_running_loop,
    sleep,
)
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncContextDecorator,
    contextmanager,
    nullcontext,
)
from contextvars import Context, ContextVar, copy_context
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE
from time import monotonic
from types import FrameType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import anyio
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, InterfaceError, NotSupportedError, connections
from django.db.transaction import TransactionManagementError
from django.db.utils import load_backend
from django.utils.connection import ConnectionDoesNotExist
from greenlet import getcurrent
from psycopg import sql
from psycopg.pq import TransactionStatus

from . import _events, bridge, conf, generators, limits, pools
from .bridge import Runner
from .driver import CANCEL_TIMEOUT, NO_LOCK, Connection, LazyConnection, finish
from .generators import Place
from .multiplexing import Queue, calls_known, is_read, is_single, slow
from .tasks import represented

T = TypeVar("T")
logger = logging.getLogger("asyncorm")
_IDLE = TransactionStatus.IDLE
_MANY_CURSORS = 64  # of one operation, before those that are closed are forgotten


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
        _scope.set(self)
        if task is not None:
            _entered[task] = self

    def pop(self) -> None:
        """Leave the scope, in whichever task and order, and however often."""
        self.ended = True
        generators.leave(self)
        top = value = _scope.get()
        while (
            value is not None and value.ended and (value is self or value.context is self.context)
        ):
            value = value.prev
        if value is not top:
            _scope.set(value)
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
        work = let_go(self.session, _discard_all) if self.block is None else _roll_back(self.block)
        later(self.session, work)

    def dropped(self, place: Place) -> None:
        """Nobody can continue a generator that it was entered in (generators.Entry).

        The consumer is outside at once, and so is what it starts from now on.
        """
        self.left += (place,)
        top = value = _scope.get()
        task, context = current_task_or_none(), getcurrent().gr_context
        while (
            value is not None
            and value.is_over(())
            and (value.is_of(task) or value.context is context)
        ):
            value = value.prev
        if value is not top:
            _scope.set(value)


_scope: ContextVar[Scope | None] = ContextVar("asyncorm_scope", default=None)

# The innermost scope that each task has entered itself and not left. The context variable alone
# would lose it: tasks that share a Context set it in turns, and asgiref and Django's Signal copy
# the variables of a Context into another.
_entered: WeakKeyDictionary[Task[Any], Scope] = WeakKeyDictionary()


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
    mine = _scope.get()
    step: Callable[[Any], Any] = coro.send
    value: Any = None
    while True:
        outside = _scope.get()
        _scope.set(mine)
        try:
            future = step(value)
        except StopIteration as stop:
            return cast(T, stop.value)
        finally:
            mine = _scope.get()
            _scope.set(outside)
        try:
            value = yield future
            step = coro.send
        except BaseException as exc:
            value, step = exc, coro.throw


def _leave_to_parent() -> None:
    """A child process that was forked inside a scope is not in it."""
    _scope.set(None)
    _entered.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _innermost(task: Task[Any] | None, around: tuple[Place, ...] = ()) -> Scope | None:
    """The scope to begin with: the task's own, else that of its context; in a generator that others
    drive, that of the generator.
    """
    scope = _entered.get(task) if _entered and task is not None else None
    if scope is None:
        scope = _scope.get()
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
    if not _entered and _scope.get() is None and not generators.places:  # _is_outside()
        return None
    task = current_task_or_none()
    around = generators.around()
    scope = _innermost(task, around)
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
                    if scope is _scope.get():  # for the tasks that are started from here
                        _scope.set(scope.prev)
                elif outlived and (block := scope.block) is not None and block.is_transaction:
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
                            raise block.left_error()
                        block.joined = True
                    return scope
        scope = scope.prev
    return None


def _is_outside() -> bool:
    """Whether the current task is certainly in no scope."""
    return not _entered and _scope.get() is None and not generators.places


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
    if _is_outside():
        return False
    return any(block.of_thread and block.inner is None for block in _blocks(alias))


def outer() -> Scope | None:
    """The scope that the current context is in."""
    return _scope.get()


@contextmanager
def unscoped(scope: Scope | None = None) -> Iterator[None]:
    """Run what is inside in no scope, or in another one, and be in that of now again afterwards."""
    before = _scope.get()
    _scope.set(scope)
    try:
        yield
    finally:
        _scope.set(before)


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


class Block:
    """A transaction or a savepoint: a node in the tree of blocks of a session.

    A statement holds the block's lock while it runs, a nested block holds it for its life. The lock
    belongs to the block and not to a task: fixtures enter and leave in different tasks.

    Attributes:
        sids: the savepoints that a callback registered here depends on (`on_commit`).
        needs_rollback, rollback_exc: Django's flag, for this block alone.
        inherited: the flag as it was in the block outside.
        joined: it was entered in an asynchronous generator, and others than that have used it.
        cancelled: what aborted the transaction, or the savepoint, by cancelling a statement.
        of_test_case: it is the transaction that a test runs in (testcase.py).
        is_transaction: a transaction is open in it.
        of_thread: synchronous code in another thread, which waits, is in it (callers.py).
        inner: the nested block that holds the lock now.
        queue: statements of child tasks that wait for the lock.
        gathers: how many `batch()` have statements wait for the end of the loop's turn.
        atomic, characteristics: Django's object for the block, and what `asyncorm.atomic()` set for
            it (transactions.py).
    """

    of_test_case = False
    event: _events.Block | None = None  # for those who listen
    size = 1  # pipelines under way at once
    in_order = True
    keeps_state = True

    is_transaction = True
    of_thread = False

    @property
    def awaited(self) -> str:
        """What its statements wait for (multiplexing.Source)."""
        return f"for the block that began at {self.origin}"

    def __str__(self) -> str:
        return f"the transaction block that began at {self.origin}"

    @property
    def outermost(self) -> bool:
        """Whether the transaction begins and ends with it."""
        return self.parent is None or not self.parent.is_transaction

    def __init__(self, session: Session, parent: Block | None, origin: str) -> None:
        self.session = session
        self.parent = parent
        self.origin = origin
        scope = Scope(session.alias, session, self)
        self._scope: Callable[[], Scope | None] = lambda: scope
        self.lock = anyio.Semaphore(1, max_value=1, fast_acquire=True)
        self.sids: frozenset[Any] = frozenset()
        self.inherited: bool = parent is not None and parent.needs_rollback
        self.needs_rollback: bool = self.inherited
        self.rollback_exc: BaseException | None = parent.rollback_exc if parent else None
        self.joined = False
        self.cancelled: BaseException | None = None
        self.inner: Block | None = None
        self.atomic: Any = None
        self.characteristics: Any = None
        self.ended = False
        self.queue: Queue | None = None
        self.gathers = 0

    @property
    def scope(self) -> Scope | None:
        """What is in the contexts of its tasks, None if nobody is left who could leave it."""
        return self._scope()

    def enter(self) -> None:
        """Be the innermost block of the current context, which keeps it from now on."""
        scope = self.scope
        assert scope is not None
        scope.push()
        self._scope = weakref.ref(scope)

    def end(self) -> None:
        """Take no more statements but of who leaves it."""
        self.ended = True
        if self.event is not None:  # by force, if it is not told already
            self.event.end(rolled_back=True)
        if (scope := self.scope) is not None:
            scope.ended = True

    def queue_for(self, text: str) -> Queue | None:
        """Where a statement of a child task waits if the lock is taken, to go with others."""
        waits = self.gathers or (not self.lock.value and conf.get("MULTIPLEXING"))
        if waits and is_single(text):
            if self.queue is None:
                self.queue = Queue(self)
            return self.queue
        return None

    @property
    def pool(self) -> pools.Pool:
        """The pool of its connection (multiplexing.Source)."""
        return self.session.pool

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Keep the lock and the connection (multiplexing.Source)."""
        runner = bridge.current()
        assert runner is not None
        if self.ended:
            raise self.outlived_error()
        runner.lead = self.session
        _scope.set(self.scope)  # the pipeline's task belongs to the block
        with self.session:
            yield self.session.wrapper.connection

    def asked(self) -> AbstractContextManager[None]:
        """Everybody gets his turn (multiplexing.Source)."""
        return nullcontext()

    def dropped(self, exc: BaseException) -> None:
        """A statement of a cancelled task is under way: the transaction cannot go on."""
        self.needs_rollback = True
        self.rollback_exc = self.cancelled = exc

    def refusal(self) -> BaseException | None:
        """Since a statement before this one failed (multiplexing.Source)."""
        return self.broken_error() if self.needs_rollback else None

    def broken_error(self) -> TransactionManagementError:
        """For a statement after an error."""
        error = TransactionManagementError(
            "An error occurred in the current transaction. You can't execute queries until the "
            "end of the 'atomic' block."
        )
        error.__cause__ = self.rollback_exc
        return error

    def outlived_error(self) -> TransactionManagementError:
        """For a task that was started in the block and goes on after its end."""
        if self.parent is not None and self.parent.ended:
            return self.parent.outlived_error()
        return TransactionManagementError(
            f"A task that was started inside {self} still uses database {self.session.alias!r}, "
            "but that has ended. Await the task inside the block, or start it with "
            "asyncorm.detached()."
        )

    def left_error(self) -> TransactionManagementError:
        """For who has left the loop over the generator that holds the block, but not closed it."""
        return TransactionManagementError(
            f"{self} is held by an asynchronous generator that is suspended: the loop over it was "
            "left before its end. What is done here would be rolled back with it. Close the "
            "generator first: await generator.aclose(), or contextlib.aclosing()."
        )

    def acquire(self) -> None:
        """Take the lock, waiting in order of arrival.

        Raises:
            TransactionManagementError: the block has ended meanwhile, or nothing happened for
                LOCK_TIMEOUT seconds.
        """
        try:
            self.lock.acquire_nowait()
        except anyio.WouldBlock:
            runner = bridge.current()
            assert runner is not None
            if self.queue is not None:
                self.queue.seal()
            since = monotonic()
            bridge.wait_for(runner, self._acquire())
            _events.waited(self.session.alias, self.awaited, since)
        if self.ended:
            self.lock.release()
            raise self.outlived_error()

    def acquire_to_leave(self, runner: Runner, cancelled: BaseException | None) -> None:
        """Take the lock for the end of the block, as `acquire()`.

        If the task is cancelled, before or while it waits for statements of the block's other
        tasks, those are cancelled too, and the block is rolled back.
        """
        if cancelled is not None and not self.lock.value:
            if not bridge.wait_for(runner, self._take_over(cancelled)):
                raise cancelled
            return
        try:
            self.acquire()
        except CancelledError as exc:
            if not bridge.wait_for(runner, self._take_over(exc)):
                raise
            runner.cancelled = exc

    async def _take_over(self, exc: BaseException) -> bool:
        block: Block | None = self
        while block is not None:  # its tasks begin nothing more
            block.needs_rollback = True
            block.rollback_exc = block.cancelled = exc
            block = block.inner
        conn = self.session.wrapper.connection
        turn = self.lock.acquire() if conn is None else conn.stop_others(self.lock.acquire)
        task = get_running_loop().create_task(turn, context=Context())
        return await finish(task, CANCEL_TIMEOUT) and task.exception() is None

    def force_end(self) -> None:
        """Have it end, with the blocks of other tasks in it: the connection is closed."""
        self.session.terminate()
        block: Block | None = self
        while block is not None:
            block.end()
            inner, block.inner = block.inner, None
            if inner is not None:
                block.lock.release()
            block = inner

    async def _acquire(self) -> None:
        timeout = conf.get("LOCK_TIMEOUT")
        loop = get_running_loop()
        session = self.session
        began = monotonic()
        handle: TimerHandle
        with anyio.CancelScope() as scope:

            def look() -> None:
                nonlocal handle
                quiet = monotonic() - max(session.active, began)
                if quiet >= timeout and not session.waits_for_server:
                    scope.cancel()
                else:
                    handle = loop.call_later(max(timeout - quiet, 0.01), look)

            handle = loop.call_later(timeout, look)
            try:
                await self.lock.acquire()
                return
            finally:
                handle.cancel()
        holder = f"the block that began at {self.inner.origin}" if self.inner else "another task"
        raise TransactionManagementError(
            f"Waited {timeout:g} s for the transaction block that began at {self.origin}: "
            f"{holder} holds it and does nothing. Probably that "
            "block waits for this task, which waits for the block. ASYNCORM['LOCK_TIMEOUT'] sets "
            "the time."
        )


class PlainBlock(Block):
    """A block that is not native code's: its rollback flag is the wrapper's own."""

    def __init__(self, session: Session, parent: Block | None, origin: str) -> None:
        flags = session.wrapper.__dict__
        before = flags.get("_plain_needs_rollback")
        super().__init__(session, parent, origin)
        flags["_plain_needs_rollback"] = before

    @property
    def needs_rollback(self) -> bool:
        return bool(self.session.wrapper.__dict__.get("_plain_needs_rollback"))

    @needs_rollback.setter
    def needs_rollback(self, value: bool) -> None:
        if not self.session.over:
            self.session.wrapper.__dict__["_plain_needs_rollback"] = value

    @property
    def of_thread(self) -> bool:  # type: ignore[override]
        """Whether synchronous code in another thread, which waits, is in it."""
        return self.session.synchronous


class Loan(PlainBlock):
    """A connection that synchronous code needs again as it is, lent to what it awaits meanwhile.

    The tasks of what is awaited take turns on it as in a transaction block.
    """

    def __init__(self, session: Session, origin: str) -> None:
        super().__init__(session, None, origin)
        wrapper = session.wrapper
        self.is_transaction = wrapper.in_atomic_block or (
            wrapper.connection is not None and not wrapper.autocommit
        )
        self.sids = frozenset(wrapper.savepoint_ids)

    def enter(self) -> None:
        """Be the innermost block of the current context. Somebody waits, and will leave it."""
        scope = self.scope
        assert scope is not None
        scope.push()

    def __str__(self) -> str:
        return (
            f"synchronous code at {self.origin} that keeps its connection while it waits for a "
            "coroutine"
        )

    def take_back(self, failure: BaseException | None) -> None:
        """What was awaited has ended; statements that it left running are waited for."""
        runner = bridge.current()
        assert runner is not None
        try:
            cancelled = failure if isinstance(failure, CancelledError) else None
            self.acquire_to_leave(runner, cancelled)
        except BaseException:
            self.force_end()
            raise
        finally:
            self.ended = True
            if (scope := self.scope) is not None:
                scope.pop()
            self.session.root = None
        self.lock.release()


UNKNOWN: Any = object()


class _PoolSource:
    """The source of connections for statements outside transactions (multiplexing.Source)."""

    awaited = "for a connection"

    in_order = False

    def __init__(self, source: limits.Source, pool: pools.Pool) -> None:
        self.source = source
        self.pool = pool

    @property
    def keeps_state(self) -> bool:
        return self.source.keeps_state

    @property
    def size(self) -> int:
        return self.source.size

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        runner = bridge.current()
        assert runner is not None
        session = Session(self.pool.alias, self.pool, self.source)
        session.pipelining = True
        runner.resources[self.pool.alias] = session
        session.wrapper.ensure_connection()
        with session:
            yield session.wrapper.connection

    def asked(self) -> AbstractContextManager[Any]:
        return self.source.asked()

    def dropped(self, exc: BaseException) -> None:
        """It is of no concern to others."""

    def refusal(self) -> None:
        return None


def _queue(source: limits.Source, pool: pools.Pool) -> Queue:
    if source.queue is None:
        source.queue = Queue(_PoolSource(source, pool))
    return cast(Queue, source.queue)


def _travels(source: limits.Source, text: str) -> bool:
    """Whether a statement may go with those of other operations, outside a block."""
    alone = not is_single(text) if source.gathers else not is_read(text) or text in slow
    return not alone and calls_known(text)


def _is_crowded(source: limits.Source) -> bool:
    """Whether single statements are to travel with others' there now."""
    return source.gathers or (
        bool(conf.get("MULTIPLEXING")) and not source.has_free and not conf.get("RESET_ALWAYS")
    )


def crowded(alias: str) -> pools.Pool | None:
    """The pool, if a statement of the current task would find all connections in use and the task
    has none; else None.

    Raises:
        TransactionManagementError: the task has outlived its block.
    """
    pool = pools.find(alias)
    if pool is None or pool.connections is None:
        return None
    if not _is_crowded(limits.source(pool)):
        return None
    if pool.outdated or alias in test_sessions or find_scope(alias) is not None:
        return None
    return pool


def queue_without_session(pool: pools.Pool, text: str) -> Queue | None:
    """Where a statement of a task waits that found the pool crowded; None if it needs a session."""
    source = limits.source(pool)
    return _queue(source, pool) if _travels(source, text) else None


class Session:
    """A Django wrapper for native code and, from its first statement on, a connection.

    It is also the lock that psycopg takes around each statement (`with connection.lock`).

    Attributes:
        alias, pool, wrapper: what they say.
        source: where connections come from: the pool, or a limit on it.
        pipelining: it is for statements of several operations, sent together.
        root: the outermost transaction block that is open, if any.
        keeper, origin: the task that pinned the session (not kept alive), and where.
        left: the stream or `connection()` that pinned it was dropped.
        pinned: kept by `asyncorm.connection()` or by a stream, whatever operations come and go.
        own: Django's own wrapper of the task that uses the session, None if there is none.
        cursors: server-side cursors of the session; open ones keep the connection.
        opened: other cursors; open ones keep the connection while the operation awaits something.
        holder: the greenlet whose statement runs.
        acting: the block that `holder` enters or leaves.
        active: when the last statement began or ended (time.monotonic()).
        fate: what the open transaction settles by, if it does (fate.py).
    """

    fate: Any = None
    pipelining = False
    settling = False
    left = False

    synchronous = False  # on a synchronous wrapper, shared with threads (callers.py)
    over = False  # the test case that it belonged to has ended (testcase.py)

    def __init__(self, alias: str, pool: pools.Pool, source: limits.Source) -> None:
        self.alias = alias
        self.pool = pool
        self.source = source
        self.wrapper: Any = pool.take_wrapper()
        self.wrapper.session = self
        self.root: Block | None = None
        self.pinned = False
        self.keeper: weakref.ref[Task[Any]] | None = None
        self.places: tuple[Place, ...] = ()
        self.origin = ""
        self.cursors: WeakSet[Any] | None = None
        self.opened: list[weakref.ref[Any]] = []
        self.own: Any = UNKNOWN
        self.holder: Any = None
        self.acting: Block | None = None
        self.active = 0.0
        self.taken: Connection | None = None  # checked out, and not yet the wrapper's
        self._depth = 0
        self._held: Block | None = None

    @property
    def on_this_loop(self) -> bool:
        """Whether its connection is one of the running loop."""
        return self.pool.loop is get_running_loop()

    @property
    def loop(self) -> AbstractEventLoop:
        """The loop that its connection belongs to."""
        return self.pool.loop

    @property
    def is_lost(self) -> bool:
        """Whether its loop, and its connection with it, is closed."""
        return self.pool.loop.is_closed()

    @property
    def task(self) -> Task[Any] | None:
        """The task that keeps the connection beyond an operation, if any."""
        if self.root is not None:
            return None if (scope := self.root.scope) is None else scope.task
        return None if self.keeper is None else self.keeper()

    @property
    def closing(self) -> bool:
        """Whether what keeps the connection was left, and gives it back in a moment."""
        root = self.root
        return self.left or (
            root is not None and ((scope := root.scope) is None or scope.left != ())
        )

    def dropped(self, place: Place) -> None:
        """Nobody can continue the stream or `connection()` any more (generators.Entry)."""
        self.left = True

    def __str__(self) -> str:
        if self.root is not None:
            return str(self.root)
        if self.pinned:
            return f"a stream or connection() that began at {self.origin}"
        return "an operation"

    # The connection

    def attach(self) -> Connection:
        """Check a connection out of the pool; DatabaseWrapper.connect() calls this."""
        self._entitled(getcurrent())
        if not self.pool.current:  # settings changed in the middle of the operation
            self.pool = _pool(self.alias, type(self.wrapper))
            self.source = limits.source(self.pool)
        self.drop_taken()
        # No call between its leaving the pool and its being noted: an error would lose it.
        self.taken = conn = None if self.source.gathers else self.source.take()
        if conn is None:
            self.taken = conn = self._lazy() or self._checkout()
        conn.lock = self
        if _events.checkouts and not conn.unsettled:
            _events.checked_out(self.alias, conn, self)
        return conn

    @property
    def _shares(self) -> bool:
        """Whether single statements of the operation are to travel with others'."""
        if self.kept or self.pipelining or self.settling or self.acting is not None:
            return False
        return _is_crowded(self.source)

    def _lazy(self) -> LazyConnection | None:
        """What serves an operation of single statements while every connection is in use."""
        return self.pool.take_lazy() if self._shares else None

    def shared(self, text: str) -> Queue | None:
        """Where a statement waits for others' connection.

        None: the operation has a connection, or gets one.
        """
        if (
            self.wrapper.connection is not None
            or not self._shares
            or not self.pool.current
            or self.pool.start is None
            or not _travels(self.source, text)
        ):
            return None
        self._entitled(getcurrent())
        return _queue(self.source, self.pool)

    def _checkout(self) -> Connection:
        if self.source.gathers and (conn := self.source.take()) is not None:
            return conn
        if not self.pipelining and (queue := self.source.queue) is not None:
            queue.seal()
            if queue.starting and (runner := bridge.current()) is not None:
                bridge.wait_for(runner, sleep(0))  # they came first
        since = monotonic()
        conn = self.source.get(self.wrapper)
        if not self.pipelining:  # or the statements' own tasks have waited, and say so
            _events.waited(self.alias, "for a connection", since)
        return conn

    def queue_for(self, text: str) -> Queue | None:
        """Where a statement waits that needs no connection of its own; None if it runs now."""
        if self.root is not None:
            block = self.innermost()
            if block is None or self.holder is getcurrent():
                return None
            queue = block.queue_for(text)
            if queue is None and self.fate is not None and self.fate.wants(text):
                return self.fate  # type: ignore[no-any-return]
            return queue
        conn = self.wrapper.connection if self.wrapper is not None else None
        if conn is None or not conn.unsettled:
            return None
        if not _travels(self.source, text):
            return None
        self._entitled(getcurrent())
        return _queue(self.source, self.pool)

    def settle(self) -> Connection:
        """In place of a lazy connection, one of the operation's own."""
        lazy = self.wrapper.connection
        self.wrapper.connection = None
        self.settling = True
        try:
            self.wrapper.ensure_connection()
        except BaseException:
            self.wrapper.connection = lazy
            raise
        finally:
            self.settling = False
        return cast(Connection, self.wrapper.connection)

    def detach(self) -> None:
        """Give the connection back."""
        conn = self.wrapper.connection
        if conn is not None:
            self.put(conn)  # if that fails, the end of the operation tries again
            if self.taken is conn:
                self.taken = None
            self.wrapper.connection = None
        self.drop_taken()

    def give_up_lost(self) -> bool:
        """Give back a connection that was lost with a statement outside transactions, to have
        another; False if somebody would miss what it had."""
        conn = self.wrapper.connection
        if self.kept:
            return False
        if conn is not None and not conn.unsettled:
            if not conn.closed or self._has_state(conn):
                return False
            self.detach()
        return True

    def drop_taken(self) -> None:
        """Close and give back a connection that was checked out in vain."""
        conn = self.taken
        if conn is not None:
            conn.terminate()
            self.put(conn)
            self.taken = None

    def put(self, conn: Connection) -> None:
        """Return `conn` to the pool in the state it came in, or closed."""
        conn.lock = NO_LOCK
        conn._pool = None
        if conn.unsettled:
            return
        if not conn._autocommit:
            if conn.pgconn.transaction_status != _IDLE:
                # Somebody turned autocommit off and left: what was not committed is rolled back.
                conn.terminate()
            conn._autocommit = True
        if _events.checkouts:
            _events.checked_in(conn)
        self.source.checkin(conn)

    def terminate(self) -> None:
        """Close the connection at once, whatever runs on it; the pool replaces it."""
        if self.wrapper is not None and self.wrapper.connection is not None:
            self.wrapper.connection.terminate()

    async def interrupt(self) -> None:
        """Cancel what runs on the connection; close it if it stays in doubt."""
        if self.wrapper.connection is not None:
            await self.wrapper.connection.interrupt()

    @property
    def waits_for_server(self) -> bool:
        """Whether a statement is on its way."""
        conn = self.wrapper.connection if self.wrapper is not None else None
        return conn is not None and conn.waiting

    @property
    def aborted(self) -> bool:
        """Whether the server refuses all but a rollback."""
        conn = self.wrapper.connection if self.wrapper is not None else None
        return conn is not None and conn.pgconn.transaction_status == TransactionStatus.INERROR

    @property
    def exclusive(self) -> bool:
        """Whether no other task's statements run on its connection."""
        return self.root is None and not self.pipelining

    @property
    def kept(self) -> bool:
        """Whether something other than an operation keeps the connection."""
        return self.root is not None or self.pinned or self.streaming

    @property
    def busy(self) -> bool:
        """Whether a statement of the current task would have to wait for another task's."""
        block = self.innermost()
        return block is not None and self.holder is not getcurrent() and not block.lock.value

    def transaction_ended(self) -> None:
        """Its server-side cursors are gone, and do not keep the connection."""
        for cursor in self.cursors or ():
            cursor.transaction_ended()

    @property
    def streaming(self) -> bool:
        """Whether a server-side cursor is open."""
        return self.cursors is not None and any(not cursor.closed for cursor in self.cursors)

    def suspend(self) -> Callable[[BaseException | None], None] | None:
        """The operation awaits something else (bridge.Resource): hold nothing meanwhile.

        Except what it has left in the server session, or an open cursor: then the connection stays,
        and what is awaited has it, as it would have a synchronous operation's.
        """
        conn = self.wrapper.connection
        if conn is None or self.holder is not None or self.root is not None:
            return None
        if not self._has_state(conn):
            if not self.kept:
                self.detach()
            return None
        self.root = loan = Loan(self, caller())
        loan.enter()
        return loan.take_back

    def _has_state(self, conn: Connection) -> bool:
        """Whether the operation's next statement may need this very connection."""
        if not conn._autocommit:
            return True
        if self.source.keeps_state:
            return False
        return conn.touched or any(
            (cursor := ref()) is not None and not cursor.closed for ref in self.opened
        )

    def note(self, cursor: Any) -> None:
        """Remember a cursor that is being opened."""
        if len(self.opened) >= _MANY_CURSORS:
            self.opened = [
                ref for ref in self.opened if (other := ref()) is not None and not other.closed
            ]
        self.opened.append(weakref.ref(cursor))

    def release(self) -> None:
        """The operation has ended (bridge.Resource)."""
        if not self.kept:
            self.close()

    def close(self) -> None:
        """Give back the connection and the wrapper."""
        wrapper = self.wrapper
        if wrapper is None:
            return
        self.detach()
        self.wrapper = None
        wrapper.session = None
        wrapper.forget()
        if not self.pool.outdated and self.holder is None:  # or a statement is still to fail
            self.pool.give_wrapper(wrapper)

    def serves(self, runner: Runner | None) -> bool:
        """Whether `runner` uses the session, rather than a finaliser that happens to run in it."""
        if runner is None:
            return False
        held = runner.resources
        if runner.lead is self or held.get(self.alias) is self or self.key in held:
            return True
        try:
            return self.innermost() is not None
        except TransactionManagementError:  # it outlived the block
            return False

    @property
    def key(self) -> str:
        return f"{self.alias} {id(self)}"

    def hook(self, callback: Callable[[], Any]) -> Callable[[], Any]:
        """What to keep for an on_commit() callback, which Django calls."""
        return callback

    def abandon(self, name: str) -> None:
        """A server-side cursor was dropped outside native code: close it later."""
        if self.root is None:
            later(self, self._abandoned(name))

    async def _abandoned(self, name: str) -> None:
        def close() -> None:
            conn = self.wrapper.connection if self.wrapper is not None else None
            if conn is not None and self.root is None and not conn.closed:
                with conn.cursor() as cursor:
                    cursor.execute(sql.SQL("CLOSE {}").format(sql.Identifier(name)))

        try:
            await run_in(self, close)
        except Exception:
            self.terminate()
        self.release()

    def __del__(self) -> None:
        # Nobody left the block or the stream that kept it: the connection is in doubt.
        wrapper = getattr(self, "wrapper", None)
        if wrapper is not None and wrapper.connection is not None:
            conn, wrapper.connection = wrapper.connection, None
            conn.lock = NO_LOCK
            conn._pool = None
            if not conn.unsettled and not self.pool.loop.is_closed():
                self.pool.loop.call_soon_threadsafe(self._drop, self.source, conn)

    @staticmethod
    def _drop(source: limits.Source, conn: Connection) -> None:
        conn.terminate()
        source.checkin(conn)

    # The lock

    def innermost(self) -> Block | None:
        """The innermost block of the current task on this session."""
        if self.root is None:
            return None
        if self.acting is not None and self.holder is getcurrent():
            return self.acting
        scope = find_scope(self.alias)
        if scope is not None and scope.session is self:
            return scope.block
        return None

    def _entitled(self, runner: Any) -> Block | None:
        """The block whose lock a statement takes; an error if the session is not `runner`'s."""
        if type(runner) is not Runner:
            raise InterfaceError("A native connection was used outside native code.")
        if self.root is None:
            if runner.resources.get(self.alias) is self or runner.lead is self:
                return None
            if self.pinned or self.streaming:
                # A cursor goes on in another operation than it began in; look again when that one
                # ends.
                runner.resources[self.key] = self
                return None
        elif runner.lead is self:
            return self.innermost() or self.root
        elif (block := self.innermost()) is not None:
            return block
        raise InterfaceError(
            f"A connection or cursor of database {self.alias!r} was used outside the operation "
            "or transaction block that it belongs to."
        )

    def __enter__(self) -> None:
        runner = getcurrent()
        if self.holder is runner:
            self._depth += 1
            return
        block = self._entitled(runner)
        if block is not None:
            block.acquire()
            if block.needs_rollback:  # since Django looked, a statement before this one failed
                block.lock.release()
                raise block.broken_error()
        elif self.holder is not None:
            raise InterfaceError(
                f"Two tasks used one connection of database {self.alias!r} at the same time."
            )
        self._held = block
        self.holder = runner
        self._depth = 1
        self.active = monotonic()

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            if self._held is not None and isinstance(exc[1], CancelledError) and self.aborted:
                # For the block's other tasks, and for its end if the cancellation is caught inside.
                self._held.needs_rollback = True
                self._held.rollback_exc = self._held.cancelled = exc[1]
            self.active = monotonic()
            self.holder = None
            if self._held is not None:
                held, self._held = self._held, None
                held.lock.release()

    @contextmanager
    def acting_for(self, runner: Runner, block: Block) -> Iterator[None]:
        """Statements inside enter or leave `block`; the caller holds the lock for that."""
        self.holder, self.acting, self._depth = runner, block, 1
        try:
            yield
        finally:
            self.holder, self.acting, self._depth = None, None, 0
            self.active = monotonic()


# Aliases


@functools.cache
def _native_class(engine: str) -> type | None:
    return getattr(load_backend(engine).DatabaseWrapper, "native_class", None)


def native_class(alias: str) -> type | None:
    """The wrapper class that native code uses for `alias`; None when its ENGINE is not ours."""
    settings_dict = connections.settings.get(alias)
    return None if settings_dict is None else _native_class(settings_dict["ENGINE"])


def refuse_foreign(alias: str) -> NotSupportedError:
    """For native code that uses an alias of another engine."""
    if alias not in connections.settings:
        raise ConnectionDoesNotExist(f"The connection '{alias}' doesn't exist.")
    engine = connections.settings[alias]["ENGINE"]
    return NotSupportedError(
        f"Database {alias!r} has ENGINE {engine!r}, which cannot run natively. Use ENGINE "
        "'asyncorm.backends.postgresql' for a PostgreSQL "
        "database; for others use Django's own a* methods or sync_to_async."
    )


def _pool(alias: str, cls: Any) -> pools.Pool:
    pool = pools.find(alias)
    if pool is None or pool.outdated:
        if pool is not None:
            pools.discard_pools(alias)
        settings_dict = connections.settings[alias]
        if not settings_dict["AUTOCOMMIT"]:
            raise ImproperlyConfigured(
                f"DATABASES[{alias!r}]['AUTOCOMMIT'] is False, which native code does not "
                "support: use asyncorm.atomic()."
            )
        pool = pools.Pool(alias, settings_dict, lambda: cls(settings_dict, alias))
        pools.add(pool)
    return pool


# Execute wrappers of native code in every task: what tells those who listen (cursor_events.py).
everywhere: list[Any] = []


# Sessions on synchronous connections (callers.py), whose execute wrappers those are put among.
sharing: set[Any] = set()

# Sessions of test cases, by alias (testcase.py): native code in a test's transaction uses them.
test_sessions: dict[str, Any] = {}


def session_for(alias: str, runner: Runner) -> Session | None:
    """The session that `runner` uses for `alias`; None when the ENGINE is not ours."""
    lead = runner.lead
    if lead is not None and lead.alias == alias:
        return cast(Session, lead)
    if (scope := find_scope(alias)) is not None:
        assert scope.session is not None
        if not scope.session.on_this_loop:
            raise TransactionManagementError(
                f"Database {alias!r} was used on another event loop inside the transaction block "
                f"that began at {scope.block and scope.block.origin}: it would not be part of the "
                "transaction. Await the coroutine on the block's own loop, or use "
                "asyncorm.detached() to work outside the block."
            )
        if scope.session.over and scope.block is not None:
            raise scope.block.outlived_error()
        return scope.session
    session: Session | None
    if test_sessions and (session := test_sessions.get(alias)) is not None:
        return cast(Session, session)
    session = runner.resources.get(alias)
    if session is None or session.wrapper is None:
        cls = native_class(alias)
        if cls is None:
            return None
        pool = _pool(alias, cls)
        session = runner.resources[alias] = Session(alias, pool, limits.source(pool))
    return cast(Session, session)


async def warm(alias: str) -> None:
    """Have a connection open, if none is yet."""
    pool = pools.find(alias)
    if pool is None or not pool.is_open:
        await bridge.run(lambda: require(alias).wrapper.ensure_connection())


def require(alias: str | None) -> Session:
    """`session_for()` the running operation.

    Raises:
        django.db.NotSupportedError: the alias has another engine.
    """
    runner = bridge.current()
    assert runner is not None
    session = session_for(alias or DEFAULT_DB_ALIAS, runner)
    if session is None:
        raise refuse_foreign(alias or DEFAULT_DB_ALIAS)
    return session


def refuses_synchronous_code(alias: str) -> bool:
    """Whether a coroutine calls, on the loop's thread, what uses a database of ours."""
    return (
        _get_running_loop() is not None
        and not bridge.in_native_code()
        and not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE")
        and native_class(alias) is not None
    )


def block_of_coroutine(alias: str) -> Block | None:
    """The transaction block that the caller is in, on the thread of its loop."""
    if _get_running_loop() is None:
        return None
    scope = find_scope(alias, outlived=False)
    block = None if scope is None else scope.block
    return block if block is not None and block.session.on_this_loop else None


def refuse_beside_block(alias: str) -> None:
    """Raise when another thread uses a synchronous connection from inside a native block."""
    if _scope.get() is not None:
        scope = find_scope(alias, outlived=False)
        if scope is not None and scope.block is not None and not scope.block.of_thread:
            raise TransactionManagementError(
                f"A synchronous connection of database {alias!r} was used in another thread "
                f"inside {scope.block}: it would not be part of the transaction. Use 'await "
                "asyncorm.native(function)(...)' instead of "
                "sync_to_async, or asyncorm.detached() to work outside the block."
            )


_OWN = (
    "asyncorm.", "django.db.", "django.dispatch", "django.utils.asyncio", "asgiref.", "psycopg.",
    "contextlib", "asyncio.", "greenlet",
)  # fmt: skip


def caller() -> str:
    """File and line of the nearest frame that is not ours nor Django's, for messages."""
    frame: FrameType | None = sys._getframe(1)
    runner: Any = getcurrent()
    while frame is None or (name := frame.f_globals.get("__name__", "")).startswith(_OWN):
        if frame is None:
            # Native code was called by the greenlet around it, which waits: whatever awaits it.
            if (runner := runner.parent) is None or (frame := runner.gr_frame) is None:
                return "an unknown place"
        elif name == "asyncio.events":  # what runs the loop is of no interest
            return "an unknown place"
        else:
            frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# Holding a connection


async def run_in(session: Session, func: Callable[..., T], /, *args: Any) -> T:
    """Run `func` natively on `session`, before any session of the context."""

    def lead() -> T:
        runner = bridge.current()
        assert runner is not None
        runner.lead = session
        return func(*args)

    return await bridge.run(lead)


async def hold(using: str | None) -> tuple[Session, bool]:
    """A session that outlives operations, and whether it is new or that of what is around."""

    origin = caller()

    def find() -> tuple[Session, bool]:
        session = require(using)
        new = not (session.root is not None or session.pinned)
        if new:
            session.pinned = True
            task = current_task_or_none()
            session.keeper, session.origin = None if task is None else weakref.ref(task), origin
            generators.enter(session)
        return session, new

    return await bridge.run(find)


class _Connection(AsyncContextDecorator):
    """What `connection()` returns: a context manager and a decorator of coroutine functions."""

    def __init__(self, using: str | None) -> None:
        self.using = using
        self._scope: Scope | None = None

    def _recreate_cm(self) -> _Connection:  # for each call of a decorated function
        return _Connection(self.using)

    async def __aenter__(self) -> None:
        session, new = await hold(self.using)
        if not new:
            return
        try:
            if session.wrapper.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
                await run_in(session, _refuse_pooler, session)
        except BaseException:
            await let_go(session)
            raise
        self._scope = Scope(session.alias, session)
        self._scope.push()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        assert scope.session is not None
        scope.pop()
        if can_wait(exc):
            await let_go(scope.session, _discard_all)
        else:
            later(scope.session, let_go(scope.session, _discard_all))


def connection(using: str | None = None) -> AbstractAsyncContextManager[None]:
    """Keep one connection for this task: for session state, temporary tables, advisory locks.

    The task's operations outside transactions, and the transactions that it begins, run on one
    server session until the end, when the session is reset (PostgreSQL's DISCARD ALL). Child tasks
    do not inherit it. Inside `atomic()` or another `connection()` it changes nothing, since the
    task has one connection there.

    Args:
        using: a database alias; the default one by default.

    Raises:
        django.db.NotSupportedError: the alias has another engine, or is behind a pooler that keeps
            no server session (DISABLE_SERVER_SIDE_CURSORS is set).
    """
    return _Connection(using)


def can_wait(exc: BaseException | None) -> bool:
    """Whether who leaves a context manager because of `exc` can await something.

    Not in a coroutine that is closed, as that of a task that is destroyed: what it awaits would
    not come back. An asynchronous generator that is closed can.
    """
    if not isinstance(exc, GeneratorExit):
        return True
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_flags & (CO_COROUTINE | CO_ASYNC_GENERATOR):
        outside = frame.f_back
        if frame.f_globals.get("__name__") != "contextlib":
            if frame.f_code.co_flags & CO_COROUTINE:
                return False
            if outside is None or outside.f_globals.get("__name__") != "contextlib":
                return True
        frame = outside
    return True


def later(session: Session, work: Coroutine[Any, Any, Any]) -> None:
    """Have `work` done in a task of the session's loop: nobody can wait for it here."""
    loop = session.loop

    def start() -> None:
        task = loop.create_task(work, context=Context())
        _detached.add(task)
        task.add_done_callback(_detached.discard)

    try:
        loop.call_soon_threadsafe(start)
    except RuntimeError:  # it is closed, and the connection with it
        work.close()


def _refuse_pooler(session: Session) -> None:
    """Raise when something between us and the server answers in its place, as PgBouncer does."""
    wrapper = session.wrapper
    wrapper.ensure_connection()
    with wrapper.wrap_database_errors, wrapper.connection.cursor() as cursor:
        pid = cursor.execute("SELECT pg_backend_pid()").fetchone()[0]
    if pid != wrapper.connection.pgconn.backend_pid:
        raise NotSupportedError(
            f"asyncorm.connection() cannot keep a server session of database {session.alias!r}: "
            "there is a pooler before the server, and by DISABLE_SERVER_SIDE_CURSORS it pools "
            "transactions. Use asyncorm.atomic() with SET LOCAL and pg_advisory_xact_lock(), or "
            "an alias that connects to the server itself."
        )


def _discard_all(session: Session) -> None:
    conn = session.wrapper.connection
    if conn is not None and conn.pooled is not None and not conn.closed:
        with conn.cursor() as cursor:
            cursor.execute("DISCARD ALL")
        for stream in session.cursors or ():
            stream._closed = True  # on the server it is
        conn.lock = NO_LOCK
        conn.pooled.renew()
        session.wrapper.connection = conn.pooled.twin


async def clean_up(func: Callable[[], Any], session: Session | None = None) -> None:
    """Run `func` natively, to close or to reset something, on `session` if there is one.

    If the task is cancelled or the generator is closed, it has CANCEL_TIMEOUT seconds for that, and
    an error says nothing new.
    """
    ending = isinstance(sys.exc_info()[1], CancelledError | GeneratorExit)

    def clean() -> None:
        runner = bridge.current()
        assert runner is not None
        if ending:
            runner.cleaning_until = monotonic() + CANCEL_TIMEOUT
        try:
            func()
        except Exception:
            if not ending:
                raise

    await (bridge.run(clean) if session is None else run_in(session, clean))


async def let_go(session: Session, clean: Callable[[Session], None] | None = None) -> None:
    """End what `hold()` began: clean the session and give its connection back, or close it."""

    def end() -> None:
        runner = bridge.current()
        assert runner is not None
        conn = session.wrapper.connection
        try:
            with bridge.shield(runner):
                if clean is not None:
                    clean(session)
        except BaseException:
            if conn is not None:
                conn.terminate()
            raise
        finally:
            session.pinned, session.keeper = False, None
            generators.leave(session)
            if session.streaming and conn is not None:
                conn.terminate()
            session.cursors = None
            runner.lead = None
            session.release()

    await clean_up(end, session)


class _Detached(AsyncContextDecorator):
    """What `detached()` returns: a context manager and a decorator of coroutine functions."""

    def __init__(self) -> None:
        self._scope: Scope | None = None

    def _recreate_cm(self) -> _Detached:
        return _Detached()

    async def __aenter__(self) -> None:
        self._scope = Scope(None, None)
        self._scope.push()

    async def __aexit__(self, *exc: object) -> None:
        if self._scope is not None:
            self._scope.pop()


def detached() -> AbstractAsyncContextManager[None]:
    """Work outside any transaction block or kept connection, on purpose.

    What runs inside, child tasks included, checks out connections of its own and commits on its
    own.
    """
    return _Detached()


def detached_task(coro: Coroutine[Any, Any, T]) -> Task[T]:
    """Start `coro` as a task outside any transaction block or kept connection, on purpose.

    It may outlive the block that it was started in; nothing of it is rolled back with the block.
    """
    context = copy_context()
    context.run(_scope.set, None)
    task = get_running_loop().create_task(coro, context=context)
    _detached.add(task)  # the loop itself keeps only a weak reference
    task.add_done_callback(_detached.discard)
    return task


_detached: set[Task[Any]] = set()
