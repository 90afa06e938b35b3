"""Has a whole test run happen natively: one operation in a running event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import psycopg
from asgiref.sync import SyncToAsync

from asyncorm import bridge, driver


_counting = False  # not while the test databases are made, synchronously


def run(func: Callable[[], Any]) -> Any:
    """Run synchronous code, the tests, in a running event loop."""

    async def main() -> Any:
        global _counting
        _counting = True
        try:
            return await bridge.run(func)
        finally:
            _counting = False

    return asyncio.run(main())


def install(record: Any) -> None:
    """Count statements by kind of connection; have Django's sync_to_async calls run natively."""
    loop_thread = threading.get_ident()
    _share_serialized_contents()
    sync_wait = psycopg.Connection.wait
    native_wait = driver.Connection.wait

    def wait_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _counting:
            record.count("sync")
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
        # to the test's own thread and connection. Natively that is an inline native call.
        if self._thread_sensitive and threading.get_ident() == loop_thread:
            return await bridge.run(self.func, *args, **kwargs)
        return await in_thread(self, *args, **kwargs)

    SyncToAsync.__call__ = call  # type: ignore[method-assign]

    new_loop = asyncio.run

    def run_here(main: Any, **options: Any) -> Any:
        # A synchronous test that runs a coroutine: there is a loop already.
        return bridge.await_(main) if bridge.in_native_code() else new_loop(main, **options)

    asyncio.run = run_here


def _share_serialized_contents() -> None:
    """Django keeps what `serialized_rollback` restores on the wrapper that made the database."""
    from django.db import connections

    from asyncorm.backends.mixin import NativeWrapper

    def contents(wrapper: Any) -> Any:
        own = getattr(connections._connections.local, wrapper.alias)
        return own._test_serialized_contents

    NativeWrapper._test_serialized_contents = property(contents)
