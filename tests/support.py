"""Small things that several tests of the core need: server-side facts, and a watch on threads."""

import asyncio
import copy
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections
from django.db.backends.postgresql.base import DatabaseWrapper as BaseWrapper

from asyncorm.demo.postgres import free_port as free_port

# For scripts: what Sentry sends is kept in `sent`.
SENTRY_KEPT = """
import sentry_sdk
from sentry_sdk.integrations.django import DjangoIntegration
from sentry_sdk.transport import Transport
sent = []
class Kept(Transport):
    def capture_envelope(self, envelope):
        sent.extend(item.payload.json for item in envelope.items if item.payload.json)
"""

# The same of Datadog, in `spans`.
DATADOG_KEPT = """
import os
os.environ.update(DD_TRACE_ENABLED="true", DD_INSTRUMENTATION_TELEMETRY_ENABLED="false",
    DD_REMOTE_CONFIGURATION_ENABLED="false", DD_TRACE_STARTUP_LOGS="false")
import ddtrace
from ddtrace.trace import TraceFilter, tracer
spans = []
class Kept(TraceFilter):
    def process_trace(self, trace):
        spans.extend(trace)
        return None
tracer.configure(trace_processors=[Kept()])
"""

# The table of items on a server of a test's own.
CREATE_ITEM = """CREATE TABLE myapp_item (id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    remote_id integer UNIQUE, name varchar(50))"""


def set_cancel_timeout(monkeypatch: Any, seconds: float) -> None:
    """Have a cancelled task wait so long for the server's answer, wherever it waits."""
    for name, module in list(sys.modules.items()):
        if name.startswith("asyncorm.") and hasattr(module, "CANCEL_TIMEOUT"):
            monkeypatch.setattr(module, "CANCEL_TIMEOUT", seconds)


def backend_pid(using: str = "default") -> int:
    """The server process that serves the caller's connection."""
    return int(value("SELECT pg_backend_pid()", using=using))


async def two_pids(using: str) -> set[int]:
    """The server processes of two connections at once."""
    from asyncorm import atomic, detached, native

    async with atomic(using=using):
        first = await native(backend_pid)(using)
        async with detached(), atomic(using=using):
            return {first, await native(backend_pid)(using)}


def value(sql: str, params: Any = None, using: str = "default") -> Any:
    """The one value of a query, through Django's connection of the caller."""
    with connections[using].cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchone()[0]


def sleep(seconds: float = 0.1) -> int:
    """Have the server sleep; the number of the process that did."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s), pg_backend_pid()", [seconds])
        return int(cursor.fetchone()[1])


def address(using: str = "default") -> dict[str, Any]:
    """How psycopg reaches an alias's database."""
    database = connections.settings[using]
    keys = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST"}
    return {name: database[key] for name, key in keys.items()} | {"port": database["PORT"] or None}


@contextmanager
def database(alias: str = "extra", **changes: Any) -> Iterator[str]:
    """An alias like `default` but for the changes; OPTIONS are put into those of `default`.

    Its connections are told apart on the server by their application_name, which is the alias.
    """
    settings = copy.deepcopy(connections.settings["default"])
    options = {"application_name": alias, **settings["OPTIONS"], **changes.pop("OPTIONS", {})}
    connections.settings[alias] = {**settings, **changes, "OPTIONS": options}
    _drop_djangos_pool(alias)  # a thread may have made one after the last that had the name
    try:
        yield alias
    finally:
        if hasattr(connections._connections, alias):
            if connections[alias].connection is not None:
                connections[alias].close()
            del connections[alias]
        _drop_djangos_pool(alias)
        del connections.settings[alias]


def _drop_djangos_pool(alias: str) -> None:
    if pool := BaseWrapper._connection_pools.pop(alias, None):
        pool.close()


def run_script(source: str, *flags: str, timeout: float = 60, **environment: str) -> Any:
    """Run a script in a new process on the test database; every warning is an error."""
    database = connections.settings["default"]
    keys = ("NAME", "USER", "PASSWORD", "HOST", "PORT")
    return subprocess.run(
        [sys.executable, "-W", "error", *flags, "-c", source],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.project.settings",
            "ASYNCORM_TEST_DATABASE": json.dumps({key: database[key] for key in keys}),
            **environment,
        },
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@contextmanager
def administrator() -> Iterator[Callable[..., Any]]:
    """A connection beside Django's: a function that runs a query and returns its first value."""
    with psycopg.connect(**address(), autocommit=True) as admin:

        def ask(sql: Any, *params: Any) -> Any:
            cursor = admin.execute(sql, params or None)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None

        yield ask


def server_connections(ask: Callable[..., Any], name: str | None = None) -> int:
    """How many client connections the server has beside the asking one."""
    return int(
        ask(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND pid <> pg_backend_pid() AND application_name = coalesce(%s, application_name)",
            name,
        )
    )


@asynccontextmanager
async def next_socket(number: int) -> AsyncIterator[None]:
    """A socket that gets the number of a closed one; at the end it can be read from on the loop."""
    loop = asyncio.get_running_loop()
    with ExitStack() as opened:
        for _ in range(50):
            mine, other = socket.socketpair()
            opened.callback(mine.close)
            opened.callback(other.close)
            if number in (mine.fileno(), other.fileno()):
                break
        else:
            pytest.skip("the number went elsewhere")
        if other.fileno() == number:
            mine, other = other, mine
        arrived = asyncio.Event()
        loop.add_reader(number, arrived.set)
        try:
            yield
            other.send(b"x")
            async with asyncio.timeout(5):
                await arrived.wait()
        finally:
            loop.remove_reader(number)


async def eventually(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait, on the loop, until the condition holds; what it returned."""
    async with asyncio.timeout(seconds):
        while not (found := condition()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return found


@contextmanager
def watched_threads() -> Iterator[list[str]]:
    """Every thread started and every function given to an executor while the block runs."""
    seen: list[str] = []
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def watched_start(self: threading.Thread) -> None:
        seen.append(f"thread {self.name}")
        start(self)

    def watched_submit(self: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        seen.append("given to an executor")  # the repr() of what is submitted may query
        return submit(self, function, *args, **kwargs)

    threading.Thread.start = watched_start  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = watched_submit  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Call synchronous code as Django's own async methods do; leave no connection in the thread."""

    def call() -> Any:
        for conn in connections.all(initialized_only=True):
            if conn.settings_dict is not connections.settings.get(conn.alias):
                del connections[conn.alias]  # of another database() that had the name
        try:
            return function(*args)
        finally:
            connections.close_all()

    return await sync_to_async(call)()


async def all_given_back(using: str | None = None) -> dict[str, int]:
    """Wait until the pool has all its connections; one that is being opened counts as in use."""
    from asyncorm import pool_stats

    def idle() -> bool:
        stats = pool_stats(using)
        return bool(stats["pool_available"] == stats["pool_size"])

    await eventually(idle)
    return pool_stats(using)
