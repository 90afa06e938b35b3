"""Waits for the socket of one libpq connection on an event loop: input and output, nothing more.

A connection that belongs to a loop keeps its reader there, so that a wait registers nothing; and
what a task awaits resumes it from the reader's callback, so that it costs no turn of the loop. What
arrives while nobody uses the connection is read at once: the end of the server's session, too.

Nothing is read that is somebody's: the reader is taken off (`park()`) when something arrives for
which nobody waits just now, a stream or a COPY whose consumer is slow (libpq would keep all of it),
and is back with the next wait. A connection of no loop in particular, which synchronous threads and
several loops read, has a reader while a task waits.

uvloop calls a reader no more once it has seen an error of the socket, though what came before that
is still to be read: there a reader that sees one is taken off, and put on by the next wait.
"""

from __future__ import annotations

import logging
import os
import select
from asyncio import AbstractEventLoop, CancelledError, SelectorEventLoop, get_running_loop, sleep
from collections.abc import Callable, Generator
from contextlib import suppress
from contextvars import Context
from time import monotonic
from types import coroutine
from typing import Any

import psycopg
from psycopg import pq, waiting
from psycopg.pq.abc import PGresult

from .turns import BUSY

logger = logging.getLogger("asyncorm")

_WAIT_R, _WAIT_W = waiting.WAIT_R, waiting.WAIT_W
_READY_R, _READY_W = waiting.READY_R, waiting.READY_W
_INPUT = select.POLLIN
_ERRORS = select.POLLERR | select.POLLHUP | select.POLLNVAL
_OK = pq.ConnStatus.OK
_ACTIVE = pq.TransactionStatus.ACTIVE
_SEVERITY = pq.DiagnosticField.SEVERITY_NONLOCALIZED
_SQLSTATE = pq.DiagnosticField.SQLSTATE

CLOSED = "The connection was closed."

_process = os.getpid()


def _is_forked() -> None:
    global _process
    _process = os.getpid()


os.register_at_fork(after_in_child=_is_forked)


def close_generator(gen: Generator[Any, Any, Any]) -> None:
    """Close a generator of psycopg's: that of its Pipeline goes on at first, to read results."""
    for _ in range(2):
        with suppress(RuntimeError, psycopg.Error):
            gen.close()


