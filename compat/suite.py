"""Gets the source distribution of a Django version, which holds its test suite, from the index."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "compat"


class SuiteError(RuntimeError):
    """The suite cannot be had; the message says why."""


def source(project: str, version: str) -> Path:
    """The unpacked source distribution of exactly this version; downloaded once.

    Raises:
        SuiteError: the index does not have it, or what it has is another version.
    """
    folder = CACHE / f"{project}-{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{project}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several runs may want it at once
        if not folder.exists():
            _download(project, version, folder)
    return folder


def django_tests() -> Path:
    """The tests folder of the source distribution of the installed Django."""
    import django

    folder = source("django", django.__version__)
    installed = Path(django.__file__).parent
    for path in (folder / "django").rglob("*.py"):
        copy = installed / path.relative_to(folder / "django")
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            raise SuiteError(f"The installed Django is not that of its source: {copy} differs.")
    return folder / "tests"


def _download(project: str, version: str, folder: Path) -> None:
    print(f"Downloading the source distribution of {project} {version} ...", flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-binary", ":all:", "--dest", temporary]
        done = subprocess.run(
            [*command, f"{project}=={version}"], capture_output=True, text=True, timeout=300
        )
        archives = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            raise SuiteError(
                f"The package index gives no source of {project} {version}: {done.stderr.strip()}"
            )
        unpacked = Path(temporary) / "unpacked"
        with tarfile.open(archives[0]) as archive:
            archive.extractall(unpacked, filter="data")
        (inner,) = unpacked.iterdir()
        shutil.copystat(unpacked, inner)
        os.rename(inner, folder)
