"""Runs all suites for every supported Django on its oldest and newest Python here.

python -m compat.matrix   then compat/results/ and docs/compatibility.md are up to date
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import page
from .environment import ROOT, environment

# What is run: (environment, module and arguments).
RUNS = (
    ("run", "compat.run"),
    ("run", "compat.run", "--fast", "--redirect"),
    ("run", "compat.run", "--requests"),
    ("apps", "compat.apps"),
)

# The Pythons that each Django series and asyncorm support.
SUPPORTED = {
    "5.2": ("3.11", "3.12", "3.13"),
    "6.0": ("3.12", "3.13"),
    "6.1": ("3.12", "3.13"),
}


def interpreter(version: str) -> str | None:
    """The path of a Python of this version, on PATH or pyenv's, if there is one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*pyenv.glob(f"{version}.*/bin/python3"), shutil.which(f"python{version}")]
    for candidate in candidates:
        # A shim of pyenv may be on PATH for a version that is not active.
        if candidate and not subprocess.run([candidate, "-c", ""], capture_output=True).returncode:
            return str(candidate)
    return None


def combinations() -> list[tuple[str, str, bool]]:
    """(Django series, interpreter, whether it is the first of the series): oldest and newest."""
    found = []
    for series, versions in SUPPORTED.items():
        here = [path for version in versions if (path := interpreter(version))]
        both = dict.fromkeys(here[:1] + here[-1:])
        found += [(series, path, not number) for number, path in enumerate(both)]
    return found


def main() -> int:
    failed = []
    for series, python, first in combinations():
        for suite, *what in RUNS:
            if suite == "run" and not first:  # the stock backend hardly depends on the Python
                what += ["--baseline", "doubtful"]
            title = f"{' '.join(what)}, Django {series} on {python}"
            print(f"\n==> {title}", flush=True)
            command = [str(environment(series, python, suite)), "-m", *what, "--results"]
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(title)
    page.write()
    for combination in failed:
        print(f"NOT as on the stock backend: {combination}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
