"""The callbacks of OPTIONS["pool"]: run natively, and what they raise."""

from __future__ import annotations

import asyncio
from asyncio import CancelledError, current_task
from collections.abc import Callable
from typing import Any

import psycopg
from greenlet import GreenletExit

from .. import bridge
from .._wire.locks import OwnLock
from .connection import PooledConnection


def natively(name: str, callback: Callable[..., Any] | None, seconds: float) -> Any:
    """Django's pool callbacks take a synchronous connection: run them natively on the twin.

    Args:
        name: the option.
        callback: its value.
        seconds: for which it may run. Tasks wait no longer for a connection.
    """
    if callback is None:
        return None

    async def run(conn: PooledConnection) -> None:
        task = current_task()
        cancels = task.cancelling() if task is not None else 0
        held, conn.twin.lock = conn.twin.lock, OwnLock()  # nobody else has the connection now
        try:
            async with asyncio.timeout(seconds):
                await bridge.run(callback, conn.twin)
        except TimeoutError as exc:
            raise psycopg.OperationalError(
                f"OPTIONS['pool'][{name!r}] has failed or has not ended within {seconds:g} s: "
                f"{exc!r}"
            ) from exc
        except (CancelledError, GreenletExit) as exc:
            if task is not None and task.cancelling() > cancels:
                raise
            # Nobody has cancelled anything: psycopg_pool takes only an Exception for a failure.
            raise psycopg.OperationalError(f"OPTIONS['pool'][{name!r}] raised {exc!r}") from exc
        finally:
            conn.twin.lock = held

    return run
