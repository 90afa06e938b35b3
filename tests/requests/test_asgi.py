"""The example project on real ASGI servers: real processes, real HTTP."""

import asyncio
import hashlib
import http.cookiejar
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest
from django.db import connections
from psycopg import sql
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Request, TextMessage

from tests.support import address, eventually, free_port

EXAMPLE = Path(__file__).parents[1] / "example"
DATABASE = "example_live"
# How each is started on a port.
SERVERS = {
    "uvicorn": ["uvicorn", "--port={port}", "--log-level=warning", "bookshop.asgi:application"],
    "hypercorn": ["hypercorn", "--bind=127.0.0.1:{port}", "bookshop.asgi:application"],
    "granian": ["granian", "--interface=asgi", "--port={port}", "bookshop.asgi:application"],
    "daphne": ["daphne", "--port={port}", "--verbosity=0", "bookshop.asgi:application"],
    # On uvicorn, by Django's own handler.
    "djangos": [
        "uvicorn", "--port={port}", "--log-level=warning", "bookshop.asgi:application",
    ],
}  # fmt: skip
# Each server gets one of the variations of the project.
VARIATIONS = {
    "uvicorn": {"EXAMPLE_ATOMIC_REQUESTS": "1"},
    "hypercorn": {"EXAMPLE_SESSIONS": "django.contrib.sessions.backends.cached_db"},
    "granian": {"EXAMPLE_NATIVE_VIEWS": "django.contrib.admin bookshop"},
    "daphne": {
        "EXAMPLE_SESSIONS": "django.contrib.sessions.backends.cached_db",
        "EXAMPLE_NATIVE_VIEWS": "django.contrib.admin",
    },
    "djangos": {"EXAMPLE_HANDLER": "django", "EXAMPLE_ATOMIC_REQUESTS": "1"},
}


def environment(**changes: str) -> dict[str, str]:
    database = connections.settings["default"]
    server = {key: database[key] for key in ("USER", "PASSWORD", "HOST", "PORT")}
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "bookshop.settings",
        "ASYNCORM_TEST_DATABASE": json.dumps({**server, "NAME": DATABASE}),
        "PYTHONPATH": str(EXAMPLE),
        "EXAMPLE_LIVE": "1",
        **changes,
    }


class Server:
    """A server's process, and a browser with cookies."""

    def __init__(self, name: str, log: Path, **changes: str) -> None:
        self.name = name
        self.port = free_port()
        self.log = log
        command = [part.format(port=self.port) for part in SERVERS[name]]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=EXAMPLE,
                env=environment(**{**VARIATIONS[name], **changes}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.jar = http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.jar))

    def wait(self) -> None:
        """Until it serves."""
        deadline = time.monotonic() + 30
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(self.log.read_text())
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)

    def stop(self) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        return time.monotonic() - began

    def open(self, path: str, **data: str) -> tuple[int, str]:
        """Status and body of a GET, or of a POST of the data; redirects are followed."""
        body = urllib.parse.urlencode(data).encode() if data else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body)
        for cookie in self.jar:
            if cookie.name == "csrftoken":
                request.add_header("X-CSRFToken", cookie.value or "")
        try:
            with self.opener.open(request, timeout=20) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def json(self, path: str) -> Any:
        status, body = self.open(path)
        assert status == 200, body
        return json.loads(body)

    async def request(self, path: str) -> tuple[int, bytes]:
        """A GET on a connection of its own; OSError when it was not answered in full."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.read()
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            if length is None or len(body) < int(length[1]):
                raise ConnectionError("cut short")
            return int(head.split()[1]), body
        except asyncio.IncompleteReadError as exc:
            raise ConnectionError("not answered") from exc
        finally:
            writer.close()


class Socket:
    """A WebSocket to a server, for messages of JSON."""

    def __init__(self, server: Server) -> None:
        self.port = server.port
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self.events: list[Any] = []

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._send(Request(host="127.0.0.1", target="/log/"))
        assert isinstance(await self._receive(), AcceptConnection)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.close()

    def send(self, **content: Any) -> None:
        self._send(TextMessage(json.dumps(content)))

    async def receive(self) -> Any:
        message = await self._receive()
        assert isinstance(message, TextMessage) and message.message_finished, message
        return json.loads(message.data)

    def _send(self, event: Any) -> None:
        self.writer.write(self.protocol.send(event))

    async def _receive(self) -> Any:
        async with asyncio.timeout(20):
            while not self.events:
                self.protocol.receive_data(await self.reader.read(4096) or None)
                self.events += self.protocol.events()
        return self.events.pop(0)


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    """The example's database, migrated, with a few rows and users; a function that asks it."""
    with psycopg.connect(**address(), autocommit=True) as admin:
        name = sql.Identifier(DATABASE)
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
        admin.execute(sql.SQL("CREATE DATABASE {}").format(name))
        try:
            set_up = (
                "from django.core.management import call_command\n"
                "import django; django.setup()\n"
                "call_command('migrate', run_syncdb=True, verbosity=0)\n"
                "from django.contrib.auth.models import User, Permission\n"
                "from bookshop.models import Book\n"
                "Book.objects.bulk_create(Book(title=f'book {n}') for n in range(1, 21))\n"
                "User.objects.create_superuser('admin', password='secret')\n"
                "editor = User.objects.create_user('editor', password='secret')\n"
                "editor.user_permissions.add(Permission.objects.get(codename='add_book'))\n"
                "User.objects.create_user('reader', password='secret')\n"
            )
            subprocess.run(
                [sys.executable, "-c", set_up], check=True, env=environment(), timeout=60
            )
            with psycopg.connect(**{**address(), "dbname": DATABASE}, autocommit=True) as conn:

                def ask(query: Any, *params: Any) -> Any:
                    return conn.execute(query, params).fetchall()

                yield ask
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture(
    scope="module",
    params=[
        "uvicorn",
        *[pytest.param(name, marks=pytest.mark.slow) for name in SERVERS if name != "uvicorn"],
    ],
)
def server(request: Any, ask: Any, tmp_path_factory: Any) -> Iterator[Server]:
    served = Server(request.param, tmp_path_factory.mktemp("server") / "log")
    try:
        served.wait()
        yield served
    finally:
        served.process.kill()
        served.process.wait()


