"""Runs the tests against what comes next: pre-releases of what asyncorm stands on, newer Pythons.

python -m compat.next [pytest arguments]

On each interpreter found here from 3.11 on, the quick profile of the tests with the newest versions
on the index, pre-releases included and our own upper bounds left aside. It reports and does not
fail: a failure says what a coming release will ask of us.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .environment import ROOT
from .matrix import interpreter
from .suite import CACHE

PYTHONS = ("3.11", "3.12", "3.13", "3.14", "3.15")
PROJECTS = ("Django", "psycopg", "psycopg-binary", "psycopg-pool", "greenlet", "asgiref")


def environment(version: str, python: str) -> tuple[Path, str]:
    """The interpreter of a new environment with the newest of everything, and what it has."""
    folder = CACHE / "venvs" / f"python-{version}-next"
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    new = folder / "bin" / "python"
    pip = [str(new), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "-e", f"{ROOT}[demo,dev]"], check=True)
    # One by one and without what they ask for: whatever is not there for this Python stays.
    for project in PROJECTS:
        subprocess.run([*pip, "--pre", "--upgrade", "--no-deps", project], check=False)
    ask = (
        "from importlib.metadata import version\n"
        f"print(', '.join(f'{{p}} {{version(p)}}' for p in {PROJECTS}))"
    )
    has = subprocess.run([str(new), "-c", ask], capture_output=True, text=True, check=True)
    return new, has.stdout.strip()


def main() -> int:
    lines = []
    for version in PYTHONS:
        python = interpreter(version)
        if python is None:
            lines.append(f"Python {version}: not here")
            continue
        try:
            new, has = environment(version, python)
        except subprocess.CalledProcessError as exc:
            lines.append(f"Python {version}: cannot be installed ({exc})")
            continue
        print(f"\n==> Python {version}, {has}", flush=True)
        command = [str(new), "-m", "pytest", "-q", "-m", "not slow", *sys.argv[1:]]
        failed = subprocess.run(command, cwd=ROOT).returncode
        lines.append(f"Python {version}, {has}: {'FAILED' if failed else 'passed'}")
    print("\n".join(["", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
