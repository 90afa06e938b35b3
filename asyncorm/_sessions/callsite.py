"""Where in its user's code something was called, for messages and for those who listen."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from greenlet import getcurrent

_OWN = (
    "asyncorm.", "django.db.", "django.dispatch", "django.utils.asyncio", "asgiref.", "psycopg.",
    "contextlib", "asyncio.", "greenlet",
)  # fmt: skip


def caller() -> str:
    """File and line of the nearest frame that is not ours nor Django's, for messages."""
    frame: FrameType | None = sys._getframe(1)
    runner: Any = getcurrent()
    while frame is None or (name := frame.f_globals.get("__name__", "")).startswith(_OWN):
        if frame is None:
            # Native code was called by the greenlet around it, which waits: whatever awaits it.
            if (runner := runner.parent) is None or (frame := runner.gr_frame) is None:
                return "an unknown place"
        elif name == "asyncio.events":  # what runs the loop is of no interest
            return "an unknown place"
        else:
            frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
