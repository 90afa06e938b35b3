"""Deadlines and cancellation: at every await, of running statements, over a Unix socket and TCP."""

import asyncio
import contextlib
import gc
import os
import signal
import time
import types
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import anyio
import psycopg
import pytest
from django.core.asgi import get_asgi_application
from django.db import OperationalError, connections, transaction
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path

import asyncorm
from asyncorm import pools
from asyncorm.demo.postgres import postgres_server
from tests.chaos import Proxy
from tests.project.myapp.models import Item
from tests.support import CREATE_ITEM, next_socket, set_cancel_timeout

PATIENCE = 30  # seconds: reached only when something hangs
ids = count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server that listens on a socket and on TCP: aliases `socket` and `tcp`."""
    with postgres_server(tcp=True, own=True) as server:
        assert server.datadir is not None
        common = {
            "ENGINE": "asyncorm.backends.postgresql",
            "OPTIONS": {"pool": {"min_size": 1, "max_size": 4}},
        }
        hosts = {"tcp": server.settings["HOST"], "socket": str(server.datadir.parent)}
        for alias, host in hosts.items():
            add_alias(alias, {**server.settings, **common, "HOST": host})
        with psycopg.connect(**address(server.settings), autocommit=True) as observer:
            observer.execute("SET application_name = 'observer'")
            observer.execute("SET lock_timeout = '20s'")
            observer.execute(CREATE_ITEM)
            server.observer = observer  # type: ignore[attr-defined]
            yield server
        for alias in hosts:
            del connections.settings[alias]


def add_alias(alias: str, settings: dict[str, Any]) -> None:
    filled = connections.configure_settings(
        {"default": connections["default"].settings_dict, alias: settings}
    )  # type: ignore[attr-defined]
    connections.settings[alias] = filled[alias]  # type: ignore[attr-defined]


def address(settings: dict[str, Any]) -> dict[str, Any]:
    names = {
        "dbname": "NAME",
        "user": "USER",
        "password": "PASSWORD",
        "host": "HOST",
        "port": "PORT",
    }
    return {name: settings[key] for name, key in names.items()}


@pytest.fixture(params=["socket", "tcp"])
def alias(request: pytest.FixtureRequest, server: Any, django_db_blocker: Any) -> Iterator[str]:
    server.observer.execute("TRUNCATE myapp_item")
    with django_db_blocker.unblock():
        yield request.param


class Watch:
    """What the server says about our connections."""

    def __init__(self, server: Any) -> None:
        self.observer = server.observer

    def rows(self) -> list[str]:
        return [name for (name,) in self.observer.execute("SELECT name FROM myapp_item ORDER BY 1")]

    def states(self) -> list[tuple[int, str]]:
        return self.observer.execute(  # type: ignore[no-any-return]
            "SELECT pid, state FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND application_name <> 'observer'"
        ).fetchall()

    async def until(
        self, condition: Callable[[], Any], seconds: float = PATIENCE, when: str = ""
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (when, self.states())
            await asyncio.sleep(0.002)

    def sleeping(self) -> bool:
        """Whether sleep_on_server() has begun on the server."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        return self.observer.execute(query).fetchone() == (1,)  # type: ignore[no-any-return]

    def at_rest(self) -> bool:
        return all(state == "idle" for _, state in self.states())


@pytest.fixture
def watch(server: Any) -> Watch:
    return Watch(server)


async def add(alias: str, name: str) -> None:
    await Item.objects.using(alias).native_create(remote_id=next(ids), name=name)


async def sleep_on_server(alias: str, seconds: float = 600) -> None:
    async with asyncorm.cursor(alias) as cursor:
        await cursor.execute("SELECT pg_sleep(%s)", [seconds])


def all_back(alias: str) -> bool:
    """Whether no connection is lent."""
    stats = asyncorm.pool_stats(alias)
    return not stats or stats["pool_available"] == stats["pool_size"] <= 4


async def healthy(alias: str, watch: Watch) -> None:
    """The pool has all its connections back and each of them works."""
    await watch.until(watch.at_rest)
    await watch.until(lambda: all_back(alias))
    barrier = asyncio.Barrier(4)

    async def use() -> int:
        async with asyncorm.atomic(alias), asyncorm.cursor(alias) as cursor:
            await barrier.wait()
            await cursor.execute("SELECT 1")
            return (await cursor.fetchone())[0]  # type: ignore[index,no-any-return]

    async with asyncio.timeout(PATIENCE):
        assert await asyncio.gather(*(use() for _ in range(4))) == [1] * 4


# Ways to be cancelled: each runs a coroutine and gives it the means to be cancelled


class Steps:
    """Await a coroutine and call `act` at its n-th, n+1st, ... suspension."""

    def __init__(self, coro: Any, at: range, act: Callable[[], Any]) -> None:
        self.coro, self.at, self.act = coro, at, act
        self.reached = False

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self.coro.__await__()
        resume = partial(steps.send, None)
        number = 0
        while True:
            try:
                future = resume()
            except StopIteration as stop:
                return stop.value
            number += 1
            if number in self.at:
                self.reached = True
                self.act()
            try:
                value = yield future
            except BaseException as exc:
                resume = partial(steps.throw, exc)
            else:
                resume = partial(steps.send, value)


def cancel_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def by_cancel(coro: Any, n: int, times: int = 1) -> bool:
    steps = Steps(coro, range(n, n + times), cancel_task)
    with contextlib.suppress(asyncio.CancelledError):
        await steps
        assert not steps.reached, "the cancellation was lost"
    return steps.reached


async def by_two_cancels(coro: Any, n: int) -> bool:
    return await by_cancel(coro, n, 2)


async def by_many_cancels(coro: Any, n: int) -> bool:
    return await by_cancel(coro, n, 50)


