"""How blocks begin and end: Django's `Atomic` as a node of the tree, with its turns and errors."""

from __future__ import annotations

import logging
import sys
from asyncio import CancelledError, sleep
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import TracebackType
from typing import Any

import anyio
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DEFAULT_DB_ALIAS, DatabaseError, OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.transaction import Atomic as DjangoAtomic
from django.db.transaction import TransactionManagementError, get_connection
from psycopg import Error

from .. import _events, advice, bridge, callers, fate, sessions, testcase
from .._sessions import callsite, engines, scopes
from .._sessions.blocks import Block
from .._sessions.session import Session
from .._wire.cancelling import CANCEL_TIMEOUT
from ..bridge import Runner
from ..pages import see
from .characteristics import Characteristics

logger = logging.getLogger("asyncorm")


enter_django = DjangoAtomic.__enter__
exit_django = DjangoAtomic.__exit__


def enter(atomic: DjangoAtomic) -> None:
    """Atomic.__enter__: in native code the block becomes a node of the tree."""
    runner = bridge.current()
    session = _session_of(atomic, runner)
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
    session = _session_of(atomic, runner)
    if runner is None or session is None:
        _leave_plainly(atomic, runner is None, exc_type, exc, traceback)
        return
    block = session.innermost()
    if block is None:
        raise TransactionManagementError(
            "A transaction block is left by a task that is not in it."
            + see("transactions#tasks-inside-a-block")
        )
    leave_block(runner, block, atomic, exc_type, exc, traceback)


def _session_of(atomic: DjangoAtomic, runner: Runner | None) -> Session | None:
    """That of the running native code, None for other code and other engines."""
    if runner is None:
        return None
    return sessions.session_for(atomic.using or DEFAULT_DB_ALIAS, runner)


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
        enter_django(atomic)
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
        exit_django(atomic, *exc)
    finally:
        if beside_native and not of_test_case and callers.are_sharing(wrapper):
            callers.leave_thread(wrapper)


def _of_test_case(atomic: Any) -> bool:
    return bool(atomic._from_testcase)


def _is_outermost(atomic: DjangoAtomic) -> bool:
    blocks: list[Any] = get_connection(atomic.using).atomic_blocks
    return blocks[:1] == [atomic]


