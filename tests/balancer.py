"""A temporary HAProxy before several servers: it forwards to whichever is the primary."""

import csv
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg

from asyncorm.demo.postgres import Server, _make_folder
from tests.bouncer import GUARD

TIMEOUT = 30  # seconds: reached only when something is broken
PORT = 6433  # only a part of the socket's name: it listens nowhere else


def program() -> str | None:
    """Where HAProxy is: ASYNCORM_TEST_HAPROXY, or on PATH, or where Debian has it."""
    return os.environ.get("ASYNCORM_TEST_HAPROXY") or shutil.which(
        "haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin"
    )


@contextmanager
def health_of(server: Server) -> Iterator[int]:
    """What Patroni has beside each server: 200 if it is the primary; the port."""
    reached = {"host": server.settings["HOST"], "port": server.settings["PORT"]}
    question = "SELECT NOT pg_is_in_recovery() AND NOT current_setting('{}')::bool"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                with psycopg.connect(
                    **reached, user="postgres", dbname="postgres", connect_timeout=2
                ) as conn:
                    sql = question.format("default_transaction_read_only")
                    found = conn.execute(sql.encode()).fetchone() == (True,)
            except psycopg.Error:
                found = False
            with suppress(ConnectionError):  # it has not waited
                self.send_response(200 if found else 503)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    checked = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=checked.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield checked.server_address[1]
    finally:
        checked.shutdown()
        thread.join()
        checked.server_close()


@contextmanager
def haproxy(servers: tuple[Server, ...], ports: list[int], shut: bool) -> Iterator[dict[str, Any]]:
    """Yield the changes to an entry of DATABASES.

    Args:
        ports: of what tells who is the primary.
        shut: break connections to a server that is found not to be it (any more).
    """
    path = program()
    assert path is not None
    folder = _make_folder(for_other_user=False)
    shutting = "on-marked-down shutdown-sessions" if shut else ""
    lines = [
        "global",
        f"stats socket unix@{folder / 'stats'}",
        "defaults",
        "mode tcp",
        "timeout connect 1s",
        "timeout client 1h",
        "timeout server 1h",
        "timeout check 1s",
        "listen primary",
        f"bind unix@{folder / f'.s.PGSQL.{PORT}'}",
        "option httpchk GET /",
        "http-check expect status 200",
        f"default-server inter 300ms fall 2 rise 1 {shutting}",
    ]
    for number, (server, port) in enumerate(zip(servers, ports, strict=True)):
        there = f"{server.settings['HOST']}/.s.PGSQL.{server.settings['PORT']}"
        lines.append(f"server s{number} unix@{there} check addr 127.0.0.1 port {port}")
    (folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "sh", path, "-db", "-f", "haproxy.cfg"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,
        )
    try:
        _wait(folder)
        yield {"HOST": str(folder), "PORT": str(PORT)}
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(TIMEOUT)
        shutil.rmtree(folder)


def _wait(folder: Path) -> None:
    """Until it has checked each server: at first all count as up, and one failed check suffices."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        with suppress(OSError):
            first, *others = _checked(folder / "stats")
            if first == "UP L7OK" and all(each.startswith("DOWN") for each in others):
                return
        if time.monotonic() > deadline:
            raise RuntimeError((folder / "log").read_text(errors="replace"))
        time.sleep(0.02)


def _checked(path: Path) -> list[str]:
    """Of each server, what HAProxy takes it for and the kind of answer that its last check had."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(path))
        asking.sendall(b"show stat\n")
        with asking.makefile(encoding="utf-8") as answer:
            rows = csv.DictReader(answer.read().removeprefix("# ").splitlines())
    servers = [row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")]
    return [f"{row['status']} {row['check_status']}" for row in servers]
