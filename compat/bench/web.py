"""What a whole request costs: a default project under Django's own handler, under ours and others.

`python -m compat.bench.web`: what `make bench-requests` runs. The server's process is measured (its
CPU time for each request), the clients are another one.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import http.client
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .run import ROOT
from .schema import database

VIEWS = {
    "empty": ("an empty view", "/empty/"),
    "one": ("one row: `aget()`", "/one/"),
    "user": ("a logged-in user: session read and written, `auser()`, a count", "/user/"),
    "synchronous": ("a synchronous view with one `get()`", "/synchronous/"),
    "admin": ("the admin's change list of 100 users", "/admin/auth/user/"),
    "rest": ("a list of 100 users by Django REST framework", "/rest/"),
}
BASE = "Django"
_DJANGOS = "django.db.backends.postgresql"
_OURS = "asyncorm.backends.postgresql"
_BACKEND = "django_async_backend.db.backends.postgresql"


@dataclass(frozen=True)
class Contestant:
    """Who serves the project.

    Attributes:
        server: a module that is run, "bolt" for django-bolt's own server.
        views: what it can serve; all by default.
        package: what has to be installed for it.
        engine, apps, handler: what differs in the project (see site/settings.py).
    """

    server: str = "uvicorn"
    application: str = "asgi"
    views: tuple[str, ...] = tuple(VIEWS)
    package: str = "django"
    engine: str = _DJANGOS
    apps: tuple[str, ...] = ()
    handler: str = "django"

    def site(self, database: dict[str, Any]) -> dict[str, Any]:
        """Its SITE in the environment."""
        chosen = {"engine": self.engine, "apps": self.apps, "handler": self.handler}
        return {**chosen, "database": database}

    @property
    def missing(self) -> bool:
        """Whether its package is not installed here."""
        return find_spec(self.package) is None

    def command(self, port: int) -> list[str]:
        """What starts it."""
        application = f"{__package__}.site.{self.application}:application"
        if self.server == "gunicorn":
            options = ["--worker-class=gthread", "--threads=16", "--keep-alive=75"]
            return ["gunicorn", f"--bind=127.0.0.1:{port}", *options, application]
        if self.server == "bolt":
            return ["django", "runbolt", "--host=127.0.0.1", f"--port={port}", "--no-admin"]
        quietly = ["--no-access-log", "--log-level=error"]
        return ["uvicorn", *quietly, f"--port={port}", application]


CONTESTANTS = {
    BASE: Contestant(),
    "Django, gunicorn with 16 threads": Contestant(
        "gunicorn", "wsgi", handler="wsgi", package="gunicorn"
    ),
    "django-async-backend": Contestant(
        views=("one",), engine=_BACKEND, apps=("django_async_backend",),
        package="django_async_backend",
    ),
    "asyncorm, Django's handler": Contestant(engine=_OURS, apps=("asyncorm",)),
    "asyncorm, its own handler": Contestant(engine=_OURS, apps=("asyncorm",), handler="asyncorm"),
    "django-bolt (no middleware)": Contestant(
        "bolt", views=("empty", "one", "rest"), package="django_bolt", apps=("django_bolt",)
    ),
    "FastAPI, SQLAlchemy on asyncpg": Contestant(
        application="fast", views=("empty", "one", "rest"), package="fastapi"
    ),
}  # fmt: skip


class Client(asyncio.Protocol):
    """Asks again as soon as it has an answer, on one connection."""

    def __init__(self, request: bytes, failed: asyncio.Future[None]) -> None:
        self.request, self.failed = request, failed
        self.seconds: list[float] = []
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.ask()

    def ask(self) -> None:
        self.data = b""
        self.began = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, separator, body = self.data.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.fail(RuntimeError(self.data.decode(errors="replace")))
        self.seconds.append(time.perf_counter() - self.began)
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or RuntimeError("The server closed the connection."))

    def fail(self, exc: Exception) -> None:
        if not self.failed.done():
            self.failed.set_exception(exc)


async def load(port: int, path: str, cookies: list[str], seconds: float) -> dict[str, Any]:
    """Ask for some seconds, a client for each cookie; what one request took, on both sides."""
    loop = asyncio.get_running_loop()
    failed = loop.create_future()
    asking = []
    for cookie in cookies:
        lines = (f"GET {path} HTTP/1.1", "Host: localhost", f"Cookie: {cookie}", "", "")
        make = functools.partial(Client, "\r\n".join(lines).encode(), failed)
        asking.append((await loop.create_connection(make, "127.0.0.1", port))[1])
    # So many connections made at once are no load: each has had its first answer before it counts.
    while not (failed.done() or all(each.seconds for each in asking)):
        await asyncio.wait([failed], timeout=seconds / 4)
    for each in asking:
        each.seconds.clear()
    (cpu, threads), began = taken(port), time.perf_counter()
    await asyncio.wait([failed], timeout=seconds)
    took = time.perf_counter() - began
    if failed.done():
        failed.result()
    times = sorted(second for each in asking for second in each.seconds)
    cpu_after, threads_after = taken(port)
    failed.cancel()
    return {
        "requests": len(times),
        "threads": threads_after - threads,
        "cpu_ms": 1000 * (cpu_after - cpu) / len(times),
        "per_second": len(times) / took,
        "p50_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * times[int(len(times) * 0.99)],
    }


def taken(port: int) -> tuple[float, int]:
    """Seconds of CPU time that the server's process has taken, and threads that it has started."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/taken/")
    cpu, threads = json.loads(connection.getresponse().read())
    return cpu, threads


