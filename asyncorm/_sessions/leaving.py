"""The end of what kept a connection: cleaned, given back, or closed if it is in doubt.

Also where nobody can wait for that: a coroutine that is closed, a block that nobody leaves.
"""

from __future__ import annotations

import sys
from asyncio import CancelledError, Task, get_running_loop
from collections.abc import Callable, Coroutine
from contextvars import Context
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from psycopg.pq import TransactionStatus

from .. import bridge, generators
from .._wire.cancelling import CANCEL_TIMEOUT
from .._wire.locks import NO_LOCK

if TYPE_CHECKING:
    from .session import Session

T = TypeVar("T")

_tasks: set[Task[Any]] = set()  # a loop itself keeps only weak references


async def run_in(session: Session, func: Callable[..., T], /, *args: Any) -> T:
    """Run `func` natively on `session`, before any session of the context."""

    def lead() -> T:
        runner = bridge.running()
        runner.session_override = session
        return func(*args)

    return await bridge.run(lead)


async def clean_up(func: Callable[[], Any], session: Session | None = None) -> None:
    """Run `func` natively, to close or to reset something, on `session` if there is one.

    If the task is cancelled or the generator is closed, it has CANCEL_TIMEOUT seconds for that, and
    an error says nothing new.
    """
    ending = isinstance(sys.exc_info()[1], CancelledError | GeneratorExit)

    def clean() -> None:
        runner = bridge.running()
        if ending:
            runner.cleaning_until = monotonic() + CANCEL_TIMEOUT
        try:
            func()
        except Exception:
            if not ending:
                raise

    await (bridge.run(clean) if session is None else run_in(session, clean))


async def unpin(session: Session, clean: Callable[[Session], None] | None = None) -> None:
    """End what `hold()` began: clean the session and give its connection back, or close it."""

    def end() -> None:
        runner = bridge.running()
        conn = session.wrapper.connection
        try:
            with bridge.shield(runner):
                session.await_closing(runner)
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
            runner.session_override = None
            session.release()

    await clean_up(end, session)


def discard_all(session: Session) -> None:
    """Reset the server session, and forget what Python has of it."""
    conn = session.wrapper.connection
    if conn is not None and conn.pooled is not None and not conn.closed:
        if conn.pgconn.transaction_status != TransactionStatus.IDLE:
            conn.terminate()  # what somebody began by himself and left: it is rolled back
            return
        conn._autocommit = True
        with session.wrapper.wrap_database_errors, conn.cursor() as cursor:
            cursor.execute("DISCARD ALL")
        session.abandoned = ()
        for stream in session.cursors or ():
            stream._closed = True  # on the server it is
        conn.lock = NO_LOCK
        conn.pooled.renew()
        session.wrapper.connection = conn.pooled.twin


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


def start_task(work: Coroutine[Any, Any, T], context: Context) -> Task[T]:
    """Start `work` as a task of the running loop that nobody keeps."""
    task = get_running_loop().create_task(work, context=context)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


def later(session: Session, work: Coroutine[Any, Any, Any]) -> None:
    """Have `work` done in a task of the session's loop: nobody can wait for it here."""
    try:
        session.loop.call_soon_threadsafe(start_task, work, Context())
    except RuntimeError:  # it is closed, and the connection with it
        work.close()
