"""Runs test_other_middleware.py in a process of its own: what other people's apps connect and patch
when they are imported is not for all tests after it."""

import os
import subprocess
import sys
from pathlib import Path


def test_other_middleware() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/requests/test_other_middleware.py"],
        env={**os.environ, "ASYNCORM_TEST_OTHERS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
