"""Transaction blocks: asyncorm's and Django's own `atomic()` as nodes of one tree."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
from asyncio import CancelledError, Future, ensure_future, sleep
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar, overload

import anyio
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DEFAULT_DB_ALIAS, DatabaseError, transaction
from django.db.transaction import Atomic as DjangoAtomic
from django.db.transaction import TransactionManagementError, get_connection
from psycopg import Error, IsolationLevel

from . import _events, advice, bridge, callers, fate, sessions, testcase
from ._sessions import callsite, engines, leaving, scopes
from ._sessions.blocks import Block
from ._sessions.scopes import Scope
from ._sessions.session import Session
from .bridge import Runner
from .driver import CANCEL_TIMEOUT

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])
logger = logging.getLogger("asyncorm")

_LONGEST = 2_147_483  # seconds: the server counts milliseconds in 32 bits

_enter_django = DjangoAtomic.__enter__
_exit_django = DjangoAtomic.__exit__


def enter(atomic: DjangoAtomic) -> None:
    """Atomic.__enter__: in native code the block becomes a node of the tree."""
    runner = bridge.current()
    session = (
        sessions.session_for(atomic.using or DEFAULT_DB_ALIAS, runner)
        if runner is not None
        else None
    )
    if runner is None or session is None:
        _enter_plainly(atomic, beside_native=runner is None)
    else:
        enter_block(runner, session, atomic, callsite.caller())


def leave(
    atomic: DjangoAtomic,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """Atomic.__exit__ of django.db.transaction, the counterpart of `enter()`."""
    runner = bridge.current()
    session = (
        sessions.session_for(atomic.using or DEFAULT_DB_ALIAS, runner)
        if runner is not None
        else None
    )
    if runner is None or session is None:
        _leave_plainly(atomic, runner is None, exc_type, exc, traceback)
        return
    block = session.innermost()
    if block is None:
        raise TransactionManagementError("A transaction block is left by a task that is not in it.")
    leave_block(runner, block, atomic, exc_type, exc, traceback)


def _enter_plainly(atomic: DjangoAtomic, beside_native: bool) -> None:
    alias = atomic.using or DEFAULT_DB_ALIAS
    in_test = alias in sessions.test_sessions and not _of_test_case(atomic)
    if not in_test and beside_native and engines.refuses_synchronous_code(alias):
        # Django would ask the connection, which tells it nothing here: its wrapper would stay in
        # the block.
        raise SynchronousOnlyOperation(
            advice.synchronous_only(
                sys._getframe(1), "In a coroutine a transaction is 'async with asyncorm.atomic()'."
            )
        )
    wrapper = get_connection(alias)
    shared = beside_native and not _of_test_case(atomic) and callers.are_sharing(wrapper)
    if shared:
        scopes.refuse_beside_block(alias)  # or it would wait for a block that waits for it
        callers.enter_thread(wrapper)
    try:
        _enter_django(atomic)
    except BaseException:
        if shared:
            callers.leave_thread(wrapper)
        raise
    if shared:
        callers.note_savepoints(wrapper)
    if beside_native and _of_test_case(atomic):
        testcase.begin(alias)


def _leave_plainly(atomic: DjangoAtomic, beside_native: bool, *exc: Any) -> None:
    alias = atomic.using or DEFAULT_DB_ALIAS
    of_test_case = beside_native and _of_test_case(atomic)
    if of_test_case and _is_outermost(atomic):
        testcase.end(alias)
    wrapper = get_connection(alias)
    try:
        _exit_django(atomic, *exc)
    finally:
        if beside_native and not of_test_case and callers.are_sharing(wrapper):
            callers.leave_thread(wrapper)


def _of_test_case(atomic: Any) -> bool:
    return bool(atomic._from_testcase)


def _is_outermost(atomic: DjangoAtomic) -> bool:
    blocks: list[Any] = get_connection(atomic.using).atomic_blocks
    return blocks[:1] == [atomic]


def enter_block(
    runner: Runner,
    session: Session,
    atomic: DjangoAtomic,
    origin: str,
    characteristics: _Characteristics | None = None,
    settle: float = 0.0,
) -> Block:
    """Begin a transaction or a savepoint, the current task's innermost block.

    Args:
        settle: seconds to find out what became of a transaction whose COMMIT was lost.
    """
    parent = session.innermost()
    if parent is None and session.root is not None:
        raise TransactionManagementError(
            f"The connection is in the transaction block that began at {session.root.origin}, in "
            "which this task is not."
        )
    if parent is not None:
        parent.acquire()
    block = Block(session, parent, origin)
    block.atomic, block.characteristics = atomic, characteristics
    if parent is not None:
        parent.inner = block
    else:
        session.root = block
        session.fate = fate.of(session, settle)
    block.enter()
    try:
        with bridge.shield(runner), session.acting_for(runner, block):
            if characteristics is not None:
                characteristics.before()
            _enter_django(atomic)
            if characteristics is not None:
                try:
                    characteristics.after(block)
                except BaseException as exc:
                    _exit_django(atomic, type(exc), exc, exc.__traceback__)
                    raise
        block.sids = frozenset(session.wrapper.savepoint_ids)
    except BaseException as exc:
        _close_block(runner, block)
        if parent is not None and parent.ended and isinstance(exc, Exception):
            raise parent.outlived_error() from exc  # by force, in the meantime
        raise
    if _events.blocks:
        block.event = _events.Block(session.alias, origin, block.outermost)
    return block


def leave_block(
    runner: Runner,
    block: Block,
    atomic: DjangoAtomic,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """Commit or roll back; running statements of child tasks are waited for, later ones refused."""
    session = block.session
    wrapper = session.wrapper
    cancelled = exc if isinstance(exc, CancelledError) else None
    if cancelled is not None:  # no further one will come and interrupt a ROLLBACK
        runner.cleaning_until = monotonic() + CANCEL_TIMEOUT
    acquired = False
    try:
        with bridge.shield(runner):
            if block.queue is not None and block.queue.active:
                block.queue.seal()
                try:
                    bridge.wait_for(runner, sleep(0))  # they stand in line then
                except CancelledError as arrived:
                    cancelled = runner.cancelled = arrived
            block.acquire_to_leave(runner, cancelled)
            acquired = block.ended = True
            with session.acting_for(runner, block):
                if isinstance(exc, GeneratorExit) and block.joined:
                    _tell_of_loss(block)
                lost = exc_type is None and _lost(block)
                if lost:
                    block.needs_rollback = True
                rolled_back = exc_type is not None or block.needs_rollback
                _exit_django_well(block, atomic, exc_type, exc, traceback)
                if block.event is not None:
                    block.event.end(rolled_back)
    finally:
        runner.cleaning_until = None
        if not acquired:  # a statement still holds the lock: the transaction cannot go on
            block.force_end()
        _close_block(runner, block)
        if acquired:
            block.lock.release()
    if lost:
        bridge.deliver(runner)
        raise TransactionManagementError(
            f"The transaction block that began at {block.origin} was rolled back: a statement in "
            "it failed or was cancelled, and the exception was caught inside the block. Put such a "
            "statement into a nested asyncorm.atomic() and catch the exception around that."
        ) from (block.cancelled or block.rollback_exc)
    if wrapper.hooks_due:
        _run_commit_hooks(runner, wrapper)
    if not isinstance(exc, CancelledError):
        bridge.deliver(runner)


@contextmanager
def reserved(session: Session, origin: str) -> Iterator[None]:
    """Keep the task's innermost block to the running operation, as a nested block would."""
    runner = bridge.current()
    parent = session.innermost()
    if runner is None or parent is None:
        raise TransactionManagementError("The task is not in a transaction block.")
    parent.acquire()
    if parent.needs_rollback:
        parent.lock.release()
        raise TransactionManagementError("The block is to be rolled back.")
    block = Block(session, parent, origin)
    block.sids = parent.sids
    parent.inner = block
    block.enter()
    try:
        yield
    finally:
        if block.needs_rollback:
            parent.needs_rollback = True
            parent.rollback_exc, parent.cancelled = block.rollback_exc, block.cancelled
        _close_block(runner, block)


