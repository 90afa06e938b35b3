"""`manage.py asyncorm bench`: Django's own asynchronous queries against native ones, here.

It reads, and writes nothing: a get, a list and a hundred gets at once, of a model of the project,
in its database. Django's are what its `a*` methods do without the swap: `sync_to_async()`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Hashable
from statistics import median
from time import perf_counter
from typing import Any

from asgiref.sync import sync_to_async
from django.apps import apps
from django.core.management import CommandError
from django.db import DEFAULT_DB_ALIAS, connections, router

from .. import pools
from .._sessions import engines
from ..pages import see

_MOST = 100  # rows, and gets at once
_LEAST_ROUNDS = 5

Query = Callable[[], Awaitable[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of which model, where, for how long."""
    parser.add_argument(
        "model", nargs="?", help="app_label.Model; the one with the most rows by default"
    )
    parser.add_argument("--database", default=DEFAULT_DB_ALIAS, help="the alias of the database")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each line of the table, 1 by default"
    )


def run(options: dict[str, Any], write: Callable[[str], Any]) -> None:
    """Measure, and print a table.

    Raises:
        CommandError: there is no such model, or nothing to read.
    """
    alias = options["database"]
    if alias not in connections.settings or engines.native_class(alias) is None:
        raise CommandError(f"Database {alias!r} does not run natively." + see("command#bench"))
    model = _named(options["model"]) if options["model"] else _largest(alias)
    keys = list(model._base_manager.using(alias).values_list("pk", flat=True)[:_MOST])
    if not keys:
        raise CommandError(
            f"{model._meta.label} has no rows in database {alias!r}: name another."
            + see("command#bench")
        )
    connections[alias].close()
    write(f"{model._meta.label} in database {alias!r}; milliseconds, the median of the rounds")
    write(f"{'':32}{'Django':>10}{'native':>10}{'':>8}")
    for name, djangos, native in asyncio.run(_measured(model, alias, keys, options["seconds"])):
        write(f"{name:32}{djangos:>10.2f}{native:>10.2f}{djangos / native:>7.1f}x")


def _named(label: str) -> Any:
    try:
        return apps.get_model(label)
    except (LookupError, ValueError) as exc:
        why = exc if isinstance(exc, LookupError) else "It is written app_label.Model."
        raise CommandError(f"There is no model {label!r}: {why}" + see("command#bench")) from exc


def _largest(alias: str) -> Any:
    """The model whose table has the most rows, as far as the server has counted them."""
    models = {
        model._meta.db_table: model
        for model in apps.get_models()
        if model._meta.managed and router.allow_migrate_model(alias, model)
    }
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "SELECT relname FROM pg_stat_user_tables WHERE relname = ANY(%s)"
            " ORDER BY n_live_tup DESC, relname LIMIT 1",
            [list(models)],
        )
        row = cursor.fetchone()
    if row is None:
        raise CommandError(
            f"Database {alias!r} has no table of a model of the project." + see("command#bench")
        )
    return models[row[0]]


async def _measured(
    model: Any, alias: str, keys: list[Any], seconds: float
) -> list[tuple[str, float, float]]:
    """What is measured, and the milliseconds of Django and of native code."""
    rows = model._base_manager.using(alias)

    def get(key: Hashable) -> Any:
        return rows.get(pk=key)

    def a_list() -> Any:
        return list(rows.order_by("pk")[:_MOST])

    async def djangos_hundred() -> None:
        await asyncio.gather(*(sync_to_async(get)(keys[n % len(keys)]) for n in range(_MOST)))

    async def native_hundred() -> None:
        await asyncio.gather(*(rows.native_get(pk=keys[n % len(keys)]) for n in range(_MOST)))

    pairs: list[tuple[str, Query, Query]] = [
        ("a get by pk", lambda: sync_to_async(get)(keys[0]), lambda: rows.native_get(pk=keys[0])),
        (
            f"a list of {len(keys)}",
            sync_to_async(a_list),
            lambda: rows.order_by("pk")[:_MOST].anative(),
        ),
        (f"{_MOST} gets gathered", djangos_hundred, native_hundred),
    ]
    try:
        return [(name, *await _compared(one, other, seconds)) for name, one, other in pairs]
    finally:
        await sync_to_async(connections.close_all)()
        await pools.close_pools()


async def _compared(one: Query, other: Query, seconds: float) -> tuple[float, float]:
    """Run both in turns, so that what else the machine does meets both."""
    for query in (one, other) * 3:  # connections are opened, statements compiled and prepared
        await query()
    times: tuple[list[float], list[float]] = [], []
    end = perf_counter() + seconds
    while perf_counter() < end or len(times[0]) < _LEAST_ROUNDS:
        for query, taken in zip((one, other), times, strict=True):
            began = perf_counter()
            await query()
            taken.append((perf_counter() - began) * 1000)
    return median(times[0]), median(times[1])
