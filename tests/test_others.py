"""Runs files in a process of their own: what other people's apps connect and patch when they are
imported, and what middleware leaves in the threads' sessions, is not for all tests after them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["test_other_middleware", "test_native_rules"])
def test_apart(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/{name}.py"],
        env={**os.environ, "ASYNCORM_TEST_OTHERS": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
