"""The process that measures one half; takes orders and answers in lines of JSON."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from .figures import Run
from .recorder import Recorder
from .settings import ASYNCORM, DJANGO, HALVES, POOL, Half, configure


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # a stray print must not garble the answers
    job = json.loads(sys.stdin.readline())
    half = HALVES[job["half"]]
    configure(half, job["database"], pool=POOL)

    from .scenarios import scenarios

    known: dict[str, Any] = {**scenarios(job["products"], quick=job["quick"])}
    if half is ASYNCORM:
        from .acts import acts

        known |= acts(job["products"], quick=job["quick"])
    recorder = Recorder()
    with asyncio.Runner() as runner:  # one event loop for all of it, and so one pool
        runner.run(_install(recorder, half))
        for line in sys.stdin:
            order = json.loads(line)
            work = known[order["scenario"]]
            run_it = work.run if order["way"] is None else partial(work.run, order["way"])
            try:
                run = runner.run(_measure(run_it, recorder))
                answer: dict[str, Any] = {"run": run.to_json()}
                if order["save"]:
                    recorder.save(order["save"])
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


async def _measure(work: Callable[[], Awaitable[list[Any]]], recorder: Recorder) -> Run:
    recorder.begin()
    rows = await work()
    seconds = recorder.elapsed()
    _compare_with_server(rows, recorder)
    return Run(
        seconds=seconds,
        rounds=(seconds,),
        threads=len(recorder.threads),
        result=_fingerprint(rows),
        statements=tuple(sorted(recorder.statements, key=lambda statement: statement.start)),
    )


async def _install(recorder: Recorder, half: Half) -> None:
    """Put the recorder where the half runs its statements: Django's threads, or everywhere."""
    from django.db.backends.signals import connection_created

    from asyncorm.cursor_events import tell

    def install(connection: Any, **kwargs: Any) -> None:
        connection.execute_wrappers[:] = [tell]

    if half is DJANGO:  # a thread for each request, with a connection of its own
        connection_created.connect(install, weak=False)
    recorder.__enter__()  # for as long as the process lives


def _compare_with_server(rows: list[Any], recorder: Recorder) -> None:
    """Rows that carry pg_backend_pid() must name the connections that were recorded."""
    told = {row.backend for row in rows if hasattr(row, "backend")}
    recorded = {statement.connection for statement in recorder.statements}
    if told and told != recorded:
        raise RuntimeError(f"the server names backends {told}, but recorded were {recorded}")


def _fingerprint(rows: list[Any]) -> str:
    """A hash of all the rows' values, to show that both halves got the same."""
    return hashlib.sha256(repr(_plain(rows)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    from django.db.models import Model

    if isinstance(value, Model):
        names = sorted(n for n in vars(value) if not n.startswith("_") and n != "backend")
        fetched = getattr(value, "_prefetched_objects_cache", {})
        related = [(name, _plain(list(fetched[name]))) for name in sorted(fetched)]
        return [(name, getattr(value, name)) for name in names] + related
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


if __name__ == "__main__":
    main()
