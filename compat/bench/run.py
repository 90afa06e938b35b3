"""Run the contestants in turns and collect what they measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg

from .contestants import FLOOR, Contestant
from .schema import conninfo, database
from .works import Sizes, Work

TIMEOUT = 600  # seconds for one order
ROOT = Path(__file__).resolve().parents[2]
CLIENTS = (1, 64)
MISSING = "missing-peers.json"  # in the environment: written by install.py
# Figures that a work gives besides its own: name, title, unit.
EXTRA = {
    "stream_memory": ("memory added while streaming, peak", "MB"),
    "stall_gc": ("longest garbage collection meanwhile", "ms"),
    "stall_load": ("time of that load", "ms"),
}


class Failed(Exception):
    """A contestant did not do what it was told."""


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, settings: dict[str, Any], sizes: Sizes) -> None:
        self.contestant = contestant
        self.calls: dict[str, int] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_TRACEBACK") else subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        self.send(
            {"name": contestant.name, "settings": settings, "sizes": dataclasses.asdict(sizes)}
        )

    def send(self, order: Any) -> None:
        assert self.process.stdin
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed("its process has ended") from None

    def receive(self, timeout: float = TIMEOUT) -> Any:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.process.kill()
            raise Failed(f"no answer within {timeout:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed("its process has ended")
        answer = json.loads(line)
        if problem := answer.get("error") or answer.get("unsupported"):
            raise Failed(problem)
        return answer

    def ask(self, **order: Any) -> Any:
        self.send(order)
        return self.receive()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def running(
    contestants: list[Contestant], settings: dict[str, Any], sizes: Sizes, skipped: dict[str, str]
) -> Iterator[tuple[dict[str, Worker], dict[str, Any]]]:
    """Workers by name and what they say of themselves; who does not start is `skipped`."""
    missing = {}
    if (file := Path(sys.prefix, MISSING)).exists():
        missing = json.loads(file.read_text())
    workers: dict[str, Worker] = {}
    info: dict[str, Any] = {"versions": {}, "remarks": {}}
    try:
        for contestant in contestants:
            reason = contestant.unfit or missing.get(contestant.package)
            if reason:
                skipped[contestant.name] = reason
            else:
                workers[contestant.name] = Worker(contestant, settings, sizes)
        for name, worker in list(workers.items()):
            try:
                answer = worker.receive()
                info["versions"] |= answer["versions"]
                info["remarks"][name] = answer["remarks"]
            except Failed as exc:
                skipped[name] = str(exc)
                workers.pop(name).stop()
        yield workers, info
    finally:
        for worker in workers.values():
            worker.process.stdin.close()  # type: ignore[union-attr]
        for worker in workers.values():
            worker.stop()


def run(
    contestants: list[Contestant],
    chosen: list[Work],
    sizes: Sizes,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The whole benchmark; the result as JSON-able data."""
    skipped: dict[str, str] = {}
    wrong: dict[str, dict[str, str]] = {}
    values: dict[str, dict[str, list[float]]] = {}
    began = time.time()
    say("filling the database")
    with database(sizes.books, sizes.events) as settings:
        with psycopg.connect(conninfo(settings)) as conn:
            server = f"{conn.info.server_version // 10000}.{conn.info.server_version % 10000}"
        say("starting the contestants")
        with running(contestants, settings, sizes, skipped) as (workers, info):
            if FLOOR not in workers:
                raise Failed(f"the floor, {FLOOR}, does not run: {skipped.get(FLOOR)}")
            for work in chosen:
                say(work.title.format(**dataclasses.asdict(sizes)))
                able = _able(work, workers, wrong)
                rounds = sizes.heavy if work.heavy else sizes.rounds
                if work.name == "stream":
                    rounds = 1  # minutes
                for turn in range(1, rounds + 1):
                    _round(work, turn, able, values, wrong)
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)),
        "seconds": round(time.time() - began, 1),
        "sizes": dataclasses.asdict(sizes),
        "machine": machine(),
        "python": platform.python_version(),
        "server": server,
        "versions": dict(sorted(info["versions"].items(), key=lambda item: item[0].lower())),
        "remarks": info["remarks"],
        "contestants": [
            {"name": each.name, "title": each.title, "variant": each.variant}
            for each in contestants
        ],
        "metrics": metrics(chosen, sizes),
        "values": values,
        "skipped": skipped,
        "failed": wrong,
    }


