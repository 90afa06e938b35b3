"""Programs that call coroutines from synchronous code: Celery's workers, WSGI servers, runserver.

Each is the real program in processes of its own. Its connections are known by their
application_name, and what it writes about itself is looked through for what it left behind.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from tests.project.shop.models import Tag
from tests.support import administrator, eventually, free_port, run_script, server_connections

ROOT = Path(__file__).parents[2]
NAME = "a program"
# What must not be in a program's output; the socket that it listens on is its own affair.
LEFT = re.compile(
    "was destroyed|never (awaited|retrieved)|Exception ignored|Traceback"
    "|ResourceWarning: (?!unclosed <socket|Enable)"
)


@pytest.fixture
def ask(fresh_shop: object) -> Iterator[Callable[..., Any]]:
    """A function that asks the database; at the end it has no connection of the program's."""
    with administrator() as ask:
        yield ask
        assert server_connections(ask, NAME) == 0


def environment(folder: Path, **changes: str) -> dict[str, str]:
    database = connections.settings["default"]
    keys = ("NAME", "USER", "PASSWORD", "HOST", "PORT")
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.project.settings",
        "ASYNCORM_TEST_DATABASE": json.dumps({key: database[key] for key in keys}),
        "ASYNCORM_TEST_OPTIONS": json.dumps({"application_name": NAME, "pool": None}),
        "CELERY_FOLDER": str(folder),
        "PYTHONWARNINGS": "default",
        **changes,
    }


class Program:
    """A program that runs until it is told to end, and what it wrote until then."""

    def __init__(self, folder: Path, command: list[str], changes: dict[str, str]) -> None:
        self.log = folder / "log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT, env=environment(folder, **changes),
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text()


@contextmanager
def program(folder: Path, *command: str, end: int = signal.SIGTERM, **changes: str) -> Any:
    """Run a module of Python until the end of the block."""
    running = Program(folder, ["-m", *command], changes)
    try:
        yield running
        running.process.send_signal(end)
        running.process.wait(60)
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def wait_for_connections(ask: Callable[..., Any], number: int) -> None:
    asyncio.run(eventually(lambda: server_connections(ask, NAME) == number, 30))


# Celery


@contextmanager
def worker(folder: Path, *flags: str, **changes: str) -> Iterator[Program]:
    for name in ("queue", "results"):
        (folder / name).mkdir(exist_ok=True)
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=info"]
    app = ["celery", "-A", "tests.project.tasks", "worker", *quiet]
    with program(folder, *app, *flags, **changes) as running:
        yield running


_CALL = """
import json, sys
from tests.project import tasks
results = [getattr(tasks, name).delay(*args) for name, *args in json.loads(sys.argv[1])]
print(json.dumps([str(result.get(timeout=60, propagate=False)) for result in results]))
"""


def call(folder: Path, *tasks: tuple[Any, ...]) -> list[str]:
    """The results of tasks that are sent to the worker at once."""
    done = subprocess.run(
        [sys.executable, "-c", _CALL, json.dumps(tasks)],
        cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


POOLS = ["prefork", pytest.param("threads", marks=pytest.mark.slow)]


@pytest.mark.parametrize("pool", POOLS)
def test_celerys_tasks_leave_nothing(ask: Callable[..., Any], tmp_path: Path, pool: str) -> None:
    with worker(tmp_path, f"--pool={pool}", "--concurrency=2") as running:
        processes: set[int] = set()
        expected = 2 if pool == "prefork" else 1
        for _ in range(20):  # which of them takes a task is Celery's matter
            results = call(tmp_path, *[("count",)] * 6, *[("pids",)] * 6)
            assert results[:6] == ["6"] * 6
            for first, second, process in map(numbers, results[6:]):
                assert first == second  # one task, one connection
                processes.add(process)
            if len(processes) >= expected:
                break
        assert len(processes) == expected
        wait_for_connections(ask, 0)  # while the worker waits for more
    assert not LEFT.search(running.output), running.output


@pytest.mark.parametrize("pool", POOLS)
def test_celerys_delay_on_commit_in_a_block(
    ask: Callable[..., Any], tmp_path: Path, pool: str
) -> None:
    """A task follows when the block of a coroutine is committed, and not when that fails."""
    with worker(tmp_path, f"--pool={pool}", "--concurrency=2") as running:
        calls = [("add", "kept"), ("add", "lost", True), ("add", "kept, too")]
        assert call(tmp_path, *calls) == ["None", "lost", "None"]

        def written() -> set[str]:
            return set(Tag.objects.filter(pk__gt=6).values_list("name", flat=True))

        expected = {"kept", "kept follows", "kept, too", "kept, too follows"}
        asyncio.run(eventually(lambda: len(in_new_thread(written)) >= 4, 30))
        assert written() == expected
        wait_for_connections(ask, 0)
    assert running.output.count("Traceback") == 1  # of the one that fails


def in_new_thread(function: Callable[[], Any]) -> Any:
    """Where no loop runs."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: (function(), connections.close_all())[0]).result()


@pytest.mark.slow
def test_a_loop_for_the_life_of_celerys_process(ask: Callable[..., Any], tmp_path: Path) -> None:
    """The recipe with `asyncio.Runner`: a process keeps its connection."""
    with worker(tmp_path, "--pool=prefork", "--concurrency=2") as running:
        found: dict[int, set[int]] = {}
        for backend, process in map(numbers, call(tmp_path, *[("kept_loop",)] * 8)):
            found.setdefault(process, set()).add(backend)
        assert {len(backends) for backends in found.values()} == {1}
        wait_for_connections(ask, len(found))
    assert not LEFT.search(running.output), running.output


@pytest.mark.slow
def test_celerys_gevent_is_refused(ask: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("gevent")
    with worker(tmp_path, "--pool=gevent", "--concurrency=4"):
        for result in call(tmp_path, *[("pids",)] * 6):
            assert "gevent has patched this process" in result
        wait_for_connections(ask, 0)


# Servers


def fetch(port: int, path: str) -> Any:
    """What a view answers, or the status and the text of an error."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def fetch_all(port: int, *paths: str) -> list[Any]:
    """The answers to requests that are made four at a time."""
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda path: fetch(port, path), paths))


