"""Streams: iterating over a server-side cursor in chunks, reading ahead where asked to."""

from __future__ import annotations

import asyncio
from asyncio import CancelledError, Task
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import anyio
from django.db import Error, OperationalError
from django.db.models.query import QuerySet
from django.db.transaction import TransactionManagementError
from psycopg.errors import InvalidCursorName

from . import bridge, pinning
from ._sessions import callsite, leaving
from ._sessions.session import Session
from ._transactions.lifecycle import reserved
from .pages import see


async def stream(queryset: QuerySet[Any], chunk_size: int, read_ahead: int) -> AsyncIterator[Any]:
    """The rows of a queryset: see `native_iterator()`."""

    def begin() -> Any:
        # The router is asked once, and in native code, where it sees the transaction.
        pinned = queryset.using(queryset.db)
        return pinned.db, pinned.iterator(chunk_size=chunk_size)

    using, rows = await bridge.run(begin)
    session, new = await pinning.pin(using)
    most = read_ahead if new or session.root is not None else 0
    ahead = _Chunks(session, new, rows, chunk_size, most)
    try:
        try:
            while True:
                part = await ahead.next()
                for row in part:
                    yield row
                if len(part) < chunk_size:
                    break
        finally:
            try:
                await ahead.stop()
            finally:
                if new:
                    await leaving.unpin(session, partial(_close, rows))
                else:
                    await leaving.clean_up(rows.close)
    except (Error, InvalidCursorName) as exc:
        if isinstance(exc.__cause__, InvalidCursorName) and not new:
            raise OperationalError(
                "The server-side cursor of a stream is gone: the transaction block that it began "
                "in was rolled back or has ended." + see("querysets#streams")
            ) from exc
        if isinstance(exc.__cause__ or exc, InvalidCursorName):
            raise OperationalError(
                f"The server-side cursor of a stream outside a transaction is gone: database "
                f"{using!r} is probably behind a pooler such as PgBouncer, which changed the "
                f"server connection. Set DATABASES[{using!r}]['DISABLE_SERVER_SIDE_CURSORS'] to "
                "True, or stream inside asyncorm.atomic()." + see("pgbouncer#settings")
            ) from exc
        raise


def _close(rows: Any, session: Session) -> None:
    rows.close()
    for cursor in [*(session.cursors or ())]:  # where what makes the rows has failed
        cursor.close()


class _Chunks:
    """Reads the chunks of a stream; a few before they are asked for, in a task of its own.

    Inside a transaction the task takes the lock of the innermost block for a whole chunk, as a
    nested block does: so what the stream's user opens and closes meanwhile cannot come between, and
    a chunk is either untouched or complete. One that still waits for the lock when it is asked for
    is read by the asking task, which may be in the very block that holds the lock.
    """

    def __init__(self, session: Session, new: bool, rows: Any, chunk_size: int, most: int) -> None:
        self.session = session
        self.new = new
        self.rows = rows
        self.chunk_size = chunk_size
        self.most = most  # that are read ahead
        self.origin = callsite.caller() if most else ""
        self.ready: deque[list[Any]] = deque()
        self.task: Task[None] | None = None
        self.reading = new  # whether the task's chunk is begun, and must come to its end
        self.changed = asyncio.Event()  # the task has read a chunk, or has ended
        self.ended = False

    async def next(self) -> list[Any]:
        """The next chunk; those after it are read meanwhile."""
        while not self.ready:
            if self.task is None:
                self._add(await self._run(self._chunk))
            elif self.task.done():
                task, self.task = self.task, None
                task.result()
            elif self.reading:
                self.changed.clear()
                try:
                    await self.changed.wait()
                except CancelledError:
                    self.task.cancel()
                    raise
            else:
                await self._end(self.task)
                self.task = None
        part = self.ready.popleft()
        idle = self.task is None or (
            self.task.done() and not self.task.cancelled() and not self.task.exception()
        )
        if idle and self.most and not self.ended:
            self.task = asyncio.create_task(self._work())
        return part

    async def stop(self) -> None:
        """Read no more. Inside a transaction, where a cancelled statement would be the end of it,
        a chunk that is begun comes to its end.
        """
        self.ended = True
        if self.task is not None:
            await self._end(self.task, cancel=self.new or not self.reading)

    async def _end(self, task: Task[None], cancel: bool = True) -> None:
        if cancel:
            task.cancel()
        try:
            await asyncio.wait((task,))
        except CancelledError:
            task.cancel()
            with anyio.CancelScope(shield=True):
                while not task.done():
                    with suppress(CancelledError):
                        await asyncio.wait((task,))
            raise
        finally:
            if not task.cancelled():
                task.exception()  # it is known

    async def _work(self) -> None:
        try:
            while not self.ended and len(self.ready) < self.most:
                try:
                    part = await self._run(self._chunk if self.new else self._chunk_in_block)
                except TransactionManagementError:
                    if self.reading:
                        raise
                    break  # the block has ended, or does not come free: who asks will see
                finally:
                    self.reading = self.new
                self._add(part)
                self.changed.set()
        finally:
            self.changed.set()

    async def _run(self, chunk: Callable[[], list[Any]]) -> list[Any]:
        return await (leaving.run_in(self.session, chunk) if self.new else bridge.run(chunk))

    def _add(self, part: list[Any]) -> None:
        self.ready.append(part)
        self.ended = self.ended or len(part) < self.chunk_size

    def _chunk(self) -> list[Any]:
        return list(islice(self.rows, self.chunk_size))

    def _chunk_in_block(self) -> list[Any]:
        with reserved(self.session, self.origin):
            self.reading = True
            return self._chunk()
