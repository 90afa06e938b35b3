"""One contestant's process: obeys orders (JSON lines on standard input) one after another.

Each contestant has a process for itself, so that no settings, garbage or imports are shared; they
take turns, so that none runs while another is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from . import works
from .adapters.base import Adapter, Unsupported
from .contestants import BY_NAME
from .schema import conninfo
from .works import DRAFT, Sizes, Work


class Context:
    """What works need to make their arguments and to check results."""

    def __init__(self, name: str, settings: dict[str, Any], sizes: Sizes) -> None:
        self.name = name
        self.sizes = sizes
        self.turn = 0
        self.grown: float | None = None
        contestant = BY_NAME[name]
        self.conn = psycopg.connect(conninfo(settings), autocommit=True)
        self.runner = asyncio.Runner()
        module = importlib.import_module(f".adapters.{contestant.module}", __package__)
        self.adapter: Adapter = module.ADAPTER(settings, contestant.options)
        self.run(self.adapter.open())
        # Have everybody's connections made: some pools grow on demand, and in the background.
        self.wait(self.adapter.sleep)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the loop, in a context of its own as a request would be."""

        async def whole() -> Any:
            try:
                return await work
            finally:
                await self.adapter.rest()

        return self.runner.run(whole(), context=contextvars.copy_context())

    def wait(self, method: Any, *args: Any) -> Any:
        """Call an adapter's method, asynchronous or not."""
        if inspect.iscoroutinefunction(method):
            return self.run(method(*args))
        return method(*args)

    def sql(self, sql: str, params: Any = ()) -> Any:
        """Rows from our own connection, whose work is not measured."""
        return self.conn.execute(sql, params).fetchall()

    def title(self, number: int) -> str:
        """A title that is unique within a turn and the same for every contestant."""
        return f"draft {self.turn} {number}"

    def store(self, values: list[dict[str, Any]]) -> list[int]:
        """Insert drafts; their keys."""
        sql = (
            f"INSERT INTO bench_draft ({', '.join(DRAFT)}) VALUES (%s, %s, %s, %s, %s, %s, %s)"
            " RETURNING id"
        )
        keys: list[int] = []
        with self.conn.cursor() as cursor, self.conn.transaction():
            rows = [
                [Jsonb(value) if isinstance(value, dict) else value for value in each.values()]
                for each in values
            ]
            cursor.executemany(sql, rows, returning=True)
            while True:
                keys += [row[0] for row in cursor.fetchall()]
                if not cursor.nextset():
                    return keys

    # Orders

    def verify(self, work: Work) -> dict[str, Any]:
        """Do the work once and say what came out and what the database then holds."""
        self.turn = 0
        if work.kind == "special":
            return getattr(self, f"verify_{work.name}")()
        self.sweep()
        args = next(iter(work.calls(self, 1)))
        result = self.wait(getattr(self.adapter, work.method or work.name), *args)
        if work.name == "create":
            # The new instance knows its key.
            key = getattr(result, "id", None) or result[0]
            assert self.sql("SELECT title FROM bench_draft WHERE id = %s", (key,)), "no key"
        digest = works.digest(work.plain(self.adapter, result))
        after = works.digest(work.check(self, args)) if work.check else ""
        self.sweep()
        return {"result": digest, "after": after}

    def verify_stream(self) -> dict[str, Any]:
        # The first time: later the process already has the memory that it needs.
        gc.collect()
        before = _memory("VmRSS")
        reset = _reset_peak()
        count = self.wait(self.streamed)
        self.grown = (_memory("VmHWM") - before) / 1024 if reset else None
        return {"result": str(count), "after": ""}

    def verify_stall(self) -> dict[str, Any]:
        books = self.wait(self.adapter.load, 500)
        return {"result": works.digest([self.adapter.row(book) for book in books]), "after": ""}

    def verify_asgi(self) -> dict[str, Any]:
        book = self.wait(self.adapter.get, 3)
        return {"result": works.digest(self.adapter.row(book)), "after": ""}

    def sweep(self) -> None:
        self.conn.execute("TRUNCATE bench_draft")

    def measure(self, work: Work, turn: int, calls: int | None) -> dict[str, Any]:
        """One turn: the times of as many calls as fit into the slice."""
        self.turn = turn
        method = getattr(self.adapter, work.method or work.name)
        if calls is None:
            # Find out how many fit; this also prepares statements and fills caches. One call
            # tells too little: the first ones learn, and the machine may have been elsewhere.
            calls = 1 if work.heavy else min(4, work.most)
            while True:
                self.turn -= 1_000
                times, _ = self.times(method, work, calls)
                spent = sum(times)
                if spent > self.sizes.slice / 2 or calls >= work.most:
                    break
                calls = min(calls * 4, work.most)
            calls = max(1, min(int(self.sizes.slice / min(times)), work.most))
            self.turn = turn
        times, cpu = self.times(method, work, calls)
        return {
            "value": statistics.median(times) / work.each,
            "mean": statistics.fmean(times) / work.each,
            "cpu": cpu / work.each,
            "calls": calls,
        }

    def times(self, method: Any, work: Work, calls: int) -> tuple[list[float], float]:
        """The time of each call, and this process's CPU time for one (all threads)."""
        args = list(work.calls(self, calls))
        if work.heavy:
            gc.collect()
        cpu = time.process_time()
        if inspect.iscoroutinefunction(method):
            times = self.run(_timed(method, args))
        else:
            times = _timed_sync(method, args)
        cpu = (time.process_time() - cpu) / len(times)
        if work.kind == "write":
            self.sweep()
        # The first calls after a pause run with cold caches.
        return times[len(times) // 10 :], cpu

    # Special works

    def measure_stream(self) -> dict[str, Any]:
        """Stream all events: the time, and how much the process grew at most (the first time)."""
        gc.collect()
        began = time.perf_counter()
        self.wait(self.streamed)
        took = time.perf_counter() - began
        return {"value": took, "stream_memory": self.grown}

    @property
    def streamed(self) -> Any:
        if self.adapter.sync:
            return lambda: sum(1 for _ in self.adapter.stream())  # type: ignore[attr-defined]

        async def stream() -> int:
            count = 0
            async for _ in self.adapter.stream():
                count += 1
            return count

        return stream

    def measure_stall(self) -> dict[str, Any]:
        """Load many books while a timer looks how late the loop comes to it."""
        return self.run(_stall(self.adapter, self.sizes.stall))

    def measure_asgi(self, clients: int) -> dict[str, Any]:
        """Serve HTTP by uvicorn; another process makes requests."""
        return {"value": self.run(_serve(self.adapter, clients, self.sizes))}


async def _timed(method: Any, calls: list[Any]) -> list[float]:
    times = []
    clock = time.perf_counter
    for args in calls:
        began = clock()
        await method(*args)
        times.append(clock() - began)
    return times


def _timed_sync(method: Any, calls: list[Any]) -> list[float]:
    times = []
    clock = time.perf_counter
    for args in calls:
        began = clock()
        method(*args)
        times.append(clock() - began)
    return times


def _memory(name: str) -> int:
    """A figure of /proc/self/status in kB; 0 where there is none."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(name + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        return False
    return True


async def _stall(adapter: Adapter, count: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    pauses: list[tuple[float, float]] = []
    lates: list[tuple[float, float]] = []
    began_gc = 0.0

    def collecting(phase: str, info: Any) -> None:
        nonlocal began_gc
        if phase == "start":
            began_gc = time.perf_counter()
        else:
            pauses.append((began_gc, time.perf_counter()))

    async def look() -> None:
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            lates.append((due, time.perf_counter()))

    gc.collect()
    gc.callbacks.append(collecting)
    watcher = loop.create_task(look())
    await asyncio.sleep(0.01)
    lates.clear()
    began = time.perf_counter()
    try:
        result = adapter.load(count)
        if inspect.isawaitable(result):
            result = await result
        took = time.perf_counter() - began
        await asyncio.sleep(0.005)
    finally:
        gc.callbacks.remove(collecting)
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
    assert len(result) == count
    longest = 0.0
    for due, came in lates:
        collected = sum(max(0.0, min(end, came) - max(start, due)) for start, end in pauses)
        longest = max(longest, came - due - collected)
    return {
        "value": longest,
        "stall_gc": max((end - start for start, end in pauses), default=0.0),
        "stall_load": took,
    }


def application(adapter: Adapter, books: int) -> Any:
    """An ASGI application without a framework: a book by its id as JSON."""
    sync = adapter.sync
    if sync:
        from asgiref.sync import sync_to_async

        get = sync_to_async(adapter.get)  # as Django runs a synchronous view under ASGI
    else:
        get = adapter.request
    number = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal number
        number = number % books + 1
        book = adapter.row(await get(number))
        body = json.dumps({"id": book[0], "title": book[2], "price": str(book[4])}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


async def _serve(adapter: Adapter, clients: int, sizes: Sizes) -> float:
    import uvicorn

    config = uvicorn.Config(
        application(adapter, sizes.books), port=0, log_level="error", lifespan="off",
        access_log=False, loop="asyncio", http="httptools",
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"{__package__}.load", str(port), str(clients), str(sizes.http),
            stdout=subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        return float(out)
    finally:
        server.should_exit = True
        await task


@contextlib.contextmanager
def _protocol() -> Iterator[Any]:
    """The pipe to the coordinator; what libraries print goes to standard error."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with pipe:
        yield pipe


def main() -> None:
    """Obey until standard input ends."""
    with _protocol() as pipe:
        spec = json.loads(sys.stdin.readline())

        def answer(make: Any) -> None:
            try:
                reply = make()
            except Unsupported as exc:
                reply = {"unsupported": str(exc) or "no such feature"}
            except Exception as exc:
                reply = {"error": f"{type(exc).__name__}: {exc}"[:400]}
                if os.environ.get("BENCH_TRACEBACK"):
                    import traceback

                    traceback.print_exc()
            print(json.dumps(reply), file=pipe, flush=True)

        context: Context | None = None

        def start() -> Any:
            nonlocal context
            context = Context(spec["name"], spec["settings"], Sizes(**spec["sizes"]))
            return {"versions": context.adapter.versions(), "remarks": context.adapter.remarks}

        answer(start)
        if context is None:
            return
        for line in sys.stdin:
            order = json.loads(line)
            work = works.BY_NAME[order["work"]]
            if order["do"] == "verify":
                answer(lambda work=work: context.verify(work))
            elif work.name == "asgi":
                answer(lambda order=order: context.measure_asgi(order["clients"]))
            elif work.kind == "special":
                answer(lambda work=work: getattr(context, f"measure_{work.name}")())
            else:
                answer(
                    lambda work=work, order=order: context.measure(
                        work, order["turn"], order.get("calls")
                    )
                )
        with contextlib.suppress(Exception):
            context.runner.run(asyncio.wait_for(context.adapter.close(), 5))
    os._exit(0)  # some libraries' threads do not end


if __name__ == "__main__":
    main()
