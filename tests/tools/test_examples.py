"""The projects in examples/: each runs its own tests, as who copied it would, on this server."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

EXAMPLES = Path(__file__).parents[2] / "examples"
# The fewest tests of each, and what it needs that a Python or a Django may not have yet.
PROJECTS = {"api": (6, ["rest_framework"]), "chat": (9, ["channels", "daphne"]), "site": (6, [])}
CHECK = ["makemigrations", "--check", "--dry-run"]
TEST = ["test", "--noinput"]


def start(name: str, database_name: str, *command: str) -> subprocess.Popen[str]:
    """Start a command of the project's manage.py, with the server in libpq's variables."""
    database = connections.settings["default"]
    server = {"PGHOST": "HOST", "PGPORT": "PORT", "PGUSER": "USER", "PGPASSWORD": "PASSWORD"}
    found = {variable: str(database[key]) for variable, key in server.items() if database[key]}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DJANGO_")}
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "manage.py", *command],
        env={**clean, **found, "PGDATABASE": database_name, "PYTHONPATH": str(EXAMPLES.parent)},
        cwd=EXAMPLES / name,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The tests of all of them, started beside each other."""
    processes = {name: start(name, f"example_{name}", *TEST) for name in PROJECTS}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def test_all_projects_are_here() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/manage.py")} == PROJECTS.keys()


@pytest.mark.parametrize("name", PROJECTS)
def test_its_own_tests_pass(runs: dict[str, Any], name: str) -> None:
    fewest, packages = PROJECTS[name]
    for package in packages:
        pytest.importorskip(package)
    output, _ = runs[name].communicate(timeout=200)
    assert runs[name].returncode == 0, output
    assert not re.search(r"Exception ignored|never awaited|Warning:", output), output
    assert int(re.search(r"Ran (\d+) tests", output)[1]) >= fewest, output  # type: ignore[index]


@pytest.mark.parametrize("name", PROJECTS)
def test_its_migrations_are_complete(name: str) -> None:
    for package in PROJECTS[name][1]:
        pytest.importorskip(package)
    with start(name, "postgres", *CHECK) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "No changes detected" in output


@pytest.mark.parametrize("name", PROJECTS)
def test_it_is_small(name: str) -> None:
    """Whoever opens it can read all of it: its README on one screen, under 250 lines of code."""
    assert len((EXAMPLES / name / "README.md").read_text().splitlines()) <= 50
    files = [path for path in (EXAMPLES / name).rglob("*.py") if path.parent.name != "migrations"]
    lines = sum(len(path.read_text().splitlines()) for path in files if path.name != "tests.py")
    assert lines < 250, f"{lines} lines"