def connections_of_pool(ask: Any) -> int:
    return int(
        ask(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid()"
        )[0][0]
    )


def test_pools_are_open_before_the_first_request(server: Server, ask: Any) -> None:
    assert connections_of_pool(ask) == (0 if server.name == "daphne" else 2)  # min_size


def test_views(server: Server) -> None:
    assert server.json("/books/")["number"] == 20
    assert server.json("/books/sync/")["titles"][:2] == ["book 1", "book 2"]
    assert server.json("/books/3/")["title"] == "book 3"
    assert server.open("/books/999/")[0] == 404
    status, body = server.open("/books/stream/")
    assert (status, body.split("\n")) == (200, [f"book {n}" for n in range(1, 21)] + [""])


def test_sessions_users_permissions_messages(server: Server) -> None:
    title = f"added on {server.name}"
    assert "token" in server.json("/accounts/")  # redirected to the log-in
    assert server.open("/accounts/login/", username="editor", password="no")[0] == 403
    assert server.open("/books/add-if-allowed/", title=title)[0] == 403
    for user, allowed in ("reader", False), ("editor", True):
        status, body = server.open("/accounts/login/", username=user, password="secret")
        assert status == 200
        me = json.loads(body)
        assert (me["user"], me["may_add"], me["visits"]) == (user, allowed, 1)
        assert server.json("/accounts/")["visits"] == 2
        status, body = server.open("/books/add-if-allowed/", title=title)
        assert status == (200 if allowed else 403), body
        assert server.json("/accounts/")["messages"] == (["added"] if allowed else [])
        server.open("/accounts/logout/")
        assert "token" in server.json("/accounts/")
    assert server.open("/admin/")[1].count("Log in") >= 1
    server.open("/accounts/login/", username="admin", password="secret")
    status, body = server.open("/admin/bookshop/book/")
    assert (status, title in body) == (200, True)
    pk = re.search(rf'book/(\d+)/change/">{title}', body)[1]  # type: ignore[index]
    status, body = server.open(f"/admin/bookshop/book/{pk}/delete/", post="yes")
    assert (status, title in server.json("/books/")["titles"]) == (200, False)


