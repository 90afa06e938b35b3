"""Starts one worker process for each half and takes the figures from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import DemoError
from .figures import Run
from .settings import Half


class HalfProcess:
    """The worker of one half; a process each, so that neither can influence the other."""

    def __init__(self, half: Half, **job: Any) -> None:
        self._half = half
        self._job = {"half": half.key, **job}

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C goes to the demo alone, which then ends its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._send(self._job)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()  # closes its input, at which it ends

    def measure(self, scenario: str, way: int | None = None, save: Path | None = None) -> Run:
        """Run a scenario once, or an act in one of its two ways; save the timeline's picture."""
        self._send({"scenario": scenario, "way": way, "save": save and str(save.absolute())})
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise DemoError(f"the process measuring {self._half.title} ended with code {code}")
        answer = json.loads(line)
        if "error" in answer:
            message = f"{self._half.title} failed at {scenario}:\n\n{answer['error']}"
            raise DemoError(message.rstrip())
        return Run.from_json(answer["run"])

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; measure() says so
