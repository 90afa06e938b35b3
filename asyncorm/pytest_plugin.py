"""The pytest plugin: nothing to configure, pytest finds it.

Tests with pytest-django's `db` roll back without it (testcase.py).
"""

from __future__ import annotations

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
            SyncToAsync.single_thread_executor.submit(connections.close_all).result()