def test_files_languages_refusals_and_error_pages(server: Server) -> None:
    content = b"0123456789" * 300_000  # too long for the memory
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    body = head + content + b"\r\n--B--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=B", "Accept-Language": "de"}
    url = f"http://127.0.0.1:{server.port}/files/"
    token = server.json("/accounts/login/")["token"]
    request = urllib.request.Request(url, body, {**headers, "X-CSRFToken": token})
    with server.opener.open(request, timeout=20) as response:
        found = json.load(response)
    assert found == {"name": "a.txt", "body": hashlib.sha256(content).hexdigest(), "yes": "Ja"}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        server.opener.open(urllib.request.Request(url, body, headers), timeout=20).close()
    for path, status, title in ("/nothing/", 404, "Not Found"), ("/files/", 500, "Server Error"):
        answer = server.open(path)
        assert answer[0] == status and title in answer[1]


def test_atomic_requests(server: Server, ask: Any) -> None:
    for path in ("ok/?seconds=0", "failed/fail/"):
        server.open(f"/visits/{server.name}-{path}")
    rows = ask("SELECT token FROM bookshop_visit WHERE token LIKE %s", f"{server.name}-%")
    atomic = "EXAMPLE_ATOMIC_REQUESTS" in VARIATIONS[server.name]
    assert len(rows) == (1 if atomic else 2)


def test_a_client_that_goes_away_frees_its_connection(server: Server, ask: Any) -> None:
    for path in ("/visits/gone/?seconds=60", "/books/stream/?slow=1"):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            time.sleep(0.3)
            assert server.json("/pool/")["pool_available"] < server.json("/pool/")["pool_size"]
        deadline = time.monotonic() + 5
        while True:
            stats = server.json("/pool/")
            if stats["pool_available"] == stats["pool_size"]:
                break
            assert time.monotonic() < deadline, stats
            time.sleep(0.05)
    running = ask(
        "SELECT count(*) FROM pg_stat_activity WHERE query ~ 'pg_sleep' AND state = 'active'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert running == [(0,)]


async def test_websockets(server: Server, ask: Any) -> None:
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(Socket(server)) for _ in range(20)]

        async def talk(number: int, socket: Socket) -> None:
            token = f"{server.name} socket {number}"
            for count in range(1, 4):
                socket.send(token=token, seconds=0.01)
                assert await socket.receive() == {"token": token, "count": count}
            socket.send(token=token, seconds=0, forget=True)
            assert await socket.receive() == {"token": token, "count": 3}

        # More than the pool has connections, which none of them holds between messages.
        await asyncio.gather(*map(talk, range(20), sockets))
        stats = await asyncio.to_thread(server.json, "/pool/")
        assert stats["pool_available"] == stats["pool_size"] <= 8
        sockets[0].send(token=f"{server.name} gone", seconds=0.2)
        await asyncio.sleep(0.1)
    # Who goes away in the middle of a message: Channels lets that come to its end.
    gone = f"SELECT count(*) FROM bookshop_visit WHERE token = '{server.name} gone'"
    await eventually(lambda: ask(gone) == [(1,)])
    await eventually(
        lambda: (stats := server.json("/pool/"))["pool_available"] == stats["pool_size"]
    )


async def test_a_graceful_stop_loses_no_request(server: Server, ask: Any) -> None:
    answered, lost, stopped = set[str](), list[str](), asyncio.Event()

    async def client(number: int) -> None:
        for n in range(1000):
            token = f"{server.name} stop {number} {n}"
            try:
                status, _ = await server.request(f"/visits/{token.replace(' ', '%20')}/")
            except OSError:
                if stopped.is_set():
                    lost.append(token)
                    return
                raise
            assert status == 200
            answered.add(token)

    before = len(server.log.read_text())
    async with asyncio.TaskGroup() as tasks:
        for number in range(16):
            tasks.create_task(client(number))
        await asyncio.sleep(0.5)
        stopped.set()
        seconds = await asyncio.to_thread(server.stop)
    begun = {row[0] for row in ask("SELECT token FROM bookshop_visit WHERE token ~ ' stop '")}
    begun = {token for token in begun if token.startswith(server.name)}
    output = server.log.read_text()[before:]
    print(f"{server.name}: {len(answered)} answered, {len(begun - answered)} lost in {seconds:.2f}")
    assert answered
    if server.name != "daphne":
        assert begun == answered
    assert "Traceback" not in output, output
    assert connections_of_pool(ask) == 0
