"""Where the microseconds of a `native_get` go: steps that each do a little more, and a profile.

The steps are differences of whole measurements, so they are right where a profiler, which slows
small functions down most, is not. The profile then says which functions the time is in.
"""

from __future__ import annotations

import asyncio
import cProfile
import itertools
import json
import pstats
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from .adapters.base import POOL
from .adapters.django_setup import setup
from .adapters.psycopg_raw import GET
from .contestants import BY_NAME
from .schema import conninfo, database

BOOKS = 4_000
_keys = itertools.count()

Step = tuple[str, Callable[[], Awaitable[Any]]]


def _pk() -> int:
    return next(_keys) * 7919 % BOOKS + 1


async def _steps(
    settings: dict[str, Any], rounds: int, calls: int
) -> dict[str, list[tuple[float, float]]]:
    """For each step and round the median time of a call and this process's CPU time per call."""
    import psycopg
    from django.db import connection
    from psycopg_pool import AsyncConnectionPool

    import asyncorm

    from .shop.models import Book

    pool = AsyncConnectionPool(
        conninfo(settings), kwargs={"autocommit": True}, min_size=POOL, max_size=POOL, open=False
    )
    await pool.open(wait=True)
    kept = await pool.getconn()

    async def raw() -> Any:
        async with pool.connection() as conn:
            return await (await conn.execute(GET, (_pk(),))).fetchone()

    async def raw_kept() -> Any:
        return await (await kept.execute(GET, (_pk(),))).fetchone()

    async def raw_checkout() -> Any:
        async with pool.connection():
            pass

    def nothing() -> None:
        pass

    def wrapper() -> Any:
        return connection.alias

    def checkout() -> Any:
        connection.ensure_connection()

    def prepared() -> Any:
        connection.ensure_connection()
        cursor = psycopg.Cursor(connection.connection)
        cursor.execute(GET, (_pk(),), prepare=True)
        return cursor.fetchone()

    def unprepared() -> Any:
        connection.ensure_connection()
        cursor = connection.connection.cursor()
        cursor.execute(GET, (_pk(),))
        return cursor.fetchone()

    def django_cursor() -> Any:
        with connection.cursor() as cursor:
            cursor.execute(GET, (_pk(),))
            return cursor.fetchone()

    def build() -> Any:
        books = Book.objects.filter(pk=_pk())
        books.query.set_limits(high=21)
        return books

    def compiled() -> Any:
        return build().query.get_compiler("default").as_sql()

    def as_list() -> Any:
        return list(build())

    native = asyncorm.native
    steps: list[Step] = [
        ("raw psycopg: pool, prepared statement, fetchone", raw),
        ("  of it: statement on a kept connection", raw_kept),
        ("  of it: checkout and return", raw_checkout),
        ("native(): nothing", native(nothing)),
        ("native(): the connection wrapper (a session)", native(wrapper)),
        ("native(): checkout and return", native(checkout)),
        ("native(): the same SQL prepared, psycopg's Cursor", native(prepared)),
        ("native(): the same SQL, the connection's own cursor", native(unprepared)),
        ("native(): the same SQL, Django's cursor", native(django_cursor)),
        ("native(): build the queryset only", native(build)),
        ("native(): build and compile it", native(compiled)),
        ("native(): list(queryset)", native(as_list)),
        ("native_get", lambda: Book.objects.native_get(pk=_pk())),
    ]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in steps}
    clock = time.perf_counter
    try:
        for _ in range(rounds):
            for name, call in steps:
                times = []
                for _ in range(calls // 10):
                    await call()
                busy = time.process_time()
                for _ in range(calls):
                    began = clock()
                    await call()
                    times.append(clock() - began)
                busy = (time.process_time() - busy) / calls
                found[name].append((statistics.median(times) * 1e6, busy * 1e6))
    finally:
        await pool.putconn(kept)
        await pool.close()
    return found


async def _profiled(calls: int) -> pstats.Stats:
    from .shop.models import Book

    for _ in range(calls // 10):
        await Book.objects.native_get(pk=_pk())
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        await Book.objects.native_get(pk=_pk())
    profiler.disable()
    return pstats.Stats(profiler)


def _medians(values: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(v[0] for v in values), statistics.median(v[1] for v in values)


def _where(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[-3:]) if len(parts) > 3 else path


def profile(out: Path | None = None, rounds: int = 9, calls: int = 200) -> None:
    """Measure, profile and print."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    with database(BOOKS, 10) as settings:
        setup(settings, BY_NAME["native"].options, "asyncorm")

        async def both() -> tuple[dict[str, list[tuple[float, float]]], pstats.Stats]:
            return await _steps(settings, rounds, calls), await _profiled(calls * 10)

        found, stats = asyncio.run(both())
    floor = _medians(next(iter(found.values())))
    table = Table(title="Where the time of a get goes, us", title_justify="left")
    for heading in ("", "time", "ratio", "CPU here", "ratio"):
        table.add_column(heading, justify="left" if not table.columns else "right")
    for name, values in found.items():
        took, busy = _medians(values)
        table.add_row(
            name, f"{took:,.1f}", f"{took / floor[0]:.2f}x", f"{busy:,.1f}",
            f"{busy / floor[1]:.2f}x",
        )  # fmt: skip
    console.print(table)
    console.print(
        "Each native() step holds all that it names. The CPU time is this process's alone: on a "
        "busy machine it is steadier than the time."
    )
    entries: dict[Any, Any] = stats.stats  # type: ignore[attr-defined]
    number = calls * 10
    for title, position in (("of their own", 2), ("with what they call", 3)):
        table = Table(title=f"Functions with most time {title}, per get", title_justify="left")
        for heading in ("function", "calls", "own us", "with callees us"):
            table.add_column(heading, justify="left" if not table.columns else "right")
        most = sorted(entries.items(), key=lambda item: -item[1][position])[:45]
        for (path, line, name), (_, count, own, whole, _) in most:
            table.add_row(
                f"{_where(path)}:{line} {name}" if line else name,
                f"{count / number:g}",
                f"{own / number * 1e6:.1f}",
                f"{whole / number * 1e6:.1f}",
            )
        console.print(table)
    console.print(
        "The profiler adds about as much again to Python code and little to input and output."
    )
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
