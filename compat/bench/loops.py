"""What a loop that lives for one call costs: Django's own asynchronous methods beside asyncorm's.

`python -m compat.bench.loops`: what `make bench-loops` runs. One `aget()` by `async_to_sync()`, as
commands, Celery tasks and WSGI call it: with Django's connections closed after each call (as after
a request or a Celery task with CONN_MAX_AGE 0) and kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

from .run import ROOT
from .schema import database

WAYS = {
    "closed": "CONN_MAX_AGE 0, connections closed after each call",
    "kept": "CONN_MAX_AGE 0, never closed: a command, a script",
    "aged": "CONN_MAX_AGE 60",
}


def work(engine: str, way: str, calls: int, settings: dict[str, Any]) -> dict[str, float]:
    """Wall and CPU milliseconds of a call, the best of five turns."""
    import django
    from asgiref.sync import async_to_sync
    from django.conf import settings as django_settings
    from django.db import connections

    age = 60 if way == "aged" else 0
    django_settings.configure(
        DATABASES={"default": {**settings, "ENGINE": engine, "CONN_MAX_AGE": age}},
        INSTALLED_APPS=["compat.bench.shop", *(["asyncorm"] if "asyncorm" in engine else [])],
        ASYNCORM={"SWAP_MANAGERS": True},
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    )
    django.setup()
    from .shop.models import Book

    async def get() -> Any:
        return await Book.objects.aget(pk=1)

    call = async_to_sync(get)
    turns = []
    for turn in range(6):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
            if way == "closed":
                connections.close_all()
        if turn:  # not the first
            turns.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: 1000 * min(seconds) / calls
        for name, seconds in zip(("wall", "cpu"), zip(*turns, strict=True), strict=True)
    }


def measure(calls: int, rounds: int) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """Each way: what Django takes, what asyncorm does; turn by turn, the best of all."""
    results = []
    with database(10, 10) as settings:
        for way in WAYS:
            found: dict[str, list[dict[str, float]]] = {"django.db": [], "asyncorm": []}
            for _ in range(rounds):
                for name, each in found.items():
                    asked = [f"{name}.backends.postgresql", way, str(calls), json.dumps(settings)]
                    done = subprocess.run(
                        [sys.executable, "-m", __spec__.name, "--work", *asked],
                        cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, check=True,
                    )  # fmt: skip
                    each.append(json.loads(done.stdout))
            best = [
                {key: min(turn[key] for turn in each) for key in ("wall", "cpu")}
                for each in found.values()
            ]
            results.append((WAYS[way], best[0], best[1]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compat.bench.loops", description=__doc__)
    parser.add_argument("--calls", type=int, default=100, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        engine, way, calls, settings = args.work
        print(json.dumps(work(engine, way, int(calls), json.loads(settings))))
        return
    import django

    print(f"Python {platform.python_version()}, Django {django.__version__}\n")
    print("| | Django, ms | CPU | asyncorm, ms | CPU | times Django's | CPU |")
    print("|---|---|---|---|---|---|---|")
    for title, theirs, ours in measure(args.calls, args.rounds):
        figures = [theirs["wall"], theirs["cpu"], ours["wall"], ours["cpu"]]
        ratios = [ours[key] / theirs[key] for key in ("wall", "cpu")]
        print(f"| {title} | {' | '.join(f'{each:.2f}' for each in (*figures, *ratios))} |")


if __name__ == "__main__":
    main()