def _round(
    work: Work,
    turn: int,
    able: list[Worker],
    values: dict[str, dict[str, list[float]]],
    wrong: dict[str, dict[str, str]],
) -> None:
    """Everybody's turn once, the floor's more often: all are compared with it."""
    floor = next(worker for worker in able if worker.contestant.name == FLOOR)
    others = [worker for worker in able if worker is not floor]
    shift = turn * 5 % max(1, len(others))  # another order in each round
    others = others[shift:] + others[:shift]
    order = [floor, *others]
    if not work.heavy:
        third = -(-len(others) // 3)
        order = [floor, *others[:third], floor, *others[third : 2 * third], floor]
        order += others[2 * third :]
    found: dict[str, dict[str, list[float]]] = {}
    for worker in order:
        try:
            for name, value in _measure(worker, work, turn):
                by_name = found.setdefault(name, {})
                by_name.setdefault(worker.contestant.name, []).append(value)
        except Failed as exc:
            wrong.setdefault(worker.contestant.name, {})[work.name] = str(exc)
    for name, of_round in found.items():
        for contestant, several in of_round.items():
            values.setdefault(name, {}).setdefault(contestant, []).append(
                statistics.median(several)
            )


def _able(work: Work, workers: dict[str, Worker], wrong: dict[str, dict[str, str]]) -> list[Worker]:
    """Who does the work and has the floor's result."""
    expected = workers[FLOOR].ask(do="verify", work=work.name)
    able = []
    for name, worker in workers.items():
        if (worker.contestant.variant and not work.core) or (work.only and name not in work.only):
            continue
        try:
            got = worker.ask(do="verify", work=work.name)
            for part in ("result", "after"):
                if got[part] != expected[part]:
                    raise Failed(f"wrong {part}: {_difference(got[part], expected[part])}")
            able.append(worker)
        except Failed as exc:
            wrong.setdefault(name, {})[work.name] = str(exc)
    return able


def _difference(got: str, expected: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b),
        min(len(got), len(expected)),
    )
    start = max(0, at - 25)
    return f"{got[start : at + 40]!r} where {expected[start : at + 40]!r} is right"


def _measure(worker: Worker, work: Work, turn: int) -> list[tuple[str, float]]:
    if work.name == "asgi":
        found = []
        for clients in CLIENTS:
            answer = worker.ask(do="measure", work=work.name, clients=clients)
            found.append((f"asgi_{clients}", answer["value"]))
        return found
    answer = worker.ask(do="measure", work=work.name, turn=turn, calls=worker.calls.get(work.name))
    if "calls" in answer:
        worker.calls[work.name] = answer["calls"]
    extra = [(name, answer[name]) for name in EXTRA if answer.get(name) is not None]
    extra += [(f"{work.name}_{name}", answer[name]) for name in ("cpu", "mean") if name in answer]
    return [(work.name, answer["value"]), *extra]


def metrics(chosen: list[Work], sizes: Sizes) -> list[dict[str, Any]]:
    """What the columns of the result are: name, title, unit, whether more is better."""
    found: list[dict[str, Any]] = []
    for work in chosen:
        title = work.title.format(**dataclasses.asdict(sizes))
        if work.name == "asgi":
            found += [
                {
                    "name": f"asgi_{clients}",
                    "title": f"{title}, {clients} client{'s' * (clients > 1)}",
                    "unit": work.unit,
                    "more": True,
                }
                for clients in CLIENTS
            ]
        else:
            found.append({"name": work.name, "title": title, "unit": work.unit, "more": False})
            if work.kind != "special" and work.name not in ("sleep", "empty"):
                found += [
                    {
                        "name": f"{work.name}_{kind}",
                        "title": title,
                        "unit": work.unit,
                        "more": False,
                    }
                    for kind in ("cpu", "mean")
                ]
        for name, (text, unit) in EXTRA.items():
            if name.startswith(work.name):
                found.append({"name": name, "title": text, "unit": unit, "more": False})
    return found


def machine() -> dict[str, Any]:
    """Where it ran, and how busy the machine was at the start."""
    model = ""
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/cpuinfo") as info:
            line = next(line for line in info if line.startswith("model name"))
            model = line.split(":", 1)[1].strip()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "cpus": cpus,
        "load": round(os.getloadavg()[0], 1),
    }