@contextmanager
def server(contestant: Contestant, database: dict[str, Any], port: int) -> Iterator[None]:
    """Serve the project.

    Raises:
        RuntimeError: it does not start.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *contestant.command(port)],
        cwd=ROOT,
        env={**os.environ, **environment(contestant.site(database))},
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("BENCH_TRACEBACK") else subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 20
        while True:
            try:
                taken(port)
                break
            except (OSError, ValueError):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{contestant} does not start") from None
                time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def environment(site: dict[str, Any]) -> dict[str, str]:
    return {"SITE": json.dumps(site), "DJANGO_SETTINGS_MODULE": "compat.bench.site.settings"}


def prepare(site: dict[str, Any]) -> list[str]:
    """Make the tables and 100 users; the cookies of as many sessions of the first one."""
    source = """
import django; django.setup()
from django.contrib.auth import get_user_model
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from django.core.management import call_command
call_command("migrate", verbosity=0)
User = get_user_model()
if not User.objects.exists():
    User.objects.bulk_create([User(username=f"user {n}", is_staff=True, is_superuser=n == 0)
        for n in range(100)])
user = User.objects.get(pk=1)
for _ in range(100):
    session = SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.save()
    print(f"sessionid={session.session_key}")
"""
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env={**os.environ, **environment(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def measure(
    seconds: float, rounds: int, clients: list[int], views: list[str]
) -> list[dict[str, Any]]:
    """All contestants, turn by turn in each round: the machine's mood changes."""
    results = []
    with database(10, 10) as settings:
        cookies = prepare(CONTESTANTS[BASE].site(settings))
        for view in views:
            chosen = {n: c for n, c in CONTESTANTS.items() if view in c.views and not c.missing}
            with ExitStack() as stack:
                ports = {}
                for port, (name, contestant) in enumerate(chosen.items(), 8700):
                    try:
                        stack.enter_context(server(contestant, settings, port))
                    except RuntimeError as exc:
                        if contestant.package == "django":
                            raise
                        print(exc, file=sys.stderr, flush=True)  # a peer of another version
                        continue
                    ports[name] = port
                known = cookies if view in ("user", "admin") else ["none=1"] * len(cookies)
                for count in clients:
                    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ports}
                    for _ in range(rounds):
                        for name, port in ports.items():
                            asked = load(port, VIEWS[view][1], known[:count], seconds)
                            found[name].append(asyncio.run(asked))
                    for name, each in found.items():
                        results.append({"view": view, "name": name, "clients": count, **over(each)})
                        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def over(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Several rounds in one: sums of what is counted, medians of what is measured."""
    counted = ("requests", "threads")
    return {
        key: (sum if key in counted else statistics.median)(each[key] for each in rounds)
        for key in rounds[0]
    }


def report(results: list[dict[str, Any]]) -> str:
    """The results as a page."""
    import django

    measured = {each["name"] for each in results}
    missing = [name for name in CONTESTANTS if name not in measured]
    lines = [
        "# Whole requests",
        "",
        f"Python {platform.python_version()}, Django {django.__version__}, uvicorn, a project as "
        "`startproject` makes it (seven MIDDLEWARE) with Django REST framework, PostgreSQL on the "
        "same machine. CPU time of the server's process for each request; asyncorm's own handler "
        "is `asyncorm.asgi.get_asgi_application()` with the views named. Threads are those started "
        "while that was measured. Measured by `make bench-requests`, turn by turn: compare within "
        "a group.",
        "",
        "django-async-backend takes part where it has an asynchronous way of its own. django-bolt "
        "and FastAPI are there for orientation: they pass no MIDDLEWARE, no sessions, no CSRF, "
        "and their list is not Django REST framework's.",
        *(["", f"Not installed, or does not start: {', '.join(missing)}."] if missing else []),
        "",
        "| | clients | | CPU ms | of Django's | requests/s | p50 ms | p99 ms | threads/requests |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = {(r["view"], r["clients"]): r for r in results if r["name"] == BASE}
    for each in results:
        share = each["cpu_ms"] / base[each["view"], each["clients"]]["cpu_ms"]
        lines.append(
            f"| {VIEWS[each['view']][0]} | {each['clients']} | {each['name']} "
            f"| {each['cpu_ms']:.2f} | {share:.2f} | {each['per_second']:,.0f} "
            f"| {each['p50_ms']:.1f} | {each['p99_ms']:.1f} "
            f"| {each['threads']:,} / {each['requests']:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compat.bench.web", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=list(VIEWS))
    parser.add_argument("--output", type=Path, help="where the page goes, by default nowhere")
    args = parser.parse_args()
    page = report(measure(args.seconds, args.rounds, args.clients, args.views))
    print(page)
    if args.output:
        args.output.write_text(page)


if __name__ == "__main__":
    main()
