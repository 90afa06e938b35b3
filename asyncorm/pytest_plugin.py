"""The pytest plugin: nothing to configure, pytest finds it.

Tests with pytest-django's `db` roll back without it (testcase.py); it offers testing.py's helpers.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(nextitem: Any) -> None:
    """After the last test, close the connections of the thread that sync_to_async() uses.

    Under pytest that is not the thread whose connections pytest-django closes; an open one keeps
    the test database from being dropped.
    """
    if nextitem is None:
        from asgiref.sync import SyncToAsync
        from django.conf import settings
        from django.db import connections

        if settings.configured:
            closing = SyncToAsync.single_thread_executor.submit(connections.close_all)
            wait([closing], timeout=5)  # no longer: a test may have left something running there


def pytest_addoption(parser: pytest.Parser) -> None:
    """--asyncorm-timeline."""
    parser.getgroup("asyncorm").addoption(
        "--asyncorm-timeline",
        action="store_true",
        help="show which task ran which query when, on which connection, for each failing test",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Show a failing test's timeline."""
    if not item.config.getoption("--asyncorm-timeline"):
        return (yield)
    from .testing import timeline_on_failure

    with timeline_on_failure():
        return (yield)


@pytest.fixture
def native_only() -> Iterator[None]:
    """Fail where the test leaves the event loop for a thread, or queries synchronously on it."""
    from . import testing

    with testing.native_only():
        yield


@pytest.fixture
def asyncorm_timeline() -> Iterator[Any]:
    """The queries of the test so far: what `asyncorm.timeline()` records."""
    from .timeline import timeline

    with timeline() as seen:
        yield seen
