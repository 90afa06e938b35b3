"""Instructions of one operation, counted by valgrind: repeatable where times are not.

`python -m compat.bench.instructions`: what `make bench-instructions` runs. The client's process is
run by callgrind; what the server does is not counted. A busy machine gives the same figures within
a percent, so they can be held against those that are kept in docs/benchmarks/instructions.json,
which are of one interpreter, Django and build of psycopg each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from .run import ROOT
from .schema import database
from .works import BY_NAME, TINY

KEPT = ROOT / "docs" / "benchmarks" / "instructions.json"
TOLERANCE = 0.05
CONTESTANT = "swap"
# How many calls are counted, so often: what falls due now and then (a full collection, a pool's
# upkeep) is in one round and not in another.
CALLS = {
    "get": 80, "get_100": 3, "count": 60, "exists": 60, "aggregate": 40, "page": 40, "rows": 3,
    "values": 8, "related": 8, "prefetch": 3, "create": 60, "save": 60, "update": 60,
    "delete": 60, "get_or_create": 40, "transaction": 20,
}  # fmt: skip
ROUNDS = 3
# Calls before that: each of a pool's connections prepares the statement.
WARMING = {"get_100": 8, "rows": 10, "values": 20, "related": 20, "prefetch": 6}
_WARMING = 64
_MISSING = """\
valgrind is not installed: it counts the instructions. Install it and try again:
    apt install valgrind    or    dnf install valgrind    (there is none for macOS on ARM)"""


def measure(names: list[str], contestant: str = CONTESTANT) -> dict[str, float]:
    """Thousands of instructions of one operation of each work."""
    if not (valgrind := shutil.which("valgrind")):
        raise SystemExit(_MISSING)
    with (
        database(TINY.books, TINY.events) as settings,
        tempfile.TemporaryDirectory(prefix="asyncorm-instructions-") as folder,
    ):
        out = Path(folder, "counts")
        done = subprocess.run(
            [
                valgrind, "--tool=callgrind", f"--callgrind-out-file={out}",
                "--dump-before=getpriority*", "--combine-dumps=no",
                sys.executable, "-m", __spec__.name,
                "--work", contestant, ",".join(names), json.dumps(settings),
            ],
            cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"The counted process failed:\n{done.stderr[-4000:]}")
        # Each round has begun and ended with a dump.
        counted = iter([_total(Path(f"{out}.{2 + 2 * i}")) for i in range(ROUNDS * len(names))])
        return {
            name: round(statistics.median(islice(counted, ROUNDS)) / _operations(name) / 1000, 1)
            for name in names
        }


def _operations(name: str) -> int:
    return CALLS[name] * BY_NAME[name].each


def _total(dump: Path) -> int:
    with dump.open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("totals:"))


def _mark() -> None:
    """Have callgrind write down what it has counted, and begin anew."""
    os.getpriority(os.PRIO_PROCESS, 0)


def work(contestant: str, names: list[str], settings: dict[str, Any]) -> None:
    """Do the works, in the process that is counted."""
    from .worker import Context

    context = Context(contestant, settings, TINY)
    for name in names:
        each = BY_NAME[name]
        method = getattr(context.adapter, name)
        for turn in range(1 + ROUNDS):
            context.turn = turn
            counted = turn > 0
            calls = list(
                each.calls(context, CALLS[name] if counted else WARMING.get(name, _WARMING))
            )
            # What is there has not to be looked through: a full collection falls due at any time.
            gc.collect()
            gc.freeze()
            context.run(_done(method, calls, counted))
            if each.kind == "write":
                context.sweep()


async def _done(method: Any, calls: list[Any], counted: bool) -> None:
    if counted:
        _mark()
    for args in calls:
        await method(*args)
    if counted:
        _mark()


def kind() -> str:
    """What figures are comparable for."""
    import django
    import psycopg

    version = "{}.{}".format(*sys.version_info)
    return (
        f"{platform.machine()}, Python {version}, Django {'.'.join(map(str, django.VERSION[:2]))}, "
        f"psycopg {psycopg.__version__.rpartition('.')[0]} ({psycopg.pq.__impl__})"
    )


def compare(found: dict[str, float], kept: dict[str, float]) -> tuple[list[str], list[str]]:
    """A table's lines, and what is over the tolerance or has no figure to be held against."""
    lines, over = [], []
    for name, value in found.items():
        was = kept.get(name)
        if was is None:
            lines.append(f"{name:16}{value:12,.1f}")
            over.append(f"{name}: no figure is kept")
            continue
        ratio = value / was
        lines.append(f"{name:16}{value:12,.1f}{was:12,.1f}{ratio:8.3f}")
        if ratio > 1 + TOLERANCE:
            over.append(f"{name}: {ratio - 1:.1%} more than {was:,.1f}")
    return lines, over


def main() -> None:
    """Measure; record, or compare and end with status 1 where a work costs more."""
    parser = argparse.ArgumentParser(prog="make bench-instructions ARGS=...", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the figures into docs/")
    parser.add_argument("--works", default=",".join(CALLS), metavar="NAMES")
    parser.add_argument("--contestant", default=CONTESTANT, help="compared only by default")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        contestant, names, settings = args.work
        work(contestant, names.split(","), json.loads(settings))
        return
    names = args.works.split(",")
    if unknown := set(names) - set(CALLS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CALLS)}")
    figures = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    mine = kind()
    found = measure(names, args.contestant)
    compared = args.contestant == CONTESTANT
    lines, over = compare(found, figures.get(mine, {}) if compared else {})
    print(f"{mine}: thousands of instructions of one operation; kept; ratio")
    print(*lines, sep="\n", flush=True)
    if not compared:
        return
    if args.record:
        figures[mine] = {**figures.get(mine, {}), **found}
        KEPT.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
        print(f"Written: {KEPT}")
    elif over:
        print(*over, sep="\n", flush=True)
        raise SystemExit('Where that is right, record it: make bench-instructions ARGS="--record"')


if __name__ == "__main__":
    main()
