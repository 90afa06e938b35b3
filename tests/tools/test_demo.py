"""The demo as a user runs it: a process of its own, its output, its files, its exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
SCENARIOS = ["slow_queries", "gets", "dashboard", "requests"]
ACTS = ["batch", "multiplexing", "prefetch", "parallelism", "read_ahead", "copy"]


def command(*options: str | Path) -> list[str]:
    return [sys.executable, "-m", "demo", *map(str, options)]


def demo(*options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


class Result(NamedTuple):
    output: str
    errors: str
    figures: dict[str, Any]
    picture: ET.Element


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("demo")
    svg, figures, acts = folder / "timeline.svg", folder / "figures.json", folder / "pictures"
    acts.mkdir()
    files = ("--json", figures, "--svg", svg, "--pictures", acts)
    done = demo("--quick", "--rows", "2000", *files)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.iterdir()) == [figures, acts, svg]
    names = sorted(picture.stem for picture in acts.iterdir())
    assert names == sorted([*ACTS, "timeline"])
    for picture in acts.iterdir():
        assert ET.parse(picture).getroot().tag == f"{SVG}svg"
    return Result(
        done.stdout, done.stderr, json.loads(figures.read_text()), ET.parse(svg).getroot()
    )


def test_both_halves_run_every_scenario_and_return_the_same_rows(result: Result) -> None:
    assert list(result.figures["scenarios"]) == SCENARIOS
    assert result.figures["rows"] == 2000
    for scenario in result.figures["scenarios"].values():
        assert scenario["same_result"] is True
        assert len(scenario["django"]["statements"]) == len(scenario["asyncorm"]["statements"])


@pytest.mark.parametrize("scenario", SCENARIOS[:3])
def test_django_uses_one_connection_and_a_thread_asyncorm_several_and_none(
    result: Result, scenario: str
) -> None:
    figures = result.figures["scenarios"][scenario]
    assert (figures["django"]["connections"], figures["django"]["threads"]) == (1, 2)
    assert figures["django"]["statements_at_once"] == 1
    assert 1 < figures["asyncorm"]["connections"] <= 10
    assert figures["asyncorm"]["threads"] == 1
    assert figures["asyncorm"]["statements_at_once"] > 1


def test_requests_need_threads_only_with_djangos_handler(result: Result) -> None:
    figures = result.figures["scenarios"]["requests"]
    assert figures["django"]["threads"] > 2  # one for each request; their numbers come again
    assert figures["asyncorm"]["threads"] == 1
    assert 1 < figures["asyncorm"]["connections"] <= 10
    assert "asyncorm.asgi" in result.output


def test_slow_queries_overlap_only_with_asyncorm(result: Result) -> None:
    figures = result.figures["scenarios"]["slow_queries"]
    assert figures["asyncorm"]["connections"] == figures["asyncorm"]["statements_at_once"] == 10
    assert figures["django"]["seconds"] >= 1.0
    assert 0.1 <= figures["asyncorm"]["seconds"] < 0.9
    assert figures["factor"] == figures["django"]["seconds"] / figures["asyncorm"]["seconds"]


def test_statements_lie_within_their_run(result: Result) -> None:
    for scenario in result.figures["scenarios"].values():
        for half in ("django", "asyncorm"):
            figures = scenario[half]
            last_end: dict[int, float] = {}
            for _, connection, start, end in sorted(figures["statements"], key=lambda s: s[2]):
                assert 0 <= start < end <= figures["seconds"]
                if half == "django":  # natively, several may travel together
                    assert start >= last_end.get(connection, 0)
                last_end[connection] = end
            assert len(last_end) == figures["connections"]


def test_acts_show_what_they_are_about(result: Result) -> None:
    acts = result.figures["acts"]
    assert list(acts) == ACTS
    for act in acts.values():
        assert act["same_result"] is True
        assert act["after"]["threads"] == 1

    def facts(act: str, fact: str) -> tuple[int, int]:
        return acts[act]["before"][fact], acts[act]["after"][fact]

    def names(act: str, way: str) -> list[str]:
        return [name for name, *_ in acts[act][way]["statements"]]

    assert facts("batch", "connections") == (1, 1)
    assert facts("batch", "statements_at_once") == (1, 6)
    assert acts["batch"]["factor"] > 1
    before, after = facts("multiplexing", "statements_at_once")
    assert before <= facts("multiplexing", "connections")[0] <= 10 < after
    assert facts("prefetch", "connections")[0] == 1 < facts("prefetch", "connections")[1]
    assert sorted(names("prefetch", "before")) == sorted(names("prefetch", "after"))
    assert facts("parallelism", "connections") == (6, 2)
    assert names("read_ahead", "after").count("FETCH") == 4  # of 480 orders
    assert "INSERT review" in names("copy", "before") and "COPY review" in names("copy", "after")
    assert names("copy", "after")[0] == "BEGIN" and names("copy", "after")[-1] == "ROLLBACK"


def test_picture_shows_each_statement_and_each_connection(result: Result) -> None:
    assert result.picture.tag == f"{SVG}svg"
    words = ["".join(text.itertext()) for text in result.picture.iter(f"{SVG}text")]
    for figures in (*result.figures["scenarios"].values(), *result.figures["acts"].values()):
        assert figures["title"] in words
    bars = [
        title.text or ""
        for rect in result.picture.iter(f"{SVG}rect")
        for title in rect.iter(f"{SVG}title")
    ]
    for scenario in ("slow_queries", "dashboard"):
        for half in ("django", "asyncorm"):
            for query, connection, start, end in result.figures["scenarios"][scenario][half][
                "statements"
            ]:
                times = f"{start * 1000:.1f} to {end * 1000:.1f} ms"
                assert f"{query}: {times} on pid {connection}" in bars
    lanes = sum(
        scenario[half]["connections"]
        for scenario in result.figures["scenarios"].values()
        for half in ("django", "asyncorm")
    ) + sum(
        act[way]["connections"]
        for act in result.figures["acts"].values()
        for way in ("before", "after")
    )
    assert sum(bool(re.fullmatch(r"connection \d+", word)) for word in words) == lanes


def test_output_shows_the_code_that_ran(result: Result) -> None:
    demo = ROOT / "demo"
    source = (demo / "scenarios.py").read_text() + (demo / "acts.py").read_text()
    names = ("slow_query", "slow_queries", "many_gets", "revenue_by_month", "dashboard")
    for name in (*names, "in_a_batch", "prices", "whole_products", "export", "add_reviews"):
        start = source.index(f"async def {name}(")
        code = source[start : source.index("\n\n", start)].rstrip()
        assert "\n".join(f"  {line}" for line in code.splitlines()) in result.output


_SHOWN = """
from demo.settings import ASYNCORM, configure
configure(ASYNCORM, {}, pool=None)
from demo import acts, scenarios, show
console = show.make_console()
show.show_settings(console)
for each in (*scenarios.scenarios(9).values(), *acts.acts(9).values()):
    show.show_code(console, each.title, each.source())
