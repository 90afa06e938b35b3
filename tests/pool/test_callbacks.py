"""Whatever a callback of OPTIONS["pool"] does, the pool has its size again, and nobody waits for
ever."""

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import psycopg
import pytest
from django.db import OperationalError
from django.db.backends.postgresql.base import DatabaseWrapper
from greenlet import GreenletExit

import asyncorm
from asyncorm import growth, native, pools
from tests.support import (
    administrator,
    backend_pid,
    database,
    eventually,
    server_connections,
    two_pids,
)

pytestmark = pytest.mark.usefixtures("shop_data")

RAISED: dict[str, type[BaseException]] = {
    "an error": ValueError,
    "CancelledError": asyncio.CancelledError,
    "GreenletExit": GreenletExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
}
DONE = [*RAISED, "waits", "waits for the server", "closes"]
ENDS = (*RAISED.values(), OperationalError)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that could not be made is tried again at once."""
    monkeypatch.setattr(growth, "_SLOWEST_PACE", (0.01, 0.02))
    monkeypatch.setattr(growth, "_SLOW_PACE", (0.01, 0.02))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One that goes on where KeyboardInterrupt has stopped it."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def act(conn: psycopg.Connection[Any], what: str) -> None:
    if what in RAISED:
        raise RAISED[what]("no")
    if what == "waits":
        asyncorm.await_(asyncio.sleep(60))
    elif what == "waits for the server":
        conn.execute("SELECT pg_sleep(60)")
    else:
        conn.close()


def recovers(loop: asyncio.AbstractEventLoop, alias: str) -> None:
    """What fails at first works in the end, each time within the pool's timeout, or so."""

    async def one() -> int:
        return await native(backend_pid)(alias)

    async def several() -> None:
        await asyncio.gather(*[one() for _ in range(4)])

    async def recovered() -> None:
        async with asyncio.timeout(20):
            while True:
                try:
                    return await bounded(lambda: two_pids(alias))
                except OperationalError:
                    continue

    async def bounded(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        began = time.monotonic()
        try:
            return await work()
        finally:
            assert time.monotonic() < began + 15, "bounded by the pool's timeout"

    for work in (one, several) * 2:
        try:
            loop.run_until_complete(bounded(work))
        except ENDS:
            stopped(loop)
    for _ in range(3):  # two of them may yet be interrupted
        try:
            loop.run_until_complete(recovered())
            break
        except (KeyboardInterrupt, SystemExit):
            stopped(loop)
    else:
        pytest.fail("it does not recover")
    loop.run_until_complete(sound(alias))


def stopped(loop: asyncio.AbstractEventLoop) -> None:
    """What stops the loop for the work that has ended is not left for the next one.

    Where a task raises KeyboardInterrupt in the very step in which run_until_complete()'s own is
    done, asyncio leaves the call of stop(), which ends the next run_until_complete() too early.
    """
    while True:
        loop.stop()
        try:
            return loop.run_forever()
        except (KeyboardInterrupt, SystemExit):
            continue


async def sound(alias: str) -> None:
    pool = pools.find(alias)
    assert pool is not None
    await eventually(lambda: pool.stats()["pool_available"] == 2)
    assert pool.stats()["pool_size"] == 2
    assert pool.connections is not None and not pool.connections._growing
    await asyncorm.close_pools(alias)


@pytest.mark.parametrize("before", [0, 1], ids=["first", "later"])
@pytest.mark.parametrize("what", DONE)
@pytest.mark.parametrize("option", ["configure", "check", "reset"])
def test_a_callback_that_fails_twice(
    option: str, what: str, before: int, loop: asyncio.AbstractEventLoop
) -> None:
    calls: list[Any] = []

    def callback(conn: psycopg.Connection[Any]) -> None:
        calls.append(conn)
        if before < len(calls) <= before + 2:
            act(conn, what)

    options = {"min_size": 0, "max_size": 2, "timeout": 0.5, option: callback}
    with database(OPTIONS={"pool": options}) as alias, administrator() as ask:
        recovers(loop, alias)
        assert len(calls) > before + 2
        loop.run_until_complete(eventually(lambda: server_connections(ask, alias) == 0))


@pytest.mark.parametrize("what", RAISED)
def test_connection_parameters_that_fail_twice(
    what: str, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an IAM token that is not to be had."""
    calls: list[str] = []
    original = DatabaseWrapper.get_connection_params

    def params(self: Any) -> Any:
        if self.alias == "extra":
            calls.append(what)
            if len(calls) <= 2:
                raise RAISED[what]("no")
        return original(self)

    monkeypatch.setattr(DatabaseWrapper, "get_connection_params", params)
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2, "timeout": 0.5}}) as alias:
        with pytest.raises(RAISED[what], match="no"):  # as on Django's own
            loop.run_until_complete(native(backend_pid)(alias))
        recovers(loop, alias)


@pytest.mark.parametrize("what", ["CancelledError", "GreenletExit"])
@pytest.mark.parametrize("option", ["configure", "check"])
async def test_a_callback_that_always_raises_is_told(option: str, what: str) -> None:
    """It is not tried again and again, and nobody is cancelled."""
    calls: list[Any] = []

    def callback(conn: psycopg.Connection[Any]) -> None:
        calls.append(conn)
        raise RAISED[what]("no")

    options = {"min_size": 0, "max_size": 2, "timeout": 0.5, option: callback}
    with database(OPTIONS={"pool": options}) as alias:
        with pytest.raises(OperationalError):
            await native(backend_pid)(alias)
        assert len(calls) < 10
        await asyncorm.close_pools(alias)


@pytest.mark.parametrize("what", RAISED)
def test_who_is_told_of_failed_connections(what: str, loop: asyncio.AbstractEventLoop) -> None:
    called: list[Any] = []

    def reconnect_failed(pool: Any) -> None:
        called.append(pool)
        raise RAISED[what]("no")

    def configure(conn: psycopg.Connection[Any]) -> None:
        if len(called) < 4:  # as many as there are workers, and one
            raise ValueError("no")

    callbacks = {"reconnect_failed": reconnect_failed, "configure": configure}
    options = {"min_size": 0, "max_size": 2, "timeout": 0.5, **callbacks}
    with database(OPTIONS={"pool": options}) as alias:

        async def go() -> None:
            for _ in range(20):
                try:
                    await native(backend_pid)(alias)
                except OperationalError:
                    await asyncio.sleep(0.2)

        for _ in range(6):
            try:
                loop.run_until_complete(go())
            except (KeyboardInterrupt, SystemExit):
                stopped(loop)
        assert len(called) == 4
        loop.run_until_complete(two_pids(alias))
        loop.run_until_complete(sound(alias))
    # (isinstance() would ask the lazy objects that other tests have left.)
    tasks = [task for task in gc.get_objects() if issubclass(type(task), asyncio.Task)]
    # What asyncio would say of them, once more and at any time, when the collector finds them.
    assert not [task for task in tasks if task._log_traceback and "-worker" in task.get_name()]


async def test_a_pool_is_closed_while_a_callback_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever that makes of its cancellation."""
    began, end = asyncio.Event(), asyncio.Event()

    async def goes_on() -> None:
        while not end.is_set():
            began.set()
            try:
                await end.wait()
            except asyncio.CancelledError:
                pass

    def reset(conn: psycopg.Connection[Any]) -> None:
        asyncorm.await_(goes_on())

    monkeypatch.setattr("asyncorm._pool.pool.CANCEL_TIMEOUT", 0.3)
    options = {"min_size": 0, "max_size": 2, "reset": reset}
    with database(OPTIONS={"pool": options}) as alias, administrator() as ask:
        await native(backend_pid)(alias)
        await began.wait()
        try:
            async with asyncio.timeout(10):
                await asyncorm.close_pools(alias)
            await eventually(lambda: server_connections(ask, alias) == 0)
        finally:
            end.set()


async def test_a_pool_whose_workers_are_cancelled() -> None:
    """By somebody who cancels all tasks there are: at each moment of opening and giving back."""

    def reset(conn: psycopg.Connection[Any]) -> None:
        conn.execute("SELECT 1")

    options = {"min_size": 0, "max_size": 2, "timeout": 5.0, "reset": reset}
    with database(OPTIONS={"pool": options}) as alias:
        own = asyncio.all_tasks()
        for turns in range(40):
            task = asyncio.create_task(native(backend_pid)(alias))
            for _ in range(turns):
                await asyncio.sleep(0)
            for worker in asyncio.all_tasks() - own - {task}:
                worker.cancel()
            await asyncio.wait([task])
        async with asyncio.timeout(10):
            await two_pids(alias)
        await sound(alias)
