"""A temporary PgBouncer in transaction mode before the tests' server, gone when we end."""

import dataclasses
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from asyncorm.demo.postgres import _make_folder, _unprivileged_user

TIMEOUT = 30  # seconds: reached only when something is broken
PORT = 6432  # only a part of the socket's name: it listens nowhere else

# Ends the program when the pipe from us closes, which the kernel sees to however we end.
GUARD = '"$@" & cat >/dev/null; kill -9 $!; wait $!'


def program() -> str | None:
    """Where PgBouncer is: ASYNCORM_TEST_PGBOUNCER, or on PATH, or where Debian has it."""
    return os.environ.get("ASYNCORM_TEST_PGBOUNCER") or shutil.which(
        "pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin"
    )


def version() -> tuple[int, ...]:
    """PgBouncer's version."""
    path = program()
    assert path is not None
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


@dataclasses.dataclass
class Bouncer:
    """A PgBouncer; `settings` are the changes to an entry of DATABASES."""

    folder: Path
    settings: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None

    def ask(self, command: str) -> list[dict[str, Any]]:
        """Run a command of its admin console."""
        with psycopg.connect(
            host=self.settings["HOST"],
            port=self.settings["PORT"],
            user="admin",
            dbname="pgbouncer",
            autocommit=True,
        ) as console:
            cursor = console.cursor(row_factory=psycopg.rows.dict_row)
            cursor.execute(command)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Start it, on the same socket, and wait until it answers."""
        (self.folder / f".s.PGSQL.{PORT}").unlink(missing_ok=True)
        (self.folder / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
        path = program()
        assert path is not None
        log = self.folder / "log"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", GUARD, "sh", path, "pgbouncer.ini"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                start_new_session=True,
                **_unprivileged_user(),  # it refuses to run as root
            )
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self.ask("SHOW VERSION")
                return
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(log.read_text(errors="replace")) from error
            time.sleep(0.02)

    def aim(self, server: dict[str, Any]) -> None:
        """Have it go to another server from now on, by RELOAD and RECONNECT."""
        configuration = self.folder / "pgbouncer.ini"
        lines = configuration.read_text().splitlines()
        lines[1] = _target(server)
        configuration.write_text("\n".join(lines) + "\n")
        self.ask("RELOAD")
        self.ask("RECONNECT")

    def stop(self) -> None:
        """Kill it, if it runs."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(TIMEOUT)
            self.process = None


def _target(server: dict[str, Any]) -> str:
    names = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD"}
    return "* = " + " ".join(f"{name}={server[key]}" for name, key in names.items() if server[key])


@contextmanager
def pgbouncer(server: dict[str, Any], **settings: Any) -> Iterator[Bouncer]:
    """Yield a PgBouncer in transaction mode for every database of `server`, an entry of DATABASES.

    It listens on a Unix socket only. `settings` are added to the section [pgbouncer] of its
    configuration.
    """
    user = _unprivileged_user()
    folder = _make_folder(for_other_user=bool(user))
    options = {
        "pool_mode": "transaction",
        "listen_port": PORT,
        "unix_socket_dir": folder,
        "auth_type": "any",  # only who may enter the folder reaches the socket
        "admin_users": "admin",
        "server_login_retry": 0.1,
        **settings,
    }
    lines = ["[databases]", _target(server), "[pgbouncer]"]
    lines += [f"{name} = {value}" for name, value in options.items()]
    configuration = folder / "pgbouncer.ini"
    configuration.write_text("\n".join(lines) + "\n")
    if user:
        for each in (folder, configuration):
            os.chown(each, user["user"], user["group"])
    bouncer = Bouncer(folder, {"HOST": str(folder), "PORT": str(PORT)})
    try:
        bouncer.start()
        yield bouncer
    finally:
        bouncer.stop()
        shutil.rmtree(folder)
