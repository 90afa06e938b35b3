"""Modules that keep state for each thread: code that runs natively shares one thread."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading

_MAKES_ONE = re.compile(
    r"\bthreading\s*\.\s*local\b|\b_thread\s*\.\s*_local\b"
    r"|^\s*from\s+threading\s+import\s[^\n]*\blocal\b|^\s*from\s+threading\s+import\s*\([^)]*\blocal\b",
    re.MULTILINE,
)


@functools.cache
def makes_thread_local(module: str) -> bool:
    """Whether a module makes a `threading.local`, or has got one of another module."""
    found = sys.modules.get(module)
    if found is None:
        return False
    if any(issubclass(type(value), threading.local) for value in vars(found).values()):
        return True
    try:
        return _MAKES_ONE.search(inspect.getsource(found)) is not None
    except (OSError, TypeError):  # no source
        return False
