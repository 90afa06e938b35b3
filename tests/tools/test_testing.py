"""A project's tests, run as its developers do: manage.py test --parallel, and pytest's plugins."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

HERE = Path(__file__).parents[1]
EXAMPLE = HERE / "example"
DOCS = HERE.parent / "docs"
FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# They run beside each other.
RUNS = {
    "manage.py": ["manage.py", "test", "--noinput", "--parallel", "2", "bookshop", "documented"],
    "strict": ["-m", "pytest", "-o", "asyncio_default_fixture_loop_scope=function"],
    "auto": [
        *["-m", "pytest", "-o", "asyncio_mode=auto"],
        *["-o", "asyncio_default_fixture_loop_scope=function"],
        *["pytests/auto_asyncio.py", "documented"],
    ],
    "auto, one loop": [
        *["-m", "pytest", "-o", "asyncio_mode=auto", "pytests/auto_asyncio.py"],
        *["-o", "asyncio_default_fixture_loop_scope=session"],
        *["-o", "asyncio_default_test_loop_scope=session"],
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Iterator[dict[str, Any]]:
    """All of them started, with the code of docs/testing.md among their tests."""
    documented = tmp_path_factory.mktemp("docs") / "documented"
    documented.mkdir()
    (documented / "__init__.py").touch()
    for name, code in FILE.findall((DOCS / "testing.md").read_text()):
        (documented / name).write_text(code)
    database = connections.settings["default"]
    server = {key: database[key] for key in ("USER", "PASSWORD", "HOST", "PORT")}
    processes = {}
    for number, (name, arguments) in enumerate(RUNS.items()):
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "bookshop.settings",
            "ASYNCORM_TEST_DATABASE": json.dumps({**server, "NAME": f"example{number}"}),
            "PYTHONPATH": str(documented.parent),
        }
        arguments = [str(documented) if part == "documented" else part for part in arguments]
        if name == "manage.py":
            arguments[-1] = "documented"
        processes[name] = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", *arguments],
            env=environment,
            cwd=EXAMPLE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "name",
    [
        *list(RUNS)[:-1],
        pytest.param(list(RUNS)[-1], marks=pytest.mark.slow),
    ],
)
def test_suite_of_a_project(runs: dict[str, Any], name: str) -> None:
    output, _ = runs[name].communicate(timeout=100)
    assert runs[name].returncode == 0, output
    assert not re.search(r"Exception ignored|never awaited|teardown test databases", output), output
    if name == "manage.py":
        assert re.search(r"Ran (3[3-9]|[4-9]\d) tests", output), output
    else:
        passed = int(re.search(r"(\d+) passed", output)[1])  # type: ignore[index]
        assert passed >= {"strict": 46, "auto": 23, "auto, one loop": 14}[name], output
        assert "warnings summary" not in output, output
