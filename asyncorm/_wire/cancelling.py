"""Cancels what runs on a connection, and closes a connection that stays in doubt."""

from __future__ import annotations

import asyncio
from asyncio import CancelledError, get_running_loop
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
from greenlet import getcurrent
from psycopg import generators, pq, waiting

from ..bridge import Runner
from ..wire import CLOSED, close_generator
from .statement import checked

if TYPE_CHECKING:
    from .._pool.connection import PooledConnection

# Seconds for the server to answer a cancel request, or to end a COMMIT, once the task is cancelled.
CANCEL_TIMEOUT = 5.0
_AGAIN = 0.05, 1.0  # seconds until a request that did nothing is repeated: at first, at most
# Seconds for a request under way when the caller's time is up: PgBouncer before 1.20 may end itself
# when who asks goes away meanwhile (its #801).
_PARTING = 0.5
_ACTIVE = pq.TransactionStatus.ACTIVE
_UNKNOWN = pq.TransactionStatus.UNKNOWN
_OK = pq.ConnStatus.OK
_PIPELINE_SYNC = pq.ExecStatus.PIPELINE_SYNC
_COPY_IN, _COPY_OUT = pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT


def pauses() -> Iterator[float]:
    """Seconds to wait after each request to cancel: twice as long each time, since a pooler makes a
    connection for each, and a server that hangs answers none."""
    pause, most = _AGAIN
    while True:
        yield pause
        pause = min(2 * pause, most)


def _rest(gen: Generator[int, int, Any], state: int, exc: BaseException) -> Any:
    """What is left of a generator that has failed, or whose coroutine was cancelled."""
    if isinstance(exc, Exception):
        raise exc
    try:
        while True:
            state = gen.send((yield state))
    except StopIteration:
        return
    finally:
        close_generator(gen)


async def finish(task: asyncio.Task[Any], timeout: float) -> bool:
    """Wait for `task` whatever cancellations arrive (anyio's come again and again)."""
    deadline = monotonic() + timeout
    with anyio.CancelScope(shield=True):
        while not task.done():
            left = deadline - monotonic()
            if left <= 0:
                task.cancel()
                with suppress(CancelledError):
                    await asyncio.wait((task,))
                return False
            with suppress(CancelledError):
                await asyncio.wait((task,), timeout=left)
    return True


