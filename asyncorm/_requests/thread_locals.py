"""Modules that keep state for each thread: code that runs natively shares one thread."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
from types import FunctionType, ModuleType
from typing import Any

_MAKES_ONE = re.compile(
    r"\bthreading\s*\.\s*local\b|\b_thread\s*\.\s*_local\b"
    r"|^\s*from\s+threading\s+import\s[^\n]*\blocal\b|^\s*from\s+threading\s+import\s*\([^)]*\blocal\b",
    re.MULTILINE,
)


# Whose code is known to keep nothing of a request there.
_KNOWN = {"asgiref", "asyncorm", "django", "psycopg", "psycopg_pool", *sys.stdlib_module_names}


@functools.cache
def thread_local_of(module: str) -> str | None:
    """The module that makes a `threading.local` which code of a module may use, if there is one.

    The module itself, those of its own package that it imports from, directly or by others of
    them, and what these import from other packages (`from crum import get_current_user`).
    """
    package = _package(module)
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or _package(name) in _KNOWN or (found := sys.modules.get(name)) is None:
            continue
        seen.add(name)
        if _makes_one(found):
            return name
        if _package(name) == package:
            waiting += map(_origin, [*vars(found).values()])
    return None


def _package(module: str) -> str:
    return module.partition(".")[0]


def _origin(value: Any) -> str:
    """The module that a value of a module's namespace is from.

    Found out by its type: asking a lazy object would make it.
    """
    cls = type(value)
    if cls is ModuleType:
        return str(value.__name__)
    owner = value if cls is FunctionType or issubclass(cls, type) else cls
    return str(getattr(owner, "__module__", ""))


def _makes_one(module: ModuleType) -> bool:
    if any(issubclass(type(value), threading.local) for value in vars(module).values()):
        return True
    try:
        return _MAKES_ONE.search(inspect.getsource(module)) is not None
    except (OSError, TypeError):  # no source
        return False
