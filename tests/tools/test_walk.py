"""A first-time reader's walk: README.md, in an empty folder, up to an answer over HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support import free_port

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLS = ("python3 -m venv ", ". .venv/", "pip install ")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The package as its wheel has it, beside what is installed here; no environment of ours."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True, timeout=120)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=120)
    ours = ("DJANGO", "ASYNCORM", "PG", "DATABASE_URL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(site), "UVICORN_PORT": str(free_port())}


@pytest.mark.slow
def test_from_an_empty_folder_to_a_view(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    readme = (ROOT / "README.md").read_text()
    text = readme[readme.index("## Try it") : readme.index("## In code")]
    *blocks, (_, serve) = BLOCK.findall(text)
    for kind, block in blocks:
        if kind == "sh":
            commands = [line for line in block.splitlines() if not line.startswith(INSTALLS)]
            subprocess.run(
                "\n".join(commands), shell=True, check=True, cwd=folder, env=environment, timeout=60
            )
        else:
            name, code = re.fullmatch(r"# (\S+)\n(.*)", block, re.DOTALL).groups()  # type: ignore[union-attr]
            with (folder / name).open("a" if "settings" in name else "w") as file:
                file.write(code)
    (url,) = re.findall(r"^(http://\S+) answers", text, re.MULTILINE)
    (answer,) = re.findall(r"answers `(.*)`", text)
    process = subprocess.Popen(
        serve, shell=True, cwd=folder, env=environment, start_new_session=True
    )
    try:
        found = get(url.replace("8000", environment["UVICORN_PORT"]), process)
        assert found == json.loads(answer)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
        process.wait(30)


def get(url: str, process: subprocess.Popen[bytes]) -> object:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
        time.sleep(0.1)
