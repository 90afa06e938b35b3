"""The wire beneath a connection: its reader on the loop, what arrives unasked, how it ends.

Large values in both directions, by socket, TCP and TLS, are in test_pipelines.py; forked processes
in test_fork.py; connections of test cases, which threads and loops share, in test_testing.py.
"""

import asyncio
import contextlib
import gc
import select
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Self

import anyio
import pytest
from django.db import DatabaseError, connections

import asyncorm
from asyncorm import native, pools
from asyncorm._pool.connection import PooledConnection
from asyncorm._pool.pool import ConnectionPool
from tests.support import address, administrator, database, eventually, next_socket, value

ALIAS = "wire"
pytestmark = pytest.mark.usefixtures("_unblocked")


@pytest.fixture
def _unblocked(django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield
        with administrator() as ask:  # whose socket was closed, they would sleep on
            ask(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE application_name = %s AND wait_event = 'PgSleep'",
                ALIAS,
            )


def two(**changes: Any) -> Any:
    """The alias, with at most two connections."""
    return database(ALIAS, OPTIONS={"pool": {"min_size": 0, "max_size": 2}}, **changes)


async def query(sql: str, *params: Any) -> Any:
    return await native(value)(sql, params or None, ALIAS)


def the_pool() -> ConnectionPool:
    pool = pools.find(ALIAS)
    assert pool is not None and pool.connections is not None
    return pool.connections


async def opened(number: int = 1) -> list[PooledConnection]:
    """So many connections, which nobody uses now."""
    await asyncio.gather(*[query("SELECT 1 FROM pg_sleep(0.1)") for _ in range(number)])
    await eventually(lambda: the_pool().free == number)
    return list(the_pool().live)


async def new_reader_works(number: int) -> bool:
    """Whether the next socket that gets the number of a closed one can be read from."""
    async with next_socket(number):
        return True


class Relay:
    """Between clients by TCP and the server's socket, in threads: it works while a loop stalls.

    Where the server closes a connection the client is not told.
    """

    def __init__(self) -> None:
        where = address()
        self._target = f"{where['host']}/.s.PGSQL.{where['port']}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        sockets = [each for pair in self._pairs for each in pair]
        for each in sockets:
            _shut(each)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *sockets):
            each.close()

    def cut(self) -> None:
        """End all connections of clients, without a word."""
        for client, _ in self._pairs:
            _shut(client)

    def reset(self, last: bytes) -> None:
        """End them as the system does for a process that left something unread."""
        for client, _ in self._pairs:
            client.sendall(last)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.shutdown(socket.SHUT_RD)  # the thread leaves it
            client.close()

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._pairs.append((client, server))
                server.connect(self._target)
                self._start(self._copy, client, server, True)
                self._start(self._copy, server, client, False)

    def _copy(self, source: socket.socket, target: socket.socket, tells: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        if tells:
            _shut(target)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relayed() -> Iterator[Relay]:
    if not str(connections.settings["default"]["HOST"]).startswith("/"):  # type: ignore[attr-defined]
        pytest.skip("the server of the tests has no socket")
    with Relay() as relay, two(HOST="127.0.0.1", PORT=str(relay.port)):
        yield relay


# The reader


class Counting(asyncio.SelectorEventLoop):
    """An event loop that counts its readers."""

    added = 0

    def add_reader(self, *args: Any) -> Any:
        self.added += 1
        return super().add_reader(*args)


def test_a_wait_registers_nothing() -> None:
    async def main() -> None:
        (conn,) = await opened()
        before = loop.added
        for number in range(50):
            assert await query("SELECT %s::int", number) == number
        assert loop.added == before
        number = conn.pgconn.socket
        await asyncorm.close_pools(ALIAS)
        assert not loop.remove_reader(number), "it went with the connection"

    with two(), contextlib.closing(Counting()) as loop:
        loop.run_until_complete(main())


async def test_the_reader_keeps_nothing_of_the_one_who_waited_first() -> None:
    class Request:
        pass

    of_request: ContextVar[Any] = ContextVar("of_request", default=None)
    kept: list[weakref.ref[Request]] = []

    async def wait_first() -> None:
        of_request.set(request := Request())
        kept.append(weakref.ref(request))
        await query("SELECT 1")

    with two():
        (conn,) = await opened()
        conn.wire.park()
        await asyncio.create_task(wait_first())
        await asyncio.sleep(0.01)  # the loop itself keeps it for a turn
        gc.collect()
        assert kept[0]() is None
        await asyncorm.close_pools(ALIAS)


async def test_nothing_is_read_that_nobody_asks_for() -> None:
    """A stream whose consumer is slow: libpq would keep all of it."""
    loop = asyncio.get_running_loop()
    rows = "SELECT repeat('x', 1000) FROM generate_series(1, 9000)"
    with two():
        await opened()
        conn = the_pool().take()
        assert conn is not None
        seen = 0
        async for _ in conn.cursor().stream(rows):
            seen += 1
            if seen in (1, 5000):
                await asyncio.sleep(0.05)
                assert not loop.remove_reader(conn.pgconn.socket)
        assert seen == 9000
        the_pool().give(conn)
        assert await query("SELECT 1") == 1
        await asyncorm.close_pools(ALIAS)


# What arrives while nobody uses the connection


async def test_a_notification_for_nobody_is_taken_at_once() -> None:
    of_request: ContextVar[Any] = ContextVar("of_request", default=None)
    heard: list[tuple[str, Any]] = []
    with two(), administrator() as ask:
        await opened()
        of_request.set("mine")
        conn = the_pool().take()
        assert conn is not None
        conn.twin.add_notify_handler(lambda n: heard.append((n.payload, of_request.get())))
        await conn.execute("LISTEN wire")
        the_pool().give(conn)
        ask("NOTIFY wire, 'first'")
        await eventually(lambda: heard)
        assert heard == [("first", None)], "in nobody's context"

        def fail(notify: Any) -> None:
            raise ValueError(notify.payload)

        conn.twin.add_notify_handler(fail)
        ask("NOTIFY wire, 'second'")
        await eventually(lambda: len(heard) == 2)
        assert not conn.closed
        assert await query("SELECT pg_backend_pid()") == conn.info.backend_pid
        await asyncorm.close_pools(ALIAS)


async def test_a_connection_that_the_server_ends_is_closed_at_once() -> None:
    with two(), administrator() as ask:
        both = await opened(2)
        numbers = [conn.pgconn.socket for conn in both]
        before = {conn.info.backend_pid for conn in both}
        for pid in before:
            ask("SELECT pg_terminate_backend(%s)", pid)
        await eventually(lambda: all(conn.closed for conn in both))
        for number in numbers:
            assert await new_reader_works(number)
        assert await query("SELECT pg_backend_pid()") not in before
        await asyncorm.close_pools(ALIAS)


async def test_last_words_are_understood_before_the_end() -> None:
    """The message that the server ends the session has come, and the end of the stream has not."""
    with relayed(), administrator() as ask:
        (conn,) = await opened()
        pid = conn.info.backend_pid
        ask("SELECT pg_terminate_backend(%s)", pid)
        select.select([conn.pgconn.socket], [], [], 10)  # the loop is kept from its reader
        async with asyncio.timeout(10):
            assert await query("SELECT pg_backend_pid()") != pid
        assert conn.closed
        await asyncorm.close_pools(ALIAS)


@pytest.mark.parametrize("stalled", [True, False])
async def test_a_connection_that_breaks_without_a_word(stalled: bool) -> None:
    with relayed() as relay:
        (conn,) = await opened()
        pid, number = conn.info.backend_pid, conn.pgconn.socket
        relay.cut()
        if stalled:
            select.select([number], [], [], 10)
        else:
            await eventually(lambda: conn.closed)
            assert await new_reader_works(number)
        assert await query("SELECT pg_backend_pid()") != pid
        await asyncorm.close_pools(ALIAS)


async def test_after_a_restart_under_a_stalled_loop() -> None:
    """The connections died after the loop last looked at them, all of them."""
    with two(), administrator() as ask:
        before = {conn.info.backend_pid for conn in await opened(2)}
        for pid in before:
            ask("SELECT pg_terminate_backend(%s)", pid)
        while ask("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)", list(before)):
            time.sleep(0.01)  # noqa: ASYNC251
        after = await asyncio.gather(*[query("SELECT pg_backend_pid()") for _ in range(2)])
        assert not before & set(after)
        await asyncorm.close_pools(ALIAS)


# How a connection ends under a statement


@pytest.mark.parametrize("how", ["terminated", "cut"])
async def test_when_libpq_has_closed_the_socket_the_loop_knows(how: str) -> None:
    loop = asyncio.get_running_loop()
    with relayed() as relay, administrator() as ask:
        (conn,) = await opened()
        number = conn.pgconn.socket
        left = []

        def work() -> None:
            try:
                value("SELECT pg_sleep(60)", None, ALIAS)
            except DatabaseError:
                left.append(loop.remove_reader(number))
                raise

        task = asyncio.create_task(native(work)())
        await eventually(lambda: conn.wire.waiting)
        if how == "terminated":
            ask("SELECT pg_terminate_backend(%s)", conn.info.backend_pid)
            await asyncio.sleep(0.1)
        relay.cut()
        with pytest.raises(DatabaseError):
            await task
        assert len(left) == 1 and not left[0]  # uvloop's says nothing
        assert await new_reader_works(number)
        assert await query("SELECT 1") == 1
        await asyncorm.close_pools(ALIAS)


# Who waits


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_one_that_is_interrupted_loses_nobody_elses_answer(error: type[BaseException]) -> None:
    done: list[int] = []

    async def work(number: int) -> int:
        await query("SELECT pg_sleep(0.3)")
        done.append(number)
        if len(done) == 1:
            raise error
        return number

    async def start() -> list[asyncio.Task[int]]:
        both = await opened(2)
        tasks = [asyncio.create_task(work(number)) for number in range(2)]
        await eventually(lambda: all(conn.wire.waiting for conn in both))
        return tasks

    with two(), contextlib.closing(asyncio.new_event_loop()) as loop:
        tasks = loop.run_until_complete(start())
        time.sleep(0.4)  # both answers are there in the loop's next turn
        with pytest.raises(error):
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(asyncio.wait_for(asyncio.wait(tasks), 10))
        assert sorted(done) == [0, 1]
        assert tasks[done[1]].result() == done[1]
        assert isinstance(tasks[done[0]].exception(), error)
        loop.run_until_complete(asyncorm.close_pools(ALIAS))


def _python_tasks(loop: Any, coro: Any, **options: Any) -> Any:
    return asyncio.tasks._PyTask(coro, loop=loop, **options)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["plain", "debug", "python", "eager"])