"""


def test_no_code_is_broken_at_80_columns() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", _SHOWN],
        env={**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert '"django.db.backends.postgresql"  "asyncorm.backends.postgresql"' in shown.stdout
    assert "def revenue_by_month" in shown.stdout and "def add_reviews" in shown.stdout
    assert [line for line in shown.stdout.splitlines() if len(line) > 80 or "…" in line] == []


def test_last_line_is_the_summary_with_the_measured_figures(result: Result) -> None:
    last = result.output.splitlines()[-1]
    assert last == result.figures["summary"]
    slow = result.figures["scenarios"]["slow_queries"]
    expected = (
        f"asyncorm: 10 slow queries {slow['asyncorm']['seconds']:.2f} s "
        f"instead of {slow['django']['seconds']:.2f} s ("
    )
    assert last.startswith(expected)
    assert "on 10 connections and 1 thread; 200 gets" in last
    assert "; dashboard of 8 queries" in last


def test_output_in_a_pipe_is_plain_text_without_noise(result: Result) -> None:
    assert "\x1b" not in result.output
    assert result.errors == ""


@pytest.mark.slow
def test_output_is_legible_where_only_ascii_can_be_printed(tmp_path: Path) -> None:
    done = demo(
        "--quick",
        "--rows",
        "1000",
        "--svg",
        tmp_path / "picture.svg",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "?" not in done.stdout
    assert re.search(r"^connection 1 +\.*1-+\.*2-+\.*3-+", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "many"], "argument --rows"),
        (["--rows", "10"], "at least 1,000 rows"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_option_is_refused(options: list[str], message: str) -> None:
    done = demo(*options)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--svg", "--json"])
def test_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, option: str
) -> None:
    for target, message in (
        (tmp_path / "missing" / "file", "there is no directory"),
        (tmp_path, "is a directory"),
    ):
        done = demo(option, target)
        assert done.returncode == 1
        assert done.stderr.startswith(f"asyncorm demo: {option}: ")
        assert message in done.stderr
        assert done.stdout == ""


@pytest.mark.slow
def test_folder_for_pictures_that_is_none_is_refused(tmp_path: Path) -> None:
    done = demo("--pictures", tmp_path / "missing")
    assert done.returncode == 1
    assert done.stderr.startswith("asyncorm demo: --pictures: ")


@pytest.mark.slow
def test_one_file_for_both_is_refused(tmp_path: Path) -> None:
    done = demo("--svg", tmp_path / "one", "--json", tmp_path / "one")
    assert done.returncode == 1
    assert "both name" in done.stderr


@pytest.mark.slow
def test_server_that_cannot_be_reached_is_an_error_without_traceback(tmp_path: Path) -> None:
    url = f"postgresql://somebody@/nothing?host={tmp_path}"
    done = demo("--svg", tmp_path / "picture.svg", DATABASE_URL=url)
    assert done.returncode == 1
    assert done.stderr.startswith("asyncorm demo: ")
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_demo_leaves_no_process_and_no_file(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with subprocess.Popen(
        command("--rows", "2000", "--svg", tmp_path / "picture.svg"),
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert any("10 slow queries" in line for line in process.stdout)
            time.sleep(1.5)  # the workers are up by then, and at their slow queries
            children = descendants(process.pid)
            assert len(children) >= 2  # a worker for each half, and the server's processes
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not [pid for pid in children if alive(pid)]
    assert list(tmp_path.iterdir()) == []


def descendants(pid: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for each in found:
        found += [child for child, parent in parents if parent == each]
    return found[1:]


def alive(pid: int) -> bool:
    status = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    return bool(status) and not status.startswith("Z")
