"""The lock around each statement of a session: whose turn it is, and who has no right to one."""

from __future__ import annotations

from asyncio import CancelledError
from contextlib import AbstractContextManager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from django.db import InterfaceError
from greenlet import getcurrent
from psycopg import Error
from psycopg.pq import TransactionStatus

from ..bridge import Runner
from ..pages import see
from .scopes import find_scope

if TYPE_CHECKING:
    from .blocks import Block


class StatementLock:
    """Who may use a session's connection now: psycopg's `with connection.lock` of each statement.

    Attributes:
        alias, wrapper: the database alias, and Django's wrapper for it.
        root: the outermost transaction block that is open, if any.
        pinned: kept by `asyncorm.connection()` or by a stream, whatever operations come and go.
        cursors: server-side cursors of the session; open ones keep the connection.
        abandoned: the names of those that nobody can close any more but the next statement.
        holder: the greenlet whose statement runs.
        acting: the block that `holder` enters or leaves.
        active: when the last statement began or ended (time.monotonic()).
    """

    alias: str
    wrapper: Any
    root: Block | None
    pinned: bool
    cursors: WeakSet[Any] | None
    abandoned: tuple[str, ...] = ()
    holder: Any
    acting: Block | None
    active: float
    _depth: int
    _held: Block | None

    @property
    def streaming(self) -> bool:
        """Whether a server-side cursor is open."""
        return self.cursors is not None and any(not cursor.closed for cursor in self.cursors)

    @property
    def aborted(self) -> bool:
        """Whether the server refuses all but a rollback."""
        conn = self.wrapper.connection if self.wrapper is not None else None
        return conn is not None and conn.pgconn.transaction_status == TransactionStatus.INERROR

    @property
    def key(self) -> str:
        return f"{self.alias} {id(self)}"

    @property
    def busy(self) -> bool:
        """Whether a statement of the current task would have to wait for another task's."""
        block = self.innermost()
        return block is not None and self.holder is not getcurrent() and not block.lock.value

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

    def _entitled(self, runner: object) -> Block | None:
        """The block whose lock a statement takes; an error if the session is not `runner`'s."""
        if type(runner) is not Runner:
            raise InterfaceError(
                "A native connection was used outside native code." + see("debugging#it-raises")
            )
        if self.root is None:
            if runner.resources.get(self.alias) is self or runner.session_override is self:
                return None
            if self.pinned or self.streaming:
                # A cursor goes on in another operation than it began in; look again when that one
                # ends.
                runner.resources[self.key] = self
                return None
        elif runner.session_override is self:
            return self.innermost() or self.root
        elif (block := self.innermost()) is not None:
            return block
        raise InterfaceError(
            f"A connection or cursor of database {self.alias!r} was used outside the operation "
            "or transaction block that it belongs to." + see("debugging#it-raises")
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
                + see("debugging#it-raises")
            )
        self.hold(runner, block)
        if self.abandoned and block is None:
            self._close_abandoned()

    def _close_abandoned(self) -> None:
        """Close the cursors of streams that were left, before the statement of their task."""
        conn = self.wrapper.connection
        if conn.pgconn.transaction_status != TransactionStatus.IDLE or conn.pgconn.pipeline_status:
            return
        names, self.abandoned = self.abandoned, ()
        try:
            for name in names:
                with suppress(Error):  # it is gone already, or the statement will say what is wrong
                    conn.close_cursor(name)
        except BaseException as exc:
            self.__exit__(type(exc), exc, exc.__traceback__)
            raise

    def hold(self, holder: object, block: Block | None) -> None:
        """Have a statement of `holder` run from now on, which has the block's lock."""
        self._held = block
        self.holder = holder
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

    def acting_for(self, runner: Runner, block: Block) -> AbstractContextManager[None]:
        """Statements inside enter or leave `block`; the caller holds the lock for that."""
        return _Acting(self, runner, block)

    def act(self, holder: object, block: Block | None) -> None:
        """Have statements of `holder` enter or leave a block from now on, or none any more."""
        self.holder, self.acting, self._depth = holder, block, int(holder is not None)
        if holder is None:
            self.active = monotonic()


class _Acting:
    """What `acting_for()` returns."""

    __slots__ = ("_block", "_lock", "_runner")

    def __init__(self, lock: StatementLock, runner: Runner, block: Block) -> None:
        self._lock, self._runner, self._block = lock, runner, block

    def __enter__(self) -> None:
        self._lock.act(self._runner, self._block)

    def __exit__(self, *exc: object) -> None:
        self._lock.act(None, None)