def _exit_django_well(block: Block, atomic: DjangoAtomic, *exc: Any) -> None:
    if block.characteristics is not None and exc[0] is None and not block.needs_rollback:
        try:
            block.characteristics.restore()
        except DatabaseError as error:
            _exit_django(atomic, type(error), error, error.__traceback__)
            raise
    _exit_django(atomic, *exc)


def _run_commit_hooks(runner: Runner, wrapper: Any) -> None:
    if runner.cancelled is None:
        wrapper.run_and_clear_commit_hooks()
        return
    # Cancelled during COMMIT: first the callbacks, which belong to it, then the cancellation.
    cancelled, runner.cancelled = runner.cancelled, None
    try:
        with anyio.CancelScope(shield=True):  # noqa: ASYNC100
            wrapper.run_and_clear_commit_hooks()
    finally:
        runner.cancelled = cancelled


def _tell_of_loss(block: Block) -> None:
    """Log it if the block is rolled back with what others wrote in it, who were told nothing."""
    conn = block.session.wrapper.connection
    if conn is None or conn.closed or block.needs_rollback:
        return
    with suppress(Error), conn.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
        if cursor.fetchone()[0]:
            logger.warning(
                "%s was rolled back, with what was written in it while the asynchronous generator "
                "that holds it was suspended: the generator was left before its end.",
                block,
            )