def enter_block(
    runner: Runner | None,
    session: Session,
    atomic: DjangoAtomic,
    origin: str,
    characteristics: Characteristics | None = None,
    settle: float = 0.0,
) -> Block:
    """Begin a transaction or a savepoint, the current task's innermost block.

    Args:
        runner: None with a session that has just got its connection (at_once.py).
        settle: seconds to find out what became of a transaction whose COMMIT was lost.
    """
    parent = session.innermost()
    if parent is None and session.root is not None:
        raise TransactionManagementError(
            f"The connection is in the transaction block that began at {session.root.origin}, in "
            "which this task is not." + see("transactions#tasks-inside-a-block")
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
        if runner is None:
            _begin(session, atomic)
        else:
            with bridge.shield(runner), session.acting_for(runner, block):
                _enter_django_well(runner, block, atomic)
        block.sids = frozenset(session.wrapper.savepoint_ids)
    except BaseException as exc:
        close_block(runner, block)
        if parent is not None and parent.ended and isinstance(exc, Exception):
            raise parent.outlived_error() from exc  # by force, in the meantime
        raise
    if _events.blocks:
        block.event = _events.Block(session.alias, origin, block.outermost)
    return block


def _begin(session: Session, atomic: DjangoAtomic) -> None:
    """What `Atomic.__enter__()` does when a session has just got its connection."""
    wrapper = session.wrapper
    if _events.checkouts:
        _events.checked_out(session.alias, wrapper.connection, session)
    wrapper.commit_on_exit = True
    wrapper.connection._autocommit = wrapper.autocommit = False
    wrapper.in_atomic_block = True
    wrapper.atomic_blocks.append(atomic)


def leave_block(
    runner: Runner,
    block: Block,
    atomic: DjangoAtomic,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
    *,
    goes_on: bool = False,
) -> None:
    """Commit or roll back; running statements of child tasks are waited for, later ones refused.

    Args:
        goes_on: where `commit_block()` has stopped.
    """
    session = block.session
    wrapper = session.wrapper
    cancelled = exc if isinstance(exc, CancelledError) else None
    if cancelled is not None:  # no further one will come and interrupt a ROLLBACK
        runner.cleaning_until = monotonic() + CANCEL_TIMEOUT
    acquired = False
    try:
        with bridge.shield(runner):
            if not goes_on:
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
                gone = exc_type is None and _is_without_connection(block)
                lost = exc_type is None and not gone and _lost(block)
                if lost:
                    block.needs_rollback = True
                rolled_back = exc_type is not None or block.needs_rollback
                _exit_django_well(runner, block, atomic, exc_type, exc, traceback)
                if block.event is not None:
                    block.event.end(rolled_back)
    finally:
        runner.cleaning_until = None
        if not acquired:  # a statement still holds the lock: the transaction cannot go on
            block.force_end()
        close_block(runner, block)
        if acquired:
            block.lock.release()
    if gone:
        bridge.deliver(runner)
        raise OperationalError(
            f"The transaction block that began at {block.origin} was rolled back: its connection "
            "was lost, and the exception was caught inside the block."
            + see("transactions#a-lost-connection")
        ) from block.rollback_exc
    if lost:
        bridge.deliver(runner)
        raise TransactionManagementError(
            f"The transaction block that began at {block.origin} was rolled back: a statement in "
            "it failed or was cancelled, and the exception was caught inside the block. Put such a "
            "statement into a nested asyncorm.atomic() and catch the exception around that."
            + see("transactions#transactions-and-tasks")
        ) from (block.cancelled or block.rollback_exc)
    if wrapper.hooks_due:
        _run_commit_hooks(runner, wrapper)
    if not isinstance(exc, CancelledError):
        _deliver(runner, committed=block.outermost and not rolled_back)


def _deliver(runner: Runner, committed: bool) -> None:
    if committed and runner.cancelled is not None:
        runner.cancelled.__cause__ = fate.Committed("The transaction was committed before that.")
    bridge.deliver(runner)


@contextmanager
def reserved(session: Session, origin: str) -> Iterator[None]:
    """Keep the task's innermost block to the running operation, as a nested block would."""
    runner = bridge.current()
    parent = session.innermost()
    if runner is None or parent is None:
        raise TransactionManagementError(
            "The task is not in a transaction block." + see("transactions#tasks-inside-a-block")
        )
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
        close_block(runner, block)


def _by_django(runner: Runner, block: Block, method: Callable[..., Any], *args: Any) -> None:
    """What Django does of a block. It asks for its connection again and again: for a transaction,
    whose BEGIN and COMMIT nobody else's code sees, that is known."""
    override = runner.session_override
    if override is None and block.outermost:
        runner.session_override = block.session
    try:
        method(*args)
    finally:
        runner.session_override = override


def _enter_django_well(runner: Runner, block: Block, atomic: DjangoAtomic) -> None:
    characteristics = block.characteristics
    if characteristics is not None:
        characteristics.before()
    _by_django(runner, block, enter_django, atomic)
    if characteristics is not None:
        try:
            characteristics.after(block)
        except BaseException as exc:
            exit_django(atomic, type(exc), exc, exc.__traceback__)
            raise


def _exit_django_well(runner: Runner, block: Block, atomic: DjangoAtomic, *exc: Any) -> None:
    if block.characteristics is not None and exc[0] is None and not block.needs_rollback:
        try:
            block.characteristics.restore()
        except DatabaseError as error:
            exit_django(atomic, type(error), error, error.__traceback__)
            raise
    _by_django(runner, block, exit_django, atomic, *exc)


def _run_commit_hooks(runner: Runner, wrapper: BaseDatabaseWrapper) -> None:
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


def _is_without_connection(block: Block) -> bool:
    """Whether the transaction cannot even be tried to be committed, and nobody has been told so.

    As Django's own, a block inside of it that cannot roll back to its savepoint has the outermost
    rolled back without an exception; that of `asyncorm.atomic()` raises one.
    """
    conn = block.session.wrapper.connection
    return (
        block.outermost
        and block.characteristics is not None
        and block.needs_rollback
        and block.cancelled is None
        and conn is not None
        and bool(conn.closed)
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


def close_block(runner: Runner | None, block: Block) -> None:
    """The end of a block, however it came to it; without a runner, the session is the caller's."""
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
        block.is_over()
        wrapper = session.wrapper
        if block.needs_rollback and wrapper.connection is not None and not wrapper.autocommit:
            # The transaction is the caller's own and goes on, refused until it is rolled back.
            wrapper.__dict__["_plain_needs_rollback"] = True
            wrapper.__dict__["_plain_rollback_exc"] = block.rollback_exc
        if runner is not None:  # its operation has it again, and gives it back when it ends
            runner.resources[session.key] = session
