"""Runs the demo: server, sample shop, then each scenario in both halves."""

from __future__ import annotations

import os
import platform
from typing import Any

from rich.console import Console

from . import show
from .errors import DemoError
from .figures import Comparison, Report, best
from .halves import HalfProcess
from .load import load, own_schema
from .postgres import postgres_server
from .settings import ASYNCORM, DJANGO, configure

ROUNDS = 5


def run(console: Console, *, rows: int, quick: bool) -> Report:
    """Measure and print everything, as it comes; no server and no process is left."""
    with postgres_server() as server:
        schema = f"asyncorm_demo_{os.getpid()}"
        database = _in_schema(server.settings, schema)
        configure(DJANGO, database, pool=None)
        from django.db.utils import Error

        try:
            with own_schema(schema):
                return _run(console, database, rows, quick)
        except Error as error:
            raise DemoError(f"the database says: {str(error).strip()}") from error


def _run(console: Console, database: dict[str, Any], rows: int, quick: bool) -> Report:
    machine = _machine()
    show.show_header(console, machine)
    with show.show_loading(console, rows) as advance:
        sizes = load(rows, advance)
    show.show_settings(console)

    from .scenarios import scenarios  # needs the settings

    comparisons: list[Comparison] = []
    job = {"database": database, "products": sizes.products, "quick": quick}
    rounds = 1 if quick else ROUNDS
    with HalfProcess(DJANGO, **job) as django, HalfProcess(ASYNCORM, **job) as asyncorm:
        for scenario in scenarios(sizes.products, quick=quick).values():
            show.show_code(console, scenario.title, scenario.source())
            # Turn by turn, so that what else the machine does hits both; the first is the warm-up.
            pairs = [
                (django.measure(scenario.key), asyncorm.measure(scenario.key))
                for _ in range(1 + rounds)
            ]
            befores, afters = zip(*pairs[1:], strict=True)
            comparison = Comparison(
                scenario.key,
                scenario.title,
                scenario.short,
                scenario.note,
                best(befores),
                best(afters),
            )
            if not comparison.same_result:
                raise DemoError(f"the halves returned different rows for: {scenario.title}")
            show.show_comparison(console, comparison)
            comparisons.append(comparison)
    return Report(tuple(comparisons), rows, machine)


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