def _lost(block: Block) -> bool:
    """Whether a block that ends without an exception is rolled back, and nobody was told so.

    Django knows of failed statements of the ORM, and is silent. It does not know of cancelled ones,
    nor of failed raw SQL: the server would answer COMMIT with ROLLBACK, taken for a success.
    """
    if block.needs_rollback:
        return block.cancelled is not None
    # Django's own atomic() is left to be as silent as it always is.
    return block.outermost and block.characteristics is not None and block.session.aborted


def _close_block(runner: Runner, block: Block) -> None:
    block.end()
    if (scope := block.scope) is not None:
        scope.pop()
    session = block.session
    if block.characteristics is not None:
        block.characteristics.forget()
    parent = block.parent
    if parent is not None:
        if block.needs_rollback != block.inherited:  # another task may have set the parent's
            parent.needs_rollback = block.needs_rollback
            parent.rollback_exc, parent.cancelled = block.rollback_exc, block.cancelled
        if parent.inner is block:
            parent.inner = None
            parent.lock.release()
    if block.outermost:
        session.transaction_ended()
    if parent is None:
        session.root = session.fate = None
        # The session is this operation's again, which gives it back when it ends.
        runner.resources[session.key] = session


class Atomic:
    """What `atomic()` returns: a context manager and a decorator of coroutine functions."""

    def __init__(self, using: str | None, **options: Any) -> None:
        self.using = using
        self.options = options
        self._entered: list[tuple[Block, Scope]] = []

    async def __aenter__(self) -> None:
        origin = callsite.caller()
        try:
            await bridge.run(self._enter, origin)
        except BaseException as exc:
            # A cancellation that arrived meanwhile is delivered after entering.
            if self._entered and not self._entered[-1][0].ended and isinstance(exc, CancelledError):
                await self.__aexit__(type(exc), exc, exc.__traceback__)
            raise

    def _enter(self, origin: str) -> None:
        runner = bridge.current()
        assert runner is not None
        session = sessions.require(self.using)
        options = dict(self.options)
        django = DjangoAtomic(session.alias, options.pop("savepoint"), options.pop("durable"))
        settle = options.pop("settle")
        characteristics = _Characteristics(session, **options)
        characteristics.check(session.innermost())
        block = enter_block(runner, session, django, origin, characteristics, settle)
        assert block.scope is not None
        self._entered.append((block, block.scope))

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task = scopes.current_task_or_none()
        entry = next((e for e in reversed(self._entered) if e[1].is_of(task)), None)
        block, scope = entry = entry or self._entered[-1]
        self._entered.remove(entry)
        if block.ended:  # with the block around it, by force
            scope.pop()
            if exc_type is None:
                raise block.outlived_error()
        elif leaving.can_wait(exc):
            await _leave(block, exc_type, exc, traceback)
        else:
            scope.pop()
            leaving.later(block.session, _leave(block, exc_type, exc, traceback))

    def __call__(self, func: F) -> F:
        if not inspect.iscoroutinefunction(func):
            raise TypeError(
                f"asyncorm.atomic decorates coroutine functions, not {func!r}; for a synchronous "
                "one use django.db.transaction.atomic."
            )

        @functools.wraps(func)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            async with Atomic(self.using, **self.options):
                return await func(*args, **kwargs)

        return inner  # type: ignore[return-value]


async def _leave(block: Block, *exc: Any) -> None:
    def leave() -> None:
        runner = bridge.current()
        assert runner is not None
        try:
            leave_block(runner, block, block.atomic, *exc)
        except Exception:
            if exc[0] is not GeneratorExit:  # else it says nothing new
                raise
        finally:
            runner.lead = None

    await leaving.run_in(block.session, leave)


scopes.roll_back_by(lambda block: _leave(block, GeneratorExit, GeneratorExit(), None))


