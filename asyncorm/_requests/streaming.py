"""Sends what a synchronous iterator yields, as soon as it does, from where it has to run."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from asgiref.sync import sync_to_async

from .. import bridge
from . import flow

Send = Callable[[bytes], Coroutine[Any, Any, None]]

_AHEAD = 32  # parts that the thread may be ahead of the client


async def natively(content: Iterator[bytes], send: Send) -> None:
    """Iterate natively, as one operation: a cursor that is read from stays open between parts."""

    def work() -> None:
        for part in content:
            bridge.await_(flow.cancellable(send, part))

    await flow.natively(work)


async def from_thread(content: Iterator[bytes], send: Send) -> None:
    """Iterate in the request's thread, which does not wait for each part to be sent."""
    loop = asyncio.get_running_loop()
    parts: deque[bytes] = deque()
    news = asyncio.Event()
    room = threading.Semaphore(_AHEAD)
    left = False

    def work() -> None:
        for part in content:
            room.acquire()
            if left:
                return
            parts.append(part)
            loop.call_soon_threadsafe(news.set)

    working = asyncio.ensure_future(sync_to_async(work)())
    working.add_done_callback(lambda _: news.set())
    try:
        while parts or not working.done():
            await news.wait()
            news.clear()
            while parts:
                await send(parts.popleft())
                room.release()
    finally:
        left = True
        room.release()
        await asyncio.wait([working])
        working.result()  # whether the client is still there or not