async def by_anyio(coro: Any, n: int) -> bool:
    with anyio.CancelScope() as scope:
        steps = Steps(coro, range(n, n + 1), scope.cancel)
        await steps
    return steps.reached


async def by_timeout(coro: Any, n: int) -> bool:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            steps = Steps(coro, range(n, n + 1), lambda: timeout.reschedule(loop.time()))
            await steps
    return steps.reached


async def by_fail_after(coro: Any, n: int) -> bool:
    def expire() -> None:
        scope.deadline = anyio.current_time()

    with contextlib.suppress(TimeoutError):
        with anyio.fail_after(PATIENCE) as scope:
            steps = Steps(coro, range(n, n + 1), expire)
            await steps
    return steps.reached


WAYS = [by_cancel, by_two_cancels, by_many_cancels, by_anyio, by_timeout, by_fail_after]
ways = pytest.mark.parametrize("cancelled", WAYS, ids=lambda way: way.__name__)


async def at_every_await(
    cancelled: Any,
    scenario: Callable[[], Any],
    alias: str,
    watch: Watch,
    check: Callable[[], Any] = lambda: None,
) -> int:
    for n in range(1, 1000):
        async with asyncio.timeout(PATIENCE):
            # A task of its own, so that what is cancelled is not the test.
            reached = await asyncio.create_task(cancelled(scenario(), n))
        await watch.until(watch.at_rest, 10, f"{n} awaits")
        await watch.until(lambda: all_back(alias), 10, f"leaked after {n} awaits")
        check()
        if not reached:
            return n
    raise AssertionError("the scenario does not end")


@ways
async def test_a_block_cancelled_at_every_await(cancelled: Any, alias: str, watch: Watch) -> None:
    called: list[str] = []

    def callback() -> None:
        # In the operation that commits, so a cancellation that came during COMMIT must wait.
        assert Item.objects.using(alias).count() == 4
        called.append("synchronous")

    async def coroutine() -> None:
        called.append("asynchronous")

    async def block() -> None:
        async with asyncorm.atomic(alias):
            asyncorm.on_commit(coroutine, alias)
            asyncorm.on_commit(callback, alias)
            await add(alias, "a")
            async with asyncorm.atomic(alias):
                await add(alias, "b")
                await asyncio.gather(add(alias, "c"), add(alias, "d"))
            async for _ in Item.objects.using(alias).native_iterator(chunk_size=3):
                pass

    def check() -> None:
        rows = watch.rows()
        assert rows in ([], ["a", "b", "c", "d"])
        if not rows:
            assert called == []
        elif called != ["asynchronous", "synchronous"]:
            # Cancelled while the callbacks ran: as if one had raised.
            assert called in ([], ["asynchronous"])
        outcomes.add(len(rows))
        called.clear()
        watch.observer.execute("TRUNCATE myapp_item")

    outcomes: set[int] = set()
    awaits = await at_every_await(cancelled, block, alias, watch, check)
    assert awaits > 8
    assert outcomes == {0, 4}
    await healthy(alias, watch)


@ways
async def test_native_code_cancelled_at_every_await(
    cancelled: Any, alias: str, watch: Watch
) -> None:
    def work() -> None:
        with transaction.atomic(using=alias):
            Item.objects.using(alias).create(remote_id=next(ids), name="a")
            with transaction.atomic(using=alias):
                Item.objects.using(alias).create(remote_id=next(ids), name="b")
                asyncorm.await_(asyncio.sleep(0))
            asyncorm.await_(add(alias, "c"))
        list(Item.objects.using(alias))

    def check() -> None:
        assert watch.rows() in ([], ["a", "b", "c"])
        watch.observer.execute("TRUNCATE myapp_item")

    await at_every_await(cancelled, asyncorm.native(work), alias, watch, check)
    await healthy(alias, watch)


@ways
async def test_a_kept_connection_and_a_stream_cancelled_at_every_await(
    cancelled: Any, alias: str, watch: Watch
) -> None:
    watch.observer.execute(
        "INSERT INTO myapp_item (remote_id, name) SELECT n, n FROM generate_series(1, 10) n"
    )

    async def use() -> None:
        async with asyncorm.connection(alias):
            async with asyncorm.cursor(alias) as cursor:
                await cursor.execute("CREATE TEMPORARY TABLE mine (n integer)")
                await cursor.execute("SELECT pg_advisory_lock(1)")
        async for _ in Item.objects.using(alias).native_iterator(chunk_size=4):
            await asyncio.sleep(0)

    def check() -> None:
        # Nothing of the session is left to the next who gets the connection.
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        assert watch.observer.execute(locks).fetchone() == (0,)

    await at_every_await(cancelled, use, alias, watch, check)
    await healthy(alias, watch)


@ways
async def test_copying_cancelled_at_every_await(cancelled: Any, alias: str, watch: Watch) -> None:
    async def create(name: str) -> None:
        items = [Item(remote_id=next(ids), name=name) for _ in range(500)]
        await Item.objects.using(alias).native_bulk_create(items, method="copy")

    class Writer:
        async def write(self, data: bytes) -> None:
            await asyncio.sleep(0)

    async def use() -> None:
        watch.observer.execute("TRUNCATE myapp_item")
        await create("a")
        await asyncorm.copy_to(Item.objects.using(alias), Writer())
        async with asyncorm.atomic(alias):
            await create("b")
            await asyncorm.copy_to(Item.objects.using(alias), Writer(), "binary")

    def check() -> None:
        assert len(watch.rows()) in (0, 500, 1000)

    await at_every_await(cancelled, use, alias, watch, check)
    await healthy(alias, watch)


