"""Transaction blocks: asyncorm's and Django's own `atomic()` as nodes of one tree."""

from __future__ import annotations

import functools
import inspect
from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar, overload

from django.db import DEFAULT_DB_ALIAS
from django.db.transaction import Atomic as DjangoAtomic
from psycopg import IsolationLevel

from . import bridge, fate, sessions
from ._sessions import callsite, leaving, scopes
from ._sessions.blocks import Block
from ._sessions.scopes import Scope
from ._sessions.session import Session
from ._transactions.at_once import commit_block, commits_alone, free_session
from ._transactions.characteristics import Characteristics
from ._transactions.lifecycle import enter_block, leave_block
from ._wire.cancelling import CANCEL_TIMEOUT
from .pages import see

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

_SET = "isolation_level", "read_only", "deferrable", "statement_timeout"
_LONGEST = 2_147_483  # seconds: the server counts milliseconds in 32 bits


class Atomic:
    """What `atomic()` returns: a context manager and a decorator of coroutine functions."""

    def __init__(self, using: str | None, **options: Any) -> None:
        self.using = using
        self.options = options
        # Without what is set at the server, or in psycopg's connection.
        self._is_plain = {*map(options.get, _SET)} == {None}
        self._entered: list[tuple[Block, Scope]] = []

    async def __aenter__(self) -> None:
        origin = callsite.caller()
        try:
            session = free_session(self.using or DEFAULT_DB_ALIAS) if self._is_plain else None
            if session is None:
                await bridge.run(self._enter, origin)
            else:
                try:
                    self._enter(origin, session)
                except BaseException:
                    bridge.release(session)
                    raise
        except BaseException as exc:
            # A cancellation that arrived meanwhile is delivered after entering.
            if self._entered and not self._entered[-1][0].ended and isinstance(exc, CancelledError):
                await self.__aexit__(type(exc), exc, exc.__traceback__)
            raise

    def _enter(self, origin: str, free: Session | None = None) -> None:
        session = sessions.require(self.using) if free is None else free
        options = dict(self.options)
        django = DjangoAtomic(session.alias, options.pop("savepoint"), options.pop("durable"))
        settle = options.pop("settle")
        characteristics = Characteristics(session, **options)
        characteristics.check(session.innermost())
        runner = bridge.running() if free is None else None
        block = enter_block(runner, session, django, origin, characteristics, settle)
        assert block.scope is not None
        self._entered.append((block, block.scope))

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # In no variable: the task keeps an error, whose traceback keeps this.
        mine = (e for e in reversed(self._entered) if e[1].is_of(scopes.current_task_or_none()))
        entry = next(mine, None)
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
                "one use django.db.transaction.atomic." + see("transactions#transactions-and-tasks")
            )

        @functools.wraps(func)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            async with Atomic(self.using, **self.options):
                return await func(*args, **kwargs)

        return inner  # type: ignore[return-value]


async def _leave(block: Block, *exc: Any) -> None:
    arrived = None
    if exc[0] is None and commits_alone(block):
        bridge.check()
        if (arrived := await commit_block(block)) is None:
            return

    def leave() -> None:
        nonlocal arrived
        runner = bridge.running()
        goes_on = arrived is not None
        if isinstance(arrived, CancelledError):
            runner.cancelled, runner.cleaning_until = arrived, monotonic() + CANCEL_TIMEOUT
        arrived = None  # its traceback will keep this
        try:
            leave_block(runner, block, block.atomic, *exc, goes_on=goes_on)
        except Exception:
            if exc[0] is not GeneratorExit:  # else it says nothing new
                raise
        finally:
            runner.session_override = None

    await leaving.run_in(block.session, leave)


scopes.roll_back_by(lambda block: _leave(block, GeneratorExit, GeneratorExit(), None))


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
    using: F | str | None = None,
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
        raise ValueError(
            f"statement_timeout must be a positive number of seconds to {_LONGEST}."
            + see("transactions#isolation-time-limits-retries")
        )
    if isolation_level is not None and not isinstance(isolation_level, IsolationLevel):
        raise ValueError(
            f"isolation_level must be a psycopg.IsolationLevel or None, not {isolation_level!r}."
            + see("transactions#isolation-time-limits-retries")
        )
    return Atomic(using, **options)
