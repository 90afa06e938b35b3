"""What a whole request costs: a default project under Django's own handler and under ours.

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .run import ROOT
from .schema import database

VIEWS = {
    "empty": ("an empty asynchronous view", "/empty/"),
    "one": ("an asynchronous view with one `aget()`", "/one/"),
    "user": ("a logged-in user: session read and written, `auser()`, a count", "/user/"),
    "synchronous": ("a synchronous view with one `get()`", "/synchronous/"),
    "admin": ("the admin's change list of 100 users", "/admin/auth/user/"),
}
CONTESTANTS = {
    "Django": {"asyncorm": False, "handler": "django"},
    "asyncorm, Django's handler": {"asyncorm": True, "handler": "django"},
    "asyncorm, its own handler": {"asyncorm": True, "handler": "asyncorm"},
}


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
    await asyncio.wait([failed], timeout=seconds / 4)
    for each in asking:
        each.seconds.clear()
    cpu, began = server_cpu(port), time.perf_counter()
    await asyncio.wait([failed], timeout=seconds)
    took = time.perf_counter() - began
    if failed.done():
        failed.result()
    times = sorted(second for each in asking for second in each.seconds)
    cpu = server_cpu(port) - cpu
    failed.cancel()
    return {
        "cpu_ms": 1000 * cpu / len(times),
        "per_second": len(times) / took,
        "p50_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * times[int(len(times) * 0.99)],
    }


def server_cpu(port: int) -> float:
    """Seconds of CPU time that the server's process has taken."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/cpu/")
    return float(connection.getresponse().read())


@contextmanager
def server(site: dict[str, Any], port: int) -> Iterator[None]:
    """Serve the project by uvicorn."""
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--no-access-log", "--log-level=error",
         f"--port={port}", "compat.bench.site.asgi:application"],
        cwd=ROOT,
        env={**os.environ, **environment(site)},
    )  # fmt: skip
    try:
        for _ in range(200):
            try:
                server_cpu(port)
                break
            except OSError:
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


def measure(seconds: float, clients: list[int], views: list[str]) -> list[dict[str, Any]]:
    """All contestants, turn by turn for each view."""
    results = []
    with database(10, 10) as settings:
        sites = {name: {**site, "database": settings} for name, site in CONTESTANTS.items()}
        cookies = prepare(sites["Django"])
        for view in views:
            for number, (name, site) in enumerate(sites.items()):
                port = 8700 + number
                with server(site, port):
                    for count in clients:
                        known = cookies if view in ("user", "admin") else ["none=1"] * len(cookies)
                        found = asyncio.run(load(port, VIEWS[view][1], known[:count], seconds))
                        results.append({"view": view, "name": name, "clients": count, **found})
                        print(json.dumps(results[-1]), flush=True)
    return results


def report(results: list[dict[str, Any]]) -> str:
    """The results as a page."""
    import django

    lines = [
        "# Whole requests",
        "",
        f"Python {platform.python_version()}, Django {django.__version__}, uvicorn, a project as "
        "`startproject` makes it (seven MIDDLEWARE), PostgreSQL on the same machine. CPU time of "
        "the server's process for each request; asyncorm's own handler is "
        "`asyncorm.asgi.get_asgi_application()` with the views named. Measured by "
        "`make bench-requests`, on a machine that had other things to do as well: compare within "
        "a group.",
        "",
        "| | clients | | CPU ms | of Django's | requests/s | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = {(r["view"], r["clients"]): r for r in results if r["name"] == "Django"}
    for each in results:
        share = each["cpu_ms"] / base[each["view"], each["clients"]]["cpu_ms"]
        lines.append(
            f"| {VIEWS[each['view']][0]} | {each['clients']} | {each['name']} "
            f"| {each['cpu_ms']:.2f} | {share:.2f} | {each['per_second']:,.0f} "
            f"| {each['p50_ms']:.1f} | {each['p99_ms']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compat.bench.web", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=list(VIEWS))
    parser.add_argument("--output", type=Path, help="where the page goes, by default nowhere")
    args = parser.parse_args()
    page = report(measure(args.seconds, args.clients, args.views))
    print(page)
    if args.output:
        args.output.write_text(page)


if __name__ == "__main__":
    main()