class _Wakeup:
    """What a task awaits until the socket is ready; `wake()` resumes it at once.

    What asyncio's tasks ask of a Future (`asyncio.isfuture()`), and no more. To be woken from a
    callback of the loop only: within a task, another one cannot be entered.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_context", "_exc", "_loop", "_ready")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._asyncio_future_blocking = True  # as `yield from` says of a Future
        self._loop = loop
        self._callback: Callable[[Any], Any] | None = None
        self._context: Any = None
        self._exc: BaseException | None = None
        self._ready = 0

    def get_loop(self) -> AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, callback: Callable[[Any], Any], *, context: Context | None = None
    ) -> None:
        self._callback, self._context = callback, context

    def result(self) -> int:
        if self._exc is not None:
            raise self._exc
        return self._ready

    def cancel(self, msg: object = None) -> bool:
        return self.fail(CancelledError() if msg is None else CancelledError(msg))

    def wake(self, ready: int) -> None:
        """Resume the task, unless it is to hear of a failure."""
        callback = self._callback
        if callback is not None:
            self._callback = None
            self._ready = ready
            self._context.run(callback, self)
            del callback  # an error of the task's may have this frame

    def fail(self, exc: BaseException) -> bool:
        """Have the task resumed with an exception, from wherever this is called."""
        callback, self._callback = self._callback, None
        if callback is None or self._loop.is_closed():
            return False
        self._exc = exc
        self._loop.call_soon(callback, self, context=self._context)
        return True


class Wire:
    """The socket of a libpq connection, and the task that waits for it.

    Only this closes the connection, and notices when libpq has: the reader goes first, or the next
    socket with the same number would have none.

    Args:
        pgconn: the libpq connection.
        is_unused: says whether nobody uses the connection, so that what arrives is for nobody;
            None if it is of no loop in particular.

    Attributes:
        state: what is or was waited for last, as psycopg's generators say it.
        opened: when the connection was (time.monotonic()).
        yielded: when the task that waits let others run last.
    """

    def __init__(self, pgconn: Any, is_unused: Callable[[], bool] | None = None) -> None:
        self.pgconn = pgconn
        self.state: int = 0
        self.opened = monotonic()
        self.yielded = 0.0
        self._is_unused = is_unused
        self._process = _process
        self._loop: AbstractEventLoop | None = None  # that has the reader
        self._stays = True  # whether it does after an error of the socket, too
        self._fileno = -1
        self._waiting: _Wakeup | None = None
        self._poller = select.poll()
        self._polled = 0  # for what

    @property
    def waiting(self) -> bool:
        """Whether a task waits for the server."""
        return self._waiting is not None

    @property
    def unanswered(self) -> bool:
        """Whether a task waits for the server's answer, and nothing of it is there to be read."""
        return self.waiting and self.state == _WAIT_R and not self.has_input

    @property
    def has_input(self) -> bool:
        """Whether the server has sent something that is not read yet."""
        return bool(self._poll(_WAIT_R))

    def begin(self, gen: Generator[Any, Any, Any]) -> int:
        """Run a generator of psycopg's, or of the kind, to its first wait, and say for what.

        Raises:
            StopIteration: it has ended.
        """
        try:
            return next(gen)  # type: ignore[no-any-return]
        finally:
            self._look()

    async def drive(self, gen: Generator[Any, Any, Any], state: int) -> Any:
        """Run such a generator, which waits for what `state` says, to its end."""
        try:
            while True:
                if state & _WAIT_W:
                    state = gen.send(await self.ready(state))
                else:
                    state = gen.send(await self._wait(get_running_loop(), state))
        except StopIteration as stop:
            return stop.value
        except CancelledError:  # who drives it has the server stop
            raise
        except BaseException as exc:  # or it would go on when the garbage collector closes it
            close_generator(gen)
            if not isinstance(exc, Exception):  # nobody else knows what was under way
                self.finish()
            raise
        finally:
            self._look()

    async def ready(self, state: int) -> int:
        """Wait until the socket is ready, for what psycopg's generators yield; how it is ready.

        Raises:
            psycopg.OperationalError: the connection is closed, or was meanwhile.
        """
        if state & _WAIT_W and (ready := self._poll(state)):
            # A socket is nearly always writable: no turn of the loop for that, within reason.
            if monotonic() - self.yielded >= BUSY:
                self.state = state
                await sleep(0)
                self.yielded = monotonic()
        else:
            return await self._wait(get_running_loop(), state)
        if self.pgconn.pgconn_ptr is None:
            raise psycopg.OperationalError(CLOSED)
        return ready

    @coroutine
    def _wait(self, loop: AbstractEventLoop, state: int) -> Generator[Any, None, int]:
        self._fileno = fileno = self.pgconn.socket
        self.state = state
        self._waiting = wakeup = _Wakeup(loop)
        try:
            if state & _WAIT_R and self._loop is not loop:
                self._attach(loop)
            if state & _WAIT_W:
                loop.add_writer(fileno, wakeup.wake, _READY_W)
            yield wakeup
            ready = wakeup.result()
            if self.pgconn.pgconn_ptr is None:
                # Closed meanwhile. psycopg's generators keep a pointer into memory that is free
                # now: they must not go on.
                raise psycopg.OperationalError(CLOSED)
            return ready
        except OSError as exc:
            raise psycopg.OperationalError("The connection's socket is closed.") from exc
        finally:
            if self._waiting is wakeup:
                self._stop_waiting()
            self.yielded = monotonic()

    def _stop_waiting(self) -> None:
        wakeup, self._waiting = self._waiting, None
        assert wakeup is not None
        if self.state & _WAIT_W and self._process == _process:
            loop = wakeup.get_loop()
            if not loop.is_closed():
                loop.remove_writer(self._fileno)
        if self._is_unused is None:
            self.park()

    def _attach(self, loop: AbstractEventLoop) -> None:
        # In no context: the reader would keep that of whoever was the first to wait.
        Context().run(loop.add_reader, self._fileno, self._readable)
        self._loop = loop
        self._stays = isinstance(loop, SelectorEventLoop)

    def park(self) -> None:
        """Take the reader off, until the next wait."""
        loop, self._loop = self._loop, None
        # Not in a child process that was forked: the parent's loop would lose its reader.
        if loop is not None and not loop.is_closed() and self._process == _process:
            loop.remove_reader(self._fileno)

    def _look(self) -> None:
        if self._loop is not None and self.pgconn.status != _OK:
            self.park()  # libpq has closed the socket

    def _readable(self) -> None:
        if not self._stays and (self.pgconn.status != _OK or self._events(_WAIT_R) & _ERRORS):
            self.park()
        wakeup = self._waiting
        if wakeup is not None and self.state & _WAIT_R:
            wakeup.wake(_READY_R)
        elif wakeup is None and self._is_nobodys:
            self._take_input()
        elif self.pgconn.status != _OK or self._poll(_WAIT_R):
            self.park()
        # Else who polled has read it since the loop saw it.

    @property
    def _is_nobodys(self) -> bool:
        return (
            self._is_unused is not None
            and self._is_unused()
            and self.pgconn.transaction_status != _ACTIVE
            and not self.pgconn.pipeline_status
        )

    def is_open(self) -> bool:
        """Whether the server has kept a connection open that nobody uses, as far as one can see."""
        # The reader may not have run since the loop was kept from it.
        if self._polled == _INPUT and self.pgconn.status == _OK and not self._poller.poll(0):
            return True
        try:
            for _ in range(3):  # a last message, then the end of the stream
                if not self._poll(_WAIT_R):
                    break
                self._take_input()
        except (psycopg.Error, OSError):
            self.finish()
        return bool(self.pgconn.status == _OK)

    def _take_input(self) -> None:
        pgconn = self.pgconn
        handler = pgconn.notice_handler
        last = False

        def hear(notice: PGresult) -> None:
            nonlocal last
            last = last or _is_last(notice)
            if handler is not None:
                handler(notice)

        pgconn.notice_handler = hear
        try:
            pgconn.consume_input()
            while (notify := pgconn.notifies()) is not None:
                if pgconn.notify_handler is not None:
                    pgconn.notify_handler(notify)
        except psycopg.Error:
            last = True
        except Exception:
            logger.exception("A handler of notifications failed.")
        finally:
            pgconn.notice_handler = handler
            if last:
                self.finish()

    def finish(self) -> None:
        """Close the socket at once; a task that waits for it gets OperationalError.

        Not in a child process that was forked: to close it would end the parent's session.
        """
        if self._process != _process:
            return
        wakeup = self._waiting
        if wakeup is not None:
            # Now, not when the task goes on: the next socket may get the same number.
            self._stop_waiting()
        self.park()
        self.pgconn.finish()
        if wakeup is not None:
            wakeup.fail(psycopg.OperationalError(CLOSED))

    def _poll(self, state: int) -> int:
        ready = 0
        event = self._events(state)
        if event & ~select.POLLOUT:
            ready |= _READY_R
        if event & select.POLLOUT:
            ready |= _READY_W
        return ready & state

    def _events(self, state: int) -> int:
        fileno = self.pgconn.socket  # an error if libpq has closed it
        mask = (select.POLLIN if state & _WAIT_R else 0) | (
            select.POLLOUT if state & _WAIT_W else 0
        )
        if mask != self._polled:
            self._poller.register(fileno, mask)
            self._polled = mask
        found = self._poller.poll(0)
        return found[0][1] if found else 0


def _is_last(notice: PGresult) -> bool:
    """Whether the server says goodbye: between statements its errors come as notices, too."""
    severity = notice.error_field(_SEVERITY)
    return severity in (b"FATAL", b"PANIC") or (notice.error_field(_SQLSTATE) or b"")[:4] == b"57P0"
