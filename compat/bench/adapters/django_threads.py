"""Django's synchronous ORM in threads of its own, each with its connection, awaited from the loop.

What there is without Django's `a*` methods, whose calls go to one thread after another:
`run_in_executor()` with as many threads as the other contestants' pools have connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..works import WORKS
from .base import POOL, Unsupported
from .django_sync import DjangoSync, sleeping


class DjangoThreads(DjangoSync):
    sync = False
    remarks: dict[str, str] = {}

    def __init__(self, settings: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__(settings, {**options, "pool": False})
        self.threads = ThreadPoolExecutor(POOL)

    async def each(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    async def get_100(self, pks: tuple[int, ...]) -> Any:  # type: ignore[override]
        return await asyncio.gather(*[self.get(pk) for pk in pks])

    async def sleep(self) -> Any:  # type: ignore[override]
        await asyncio.gather(*[self.each(list, sleeping(self.m)) for _ in range(POOL)])

    async def load(self, count: int) -> Any:  # type: ignore[override]
        return await self.rows(1, count + 1)

    def stream(self) -> Any:
        raise Unsupported("a server-side cursor belongs to one thread")


def _threaded(name: str) -> Any:
    synchronous = getattr(DjangoSync, name)

    async def method(self: DjangoThreads, *args: Any) -> Any:
        return await self.each(synchronous, self, *args)

    return method


for _name in ({work.name for work in WORKS} | {"drafts"}) - {"empty", "stall", "asgi"}:
    if _name not in vars(DjangoThreads) and hasattr(DjangoSync, _name):
        setattr(DjangoThreads, _name, _threaded(_name))

ADAPTER = DjangoThreads
