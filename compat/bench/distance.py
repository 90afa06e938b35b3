"""Many operations, few round trips: raw psycopg beside multiplexing, batch() and COPY.

`python -m compat.bench.distance`: what `make bench-distance` runs. "Far" is a proxy on loopback, in
a process of its own, that delays each way by 2 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from asgiref.sync import sync_to_async
from psycopg_pool import AsyncConnectionPool

from demo.far import proxy

from .adapters.django_setup import setup
from .run import ROOT
from .schema import conninfo, database

DELAY = 0.002  # seconds, each way
NEAR, FAR = 10, 4  # connections
ROWS = 100_000  # of a COPY
BOOK = "SELECT id, author_id, title, pages, price, published, updated, meta FROM bench_book"
Timed = Callable[[], Awaitable[Any]]


class Bench:
    """The pairs to compare: title, repetitions in one turn, raw psycopg, asyncorm."""

    def __init__(self, near: dict[str, Any], far: dict[str, Any]) -> None:
        import asyncorm

        from .shop import models

        self.asyncorm, self.models = asyncorm, models
        self.pools = {"default": self.raw(near, NEAR), "far": self.raw(far, FAR)}

    @staticmethod
    def raw(settings: dict[str, Any], size: int) -> Any:
        kwargs = {"autocommit": True}
        return AsyncConnectionPool(
            conninfo(settings), min_size=size, max_size=size, open=False, kwargs=kwargs
        )

    async def raw_value(self, alias: str, number: int) -> Any:
        async with self.pools[alias].connection() as conn:
            cursor = await conn.execute("SELECT %s::int", [number])
            return await cursor.fetchone()

    async def value(self, alias: str, number: int) -> Any:
        async with self.asyncorm.cursor(alias) as cursor:
            await cursor.execute("SELECT %s::int", [number])
            return await cursor.fetchone()

    async def raw_get(self, alias: str, pk: int) -> Any:
        async with self.pools[alias].connection() as conn:
            cursor = await conn.execute(f"{BOOK} WHERE id = %s LIMIT 21", [pk])
            return await cursor.fetchall()

    async def get(self, alias: str, pk: int) -> Any:
        return await self.models.Book.objects.using(alias).aget(pk=pk)

    def gathered(self, one: Callable[[str, int], Any], alias: str, n: int) -> Timed:
        async def run() -> None:
            await asyncio.gather(*[one(alias, 1 + i) for i in range(n)])

        return run

    async def raw_dashboard(self, alias: str) -> None:
        async with self.pools[alias].connection() as conn:
            for number in range(10):
                cursor = await conn.execute(f"{BOOK} WHERE author_id = %s", [1 + number])
                await cursor.fetchall()

    async def dashboard(self, alias: str) -> None:
        books = self.models.Book.objects.using(alias)
        await self.asyncorm.batch(
            *[books.filter(author_id=1 + number) for number in range(10)], using=alias
        )

    async def ours_in_block(self, alias: str) -> None:
        async with self.asyncorm.atomic(alias):
            await asyncio.gather(*[self.value(alias, n) for n in range(50)])

    async def raw_in_block(self, alias: str) -> None:
        async with self.pools[alias].connection() as conn, conn.transaction():
            for n in range(50):
                await (await conn.execute("SELECT %s::int", [n])).fetchone()

    async def prefetch(self, alias: str, parallel: bool) -> None:
        from django.test import override_settings

        with override_settings(ASYNCORM={"SWAP_MANAGERS": True, "PARALLEL_PREFETCH": parallel}):
            authors = self.models.Author.objects.using(alias).filter(pk__lte=50)
            await authors.prefetch_related("books", "publisher", "publisher__authors").anative()

    async def stream(self, alias: str, read_ahead: int) -> None:
        books = self.models.Book.objects.using(alias).order_by("pk")[:500]
        number = 0
        async for _ in books.native_iterator(chunk_size=100, read_ahead=read_ahead):
            number += 1
            if number % 100 == 0:
                await asyncio.sleep(0.005)  # each chunk is sent somewhere

    async def limited(self, alias: str, n: int) -> None:
        async with self.asyncorm.parallelism(n, alias):
            await asyncio.gather(*[self.get(alias, 1 + i) for i in range(100)])

    async def create(self, method: str | None) -> None:
        from .works import draft

        Draft = self.models.Draft
        drafts = [Draft(**draft(f"{method} {n}", n)) for n in range(ROWS)]
        began = perf_counter()
        if method is None:
            await sync_to_async(Draft.objects.bulk_create)(drafts)
        else:
            await Draft.objects.native_bulk_create(drafts, method=method)
        self.took = perf_counter() - began
        async with self.asyncorm.cursor() as cursor:
            await cursor.execute("TRUNCATE bench_draft")

    def pairs(self) -> list[tuple[str, Timed, Timed]]:
        p = functools.partial
        return [
            (
                f"{n} gathered {what}, {where}",
                self.gathered(raw, alias, n),
                self.gathered(ours, alias, n),
            )
            for alias, n, where in (
                ("default", 100, f"local socket, {NEAR} connections"),
                ("far", 400, f"2 ms each way, {FAR} connections"),
            )
            for what, raw, ours in (
                ("cursor() statements", self.raw_value, self.value),
                ("aget()", self.raw_get, self.get),
            )
        ] + [
            (
                "ten querysets of two books by batch(), local socket",
                p(self.raw_dashboard, "default"),
                p(self.dashboard, "default"),
            ),
            (
                "ten querysets of two books by batch(), 2 ms each way",
                p(self.raw_dashboard, "far"),
                p(self.dashboard, "far"),
            ),
            (
                "50 statements gathered in a block, 2 ms each way",
                p(self.raw_in_block, "far"),
                p(self.ours_in_block, "far"),
            ),
            (
                "prefetch_related() of three lookups, 2 ms each way (beside it turned off)",
                p(self.prefetch, "far", False),
                p(self.prefetch, "far", True),
            ),
            (
                "stream of five chunks, 5 ms of use each, 2 ms each way, read_ahead=1 (beside 0)",
                p(self.stream, "far", 0),
                p(self.stream, "far", 1),
            ),
            (
                "100 gathered aget() within parallelism(2), 2 ms each way (beside all 4)",
                p(self.limited, "far", FAR),
                p(self.limited, "far", 2),
            ),
        ]

    async def run(self, rounds: int) -> list[dict[str, Any]]:
        for pool in self.pools.values():
            await pool.open(wait=True)
        found = []
        for title, raw, ours in self.pairs():
            for _ in range(3):
                await raw()
                await ours()
            times: list[tuple[float, float]] = []
            for _ in range(rounds):
                began = perf_counter()
                await raw()
                between = perf_counter()
                await ours()
                times.append((between - began, perf_counter() - between))
            found.append(_figures(title, times))
            print(_line(found[-1]), flush=True)
        times = []
        for _ in range(max(3, rounds // 6)):
            await self.create(None)
            ordinary = self.took
            await self.create("copy")
            times.append((ordinary, self.took))
        title = f'native_bulk_create() of {ROWS:,}, method="copy", beside Django\'s bulk_create()'
        found.append(_figures(title, times))
        print(_line(found[-1]), flush=True)
        for pool in self.pools.values():
            await pool.close()
        await self.asyncorm.close_pools()
        return found


def _figures(title: str, times: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = sorted(ours / raw for raw, ours in times)
    return {
        "title": title,
        "raw_ms": statistics.median(raw for raw, _ in times) * 1000,
        "ours_ms": statistics.median(ours for _, ours in times) * 1000,
        "ratio": statistics.median(ratios),
        "from": ratios[len(ratios) // 10],
        "to": ratios[-1 - len(ratios) // 10],
    }


def _line(figures: dict[str, Any]) -> str:
    return (
        "{title}: {raw_ms:.2f} ms, asyncorm {ours_ms:.2f} ms, {ratio:.2f}x ({from:.2f}-{to:.2f})"
    ).format(**figures)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-distance ARGS=...", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--remark", default="", help="a sentence at the top of the page")
    args = parser.parse_args()
    with (
        database(2000, 1) as settings,
        proxy(settings["HOST"], int(settings["PORT"] or 5432), DELAY) as port,
    ):
        far = {**settings, "HOST": "127.0.0.1", "PORT": str(port)}
        options = {"prepare_threshold": 5, "engine": "asyncorm.backends.postgresql"}
        setup(settings, options, "asyncorm", ASYNCORM={"SWAP_MANAGERS": True})
        from django.db import connections

        default = connections.settings["default"]
        pool = {"min_size": FAR, "max_size": FAR}
        connections.settings["far"] = {
            **default,
            **far,
            "OPTIONS": {**default["OPTIONS"], "pool": pool},
        }
        found = asyncio.run(Bench(settings, far).run(args.rounds))
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    lines = [
        f"# Round trips, Python {version}",
        "",
        args.remark or "Both in turns in one run; the median time and ratio, and its spread.",
        f"{platform.machine()}, {multiprocessing.cpu_count()} CPUs. Repeat: `make bench-distance`.",
        "",
        "| | raw psycopg pool [ms] | asyncorm [ms] | ratio |",
        "|---|---:|---:|---:|",
        *(
            f"| {f['title']} | {f['raw_ms']:.2f} | {f['ours_ms']:.2f} "
            f"| {f['ratio']:.2f}x ({f['from']:.2f}-{f['to']:.2f}) |"
            for f in found
        ),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"python{version}-distance"
    (args.out / f"{stem}.md").write_text("\n".join(lines) + "\n")
    (args.out / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"Written: {args.out / stem}.md")


if __name__ == "__main__":
    main()