class _Characteristics:
    """The isolation level and the like of one block; what it changes it puts back."""

    def __init__(
        self,
        session: Session,
        isolation_level: IsolationLevel | None,
        read_only: bool | None,
        deferrable: bool | None,
        statement_timeout: float | None,
    ) -> None:
        self.session = session
        options = {
            "isolation_level": isolation_level,
            "read_only": read_only,
            "deferrable": deferrable,
        }
        self.transaction = {name: value for name, value in options.items() if value is not None}
        self.statement_timeout = statement_timeout
        self.saved: dict[str, Any] = {}
        self.saved_timeout: str | None = None

    def check(self, parent: Block | None) -> None:
        if parent is not None and parent.of_test_case and self.transaction:
            warnings.warn(
                f"{', '.join(self.transaction)} is ignored in a test's transaction.", stacklevel=2
            )
            self.transaction = {}
        if parent is not None and parent.is_transaction and self.transaction:
            raise TransactionManagementError(
                f"{', '.join(self.transaction)} can be set for the outermost block only; this "
                f"one is inside the block that began at {parent.origin}."
            )

    def before(self) -> None:
        """Before the outermost block: psycopg makes BEGIN from these."""
        if self.transaction:
            wrapper = self.session.wrapper
            wrapper.ensure_connection()
            conn = wrapper.connection
            self.saved = {name: getattr(conn, name) for name in self.transaction}
            with wrapper.wrap_database_errors:
                for name, value in self.transaction.items():
                    setattr(conn, name, value)

    def after(self, block: Block) -> None:
        """In the block: the time limit of its statements."""
        if self.statement_timeout is not None:
            milliseconds = f"{max(1, round(self.statement_timeout * 1000))}ms"
            with self.session.wrapper.cursor() as cursor:
                cursor.execute(
                    "SELECT current_setting('statement_timeout'),"
                    " set_config('statement_timeout', %s, true)",
                    [milliseconds],
                )
                before = cursor.fetchone()[0]
            if not block.outermost:  # else the end of the transaction puts it back
                self.saved_timeout = before

    def restore(self) -> None:
        """At the end of a nested block; a rollback puts it back by itself."""
        if self.saved_timeout is not None:
            with self.session.wrapper.cursor() as cursor:
                cursor.execute(
                    "SELECT set_config('statement_timeout', %s, true)", [self.saved_timeout]
                )

    def forget(self) -> None:
        """After the outermost block, however it ended."""
        if self.saved and (conn := self.session.wrapper.connection) is not None:
            # Read by psycopg at the next BEGIN only; the setters would refuse inside a transaction.
            for name, value in self.saved.items():
                setattr(conn, f"_{name}", value)
            conn._begin_statement = b""


@overload
def atomic(using: F) -> F: ...
@overload
def atomic(
    using: str | None = None,
    savepoint: bool = True,
    durable: bool = False,
    *,
    isolation_level: IsolationLevel | None = None,
    read_only: bool | None = None,
    deferrable: bool | None = None,
    statement_timeout: float | None = None,
    settle: bool | float = False,
) -> Atomic: ...
def atomic(
    using: Any = None,
    savepoint: bool = True,
    durable: bool = False,
    *,
    isolation_level: IsolationLevel | None = None,
    read_only: bool | None = None,
    deferrable: bool | None = None,
    statement_timeout: float | None = None,
    settle: bool | float = False,
) -> Any:
    """A transaction, or inside another block a savepoint: `async with atomic():`, or a decorator of
    coroutine functions.

    Means what django.db.transaction.atomic() means ("Database transactions" in Django's
    documentation), for the task and the tasks it starts inside: they share the block's connection
    and take turns, statement by statement. A nested block keeps others out for its life.

    Args:
        using: a database alias; the default one by default.
        savepoint: make a savepoint when nested.
        durable: raise RuntimeError when nested.
        isolation_level: for an outermost block.
        read_only: for an outermost block; True has the server refuse writes.
        deferrable: for an outermost block that is serializable and read-only.
        statement_timeout: seconds after which the server cancels a statement of the block
            (django.db.OperationalError).
        settle: if the connection is lost during COMMIT, ask the server what became of the
            transaction, for 10 or so many seconds: if it was committed, the block ends well; if
            not, OperationalError says so; only if nobody knows it raises CommitUnknown. In a nested
            block it changes nothing.

    Raises:
        django.db.NotSupportedError: the alias has another engine.
        django.db.transaction.TransactionManagementError: an option for outermost blocks in a nested
            one.
        asyncorm.CommitUnknown: the connection was lost during COMMIT.
    """
    options = {
        "savepoint": savepoint,
        "durable": durable,
        "isolation_level": isolation_level,
        "read_only": read_only,
        "deferrable": deferrable,
        "statement_timeout": statement_timeout,
        "settle": fate.seconds(settle),
    }
    if callable(using):
        return Atomic(None, **options)(using)
    if statement_timeout is not None and not 0 < statement_timeout < _LONGEST:
        raise ValueError(f"statement_timeout must be a positive number of seconds to {_LONGEST}.")
    if isolation_level is not None and not isinstance(isolation_level, IsolationLevel):
        raise ValueError(
            f"isolation_level must be a psycopg.IsolationLevel or None, not {isolation_level!r}."
        )
    return Atomic(using, **options)


