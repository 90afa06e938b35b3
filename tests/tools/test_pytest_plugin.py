"""The pytest plugin where it is merely installed: it costs next to nothing, and nobody sees it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *args: str, command: tuple[str, ...] = ("-m", "pytest"), **files: str) -> str:
    """Run pytest in a folder with these modules, with the plugin and no other; what it shows."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    environ = {name: value for name, value in os.environ.items() if "DJANGO" not in name}
    environ |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
    }
    result = subprocess.run(
        [sys.executable, *command, "-p", "pytest_asyncorm", "-q", "-p", "no:cacheprovider", *args],
        cwd=folder, env=environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


LOADED = """
import sys

HEAVY = {"django", "psycopg", "greenlet", "asgiref", "asyncorm"}

def loaded():
    return HEAVY & {name.partition(".")[0] for name in sys.modules}
"""

# At the very end, when each of the plugin's hooks has run.
CONFTEST = """
from loaded import loaded

def pytest_unconfigure(config):
    assert config.pluginmanager.has_plugin("pytest_asyncorm")
    assert not loaded(), loaded()
"""

PASSES = "def test_passes(): pass\n"


def test_the_entry_point_is_outside_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # Of one name, so that pytest does not load it twice when somebody names the module.
    assert project["project"]["entry-points"]["pytest11"] == {"pytest_asyncorm": "pytest_asyncorm"}
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert "pytest_asyncorm.py" in included


@pytest.mark.parametrize("others", [(), ("-p", "pytest_django.plugin")], ids=["", "pytest-django"])
def test_nothing_is_imported(tmp_path: Path, others: tuple[str, ...]) -> None:
    assert "1 passed" in run(tmp_path, *others, loaded=LOADED, conftest=CONFTEST, test_it=PASSES)


def test_it_costs_less_than_ten_milliseconds(tmp_path: Path) -> None:
    code = (
        "import time, pytest; begun = time.process_time(); import pytest_asyncorm; "
        "print(time.process_time() - begun)"
    )
    seconds = min(
        float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) for _ in range(3)
    )
    assert seconds < 0.010


def test_runs_where_psycopg_cannot_be_imported(tmp_path: Path) -> None:
    broken = "raise ImportError('no pq wrapper available')\n"
    assert "1 passed" in run(tmp_path, psycopg=broken, test_it=PASSES)


def test_runs_where_gevent_has_patched_everything(tmp_path: Path) -> None:
    pytest.importorskip("gevent")
    patched = (
        "from gevent import monkey; monkey.patch_all()\nimport pytest\npytest.console_main()\n"
    )
    assert "1 passed" in run(tmp_path, command=("patched.py",), patched=patched, test_it=PASSES)


FIXTURES = """
def test_fixtures(native_only, asyncorm_timeline):
    assert not asyncorm_timeline.queries
"""


@pytest.mark.parametrize(
    "named", [(), ("-p", "asyncorm.pytest_plugin")], ids=["found", "named as well"]
)
def test_fixtures_import_what_they_need(tmp_path: Path, named: tuple[str, ...]) -> None:
    assert "1 passed" in run(tmp_path, *named, test_it=FIXTURES)


def test_the_former_name_is_enough(tmp_path: Path) -> None:
    command = ("-m", "pytest", "-p", "asyncorm.pytest_plugin")
    (tmp_path / "test_it.py").write_text(FIXTURES)
    environ = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    shown = subprocess.check_output(
        [sys.executable, *command, "-c", os.devnull, "--rootdir", ".", "test_it.py"],
        cwd=tmp_path, env=environ, text=True, timeout=120,
    )  # fmt: skip
    assert "1 passed" in shown


def test_the_fixtures_can_be_imported_by_their_former_name() -> None:
    from asyncorm import pytest_plugin

    assert pytest_plugin.native_only is not None and pytest_plugin.asyncorm_timeline is not None