@ways
async def test_reading_ahead_cancelled_at_every_await(
    cancelled: Any, alias: str, watch: Watch
) -> None:
    watch.observer.execute(
        "INSERT INTO myapp_item (remote_id, name) SELECT n, n FROM generate_series(1, 10) n"
    )

    async def read(left_early: bool) -> None:
        rows = Item.objects.using(alias).native_iterator(chunk_size=2, read_ahead=2)
        async with contextlib.aclosing(rows):  # type: ignore[type-var]
            seen = 0
            async for _ in rows:
                seen += 1
                await asyncio.sleep(0)
                if left_early and seen == 5:
                    break
            assert seen == (5 if left_early else 10)

    async def use() -> None:
        await read(False)
        async with asyncorm.atomic(alias):
            await read(True)
            async with asyncorm.atomic(alias):
                await read(False)

    await at_every_await(cancelled, use, alias, watch)
    await healthy(alias, watch)


@ways
async def test_waiting_for_a_connection_cancelled_at_every_await(
    cancelled: Any, alias: str, watch: Watch
) -> None:
    async def crowd() -> None:
        await asyncio.gather(*(sleep_on_server(alias, 0.001) for _ in range(12)))

    await at_every_await(cancelled, crowd, alias, watch)
    await healthy(alias, watch)


# Statements that run on the server


async def statement(alias: str) -> None:
    await sleep_on_server(alias)


async def in_a_block(alias: str) -> None:
    async with asyncorm.atomic(alias):
        await add(alias, "lost")
        await sleep_on_server(alias)


async def in_a_nested_block(alias: str) -> None:
    async with asyncorm.atomic(alias):
        await add(alias, "lost")
        async with asyncorm.atomic(alias):
            await add(alias, "lost too")
            await sleep_on_server(alias)


async def in_a_child_task(alias: str) -> None:
    async with asyncorm.atomic(alias):
        async with asyncio.TaskGroup() as group:
            group.create_task(add(alias, "lost"))
            group.create_task(sleep_on_server(alias))


async def in_native_code(alias: str) -> None:
    def work() -> None:
        with transaction.atomic(using=alias):
            Item.objects.using(alias).create(remote_id=next(ids), name="lost")
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT pg_sleep(600)")

    await asyncorm.native(work)()


async def in_a_kept_connection(alias: str) -> None:
    async with asyncorm.connection(alias):
        await sleep_on_server(alias)


PLACES = [
    statement,
    in_a_block,
    in_a_nested_block,
    in_a_child_task,
    in_native_code,
    in_a_kept_connection,
]


async def end_by_cancel(coro: Any, go: asyncio.Event) -> None:
    task = asyncio.create_task(coro)
    await go.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def end_by_two_cancels(coro: Any, go: asyncio.Event) -> None:
    task = asyncio.create_task(coro)
    await go.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def end_by_timeout(coro: Any, go: asyncio.Event) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:

            async def expire() -> None:
                await go.wait()
                timeout.reschedule(asyncio.get_running_loop().time())

            expiring = asyncio.create_task(expire())
            await coro
    await expiring


async def end_by_anyio(coro: Any, go: asyncio.Event) -> None:
    async def run() -> None:
        await coro

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await go.wait()
        group.cancel_scope.cancel()


async def end_by_fail_after(coro: Any, go: asyncio.Event) -> None:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(PATIENCE) as scope:

            async def expire() -> None:
                await go.wait()
                scope.deadline = anyio.current_time()

            expiring = asyncio.create_task(expire())
            await coro
    await expiring


ENDS = [end_by_cancel, end_by_two_cancels, end_by_timeout, end_by_anyio, end_by_fail_after]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
async def test_a_running_statement_is_cancelled_on_the_server(
    end: Any, place: Any, alias: str, watch: Watch
) -> None:
    go = asyncio.Event()

    async def started() -> None:
        await watch.until(watch.sleeping)
        go.set()

    starting = asyncio.create_task(started())
    async with asyncio.timeout(PATIENCE):
        await end(place(alias), go)
    await starting
    # The statement was over when the task went on: its locks do not surprise the caller.
    assert not watch.sleeping()
    await healthy(alias, watch)
    assert watch.rows() == []


async def test_the_connection_of_a_cancelled_statement_is_used_again(
    alias: str, watch: Watch
) -> None:
    async with asyncorm.cursor(alias) as cursor:
        await cursor.execute("SELECT 1")
    before = {pid for pid, _ in watch.states()}
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await sleep_on_server(alias)
    assert before & {pid for pid, _ in watch.states()} == before


async def in_a_batch(alias: str) -> None:
    await asyncorm.batch(
        lambda: sleep_on_server(alias), lambda: sleep_on_server(alias), using=alias
    )


@pytest.mark.parametrize(
    "place",
    [statement, in_native_code, in_a_kept_connection, in_a_child_task, in_a_batch],
    ids=lambda place: place.__name__,
)
async def test_a_cancellation_that_overtakes_its_statement(
    place: Any, alias: str, watch: Watch
) -> None:
    """A server process that has not read the statement yet ignores the request to cancel it."""
    await sleep_on_server(alias, 0)
    before = {pid for pid, _ in watch.states()}
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    try:
        task = asyncio.create_task(place(alias))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.3)
    finally:
        for pid in before:
            os.kill(pid, signal.SIGCONT)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not watch.sleeping()
    await healthy(alias, watch)
    assert before <= {pid for pid, _ in watch.states()}, "the connections are used again"
    assert watch.rows() == []


