"""The maintenance work of a pool, in tasks that live while there is some.

psycopg_pool has a scheduler and three workers for it as long as a pool is open. A loop that lives
for one call (`async_to_sync()`, a Celery task, a management command) opens one connection and ends:
to start, wake, stop and await four tasks for that costs more than its query does.

Of asyncio `Task._log_destroy_pending` is used, for tasks that a loop that is gone leaves behind.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from asyncio import AbstractEventLoop, CancelledError, Task, TimerHandle
from contextvars import Context
from typing import Any, TypeVar

from greenlet import GreenletExit
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from psycopg_pool.pool_async import ReturnConnection, ShrinkPool

C = TypeVar("C", bound=AsyncConnection[Any])

logger = logging.getLogger("psycopg.pool")


class Cancelled(BaseException):
    """A cancellation that psycopg_pool does not take for a failure of the work."""


class UpkeptPool(AsyncConnectionPool[C]):
    """psycopg_pool's pool without idle tasks: no work, no task.

    At most `num_workers` run at once, in an empty context: they inherit nobody's transaction. A
    cancellation ends them, since the end of a loop waits for that; later work gets new ones.
    """

    _loop: AbstractEventLoop
    _workers: list[Task[None]]
    _shrinking: TimerHandle | None = None

    def start(self) -> None:
        """Open the pool on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._ensure_lock()
        self._open()

    def _start_workers(self) -> None:
        pass

    def _start_initial_tasks(self) -> None:
        self._shrink_after(self.max_idle)

    def run_task(self, task: Any) -> None:
        """Have a worker do some work, one more if not all of them are at work."""
        self._tasks.put_nowait(task)
        self._employ()

    async def schedule_task(self, task: Any, delay: float) -> None:
        """psycopg_pool's, for the one thing that it does again and again."""
        assert isinstance(task, ShrinkPool)
        self._shrink_after(delay)

    def _shrink_after(self, seconds: float) -> None:
        if self._closed:
            return
        self._shrinking = self._loop.call_later(seconds, self._shrink, context=Context())

    def _shrink(self) -> None:
        self.run_task(ShrinkPool(self))

    def _employ(self) -> None:
        if self._tasks.empty() or len(self._workers) >= self.num_workers:
            return
        name = f"{self.name}-worker"
        worker = self._loop.create_task(self._maintain(), name=name, context=Context())
        self._workers.append(worker)
        worker.add_done_callback(self._ended)

    def _ended(self, worker: Task[None]) -> None:
        self._workers.remove(worker)
        if not worker.cancelled():
            worker.exception()  # KeyboardInterrupt or SystemExit, which the loop has raised
        self._employ()  # work may have come since it looked for the last time

    async def _maintain(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while not self._tasks.empty():
            work = self._tasks.get_nowait()
            try:
                if self._closed and isinstance(work, ReturnConnection):
                    await work.conn.close()  # psycopg_pool would drop it, and the loop keeps it
                else:
                    await work.run()
            except Cancelled:
                raise CancelledError from None
            except (Exception, CancelledError, GreenletExit) as exc:
                logger.warning("%s failed: %s: %s", work, type(exc).__name__, exc)
            if task.cancelling():
                raise CancelledError

    async def _signal_stop_worker(self) -> list[Task[None]]:
        self._stop_shrinking()  # its timer would keep the pool for as long as max_idle
        return []  # they end by themselves; close() does not wait for a server that is silent

    def dismiss(self) -> None:
        """Cancel what is at work or due."""
        alive = not self._loop.is_closed()
        for worker in self._workers:
            worker._log_destroy_pending = False  # type: ignore[attr-defined]  # nobody waits for it
            if alive:
                worker.cancel()
                continue
            coro: Any = worker.get_coro()
            if inspect.getcoroutinestate(coro) == inspect.CORO_CREATED:
                coro.close()  # or Python would warn of one that was never awaited
        self._stop_shrinking()

    def _stop_shrinking(self) -> None:
        if self._shrinking is not None and not self._loop.is_closed():
            self._shrinking.cancel()
        self._shrinking = None
