"""A primary that fails under load and is replaced by its standby: what an application sees.

`python -m tests.availability` (make test-availability) tries each set-up with each fault and writes
the table of docs/reliability.md; test_availability.py holds what is promised.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

import django
from django.apps import apps

if not apps.ready:  # run as a program
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.project.settings")
    django.setup()

from django.db import InterfaceError, InternalError, OperationalError
from django.test import override_settings

import asyncorm
from asyncorm import replicas
from asyncorm._wire.cancelling import CANCEL_TIMEOUT
from asyncorm.demo.postgres import Server
from asyncorm.replicas import ReplicaRouter
from tests import balancer, bouncer
from tests.pool.test_standby import ask, reach, replicated
from tests.project.myapp.models import Item
from tests.support import database, eventually

WRITERS = READERS = 4
DEADLINE = 3.0  # seconds for a transaction, where the server hangs
CONNECT_TIMEOUT = 2  # seconds; psycopg's shortest
POOL = {"min_size": 0, "max_size": 5, "timeout": 30}
OPTIONS = {"options": None, "pool": POOL, "connect_timeout": CONNECT_TIMEOUT}
MENDS = (OperationalError, InternalError, InterfaceError, asyncorm.CommitUnknown, TimeoutError)

SWITCHES = {"HAProxy, sessions shut": True, "HAProxy, sessions kept": False}
SETUPS = ("several hosts", *SWITCHES, "PgBouncer, RELOAD and RECONNECT")
FAULTS = ("killed", "switched over", "made read-only", "hung")
_ids = count(10**6)


def missing(setup: str) -> str | None:
    """The program that a set-up needs and that is not installed."""
    for name, program in (("HAProxy", balancer.program), ("PgBouncer", bouncer.program)):
        if setup.startswith(name) and program() is None:
            return name
    return None


@dataclass
class Seen:
    """What the application saw.

    Attributes:
        errors: of writes, by their class's name; each operation's counts once.
        read_errors: of reads.
        first_write: seconds from the promotion to the first acknowledged write.
        pause: the longest read, in seconds.
        late: for how long at most the loop itself stood still: the machine did something else, or
            the tests' garbage was collected.
        lost: acknowledged, and not there.
        writes, reads: how many there were.
    """

    setup: str
    fault: str
    retrying: bool
    errors: Counter[str] = field(default_factory=Counter)
    read_errors: Counter[str] = field(default_factory=Counter)
    first_write: float = 0.0
    pause: float = 0.0
    late: float = 0.0
    lost: int = 0
    writes: int = 0
    reads: int = 0


class Load:
    """Writers on the primary and readers where the router says, until told to stop."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.stopped = False
        self.written: dict[int, float] = {}  # when it was acknowledged
        deadline = DEADLINE if seen.fault == "hung" else None

        async def write(number: int) -> None:
            async with asyncio.timeout(deadline), asyncorm.atomic("primary"):
                # As often as you like: it is there once.
                await Item.objects.using("primary").native_update_or_create(remote_id=number)

        self._write: Callable[[int], Awaitable[None]] = write
        if seen.retrying:
            self._write = asyncorm.retrying(50, on=MENDS, backoff=lambda n: 0.2, using="primary")(
                write
            )

    async def write(self) -> None:
        while not self.stopped:
            number = next(_ids)
            try:
                async with replicas.after():
                    await self._write(number)
            except Exception as exc:
                self.seen.errors[type(exc).__name__] += 1
                await asyncio.sleep(0.02)
            else:
                self.written[number] = time.monotonic()
                await asyncio.sleep(0.005)

    async def read(self) -> None:
        while not self.stopped:
            began = time.monotonic()
            try:
                async with replicas.after():
                    await Item.objects.filter(remote_id=1).native_exists()
            except Exception as exc:
                self.seen.read_errors[type(exc).__name__] += 1
            self.seen.reads += 1
            self.seen.pause = max(self.seen.pause, time.monotonic() - began)
            await asyncio.sleep(0.01)

    async def watch(self) -> None:
        while not self.stopped:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            self.seen.late = max(self.seen.late, time.monotonic() - began - 0.01)