@pytest.mark.parametrize("turns", range(5))
async def test_a_cancellation_that_comes_with_the_connection(
    turns: int, alias: str, watch: Watch
) -> None:
    """wait_for() of Python 3.11 forgets it, and anyio knows its own by their message."""
    await healthy(alias, watch)
    pool: Any = pools.find(alias)
    taken = list(iter(pool.take, None))

    async def give() -> None:
        await watch.until(lambda: asyncorm.pool_stats(alias)["requests_waiting"])
        pool.checkin(taken.pop())
        for _ in range(turns):
            await asyncio.sleep(0)
        scope.cancel()

    giving = asyncio.create_task(give())
    try:
        with anyio.CancelScope() as scope:
            async with asyncorm.connection(alias):
                await sleep_on_server(alias)
        assert scope.cancelled_caught
        await giving
    finally:
        for conn in taken:
            pool.checkin(conn)
    await healthy(alias, watch)


async def test_a_batch_that_ends_late_is_cancelled_once(
    alias: str, caplog: pytest.LogCaptureFixture
) -> None:
    """anyio cancels who waits at each turn of the loop."""
    go = asyncio.Event()
    cancelled = 0

    async def ends_late() -> None:
        nonlocal cancelled
        scope.cancel()
        asyncio.get_running_loop().call_later(0.05, go.set)
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                cancelled += 1

    with anyio.CancelScope() as scope:
        await asyncorm.batch(ends_late, using=alias)
    assert (scope.cancelled_caught, cancelled) == (True, 1)
    gc.collect()
    assert not [each for each in caplog.records if each.name == "asyncio"]


