"""Thousands of requests to a default project, in this process: they start no thread, leave nothing.

`python -m tests.storms [COUNT] [SEED]` (make soak-requests): first the views that compat.bench.web
measures are asked, COUNT requests in all, 32 at once; then as many whose client goes away, or whose
task is cancelled, at random. test_storms.py does it with some hundreds.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
from collections.abc import Awaitable, Callable

import django
from django.db import connections

import asyncorm
from asyncorm.asgi import get_asgi_application
from asyncorm.bridge import Runner
from asyncorm.demo.postgres import postgres_server
from compat.bench import web
from tests.asgi_client import ask
from tests.support import (
    administrator,
    all_given_back,
    eventually,
    server_connections,
    watched_threads,
)

AT_ONCE = 32
HOST = {"host": "localhost"}


async def main(count: int, seed: int, cookies: list[str]) -> None:
    """Make the requests.

    Raises:
        AssertionError: a thread was started, something was left, or an answer is not the view's.
    """
    app = get_asgi_application()
    rng = random.Random(seed)
    urls = [url for _, url in web.VIEWS.values()]

    async def stays(n: int) -> None:
        answer = await ask(app, urls[n % len(urls)], cookie=cookies[n % AT_ONCE], **HOST)
        assert answer.status == 200, answer

    async def leaves(n: int) -> None:
        gone = asyncio.Event()
        asked = ask(app, rng.choice(urls), gone=gone, cookie=cookies[n % AT_ONCE], **HOST)
        task = asyncio.create_task(asked)
        for way in rng.choices(["wait", "disconnect", "cancel"], k=2):
            await asyncio.sleep(rng.random() * rng.choice([0.001, 0.01, 0.1]))
            gone.set() if way == "disconnect" else task.cancel() if way == "cancel" else None
        await asyncio.wait([task])
        if not task.cancelled():  # answered, or the client had gone before
            assert task.result().status in (0, 200), task.result()

    async def storm(request: Callable[[int], Awaitable[None]]) -> None:
        for n in range(0, count, AT_ONCE):
            await asyncio.gather(*(request(i) for i in range(n, min(n + AT_ONCE, count))))

    await asyncio.gather(*map(stays, range(AT_ONCE)))  # opens the connections, loads the modules
    threads, tasks = threading.active_count(), len(asyncio.all_tasks())
    with watched_threads() as seen:
        await storm(stays)
    assert seen == []
    print(f"{count:,} requests started 0 threads")
    with watched_threads() as seen:
        await storm(leaves)
    await all_given_back()
    assert seen == []
    assert threading.active_count() == threads
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks + 1)  # one may be the pool's
    gc.collect()
    busy = [o for o in gc.get_objects() if type(o) is Runner and o.gr_context is not None]
    assert busy == []
    assert [each for each in connections.all(initialized_only=True) if each.connection] == []
    await asyncorm.close_pools()
    with administrator() as ask_server:
        await eventually(lambda: server_connections(ask_server) == 0)
    print(f"{count:,} with clients that went away left nothing")


if __name__ == "__main__":
    numbers = [int(each) for each in sys.argv[1:]]
    count, seed = (*numbers, *[10_000, 1][len(numbers) :])
    with postgres_server(own=True) as server:
        site = web.CONTESTANTS["asyncorm, its own handler"].site(server.settings)
        cookies = web.prepare(site)
        os.environ.update(web.environment(site))
        django.setup()
        asyncio.run(main(count, seed, cookies))
