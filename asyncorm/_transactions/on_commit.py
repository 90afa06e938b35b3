"""`on_commit()` and `set_rollback()`: what happens to the block around, at its end."""

from __future__ import annotations

import functools
import inspect
import logging
from asyncio import Future, ensure_future
from collections.abc import Callable
from typing import Any

from django.db import DEFAULT_DB_ALIAS, transaction
from django.db.transaction import TransactionManagementError

from .. import bridge, callers, sessions
from .._sessions import scopes
from .._sessions.blocks import Block

logger = logging.getLogger("asyncorm")


_tasks: set[Any] = set()


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