@pytest.mark.parametrize("timeout", [2.0, 0.05])
async def test_requests_to_cancel(
    timeout: float, alias: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler makes a connection for each: they are few, and PgBouncer before 1.20 ends itself
    where one is given up while it is under way."""
    fates: list[bool] = []

    async def slowly(gen: Any, interval: float) -> Any:
        fates.append(False)
        await asyncio.sleep(0.1)
        await psycopg.waiting.wait_conn_async(gen, interval)
        fates[-1] = True

    slow = SimpleNamespace(wait_conn_async=slowly)
    monkeypatch.setattr("asyncorm._wire.cancelling.waiting", slow)
    set_cancel_timeout(monkeypatch, timeout)
    await sleep_on_server(alias, 0)
    stopped = {pid for pid, _ in watch.states()}
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await sleep_on_server(alias, 0)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert fates
    assert all(fates)
    assert len(fates) <= 7


async def many(alias: str) -> None:
    async with asyncorm.cursor(alias) as cursor:
        await cursor.executemany("SELECT pg_sleep(%s)", [(600,), (600,)])


async def in_a_pipeline_of_psycopgs(alias: str) -> None:
    def work() -> None:
        connections[alias].ensure_connection()
        conn = connections[alias].connection
        with conn.pipeline() as pipeline:
            for _ in range(2):
                conn.execute("SELECT pg_sleep(600)")
                pipeline.sync()

    await asyncorm.native(work)()


@pytest.mark.parametrize(
    ("place", "closes"),
    [
        (many, False),
        (in_a_pipeline_of_psycopgs, False),
        (statement, True),
        (in_a_block, True),
        (many, True),
    ],
)
async def test_what_is_closed_does_not_go_on_on_the_server(
    place: Any, closes: bool, alias: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server process has not read the statement yet, or reads the next one then."""
    monkeypatch.setattr("asyncorm._pool.pool.STOP_TIMEOUT", PATIENCE)
    await sleep_on_server(alias, 0)
    before = {pid for pid, _ in watch.states()}
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    task = asyncio.create_task(place(alias))
    try:
        await asyncio.sleep(0.05)
        if closes:
            closing = asyncio.create_task(asyncorm.close_pools())
        else:
            task.cancel()
        await asyncio.sleep(0.3)
    finally:
        for pid in before:
            os.kill(pid, signal.SIGCONT)
    with pytest.raises(OperationalError if closes else asyncio.CancelledError) as raised:
        await task
    if closes:
        assert "closed" in str(raised.value)
        await closing
    await watch.until(watch.at_rest)
    await healthy(alias, watch)


async def test_a_cancelled_statement_that_is_caught_inside_its_block(
    alias: str, watch: Watch
) -> None:
    """The server has aborted the transaction: the block cannot pretend that all is well."""
    called: list[int] = []

    async def times_out() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await sleep_on_server(alias)

    with pytest.raises(transaction.TransactionManagementError, match="cancelled"):
        async with asyncorm.atomic(alias):
            asyncorm.on_commit(lambda: called.append(1), alias)
            await add(alias, "lost")
            await times_out()
            with pytest.raises(transaction.TransactionManagementError):
                await add(alias, "refused")
            with pytest.raises(transaction.TransactionManagementError):
                await asyncio.gather(add(alias, "refused"))
    assert (watch.rows(), called) == ([], [])
    with pytest.raises(transaction.TransactionManagementError, match="cancelled"):
        async with asyncorm.atomic(alias):
            asyncorm.on_commit(lambda: called.append(1), alias)
            await add(alias, "lost")
            await times_out()
    assert (watch.rows(), called) == ([], [])

    async with asyncorm.atomic(alias):  # in a nested block it is rolled back alone
        asyncorm.on_commit(lambda: called.append(1), alias)
        await add(alias, "a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), asyncorm.atomic(alias):
                await add(alias, "lost")
                await sleep_on_server(alias)
        await add(alias, "b")
    assert (watch.rows(), called) == (["a", "b"], [1])
    await healthy(alias, watch)


async def test_a_child_cancelled_while_it_waits_for_the_lock_does_no_harm(
    alias: str, watch: Watch
) -> None:
    async with asyncorm.atomic(alias):
        busy = asyncio.create_task(sleep_on_server(alias, 0.3))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(add(alias, f"a{n}")) for n in range(4)]
        await asyncio.sleep(0.05)
        waiting[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[1]
        await asyncio.gather(busy, waiting[0], waiting[2], waiting[3])
    assert watch.rows() == ["a0", "a2", "a3"]


@pytest.mark.parametrize("callbacks", [["synchronous", "asynchronous"], []])
@pytest.mark.parametrize("times", [1, 2])
async def test_commit_is_not_half_done(
    alias: str, watch: Watch, times: int, callbacks: list[str]
) -> None:
    """A deferred trigger makes COMMIT last; it is cancelled in the middle."""
    watch.observer.execute(
        """
        CREATE OR REPLACE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END$$;
        CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON myapp_item
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION linger();
        """
    )
    called: list[str] = []

    async def later() -> None:
        await asyncio.sleep(0)
        called.append("asynchronous")

    async def block() -> None:
        async with asyncorm.atomic(alias):
            await add(alias, "a")
            if callbacks:
                asyncorm.on_commit(lambda: called.append("synchronous"), alias)
                asyncorm.on_commit(later, alias)

    committing = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query = 'COMMIT'"
    )
    try:
        task = asyncio.create_task(block())
        await watch.until(lambda: watch.observer.execute(committing).fetchone() == (1,))
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (watch.rows(), called) == (["a"], callbacks)

        called.clear()
        with anyio.move_on_after(PATIENCE) as scope:

            async def expire() -> None:
                await watch.until(lambda: watch.observer.execute(committing).fetchone() == (1,))
                scope.cancel()

            expiring = asyncio.create_task(expire())
            await block()
        await expiring
        assert scope.cancelled_caught
        assert (watch.rows(), called) == (["a", "a"], callbacks)
    finally:
        watch.observer.execute("DROP TRIGGER linger ON myapp_item")
    await healthy(alias, watch)


async def test_a_coroutine_is_closed_during_commit(alias: str, watch: Watch) -> None:
    """Nobody can wait for the answer any more: the connection is closed, and replaced."""
    watch.observer.execute(
        """
        CREATE OR REPLACE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END$$;
        CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON myapp_item
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION linger();
        """
    )
    block = asyncorm.atomic(alias)
    try:
        await block.__aenter__()
        await add(alias, "a")
        leaving = block.__aexit__(None, None, None)
        leaving.send(None)
        await watch.until(watch.sleeping)
        leaving.close()
        async with asyncorm.atomic(alias):
            assert await asyncorm.native(lambda: connections[alias].in_atomic_block)()
        assert not await asyncorm.native(lambda: connections[alias].in_atomic_block)()
        await watch.until(lambda: not watch.sleeping())
    finally:
        watch.observer.execute("DROP TRIGGER linger ON myapp_item")
    await healthy(alias, watch)


@types.coroutine
def interrupted(coro: Any, at: int, exc: BaseException) -> Generator[Any, Any, None]:
    """Await a coroutine, and throw `exc` into its n-th step instead of what it waits for."""
    steps = coro.__await__()
    for number in count(1):
        try:
            future = steps.throw(exc) if number == at else steps.send(None)
        except StopIteration:
            return
        yield future


async def test_an_exit_that_is_thrown_into_a_block_is_what_comes_out(
    alias: str, watch: Watch
) -> None:
    """In COMMIT, too, Django's own reaction to it does not take its place."""

    async def block(settle: bool = False) -> None:
        async with asyncorm.atomic(alias, settle=settle):
            await add(alias, "a")

    @asyncorm.native
    def natively() -> None:
        with transaction.atomic(alias):
            Item.objects.using(alias).create(remote_id=next(ids), name="a")

    for way in (block, partial(block, settle=True), natively):
        await way()
        for step in count(2):
            leaving, left = SystemExit(), None
            try:
                await interrupted(way(), step, leaving)
            except BaseException as exc:
                left = exc
            if left is None:
                break
            assert left is leaving, (way, step)
        assert step > 3, way
    await healthy(alias, watch)


async def test_a_cancelled_task_is_told_that_the_fate_of_its_commit_is_unknown(
    alias: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A COMMIT that takes longer than a cancelled task waits for it."""
    set_cancel_timeout(monkeypatch, 0.1)
    watch.observer.execute(
        """
        CREATE OR REPLACE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END$$;
        CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON myapp_item
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION linger();
        """
    )

    async def block() -> None:
        async with asyncorm.atomic(alias):
            await add(alias, "a")

    def native() -> None:
        with transaction.atomic(using=alias):
            Item.objects.using(alias).create(remote_id=next(ids), name="a")

    try:
        for work in (block(), asyncorm.native(native)()):
            task = asyncio.create_task(work)
            await watch.until(watch.sleeping)
            task.cancel()
            with pytest.raises(OperationalError, match="may or may not have been committed"):
                await task
            await watch.until(lambda: not watch.sleeping())
    finally:
        watch.observer.execute("DROP TRIGGER linger ON myapp_item")
    await healthy(alias, watch)


async def test_a_storm_of_cancellations(alias: str, watch: Watch) -> None:
    async def block(n: int) -> None:
        async with asyncorm.atomic(alias):
            await add(alias, f"{n}")
            await asyncio.gather(add(alias, f"{n}"), sleep_on_server(alias, 0.002))

    async with asyncio.timeout(4 * PATIENCE):
        tasks = []
        for n in range(200):
            tasks.append(asyncio.create_task(block(n)))
            await asyncio.sleep(0.001)
            if n >= 8:
                tasks[n - n % 8].cancel()
                tasks[n // 2].cancel()
        await asyncio.wait(tasks)
    rows = watch.rows()
    for n, task in enumerate(tasks):
        if not task.cancelled():
            assert task.exception() is None
            assert rows.count(f"{n}") == 2
        else:
            assert rows.count(f"{n}") in (0, 2)
    await healthy(alias, watch)


# Cancelled while the block is being left


LEAVING = ["outermost", "nested", "native"]


async def leave_while_a_child_works(alias: str, kind: str, child: Any) -> None:
    """Leave a block while a task that was started in it is not done."""
    if kind == "native":

        def work() -> None:
            with transaction.atomic(using=alias):
                Item.objects.using(alias).create(remote_id=next(ids), name="lost")
                asyncorm.await_(start())

        async def start() -> None:
            asyncio.ensure_future(child)  # noqa: RUF006
            await asyncio.sleep(0.1)

        await asyncorm.native(work)()
        return
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(asyncorm.atomic(alias))
        await add(alias, "lost")
        if kind == "nested":
            await stack.enter_async_context(asyncorm.atomic(alias))
        asyncio.ensure_future(child)  # noqa: RUF006
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", LEAVING)
@pytest.mark.parametrize("times", [1, 2])
async def test_statements_of_children_are_cancelled_when_their_block_is_cancelled_while_leaving(
    alias: str, watch: Watch, kind: str, times: int
) -> None:
    child = asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            await sleep_on_server(alias)
        except BaseException as exc:
            child.set_result(exc)

    leaving = asyncio.create_task(leave_while_a_child_works(alias, kind, work()))
    await watch.until(watch.sleeping)
    await asyncio.sleep(0.2)
    assert not leaving.done()
    before = watch.states()
    began = time.monotonic()
    for _ in range(times):
        leaving.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert time.monotonic() - began < 4.5  # not after the time for cancelling
    assert not watch.sleeping()
    error = await child
    assert isinstance(error, OperationalError)
    assert isinstance(error.__cause__, psycopg.errors.QueryCanceled)
    assert watch.rows() == []
    assert {pid for pid, _ in before} <= {pid for pid, _ in watch.states()}  # it was kept
    await healthy(alias, watch)


@pytest.mark.parametrize("how", ["timeout", "fail_after"])
async def test_a_deadline_while_a_block_is_being_left(alias: str, watch: Watch, how: str) -> None:
    """Caught in the outer block, which goes on."""
    async with asyncio.timeout(PATIENCE), asyncorm.atomic(alias):
        await add(alias, "a")
        with pytest.raises(TimeoutError):
            if how == "timeout":
                async with asyncio.timeout(0.3):
                    async with asyncorm.atomic(alias):
                        await add(alias, "lost")
                        child = asyncio.create_task(sleep_on_server(alias))
                        await asyncio.sleep(0.1)
            else:
                with anyio.fail_after(0.3):
                    async with asyncorm.atomic(alias):
                        await add(alias, "lost")
                        child = asyncio.create_task(sleep_on_server(alias))
                        await asyncio.sleep(0.1)
        with pytest.raises(OperationalError):
            await child
        await add(alias, "b")
    assert watch.rows() == ["a", "b"]
    await healthy(alias, watch)


async def test_a_block_that_is_cancelled_does_not_wait_for_a_childs_statement(
    alias: str, watch: Watch
) -> None:
    child = None

    async def block() -> None:
        nonlocal child
        async with asyncorm.atomic(alias):
            await add(alias, "lost")
            child = asyncio.create_task(sleep_on_server(alias))
            await asyncio.sleep(600)

    task = asyncio.create_task(block())
    await watch.until(watch.sleeping)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(2):
            await task
    assert child is not None
    with pytest.raises(OperationalError):
        await child
    assert watch.rows() == []
    await healthy(alias, watch)


def lose_when_cancelled(alias: str) -> None:
    """A statement that, cancelled, ends its server process."""
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "DO $$ BEGIN PERFORM pg_sleep(600); EXCEPTION WHEN query_canceled THEN"
            " PERFORM pg_terminate_backend(pg_backend_pid()), pg_sleep(600); END $$"
        )


async def test_a_block_that_is_cancelled_as_a_childs_statement_loses_the_connection(
    alias: str, watch: Watch
) -> None:
    async def child() -> None:
        with pytest.raises(OperationalError):
            await asyncorm.native(lose_when_cancelled)(alias)
        async with asyncorm.atomic(alias):  # waits for the lock, behind the end of the block
            await add(alias, "late")

    with pytest.raises(asyncio.CancelledError):
        async with asyncorm.atomic(alias):
            await add(alias, "lost")
            task = asyncio.create_task(child())
            await asyncio.sleep(0)  # its statement is on its way
            raise asyncio.CancelledError
    with pytest.raises(transaction.TransactionManagementError, match="has ended"):
        async with asyncio.timeout(PATIENCE):
            await task
    assert watch.rows() == []
    await healthy(alias, watch)


async def test_a_childs_block_that_loses_the_connection_ends_before_the_cancelled_one_around_it(
    alias: str, watch: Watch
) -> None:
    """However long it takes for that, within the time for cleaning up."""
    ends = []

    async def child() -> None:
        with pytest.raises(transaction.TransactionManagementError, match="was rolled back"):
            async with asyncorm.atomic(alias):
                with pytest.raises(OperationalError):
                    await asyncorm.native(lose_when_cancelled)(alias)
                await asyncio.sleep(0.1)  # until the server would have been asked once more
        ends.append("child's")

    with pytest.raises(asyncio.CancelledError):
        async with asyncorm.atomic(alias):
            await add(alias, "lost")
            task = asyncio.create_task(child())
            await watch.until(watch.sleeping)
            raise asyncio.CancelledError
    ends.append("cancelled")
    async with asyncio.timeout(PATIENCE):
        await task
    assert ends == ["child's", "cancelled"]
    assert watch.rows() == []
    await healthy(alias, watch)


@pytest.mark.parametrize("how", ["cancelled", "LOCK_TIMEOUT"])
@pytest.mark.parametrize("kind", ["asyncorm", "empty", "native"])
async def test_a_childs_block_that_does_not_end_is_ended_by_force(
    alias: str, watch: Watch, kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cancel_timeout(monkeypatch, 0.3)
    begun, go = asyncio.Event(), asyncio.Event()

    async def nested() -> None:
        async with asyncorm.atomic(alias):
            await add(alias, "lost")
            begun.set()
            await go.wait()
            if kind == "asyncorm":
                await add(alias, "late")

    def native() -> None:
        with transaction.atomic(using=alias):
            Item.objects.using(alias).create(remote_id=next(ids), name="lost")
            begun.set()
            asyncorm.await_(go.wait())
            Item.objects.using(alias).create(remote_id=next(ids), name="late")

    async def waits() -> None:  # for the lock that the nested block has
        await add(alias, "late")

    async def block() -> None:
        nonlocal child, waiting
        async with asyncorm.atomic(alias):
            await add(alias, "lost")
            child = asyncio.create_task(asyncorm.native(native)() if kind == "native" else nested())
            await begun.wait()
            waiting = asyncio.create_task(waits())
            await asyncio.sleep(0)
            if how == "cancelled":
                deadline.reschedule(asyncio.get_running_loop().time() + 0.1)

    child = waiting = None
    deadline = asyncio.timeout(None)
    if how == "cancelled":
        with pytest.raises(TimeoutError):
            async with deadline:
                await block()
    else:
        with override_settings(ASYNCORM={"LOCK_TIMEOUT": 0.3}):
            with pytest.raises(transaction.TransactionManagementError) as caught:
                await block()
        assert str(caught.value).count(__file__) == 2  # both places are named
    go.set()
    assert child is not None
    assert waiting is not None
    for task in (child, waiting):
        with pytest.raises(transaction.TransactionManagementError, match=r"has ended|^Waited"):
            await task
    assert watch.rows() == []
    await healthy(alias, watch)


async def test_a_cancellation_while_an_error_leaves_a_block_is_not_lost(
    alias: str, watch: Watch
) -> None:
    """In native code too, where the error would be caught and the deadline forgotten."""

    def work() -> None:
        with transaction.atomic(using=alias):
            Item.objects.using(alias).create(remote_id=next(ids), name="lost")
            asyncorm.await_(start())
            raise ZeroDivisionError

    async def start() -> None:
        nonlocal child
        child = asyncio.create_task(sleep_on_server(alias, 0.5))
        await asyncio.sleep(0.1)

    child = None
    reached = False
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            with contextlib.suppress(ZeroDivisionError):
                await asyncorm.native(work)()
            reached = True
    assert not reached
    assert child is not None
    await asyncio.wait([child])
    child.exception()
    await healthy(alias, watch)


@ways
async def test_options_of_a_block_cancelled_at_every_await(
    cancelled: Any, alias: str, watch: Watch
) -> None:
    """Whatever they changed on the connection is as before."""

    async def block() -> None:
        async with asyncorm.atomic(
            alias, isolation_level=psycopg.IsolationLevel.SERIALIZABLE, statement_timeout=9
        ):
            async with asyncorm.atomic(alias, statement_timeout=5):
                await add(alias, "a")
            await add(alias, "b")

    def check() -> None:
        pool = pools.find(alias).connections  # type: ignore[union-attr]
        for conn in pool.live if pool is not None else ():
            assert conn.twin.isolation_level in (None, psycopg.IsolationLevel.READ_COMMITTED)

    await at_every_await(cancelled, block, alias, watch, check)
    await healthy(alias, watch)


async def test_callbacks_cancelled_in_the_middle(alias: str, watch: Watch) -> None:
    """As if one had raised: those before it have run, the commit stays."""
    called: list[Any] = []

    async def slow() -> None:
        called.append("slow")
        await sleep_on_server(alias)

    async with asyncorm.connection(alias):  # the next transaction is on the same wrapper
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), asyncorm.atomic(alias):
                await add(alias, "a")
                asyncorm.on_commit(lambda: called.append(1), alias)
                asyncorm.on_commit(slow, alias, robust=True)
                asyncorm.on_commit(lambda: called.append(2), alias)
        assert not watch.sleeping()
        async with asyncorm.atomic(alias):
            await add(alias, "b")
    assert called == [1, "slow"]
    assert watch.rows() == ["a", "b"]
    await healthy(alias, watch)


# Timeouts of the server's


async def test_a_statement_timeout_in_options(alias: str, watch: Watch) -> None:
    settings = dict(connections.settings[alias])  # type: ignore[attr-defined]
    settings["OPTIONS"] = {**settings["OPTIONS"], "options": "-c statement_timeout=200ms"}
    add_alias("limited", settings)
    try:
        with pytest.raises(OperationalError) as caught:
            await sleep_on_server("limited")
        assert isinstance(caught.value.__cause__, psycopg.errors.QueryCanceled)
        async with asyncorm.atomic("limited"):
            await add("limited", "a")
            async with asyncorm.atomic("limited", statement_timeout=PATIENCE):
                await sleep_on_server("limited", 0.4)
            with pytest.raises(OperationalError):
                async with asyncorm.atomic("limited"):
                    await sleep_on_server("limited")
        assert watch.rows() == ["a"]
        await healthy("limited", watch)
    finally:
        await asyncorm.close_pools("limited")
        del connections.settings["limited"]  # type: ignore[attr-defined]


# A server that does not answer


async def asleep_in_a_block(alias: str) -> None:
    async with asyncorm.atomic(alias):
        await add(alias, "lost")
        async with asyncorm.atomic(alias):
            await add(alias, "lost")
            await asyncio.sleep(600)


async def asleep_in_a_kept_connection(alias: str) -> None:
    async with asyncorm.connection(alias):
        await sleep_on_server(alias, 0)
        await asyncio.sleep(600)


async def asleep_in_a_stream(alias: str) -> None:
    async with contextlib.aclosing(Item.objects.using(alias).native_iterator(1)) as rows:  # type: ignore[type-var]
        async for _ in rows:
            await asyncio.sleep(600)


@pytest.mark.parametrize(
    "place",
    [in_a_block, asleep_in_a_block, asleep_in_a_kept_connection, asleep_in_a_stream],
    ids=lambda place: place.__name__,
)
@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_when_the_server_does_not_answer(
    server: Any,
    watch: Watch,
    django_db_blocker: Any,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    times: int,
) -> None:
    """The task ends within the time for cancelling; the connection is replaced."""
    set_cancel_timeout(monkeypatch, 0.5)
    server.observer.execute("TRUNCATE myapp_item")
    server.observer.execute("INSERT INTO myapp_item VALUES (DEFAULT, 1, 'a'), (DEFAULT, 2, 'b')")
    with django_db_blocker.unblock():
        async with Proxy(server.settings["HOST"], int(server.settings["PORT"])) as proxy:
            settings = {**connections.settings["tcp"], "PORT": str(proxy.port)}  # type: ignore[attr-defined]
            add_alias("proxied", settings)
            try:
                task = asyncio.create_task(place("proxied"))
                if place is in_a_block:
                    await watch.until(watch.sleeping)
                else:
                    await asyncio.sleep(0.2)
                proxy.hold()
                began = time.monotonic()
                for _ in range(times):
                    task.cancel()
                    await asyncio.sleep(0)
                done, _ = await asyncio.wait([task], timeout=PATIENCE)
                assert done
                assert task.cancelled()
                assert time.monotonic() - began < 4.5
                proxy.reset()
                # The request to cancel was lost: the server goes on until it writes to the client.
                watch.observer.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE wait_event = 'PgSleep'"
                )
                await healthy("proxied", watch)
            finally:
                await asyncorm.close_pools("proxied")
                del connections.settings["proxied"]  # type: ignore[attr-defined]


# The end of a loop


def test_loops_that_end_in_the_middle(server: Any, django_db_blocker: Any) -> None:
    """asyncio.run() cancels all tasks, the pool's while it connects too; nothing hangs or stays."""

    async def main(n: int) -> None:
        started = [asyncio.create_task(sleep_on_server("tcp", 0.01)) for _ in range(4)]
        for _ in range(n):
            await asyncio.sleep(0)
        assert started

    watch = Watch(server)
    with django_db_blocker.unblock():
        for n in range(30):
            asyncio.run(main(n))
    deadline = time.monotonic() + PATIENCE
    while watch.states():
        assert time.monotonic() < deadline, watch.states()
        time.sleep(0.01)


# ASGI


async def slow_view(request: Any) -> HttpResponse:
    async with asyncorm.atomic("tcp"):
        await add("tcp", "lost")
        await sleep_on_server("tcp")
    return HttpResponse("done")


urlpatterns = [path("slow", slow_view)]


async def test_an_asgi_client_that_disconnects_frees_its_connection(
    server: Any, watch: Watch, django_db_blocker: Any
) -> None:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/slow",
        "query_string": b"",
        "headers": [(b"host", b"testserver")],
    }
    disconnect = asyncio.Event()
    messages = iter([{"type": "http.request", "body": b""}])

    async def receive() -> Any:
        for message in messages:
            return message
        await disconnect.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody is there: {message}")

    with django_db_blocker.unblock(), override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[]):
        server.observer.execute("TRUNCATE myapp_item")
        request = asyncio.create_task(get_asgi_application()(scope, receive, send))
        await watch.until(watch.sleeping)
        disconnect.set()
        async with asyncio.timeout(PATIENCE):
            await request
        await watch.until(watch.at_rest, 10)
        assert watch.rows() == []
        await healthy("tcp", watch)


