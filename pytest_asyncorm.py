"""The pytest plugin: nothing to configure, pytest finds it.

pytest loads it wherever the package is installed, also for projects without asyncorm or Django: it
is a module of its own, which imports neither until one of its fixtures is used.

Tests with pytest-django's `db` roll back without it (testcase.py); it offers testing.py's helpers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest


def _app_is_installed() -> bool:
    module: Any = sys.modules.get("django.apps")  # never imported for us
    return bool(module and module.apps.apps_ready and module.apps.is_installed("asyncorm"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(nextitem: Any) -> None:
    """After the last test, close the connections of the thread that sync_to_async() uses.

    Under pytest that is not the thread whose connections pytest-django closes; an open one keeps
    the test database from being dropped.
    """
    if nextitem is None and _app_is_installed():
        from concurrent.futures import wait

        from asgiref.sync import SyncToAsync
        from django.db import connections

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
    if not (item.config.getoption("--asyncorm-timeline") and _app_is_installed()):
        return (yield)
    from asyncorm.testing import timeline_on_failure

    with timeline_on_failure():
        return (yield)


@pytest.fixture
def native_only() -> Iterator[None]:
    """Fail where the test leaves the event loop for a thread, or queries synchronously on it."""
    from asyncorm import testing

    with testing.native_only():
        yield


@pytest.fixture
def asyncorm_timeline() -> Iterator[Any]:
    """The queries of the test so far: what `asyncorm.timeline()` records."""
    from asyncorm.timeline import timeline

    with timeline() as seen:
        yield seen
