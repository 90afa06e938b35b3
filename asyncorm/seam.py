"""What asyncorm replaces in Django and asgiref while the app is installed, so that connections,
blocks and waiting work natively: the seam to Django's internals.

(The wrapper classes are in backends/.) Each replacement does what it replaced outside
native code. They are made by patches.py, as those of other modules are.

- `django.db.connections._connections`: where `connections[alias]` is kept. It must be the running
  operation's wrapper in native code; Django's own is a context variable on a loop's thread, copied
  into child tasks, so gathered tasks would share one wrapper.
- `django.utils.asyncio.get_running_loop`: what `async_unsafe` asks whether to refuse; native code
  is allowed.
- `django.db.transaction.Atomic.__enter__`, `.__exit__`: blocks of the transaction tree in native
  code.
- `asgiref.sync.AsyncToSync.__call__`: refuses on a running loop's thread; native code awaits
  instead (asynchronous signal receivers). In a thread it lends what the thread's connection has
  (callers.py).
- `django.dispatch.dispatcher._run_parallel` (Django 6.1): runs asynchronous receivers in tasks that
  share one Context; the block that one of them is in must not be that of a task that another
  starts.
- `django.db.models.fields.files.FieldFile.save`, `.delete`: the storage works in a thread while the
  model is saved natively.
- `django.db.models.query.prefetch_related_objects`, `.prefetch_one_level`: the queries of several
  lookups at once (prefetching.py, which also reads `get_prefetcher`, `QuerySet._result_cache`,
  `._fetch_all` and `._prefetch_related_lookups`, and the methods of `Prefetch`).
- `QuerySet._batched_insert` of a queryset that copies instead (copying.py).
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import django.db.models.query
import django.utils.asyncio
from asgiref.sync import AsyncToSync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.files.storage import Storage
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.dummy.base import DatabaseWrapper as _NoDatabase
from django.db.models.fields.files import FieldFile
from django.db.transaction import Atomic
from django.dispatch import dispatcher

from . import advice, bridge, callers, internals, observers, patches, prefetching, sessions
from ._sessions import scopes
from ._transactions import lifecycle
from .backends.native import NativeWrapper
from .pages import see


class _Storage:
    """In place of `connections._connections`.

    Attributes:
        local: Django's own storage.
    """

    def __init__(self, local: object) -> None:
        object.__setattr__(self, "local", local)

    def __getattr__(self, alias: str) -> Any:
        runner = bridge.current()
        if runner is not None:
            session = sessions.session_for(alias, runner)
            if session is not None:
                return session.wrapper
            runner.resources.setdefault(_FOREIGN, _foreign)
        elif alias in sessions.test_sessions and (bridge.loop_runs() or observers.serves_a_loop()):
            # On the loop's thread: what is installed there (CaptureQueriesContext) is for the test.
            # In another thread: synchronous code that the test calls by sync_to_async().
            return sessions.test_sessions[alias].wrapper
        elif (block := scopes.block_of_coroutine(alias)) is not None:
            # For transaction.on_commit(), set_rollback() and the like; statements are refused.
            return block.session.wrapper
        return getattr(self.local, alias)

    def __setattr__(self, alias: str, wrapper: BaseDatabaseWrapper) -> None:
        setattr(self.local, alias, wrapper)

    def __delattr__(self, alias: str) -> None:
        delattr(self.local, alias)


_FOREIGN = "a wrapper of another engine was handed out"


class _Foreign:
    """A mark among the resources of an operation."""

    def suspend(self) -> None: ...

    def release(self) -> None: ...


_foreign = _Foreign()


def _get_running_loop() -> Any:
    runner = bridge.current()
    if runner is not None:
        if _FOREIGN in runner.resources:
            _refuse_foreign(sys._getframe(1).f_locals.get("args", ()))
        raise RuntimeError("Native code may call the synchronous ORM.")
    loop = asyncio.get_running_loop()
    _advise(sys._getframe(1))
    return loop


def _advise(frame: FrameType) -> None:
    """Raise what async_unsafe's wrapper is about to raise, with advice, for a wrapper of ours."""
    args = frame.f_locals.get("args")
    if (
        args
        and getattr(args[0], "native_class", None) is not None
        and not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE")
    ):
        raise SynchronousOnlyOperation(advice.synchronous_only(frame))