# A connection that is closed under a statement


@pytest.mark.parametrize("what", ["statement", "reset"])
async def test_closed_at_the_moment_when_the_answer_is_there(
    alias: str, watch: Watch, what: str
) -> None:
    """libpq's memory is free then: nothing may go on reading the answer."""
    await sleep_on_server(alias, 0)
    pool = pools.find(alias).connections  # type: ignore[union-attr]
    assert pool is not None
    if what == "statement":
        task = asyncio.create_task(sleep_on_server(alias, 0.05))
    else:
        conn = pool.take()
        assert conn is not None
        task = asyncio.create_task(conn.execute("SELECT pg_sleep(0.05)"))  # type: ignore[arg-type]
    await watch.until(lambda: any(conn.wire.waiting for conn in pool.live))
    twin = next(conn.twin for conn in pool.live if conn.wire.waiting)
    time.sleep(0.2)  # noqa: ASYNC251  # the answer arrives, and the loop cannot see it yet
    assert not task.done()
    twin.terminate()
    with pytest.raises((OperationalError, psycopg.OperationalError), match="closed"):
        await task
    if what == "reset":
        pool.give(twin.pooled)  # type: ignore[arg-type]
    await healthy(alias, watch)


async def test_the_next_socket_may_get_the_number_of_a_closed_one(alias: str, watch: Watch) -> None:
    """Before the task that waited for the closed one runs again."""
    task = asyncio.create_task(sleep_on_server(alias))
    await watch.until(watch.sleeping)
    pool = pools.find(alias).connections  # type: ignore[union-attr]
    twin = next(conn.twin for conn in pool.live if conn.wire.waiting)  # type: ignore[union-attr]
    number = twin.pgconn.socket
    twin.cancel_safe()
    twin.terminate()
    async with next_socket(number):
        with pytest.raises(OperationalError, match="closed"):
            await task
    await healthy(alias, watch)
