"""Blocks: the tree of transactions and savepoints of a session, and whose turn it is in each."""

from __future__ import annotations

import weakref
from asyncio import CancelledError, Event, TimerHandle, get_running_loop, timeout
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import Context
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
from django.db.transaction import TransactionManagementError

from .. import _events, bridge, conf, pools
from .._wire.cancelling import CANCEL_TIMEOUT, finish
from .._wire.texts import is_single
from ..bridge import Runner
from ..driver import Connection
from ..multiplexing import Queue
from ..pages import see
from .scopes import Scope, current_scope, of_threads

if TYPE_CHECKING:
    from .session import Session


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
        batching: how many `batch()` have statements wait for the end of the loop's turn.
        atomic, characteristics: Django's object for the block, and what `asyncorm.atomic()` set for
            it (_transactions/).
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
        self.batching = 0
        self._over: Event | None = None

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
        self.queue = None  # which has the block
        if self.event is not None:  # by force, if it is not told already
            self.event.end(rolled_back=True)
        if (scope := self.scope) is not None:
            scope.ended = True

    async def until_over(self) -> None:
        """Wait until it is rolled back: who could leave it was dropped. Not for ever: that may wait
        for who waits here."""
        if self._over is None:
            self._over = Event()
        with suppress(TimeoutError):
            async with timeout(conf.get("LOCK_TIMEOUT")):
                await self._over.wait()

    def is_over(self) -> None:
        """The session is free of it."""
        if self._over is not None:
            self._over.set()

    def queue_for(self, text: str) -> Queue | None:
        """Where a statement of a child task waits if the lock is taken, to go with others."""
        waits = self.batching or (not self.lock.value and conf.get("MULTIPLEXING"))
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
        runner = bridge.running()
        if self.ended:
            raise self.outlived_error()
        runner.session_override = self.session
        current_scope.set(self.scope)  # the pipeline's task belongs to the block
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
            "end of the 'atomic' block." + see("transactions#tasks-inside-a-block")
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
            "asyncorm.detached()." + see("transactions#tasks-inside-a-block")
        )

    def left_error(self) -> TransactionManagementError:
        """For who has left the loop over the generator that holds the block, but not closed it."""
        return TransactionManagementError(
            f"{self} is held by an asynchronous generator that is suspended: the loop over it was "
            "left before its end. What is done here would be rolled back with it. Close the "
            "generator first: await generator.aclose(), or contextlib.aclosing()."
            + see("transactions#in-asynchronous-generators")
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
            runner = bridge.running()
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
        taken = False

        async def take() -> None:
            nonlocal taken
            await self.lock.acquire()
            taken = True

        conn = self.session.wrapper.connection
        turn = take() if conn is None else conn.stop_others(take)
        task = get_running_loop().create_task(turn, context=Context())
        if await finish(task, CANCEL_TIMEOUT) and task.exception() is None:
            return True
        if taken:  # and the connection was lost then: those who wait must hear of it
            self.lock.release()
        return False

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
        context = Context()  # the loop keeps timers that were cancelled for their time
        handle: TimerHandle
        with anyio.CancelScope() as scope:

            def look(again: Any) -> None:  # itself, which it does not keep
                nonlocal handle
                quiet = monotonic() - max(session.active, began)
                if quiet >= timeout and not session.waits_for_server:
                    scope.cancel()
                else:
                    left = max(timeout - quiet, 0.01)
                    handle = loop.call_later(left, again, again, context=context)

            handle = loop.call_later(timeout, look, look, context=context)
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
            "the time." + see("debugging#it-hangs")
        )


class PlainBlock(Block):
    """A block that is not native code's: its rollback flag is the wrapper's own."""

    def __init__(self, session: Session, parent: Block | None, origin: str) -> None:
        flags = session.wrapper.__dict__
        before = flags.get("_plain_needs_rollback", False)
        super().__init__(session, parent, origin)
        flags["_plain_needs_rollback"] = before
        if self.of_thread:
            of_threads.add(self)

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
        runner = bridge.running()
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