@contextmanager
def hung(server: Server) -> Iterator[None]:
    """Stop all its processes as they are: it takes connections and answers nothing."""
    assert server.datadir is not None
    main = int((server.datadir / "postmaster.pid").read_text().split()[0])
    with open(f"/proc/{main}/task/{main}/children") as children:
        pids = [main, *map(int, children.read().split())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def failed(primary: Server, fault: str) -> Iterator[None]:
    if fault == "hung":
        with hung(primary):
            yield
        return
    if fault == "made read-only":
        ask(primary, "ALTER SYSTEM SET default_transaction_read_only = on")
        ask(primary, "SELECT pg_reload_conf()")
    else:
        primary.stop("immediate" if fault == "killed" else "fast")
    yield


def promote(standby: Server) -> None:
    """What a cluster manager does."""
    ask(standby, "ALTER SYSTEM SET synchronous_standby_names = ''")
    ask(standby, "SELECT pg_reload_conf()")
    assert ask(standby, "SELECT pg_promote()")


@contextmanager
def reached(setup: str, primary: Server, standby: Server) -> Iterator[Callable[[], None]]:
    """The alias `primary` by a set-up, and the replica `r1`; what is to be done after promotion."""
    with ExitStack() as stack:
        after: Callable[[], None] = lambda: None  # noqa: E731
        changes: dict[str, Any] = {
            **reach(primary, standby),
            "OPTIONS": {**OPTIONS, "target_session_attrs": "read-write"},
        }
        if setup in SWITCHES:
            ports = [stack.enter_context(balancer.health_of(each)) for each in (primary, standby)]
            before = balancer.haproxy((primary, standby), ports, SWITCHES[setup])
            changes |= stack.enter_context(before)
        elif setup.startswith("PgBouncer"):
            running = stack.enter_context(bouncer.pgbouncer(primary.settings))
            changes |= {**running.settings, "DISABLE_SERVER_SIDE_CURSORS": True}
            after = lambda: running.aim(standby.settings)  # noqa: E731
        stack.enter_context(database("primary", **changes))
        stack.enter_context(database("r1", **reach(standby), OPTIONS=OPTIONS))
        yield after


async def run(setup: str, fault: str, retrying: bool) -> Seen:
    """Have the primary fail under load, and the standby promoted."""
    seen = Seen(setup, fault, retrying)
    with replicated() as (primary, standby), reached(setup, primary, standby) as after:
        router = ReplicaRouter("primary", ["r1"])
        with override_settings(DATABASE_ROUTERS=[router]):
            try:
                await _run(seen, router, primary, standby, after)
            finally:
                await asyncorm.close_pools("primary")
                await asyncorm.close_pools("r1")
    return seen


async def _run(
    seen: Seen, router: ReplicaRouter, primary: Server, standby: Server, after: Callable[[], None]
) -> None:
    load = Load(seen)
    replica = router.watcher.replicas["r1"]

    def since(moment: float) -> list[float]:
        return [each for each in load.written.values() if each > moment]

    async with asyncio.TaskGroup() as group:
        group.create_task(load.watch())
        writing = [group.create_task(load.write()) for _ in range(WRITERS)]
        for _ in range(READERS):
            group.create_task(load.read())
        await eventually(lambda: len(load.written) > 40 and replica.reads > 20, 60)
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, failed(primary, seen.fault))
            await asyncio.sleep(0.5)  # until that is found out
            await asyncio.to_thread(promote, standby)
            promoted = time.monotonic()
            await asyncio.to_thread(after)
            await eventually(lambda: since(promoted), 60)
            seen.first_write = min(since(promoted)) - promoted
            await eventually(lambda: len(since(promoted)) > 40, 60)
            await eventually(lambda: replica.problem == "it is no standby (any more)", 30)
            load.stopped = True
            # A primary that hangs no more would take writes: there would be two of them.
            await asyncio.wait(writing)
    there = set(await Item.objects.using("r1").values_list("remote_id", flat=True).anative())
    seen.lost = len(load.written.keys() - there)
    seen.writes = len(load.written)


HEADER = (
    "set-up",
    "the primary is",
    "`retrying()`",
    "errors of writes",
    "of reads",
    "first write after promotion",
    "longest read",
)


def cells(seen: Seen) -> list[str]:
    kinds = ", ".join(f"{number} {name}" for name, number in sorted(seen.errors.items()))
    return [
        seen.setup,
        seen.fault,
        "yes" if seen.retrying else "no",
        kinds or "none",
        str(seen.read_errors.total() or "none"),
        f"{seen.first_write:.2f} s",
        f"{seen.pause:.2f} s (loop late {seen.late:.2f} s)",
    ]


def promised(seen: Seen) -> tuple[float, float]:
    """Seconds from the promotion to the first write, and of the longest read."""
    if seen.fault == "hung":
        # The victim's deadline and its cancellation; then the host that hangs is tried first.
        bound = DEADLINE + CANCEL_TIMEOUT + CONNECT_TIMEOUT + 1
        return bound, 2 * bound  # reads have no deadline
    return 3.0 if seen.setup in SWITCHES else 1.0, 0.5