def test_tasks_of_all_kinds(kind: str) -> None:
    async def main() -> None:
        await opened(2)
        assert await asyncio.gather(*[query("SELECT %s::int", n) for n in range(20)]) == [
            *range(20)
        ]
        began = time.monotonic()
        with anyio.move_on_after(0.05) as scope:
            await query("SELECT pg_sleep(60)")
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await query("SELECT pg_sleep(60)")
        task = asyncio.create_task(query("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.05)
        task.cancel("first")
        task.cancel("second")
        with pytest.raises(asyncio.CancelledError):
            await task
        task = asyncio.create_task(query("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.05)
        assert "wait_for=" in repr(task)
        for conn in the_pool().live:
            conn.twin.terminate()
        with pytest.raises(DatabaseError, match="closed"):
            await task
        assert await query("SELECT 1") == 1
        assert time.monotonic() - began < 30
        await asyncorm.close_pools(ALIAS)

    with two(), contextlib.closing(asyncio.new_event_loop()) as loop:
        if kind == "debug":
            loop.set_debug(True)
        elif kind == "python":
            loop.set_task_factory(_python_tasks)
        elif kind == "eager":
            if sys.version_info < (3, 12):
                pytest.skip("Python 3.12 has them")
            loop.set_task_factory(asyncio.eager_task_factory)
        loop.run_until_complete(main())


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_connection_that_is_reset_while_an_answer_arrives(kind: str) -> None:
    """uvloop calls no reader any more after an error, and the part of an answer is read first."""

    async def main() -> None:
        with relayed() as relay:
            (conn,) = await opened()
            number = conn.pgconn.socket
            task = asyncio.create_task(query("SELECT pg_sleep(60)"))
            await eventually(lambda: conn.wire.waiting)
            relay.reset(b"T\0\0")
            errors = select.poll()
            errors.register(number, 0)
            assert errors.poll(10_000)  # the loop sees both at once
            async with asyncio.timeout(10):
                with pytest.raises(DatabaseError):
                    await task
                assert await new_reader_works(number)
                assert await query("SELECT 1") == 1
            await asyncorm.close_pools(ALIAS)

    factory = asyncio.new_event_loop
    if kind == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop
    with contextlib.closing(factory()) as loop:
        loop.run_until_complete(main())
