"""Has a whole test run happen natively: one operation in a running event loop."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django
import psycopg
from asgiref.sync import SyncToAsync
from django.conf import settings
from django.db import connections

from asyncorm import bridge, driver

_counting = False  # not while the test databases are made, synchronously


def run(func: Callable[[], Any]) -> Any:
    """Run synchronous code, the tests, in a running event loop."""

    for connection in connections.all() if settings.configured else ():
        if hasattr(connection, "_test_serialized_contents"):
            _contents[connection.alias] = connection._test_serialized_contents

    async def main() -> Any:
        global _counting
        _counting = True
        try:
            return await bridge.run(func)
        finally:
            _counting = False

    return asyncio.run(main())


def install(record: Any, tests: str) -> None:
    """Count statements by kind of connection; have Django's sync_to_async calls run natively.

    Args:
        record: what counts.
        tests: the folder of the tests; threads that code there starts may use the database.
    """
    loop_thread = threading.get_ident()
    _share_serialized_contents()
    _mark_threads(tests)
    sync_wait = psycopg.Connection.wait
    native_wait = driver.Connection.wait

    def wait_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _counting:
            asked = getattr(threading.current_thread(), "asked_by_test", False)
            record.count("threads" if asked else "sync")
        return sync_wait(self, *args, **kwargs)

    def wait_native(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _counting:
            record.count("native" if threading.get_ident() == loop_thread else "elsewhere")
        return native_wait(self, *args, **kwargs)

    psycopg.Connection.wait = wait_sync  # type: ignore[method-assign]
    driver.Connection.wait = wait_native  # type: ignore[method-assign]

    in_thread = SyncToAsync.__call__

    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Django's suite runs its async tests under async_to_sync, which brings sync_to_async back
        # to the test's own thread and connection. Natively that is an inline native call. In a
        # ThreadSensitiveContext (ASGIHandler opens one) it has a thread of its own on either side.
        if (
            self._thread_sensitive
            and threading.get_ident() == loop_thread
            and self.thread_sensitive_context.get(None) is None
        ):
            return await bridge.run(self.func, *args, **kwargs)
        return await in_thread(self, *args, **kwargs)

    SyncToAsync.__call__ = call  # type: ignore[method-assign]

    new_loop = asyncio.run

    def run_here(main: Any, **options: Any) -> Any:
        # A synchronous test that runs a coroutine: there is a loop already.
        return bridge.await_(main) if bridge.in_native_code() else new_loop(main, **options)

    asyncio.run = run_here


def _mark_threads(tests: str) -> None:
    """Tell the threads that a test starts itself from others: those may use the database."""
    start = threading.Thread.start
    # Django's live servers, and their threads for each request, are asked for by a test as well.
    asking = (tests, str(Path(django.__file__).parent / "test"))

    def marking(self: threading.Thread) -> None:
        asked = getattr(threading.current_thread(), "asked_by_test", False)
        if asked or sys._getframe(1).f_code.co_filename.startswith(asking):
            self.asked_by_test = True  # type: ignore[attr-defined]
        start(self)

    threading.Thread.start = marking  # type: ignore[method-assign]


def _share_serialized_contents() -> None:
    """Django keeps what `serialized_rollback` restores on the wrapper that made the database."""
    from asyncorm.backends.native import NativeWrapper

    def kept(wrapper: Any) -> dict[str, Any]:
        # A wrapper that a test makes itself, or copies, keeps its own.
        session = wrapper.session
        own = wrapper.unpooled or (session is not None and session.wrapper is not wrapper)
        return wrapper.__dict__.setdefault("_contents", {}) if own else _contents

    def get(wrapper: Any) -> Any:
        try:
            return kept(wrapper)[wrapper.alias]
        except KeyError:
            raise AttributeError("_test_serialized_contents") from None

    def put(wrapper: Any, value: Any) -> None:
        kept(wrapper)[wrapper.alias] = value

    NativeWrapper._test_serialized_contents = property(get, put)  # type: ignore[attr-defined]


_contents: dict[str, Any] = {}
