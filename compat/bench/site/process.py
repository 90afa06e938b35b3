"""What the server's process has taken so far: CPU time and threads."""

import json
import threading
import time

_started = 0
_start = threading.Thread.start


def _counted(self: threading.Thread) -> None:
    global _started
    _started += 1
    _start(self)


threading.Thread.start = _counted  # type: ignore[method-assign]


def taken() -> str:
    """Seconds of CPU time and the number of threads started, as JSON."""
    return json.dumps([time.process_time(), _started])
