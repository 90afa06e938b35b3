"""The pytest plugin under its former name, for who names it with `-p` or in `pytest_plugins`."""

from typing import Any

pytest_plugins = ["pytest_asyncorm"]  # under which pytest has it, once


def __getattr__(name: str) -> Any:
    import pytest_asyncorm  # not before pytest does, which rewrites its assertions

    return getattr(pytest_asyncorm, name)