def broken(seen: Seen, slack: float = 0.0) -> list[str]:
    """The promises that were not kept.

    Args:
        slack: seconds that a machine may take longer that does other work, too.
    """
    first_write, pause = promised(seen)
    # PgBouncer tells new clients what the server said once: only the refused write says otherwise.
    nobody_knows = seen.setup.startswith("PgBouncer") and seen.fault == "made read-only"
    # It may give a connection to a server that is gone, before it has noticed.
    most = POOL["max_size"] if seen.setup.startswith("PgBouncer") else WRITERS
    if nobody_knows:
        most = seen.errors.total()
    promises = {
        "what was acknowledged is there": not seen.lost,
        "no read fails": not seen.read_errors,
        "a write that is repeated does not fail": not (seen.retrying and seen.errors),
        "at most one error for each operation under way": seen.errors.total() <= most,
        "the first write comes soon": seen.first_write < first_write + slack,
        "reads do not pause for long": seen.pause - seen.late < pause + slack,
    }
    return [promise for promise, kept in promises.items() if not kept]


INTRODUCTION = """
## A primary that fails

`make test-availability` has {writers} tasks write and {readers} read (by `ReplicaRouter`) while
the primary fails, and promotes its standby half a second later. Times are from the promotion to the
first acknowledged write, and that of the longest read (and for how long the loop stood still: the
machine did something else). Nothing that was acknowledged is lost: the standby is synchronous.
`retrying()` repeats what may be done twice, for any of {mends}.
Where the primary hangs (SIGSTOP), a write has {deadline:g} s and `connect_timeout` is {connect} s;
the cancellation of a statement is waited for for {cancel:g} s; then, with several hosts, the one
that hangs is tried first: {bound:g} s in all since it hangs. Reads have no deadline: those that
were sent to the primary wait as long.

The last run ({date}, commit {commit}, `make test-availability ARGS=--write`):
{notes}

"""


def write(rows: list[Seen], notes: list[str], path: Path) -> None:
    """Write the table for the documentation."""
    text, mark, rest = path.read_text().partition("\n## A primary that fails\n")
    if not mark:  # before the first other heading
        text, _, rest = text.partition("\n## ")
        rest = f"\n## {rest}"
    after = "".join(rest.partition("\n## ")[1:])
    introduction = INTRODUCTION.format(
        writers=WRITERS,
        readers=READERS,
        mends=", ".join(f"`{each.__name__}`" for each in MENDS),
        deadline=DEADLINE,
        connect=CONNECT_TIMEOUT,
        cancel=CANCEL_TIMEOUT,
        bound=DEADLINE + CANCEL_TIMEOUT + CONNECT_TIMEOUT,
        date=date.today(),
        commit=_commit(),
        notes="\n".join(notes),
    )
    lines = [
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
        *("| " + " | ".join(cells(seen)) + " |" for seen in rows),
    ]
    path.write_text(text + introduction + "\n".join(lines) + "\n" + after)


def _commit() -> str:
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return said.stdout.strip() or "unknown"


async def main() -> int:
    rows: list[Seen] = []
    failures = 0
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    slack = 2.0 if load > processors else 0.0
    skipped = Counter(name for setup in SETUPS if (name := missing(setup)))
    for setup in SETUPS:
        for fault in FAULTS if missing(setup) is None else ():
            for retrying in (False, True):
                async with asyncio.timeout(180):
                    seen = await run(setup, fault, retrying)
                rows.append(seen)
                print(" | ".join(cells(seen)), flush=True)
                for promise in broken(seen, slack):
                    failures += 1
                    print(f"  NOT KEPT: {promise}: {seen}", flush=True)
    notes = [
        f"{name} is not installed (apt install {name.lower()}): {2 * len(FAULTS) * number} runs "
        "were skipped."
        for name, number in skipped.items()
    ]
    missed = [
        f"Not kept: {seen.setup}, {seen.fault}, {promise}."
        for seen in rows
        for promise in broken(seen)
    ]
    notes = [
        f"{len(rows)} runs at a load of {load:.1f} on {processors} processors, {failures} promises "
        f"not kept ({len(missed)} without the {slack:g} s that a machine is given that does other "
        "work, too).",
        *missed,
        *notes,
    ]
    print(*notes, sep="\n")
    if "--write" in sys.argv:
        write(rows, notes, Path(__file__).parent.parent / "docs" / "reliability.md")
    return 1 if failures else 0


if __name__ == "__main__":
    import logging

    for name in ("psycopg.pool", "asyncorm"):  # of every lost connection, of each replica
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.exit(asyncio.run(main()))
