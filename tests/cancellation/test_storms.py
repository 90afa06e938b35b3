"""Requests by the hundred, some of whose clients go away: `make soak-requests` makes thousands."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_they_start_no_thread_and_leave_nothing() -> None:
    pytest.importorskip("rest_framework")
    done = subprocess.run(
        [sys.executable, "-m", "tests.storms", "300"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "300 requests started 0 threads",
        "300 with clients that went away left nothing",
    ]