def wait_for_server(running: Program, port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        if running.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(running.output)
        try:
            fetch(port, "/nothing/")
            return
        except OSError:
            time.sleep(0.1)


@contextmanager
def gunicorn(folder: Path, *flags: str, **changes: str) -> Iterator[tuple[Program, int]]:
    port = free_port()
    command = ["gunicorn", f"--bind=127.0.0.1:{port}", *flags, "tests.project.wsgi"]
    with program(folder, *command, **changes) as running:
        wait_for_server(running, port)
        yield running, port


def check_answers(port: int, number: int = 12) -> list[Any]:
    """Requests for three views in turn; who served them."""
    answers = fetch_all(port, *["/books/1/", "/books/999/", "/processes/"] * number)
    assert [answer["pk"] for answer in answers[::3]] == [1] * number
    assert [status for status, _ in answers[1::3]] == [404] * number
    return answers[2::3]


@pytest.mark.parametrize("flags", [["--workers=2"], ["--workers=1", "--threads=3"]], ids=str)
def test_gunicorn_leaves_nothing(ask: Callable[..., Any], tmp_path: Path, flags: list[str]) -> None:
    with gunicorn(tmp_path, *flags) as (running, port):
        check_answers(port)
        wait_for_connections(ask, 0)
    assert not LEFT.search(running.output), running.output


def test_gunicorns_children_leave_their_parents_connections(
    ask: Callable[..., Any], tmp_path: Path
) -> None:
    """The project has used the database before it is forked, and many children end."""
    pids = "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE application_name = %s"
    flags = ["--preload", "--workers=2", "--max-requests=3"]
    with gunicorn(tmp_path, *flags, ASYNCORM_TEST_PRELOAD="1") as (running, port):
        wait_for_connections(ask, 1)
        parents = ask(pids, NAME)
        served = check_answers(port)
        assert len({each["here"] for each in served}) > 2
        assert {each["backend"] for each in served}.isdisjoint(parents)
        wait_for_connections(ask, 1)
        assert ask(pids, NAME) == parents
    assert not LEFT.search(running.output), running.output


@pytest.mark.slow
def test_conn_max_age_keeps_gunicorns_connections(ask: Callable[..., Any], tmp_path: Path) -> None:
    with gunicorn(tmp_path, "--workers=1", ASYNCORM_TEST_CONN_MAX_AGE="600") as (running, port):
        assert len({each["backend"] for each in check_answers(port)}) == 1
        wait_for_connections(ask, 1)
    assert not LEFT.search(running.output), running.output


@pytest.mark.slow
def test_gunicorns_gevent_is_refused(ask: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("gevent")
    with gunicorn(tmp_path, "--worker-class=gevent", ASYNCORM_TEST_DEBUG="1") as (_, port):
        for status, text in fetch_all(port, *["/processes/"] * 6):
            assert status == 500 and "gevent has patched this process" in text
        wait_for_connections(ask, 0)


def test_runserver_leaves_nothing(ask: Callable[..., Any], tmp_path: Path) -> None:
    port = free_port()
    command = ["django", "runserver", "--noreload", str(port)]
    with program(tmp_path, *command, end=signal.SIGINT) as running:
        wait_for_server(running, port)
        check_answers(port)
        wait_for_connections(ask, 0)
    assert not LEFT.search(running.output), running.output


def test_a_wsgiref_server_leaves_nothing(ask: Callable[..., Any]) -> None:
    script = """
import json, threading, urllib.request
from wsgiref.simple_server import WSGIRequestHandler, make_server
from tests.project.wsgi import application

class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass

with make_server("127.0.0.1", 0, application, handler_class=Quiet) as server:
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    for _ in range(3):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/books/1/") as answer:
            assert json.loads(answer.read())["pk"] == 1
    server.shutdown()
    serving.join()
"""
    done = run_script(script, ASYNCORM_TEST_OPTIONS=json.dumps({"application_name": NAME}))
    assert (done.stderr, done.returncode) == ("", 0)