class CancellableConnection(psycopg.Connection[Any]):
    """A connection whose statements are stopped from the loop.

    Attributes:
        pooled: the pool's connection underneath, None when there is none.
        wire: waits for the socket.
        segment: it is in pipeline mode for one sync segment, whose end is sent.
        rest_of_commit: what `commit()` goes on with, if `committed()` has begun.
    """

    pooled: PooledConnection | None
    wire: Any
    segment = False
    rest_of_commit: Any = None

    @property
    def waiting(self) -> bool:
        """Whether a task waits for the server on this connection."""
        return bool(self.wire.waiting)

    def _try_cancel(self, *, timeout: float = CANCEL_TIMEOUT) -> None:
        # For a stream() that is left before its end: psycopg's would block the loop, and might hit
        # the next statement.
        runner = getcurrent()
        if type(runner) is Runner:
            runner.parent.switch(self.interrupt())  # type: ignore[union-attr]
        else:
            self.terminate()

    def _hangs(self) -> None:
        """The server does not answer: whoever gets another old connection would find that, too."""
        if self.pooled is not None and self.pooled.home is not None:
            self.pooled.home.retire_all()

    def given_up(self, gen: Generator[Any, Any, Any]) -> psycopg.OperationalError:
        close_generator(gen)
        self._hangs()
        self.terminate()
        return psycopg.OperationalError(
            f"The task was cancelled and the server did not answer within {CANCEL_TIMEOUT:g} s; "
            "the connection is closed. If this was a COMMIT, the transaction may or may not have "
            "been committed."
        )

    async def _complete(self, gen: Generator[Any, Any, Any]) -> Any:
        try:
            state = self.wire.begin(gen)
        except StopIteration as stop:
            return stop.value
        return await self.wire.drive(gen, state)

    @property
    def may_commit(self) -> bool:
        """Whether `commit()` sends something, or has."""
        return self.pgconn.status == _OK or self.rest_of_commit is not None

    def commit(self) -> None:
        """psycopg's; it goes on with what `committed()` has begun."""
        rest, self.rest_of_commit = self.rest_of_commit, None
        with self.lock:
            self.wait(self._commit_gen() if rest is None else rest)

    async def committed(self) -> BaseException | None:
        """Do what `commit()` does, from a coroutine that has the connection to itself.

        Returns:
            an error, or a cancellation that arrived meanwhile: `commit()` is to go on.
        """
        gen = self._commit_gen()
        try:
            await self._complete(gen)
        except (Exception, CancelledError) as exc:
            self.rest_of_commit = _rest(gen, self.wire.state, exc)
            return exc
        return None

    async def give_up(self, gen: Generator[Any, Any, Any]) -> None:
        close_generator(gen)
        await self.interrupt()

    async def interrupt(self) -> None:
        """Cancel the statement on the server; close the connection if it stays in doubt."""
        if self.pgconn.status == _OK:
            pipeline = self.pgconn.pipeline_status and not self.segment
            if not pipeline and self.pgconn.transaction_status != _ACTIVE:
                return
            stop = self.silence() if pipeline else self.stop(self._drain)
            task = get_running_loop().create_task(stop)
            answered = await finish(task, CANCEL_TIMEOUT)
            if not answered or task.cancelled() or task.exception():
                self._hangs()
            elif not pipeline:
                return
        self.terminate()

    async def stop(self, over: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Have the server stop what runs, and wait for `over()`: the answer to it.

        Asks again and again: a server process that has not read the statement yet, or is between
        two of them, ignores a request to cancel. A connection that cannot be asked, or is lost, is
        closed: who waits for it hears so, and has it no longer.
        """
        await self._ask_until(over())
        if self.pgconn.status == _OK:
            await self._absorb_cancel()

    async def _ask_until(self, over: Coroutine[Any, Any, Any]) -> None:
        task = get_running_loop().create_task(over)
        try:
            for pause in pauses():
                try:
                    await self._request_cancel()
                except psycopg.Error:
                    self.terminate()
                    break
                await asyncio.wait((task,), timeout=pause)
                if task.done():
                    break
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def silence(self) -> None:
        """Have the server stop what runs, for who closes the connection then: it would go on, and
        notice that at the end only. Not for ever: the caller sets a limit."""
        answered = False
        for pause in pauses():
            if self.pgconn.status != _OK or self.pgconn.transaction_status != _ACTIVE:
                return
            if self.pgconn.pipeline_status and not self.wire.waiting:
                await self._ask_until(self._complete(self._rest_of_pipeline()))
                return
            await self._request_cancel()
            await asyncio.sleep(pause)
            if self.wire.has_input and not self.wire.waiting:  # who waits reads it
                self.pgconn.consume_input()
                answered = True
            elif answered:
                return

    def _rest_of_pipeline(self) -> Generator[int, int, None]:
        # The server may have answered all that it was sent, and wait for more: only the answer to
        # a sync says that it runs nothing. (A pipeline is ACTIVE for libpq until that is read.)
        self.pgconn.pipeline_sync()
        yield from generators.send(self.pgconn)
        while self.pgconn.status == _OK and self.pgconn.transaction_status == _ACTIVE:
            yield from generators.fetch_many(self.pgconn)

    async def _absorb_cancel(self) -> None:
        # The request may have reached the server after the statement had ended: give it something
        # harmless to hit.
        self.pgconn.send_query(b"SELECT 1")
        await self._drain()

    async def stop_others(self, turn: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Cancel the statement that another task waits for, then wait for `turn()`: for the
        connection to be the caller's."""
        await (self.stop(turn) if self.waiting else turn())

    def segment_results(self) -> Generator[int, int, list[list[Any]]]:
        """The results of the sync segment under way, those of each command together; leaves
        pipeline mode.

        Raises:
            psycopg.OperationalError: the connection is lost; what the server said of it, if it did.
        """
        pgconn = self.pgconn
        answers: list[list[Any]] = []
        try:
            yield from generators.send(pgconn)
            while True:
                results = yield from generators.fetch_many(pgconn)
                if results and results[0].status == _PIPELINE_SYNC:
                    break
                if results:  # none: who was cancelled has read them, but not that they had ended
                    answers.append(results)
                if pgconn.status != _OK:
                    raise psycopg.OperationalError(pgconn.get_error_message() or CLOSED)
        except psycopg.OperationalError:
            encoding = self.info.encoding if answers else ""
            self.close_if_lost()
            if answers:
                checked([result for results in answers for result in results], encoding)
            raise
        pgconn.exit_pipeline_mode()
        self.segment = False
        return answers

    async def _drain(self) -> None:
        if self.segment:
            await self._complete(self.segment_results())
            return
        results = await self._complete(generators.execute(self.pgconn))
        if results and results[-1].status == _COPY_IN:
            self.pgconn.put_copy_end(b"cancelled")
            await self._complete(generators.execute(self.pgconn))
        elif results and results[-1].status == _COPY_OUT:
            with suppress(psycopg.Error):  # the answer to the cancel request
                left: Any = memoryview(b"")
                while isinstance(left, memoryview):
                    left = await self._complete(generators.copy_from(self.pgconn))
        if self.pgconn.transaction_status in (_ACTIVE, _UNKNOWN):
            raise psycopg.OperationalError("The connection is still busy.")

    async def _request_cancel(self) -> None:
        """Have the server stop the statement that runs."""
        if not psycopg.capabilities.has_cancel_safe():
            await asyncio.to_thread(self.cancel)
            return
        asking = waiting.wait_conn_async(self._cancel_gen(), 0.1)
        request = get_running_loop().create_task(asking)
        try:
            await asyncio.shield(request)
        except CancelledError:
            if await finish(request, _PARTING):
                request.exception()  # nobody wants it any more
            raise

    def close(self) -> None:
        """As psycopg's."""
        self._closed = True
        self.terminate()

    def close_if_lost(self) -> None:
        """Close what was lost in pipeline mode: libpq stays in it, and whoever is refused there
        (server-side cursors, COPY) would hear of that, and not that the connection is lost."""
        if self.pgconn.status != _OK:
            self.terminate()

    def terminate(self) -> None:
        """Close the socket at once; a task waiting for it gets OperationalError."""
        self.wire.finish()
