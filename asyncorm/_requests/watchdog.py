"""Warns of a step that keeps the event loop busy, and shows what it was doing.

A thread asks the loop to answer, and looks at what the loop's thread does when no answer comes in
time. Without it nothing is measured; it runs with DEBUG, or where ASYNCORM["SLOW_STEP"] says so.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from types import FrameType
from weakref import WeakSet

from django.conf import settings

from .. import conf

logger = logging.getLogger("asyncorm")

_WITH_DEBUG = 0.1  # seconds
# What is not the project's own, wherever it is installed.
_OTHERS = {"asyncorm", *sys.stdlib_module_names}
_watched: WeakSet[asyncio.AbstractEventLoop] = WeakSet()


def limit() -> float | None:
    """Seconds that a step may take; None: nobody looks."""
    seconds = conf.get("SLOW_STEP")
    if seconds is None and settings.DEBUG:
        return _WITH_DEBUG
    return seconds or None


def watch() -> None:
    """Watch the running loop from now on, if that is asked for."""
    loop = asyncio.get_running_loop()
    if loop not in _watched and (seconds := limit()) is not None:
        _watched.add(loop)
        thread = threading.get_ident()
        threading.Thread(
            target=_watch, args=(loop, thread, seconds), name="asyncorm-watchdog", daemon=True
        ).start()


def _watch(loop: asyncio.AbstractEventLoop, thread: int, seconds: float) -> None:
    pause = threading.Event()
    while not loop.is_closed():
        answered = threading.Event()
        try:
            loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # closed meanwhile
            return
        if not answered.wait(seconds):
            frame = sys._current_frames().get(thread)
            if frame is not None and not answered.is_set() and not _waits(frame):
                _warn(frame, seconds)
            while not answered.wait(1.0):  # once for each step
                if loop.is_closed() or not loop.is_running():
                    return
        pause.wait(seconds / 2)


def _waits(frame: FrameType) -> bool:
    """Whether a loop's thread waits for input: it is the machine that is slow."""
    return frame.f_globals.get("__name__") in ("selectors", "asyncio.base_events")


def _warn(frame: FrameType, seconds: float) -> None:
    stack = traceback.extract_stack(frame)
    name = _culprit(frame)
    logger.warning(
        "%s has kept the event loop busy for more than %g s: no other request is served meanwhile. "
        "What blocks belongs into a thread, see \"Requests\" in asyncorm's documentation.\n%s",
        name, seconds, "".join(traceback.format_list(stack)).rstrip(),
    )  # fmt: skip


def _culprit(innermost: FrameType) -> str:
    """The innermost function that is the project's, else the innermost one."""
    frame: FrameType | None = innermost
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        in_packages = "site-packages" in frame.f_code.co_filename
        if not in_packages and module.partition(".")[0] not in _OTHERS:
            return f"{module}.{frame.f_code.co_qualname}()"
        frame = frame.f_back
    module = innermost.f_globals.get("__name__", "")
    return f"{module}.{innermost.f_code.co_qualname}()"