def _refuse_foreign(args: tuple[Any, ...]) -> None:
    # Called by async_unsafe's wrapper, whose first argument is the DatabaseWrapper.
    wrapper: Any = args[0] if args else None
    alias = getattr(wrapper, "alias", None)
    if (
        alias is not None
        and not isinstance(wrapper, NativeWrapper)
        and getattr(wrapper, "native_class", None) is None  # ours, of another thread, is not
    ):
        engine = wrapper.settings_dict.get("ENGINE")
        if isinstance(wrapper, _NoDatabase):
            return  # says itself that there is no database in the settings
        raise SynchronousOnlyOperation(
            f"Native code used database {alias!r}, whose ENGINE {engine!r} would block the event "
            "loop. Use sync_to_async for it, or "
            "asyncorm.await_(sync_to_async(function)()) from within native code."
            + see("databases#several-databases")
        )


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if bridge.in_native_code():
            return bridge.await_(self.awaitable(*args, **kwargs))
        with callers.lending():
            return original(self, *args, **kwargs)

    return __call__


def _in_own_scopes(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def run_parallel(*coros: Any) -> Any:
        return await original(*map(scopes.in_own_scope, coros))

    return run_parallel


class _ThreadedStorage:
    """A storage whose methods run in Django's thread while native code waits."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._storage, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            # Not await_(), which gives the connection back: before Django 6 the cursor of the
            # INSERT is open while pre_save() stores the file.
            return bridge.wait_for(bridge.running(), sync_to_async(value)(*args, **kwargs))

        return call


def _with_threaded_storage(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not bridge.in_native_code() or isinstance(self.storage, _ThreadedStorage):
            return original(self, *args, **kwargs)
        storage, self.storage = self.storage, _ThreadedStorage(self.storage)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.storage = storage

    return method


def install() -> None:
    """Put the replacements in place, once."""
    if isinstance(connections._connections, _Storage):  # type: ignore[attr-defined]
        return
    storage = _Storage(connections._connections)  # type: ignore[attr-defined]
    patches.replace(
        connections, "_connections", storage, "native code has a connection for each operation",
        label="django.db.connections",
    )  # fmt: skip
    patches.replace(
        django.utils.asyncio, "get_running_loop", _get_running_loop,
        "native code may call the synchronous ORM on the event loop",
    )  # fmt: skip
    blocks = "blocks are a tree that tasks share"
    patches.replace(Atomic, "__enter__", lifecycle.enter, blocks)
    patches.replace(Atomic, "__exit__", lifecycle.leave, blocks)
    patches.replace(
        AsyncToSync, "__call__", _call(AsyncToSync.__call__),
        "native code awaits, and synchronous code lends its transaction",
    )  # fmt: skip
    if run_parallel := getattr(dispatcher, "_run_parallel", None):
        patches.replace(
            dispatcher, "_run_parallel", _in_own_scopes(run_parallel),
            "asynchronous receivers have blocks of their own",
        )  # fmt: skip
    if internals.PREFETCH not in internals.lost():
        together = "queries of independent lookups run at once"
        for module in (django.db.models.query, django.db.models):
            patches.replace(
                module, "prefetch_related_objects", prefetching.prefetch_related_objects, together
            )
        patches.replace(
            django.db.models.query, "prefetch_one_level", prefetching.prefetch_one_level, together
        )
    for name in ("save", "delete"):
        patches.replace(
            FieldFile, name, _with_threaded_storage(getattr(FieldFile, name)),
            "file storage works in a thread",
        )  # fmt: skip