def _block(alias: str) -> Block | None:
    scope = scopes.find_scope(alias)
    if scope is not None and scope.block is not None and not scope.block.of_thread:
        return scope.block
    block = callers.block_of_thread(alias)
    if block is not None and (scope is not None or alias in sessions.test_sessions):
        return block
    return scope.block if scope is not None else None


def on_commit(callback: Callable[[], Any], using: str | None = None, robust: bool = False) -> None:
    """Call `callback` after the outermost block has committed; never if it, or the savepoint around
    this call, is rolled back.

    Callbacks run in order, outside the transaction. What one returns is awaited if it is awaitable.
    Outside a block it is called at once, and an awaitable that it returns is scheduled as a task,
    whose exception goes to the loop's exception handler. In a coroutine
    django.db.transaction.on_commit() does the same.

    Args:
        callback: takes no arguments.
        using: a database alias; the default one by default.
        robust: log an exception and go on, instead of raising it (after the commit).

    Raises:
        django.db.transaction.TransactionManagementError: autocommit is turned off, and there is no
            block.
    """
    if not callable(callback):
        raise TypeError("on_commit()'s callback must be a callable.")
    alias = using or DEFAULT_DB_ALIAS
    block = _block(alias)
    scope = scopes.find_scope(alias)
    session = scope.session if scope is not None else None
    if block is not None:
        session = block.session
    if session is not None:
        wrapper = session.wrapper
        if block is not None and block.ended:  # what it registered is known
            raise block.outlived_error()
        if wrapper.in_atomic_block and block is not None:
            wrapper.run_on_commit.append((set(block.sids), session.hook(callback), robust))
            return
        if wrapper.connection is not None and not wrapper.autocommit:
            raise TransactionManagementError(
                "on_commit() cannot be used in manual transaction management"
            )
    if bridge.in_native_code():
        sessions.require(using).wrapper.on_commit(callback, robust)
    elif scopes.current_task_or_none() is None:
        transaction.on_commit(callback, using, robust)
    else:
        _call(callback, robust)


def _call(callback: Callable[[], Any], robust: bool) -> None:
    try:
        result = callback()
    except Exception:
        if not robust:
            raise
        logger.exception("Error calling %r in on_commit().", callback)
        return
    if inspect.isawaitable(result):
        task = ensure_future(result)
        _tasks.add(task)
        task.add_done_callback(functools.partial(_called, callback, robust))


def _called(callback: Callable[[], Any], robust: bool, task: Future[Any]) -> None:
    _tasks.discard(task)
    error = None if task.cancelled() else task.exception()
    if error is None:
        return
    if robust:
        logger.error("Error calling %r in on_commit().", callback, exc_info=error)
    else:  # nobody is there to raise it to
        task.get_loop().call_exception_handler(
            {
                "message": f"Error in what {callback!r} returned, called by on_commit()",
                "exception": error,
                "future": task,
            }
        )


_tasks: set[Any] = set()


def set_rollback(rollback: bool, using: str | None = None) -> None:
    """Have the innermost block with a savepoint, or the transaction, roll back at its end without
    an exception (or not).

    As django.db.transaction.set_rollback().

    Raises:
        django.db.transaction.TransactionManagementError: outside a block.
    """
    if (block := _block(using or DEFAULT_DB_ALIAS)) is None:
        raise TransactionManagementError(
            "The rollback flag doesn't work outside of an 'atomic' block."
        )
    if block.ended:
        raise block.outlived_error()
    block.session.wrapper.needs_rollback = rollback
