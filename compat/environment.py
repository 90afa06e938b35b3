"""Runs compat.run, or compat.apps, in an environment of its own with the Django series asked for.

python -m compat.environment [--django 6.0] [--suite apps] [what compat.run or compat.apps takes]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from .suite import CACHE

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent


def environment(series: str, python: str = sys.executable, suite: str = "run") -> Path:
    """The interpreter of a virtual environment with asyncorm, a Django and what the tests use.

    Args:
        series: of Django.
        python: the interpreter that it is made with.
        suite: "run" for Django's tests, "apps" for those of other people's apps.

    Made when it is not there yet or what it is made from has changed.
    """
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    suffix = "" if suite == "run" else f"-{suite}"
    folder = CACHE / "venvs" / f"python-{version}-django-{series}{suffix}"
    requirements = HERE / f"requirements{suffix}.txt"
    made_from = (ROOT / "pyproject.toml").read_bytes() + requirements.read_bytes()
    stamp = folder / ".installed"
    digest = hashlib.sha256(made_from).hexdigest()
    interpreter = folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == digest:
        return interpreter
    print(f"Making {folder} (once, a minute or so) ...", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-input", "-e", f"{ROOT}[demo]", f"Django~={series}.0", "-r", str(requirements)]
    subprocess.run(pip, check=True)
    stamp.write_text(digest)
    return interpreter


def installed_series() -> str:
    """The series of the Django that is installed here."""
    import django

    return ".".join(django.__version__.split(".")[:2])


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--django", choices=("5.2", "6.0", "6.1"))
    parser.add_argument("--suite", choices=("run", "apps"), default="run")
    options, rest = parser.parse_known_args()
    series = options.django or installed_series()
    try:
        interpreter = environment(series, suite=options.suite)
    except subprocess.CalledProcessError as exc:
        print(f"The environment cannot be made: {exc}", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    os.execv(interpreter, [str(interpreter), "-m", f"compat.{options.suite}", *rest])


if __name__ == "__main__":
    sys.exit(main())
