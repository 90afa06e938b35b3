"""Runs the demo: server, sample shop, each scenario in both halves, then asyncorm's own acts."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from asyncorm.demo.postgres import postgres_server

from . import show
from .errors import DemoError
from .far import proxy
from .figures import Comparison, Report, best
from .halves import HalfProcess
from .load import load, own_schema
from .settings import ASYNCORM, DELAY, DJANGO, configure

ROUNDS = 3


def run(console: Console, *, rows: int, quick: bool, pictures: Path | None = None) -> Report:
    """Measure and print everything, as it comes; no server and no process is left."""
    with postgres_server() as server:
        schema = f"asyncorm_demo_{os.getpid()}"
        database = _in_schema(server.settings, schema)
        configure(DJANGO, database, pool=None)
        from django.db.utils import Error

        try:
            with own_schema(schema):
                return _run(console, database, rows, quick, pictures)
        except Error as error:
            raise DemoError(f"the database says: {str(error).strip()}") from error


def _run(
    console: Console, database: dict[str, Any], rows: int, quick: bool, pictures: Path | None
) -> Report:
    machine = _machine()
    show.show_header(console, machine)
    with show.show_loading(console, rows) as advance:
        sizes = load(rows, advance)
    show.show_settings(console)

    from .acts import acts  # these need the settings
    from .scenarios import scenarios

    job = {"products": sizes.products, "quick": quick}
    rounds = 1 if quick else ROUNDS

    def compare(work: Any, titles: tuple[str, str], keys: tuple[str, str], *ways: Any) -> Any:
        show.show_code(console, work.title, work.source())
        # Turn by turn, so that what else the machine does hits both; the first is the warm-up.
        pairs = [[way() for way in ways] for _ in range(1 + rounds)]
        before, after = (best(runs) for runs in zip(*pairs[1:], strict=True))
        short = getattr(work, "short", "")
        comparison = Comparison(work.key, work.title, short, work.note, before, after, titles, keys)
        if not comparison.same_result:
            raise DemoError(f"the two ways returned different rows for: {work.title}")
        show.show_comparison(console, comparison)
        return comparison

    near = {**job, "database": database}
    with HalfProcess(DJANGO, **near) as django, HalfProcess(ASYNCORM, **near) as asyncorm:
        comparisons = [
            compare(
                scenario,
                show.TITLES,
                (DJANGO.key, ASYNCORM.key),
                partial(django.measure, key),
                partial(asyncorm.measure, key),
            )
            for key, scenario in scenarios(sizes.products, quick=quick).items()
        ]
    show.show_acts(console)
    with _far(database) as far, HalfProcess(ASYNCORM, **job, database=far) as asyncorm:
        played = [
            compare(
                act,
                act.names,
                ("before", "after"),
                partial(asyncorm.measure, key, 0),
                partial(asyncorm.measure, key, 1),
            )
            for key, act in acts(sizes.products, quick=quick).items()
        ]
        if pictures is not None:  # one as asyncorm.timeline() itself draws it
            asyncorm.measure("parallelism", 1, save=pictures / "timeline.svg")
    return Report(tuple(comparisons), tuple(played), rows, machine)


@contextmanager
def _far(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same database, at a distance."""
    from django.db import connection

    connection.ensure_connection()
    info = connection.connection.info
    with proxy(info.host, info.port, DELAY) as port:
        yield {**settings, "HOST": "127.0.0.1", "PORT": str(port)}


def _in_schema(settings: dict[str, Any], schema: str) -> dict[str, Any]:
    """The same database, with unqualified names meaning the tables of one schema."""
    options = dict(settings.get("OPTIONS", {}))
    options["options"] = f"{options.get('options', '')} -c search_path={schema}".strip()
    return {**settings, "OPTIONS": options}


def _machine() -> dict[str, str | int]:
    """What runs here: figures mean little without it."""
    import django
    import psycopg
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        server = cursor.fetchone()[0]
    return {
        "Python": platform.python_version(),
        "Django": django.__version__,
        "psycopg": psycopg.__version__,
        "PostgreSQL": server.split()[0],
        "CPUs": os.cpu_count() or 1,
    }
