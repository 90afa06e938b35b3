"""The failures that users meet: the right exception, its message, and how soon it comes."""

import asyncio
import gc
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import NotSupportedError, OperationalError, connections
from django.db.transaction import TransactionManagementError
from django.db.utils import ConnectionDoesNotExist

import asyncorm
from asyncorm import native
from asyncorm.demo.postgres import Server, postgres_server
from tests.project.legacy.models import LegacyRecord
from tests.project.shop.models import Tag
from tests.support import (
    backend_pid,
    database,
    eventually,
    free_port,
    in_thread,
    run_script,
    sleep,
)

pytestmark = pytest.mark.usefixtures("shop_data")


@contextmanager
def failing(kind: type[Exception], *words: str, within: float = 5) -> Iterator[None]:
    """The block raises that exception, soon, and its message has all the words."""
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        yield
    assert time.monotonic() - began < within
    assert type(caught.value).__module__.startswith("django.") or kind.__module__ == "builtins"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


async def every_way(using: str, check: Callable[[], Any]) -> None:
    """The first statement of each kind of call fails the same way."""

    async def block() -> None:
        async with asyncorm.atomic(using=using):
            await Tag.objects.using(using).native_count()

    async def raw() -> None:
        async with asyncorm.cursor(using=using) as cursor:
            await cursor.execute("SELECT 1")

    async def stream() -> None:
        async for _ in Tag.objects.using(using).native_iterator():
            pass

    async def function() -> None:
        await native(backend_pid)(using)

    for way in (function, block, raw, stream):
        with check():
            await way()


# Connecting


async def test_nothing_listens_on_the_port() -> None:
    port = free_port()
    with database(HOST="127.0.0.1", PORT=port) as alias:
        await every_way(
            alias,
            lambda: failing(
                OperationalError,
                "Cannot connect to database 'extra'",
                "host '127.0.0.1'",
                f"port {port}",
                "Connection refused",
                "Check that the server runs and that DATABASES['extra'] is right",
            ),
        )


async def test_no_socket_in_the_folder() -> None:
    with tempfile.TemporaryDirectory() as folder, database(HOST=folder) as alias:
        with failing(OperationalError, "'extra'", folder, "No such file or directory"):
            await native(backend_pid)(alias)


async def test_no_such_database() -> None:
    with database(NAME="no_such_database") as alias:
        await every_way(
            alias,
            lambda: failing(
                OperationalError,
                "'extra'",
                'database "no_such_database" does not exist',
                "DATABASES['extra']",
            ),
        )


async def test_no_such_role() -> None:
    with database(USER="nobody_at_all") as alias:
        with failing(OperationalError, "'extra'", "nobody_at_all", "does not exist"):
            await native(backend_pid)(alias)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of our own that listens on TCP, where it asks for the password."""
    with postgres_server(tcp=True, own=True) as server:
        yield server


async def test_wrong_password(server: Server) -> None:
    with database(**{**server.settings, "PASSWORD": "a wrong secret"}) as alias:
        await every_way(
            alias,
            lambda: failing(
                OperationalError, "'extra'", "password authentication failed", "host '127.0.0.1'"
            ),
        )
        with pytest.raises(OperationalError) as caught:
            await native(backend_pid)(alias)
        assert "a wrong secret" not in str(caught.value)


async def test_no_password(server: Server) -> None:
    with database(**{**server.settings, "PASSWORD": ""}) as alias:
        with failing(OperationalError, "'extra'", "no password supplied"):
            await native(backend_pid)(alias)


async def test_every_waiting_task_is_told(server: Server) -> None:
    with database(**{**server.settings, "PASSWORD": "wrong"}) as alias:
        began = time.monotonic()
        found = await asyncio.gather(
            *[native(backend_pid)(alias) for _ in range(30)], return_exceptions=True
        )
        assert time.monotonic() - began < 10
    assert [type(error) for error in found] == [OperationalError] * 30
    assert all("password authentication failed" in str(error) for error in found)


async def test_the_cause_is_kept(server: Server) -> None:
    with database(**{**server.settings, "PASSWORD": "wrong"}) as alias:
        with pytest.raises(OperationalError) as caught:
            await native(backend_pid)(alias)
    causes: list[type] = []
    cause: BaseException | None = caught.value
    while cause is not None:
        causes.append(type(cause))
        cause = cause.__cause__
    assert psycopg.OperationalError in causes


@contextmanager
def black_hole() -> Iterator[tuple[int, list[socket.socket]]]:
    """A port that accepts connections and never answers, and its ends of them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1], taken
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for each in taken:
            each.close()


def is_left(end: socket.socket) -> bool:
    """Whether who has connected has closed the connection."""
    end.setblocking(False)
    try:
        while end.recv(1024):
            pass
    except BlockingIOError:
        return False
    return True


async def test_a_host_that_never_answers_with_connect_timeout() -> None:
    with (
        black_hole() as (port, taken),
        database(HOST="127.0.0.1", PORT=port, OPTIONS={"connect_timeout": 2}) as alias,
    ):
        gc.disable()  # a server that answers later would have a connection that nobody uses
        try:
            with failing(OperationalError, "'extra'", "host '127.0.0.1'", "timeout", within=8):
                await native(backend_pid)(alias)
            await eventually(lambda: all(map(is_left, taken)))
        finally:
            gc.enable()


async def test_a_host_that_never_answers_and_the_pools_timeout() -> None:
    pool = {"min_size": 0, "max_size": 2, "timeout": 0.5}
    with (
        black_hole() as (port, _),
        database(HOST="127.0.0.1", PORT=port, OPTIONS={"pool": pool}) as alias,
    ):
        with failing(OperationalError, "'extra'", "no answer within 0.5 s", "connect_timeout"):
            await native(backend_pid)(alias)


async def test_who_would_listen_is_cancelled_while_the_host_does_not_answer() -> None:
    with black_hole() as (port, taken), database(HOST="127.0.0.1", PORT=port) as alias:
        gc.disable()
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2), asyncorm.listen("channel", using=alias):
                    pass
            await eventually(lambda: all(map(is_left, taken)))
        finally:
            gc.enable()


async def test_waiting_for_a_connection_can_be_cancelled() -> None:
    with black_hole() as (port, _), database(HOST="127.0.0.1", PORT=port) as alias:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await native(backend_pid)(alias)
        assert time.monotonic() - began < 5


async def test_a_server_that_comes_back_is_used_at_once(server: Server) -> None:
    with database(**server.settings) as alias:
        assert await native(backend_pid)(alias)
        await asyncio.to_thread(server.stop, "immediate")
        try:
            for _ in range(3):
                with failing(OperationalError):
                    await native(backend_pid)(alias)
        finally:
            await asyncio.to_thread(server.start)
        assert await native(backend_pid)(alias)


async def test_a_failure_of_one_alias_does_not_touch_others(server: Server) -> None:
    with database(**{**server.settings, "PASSWORD": "wrong"}) as alias:
        results = await asyncio.gather(
            native(backend_pid)(alias), native(sleep)(0.1), return_exceptions=True
        )
    assert isinstance(results[0], OperationalError)
    assert isinstance(results[1], int)


# The pool


async def test_an_exhausted_pool_names_size_waiters_and_setting() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2, "timeout": 0.3}}) as alias:

        async def hold() -> None:
            async with asyncorm.atomic(using=alias):
                await native(backend_pid)(alias)
                await asyncio.sleep(1)

        holders = [asyncio.create_task(hold()) for _ in range(2)]
        await asyncio.sleep(0.1)
        with failing(
            OperationalError,
            "'extra' is exhausted",
            "all 2 connections",
            "0.3 s",
            "more tasks wait",
            "OPTIONS['pool']['max_size']",
            "DATABASES['extra']",
        ):
            await native(backend_pid)(alias)
        await asyncio.gather(*holders)
        assert await native(backend_pid)(alias)


async def test_max_waiting() -> None:
    pool = {"min_size": 0, "max_size": 1, "max_waiting": 2}
    with database(OPTIONS={"pool": pool}) as alias:

        async def hold() -> None:
            async with asyncorm.connection(using=alias):
                await native(backend_pid)(alias)
                await asyncio.sleep(0.5)

        holder = asyncio.create_task(hold())
        await asyncio.sleep(0.1)
        waiters = [asyncio.create_task(native(backend_pid)(alias)) for _ in range(2)]
        await asyncio.sleep(0.1)
        with failing(
            OperationalError, "'extra' is exhausted", "1 connections", "2 tasks wait", "max_waiting"
        ):
            await native(backend_pid)(alias)
        with pytest.raises(OperationalError, match=r"^The native pool of database 'extra' is exh"):
            await native(backend_pid)(alias)
        await asyncio.gather(holder, *waiters)


async def test_who_has_given_up_does_not_count_as_waiting() -> None:
    """Clients that went away keep nobody else from waiting."""
    pool = {"min_size": 0, "max_size": 1, "max_waiting": 2}
    with database(OPTIONS={"pool": pool}) as alias:
        async with asyncorm.connection(using=alias):
            await native(backend_pid)(alias)
            for _ in range(2):
                gone = [asyncio.create_task(native(backend_pid)(alias)) for _ in range(2)]
                await eventually(lambda: asyncorm.pool_stats(alias)["requests_waiting"] == 2)
                for task in gone:
                    task.cancel()
                await asyncio.wait(gone)
                await eventually(lambda: not asyncorm.pool_stats(alias)["requests_waiting"])
            waiter = asyncio.create_task(native(backend_pid)(alias))
            await eventually(lambda: asyncorm.pool_stats(alias)["requests_waiting"] == 1)
        assert await waiter


# Settings


async def test_native_methods_refuse_other_engines() -> None:
    words = ("'legacy'", "django.db.backends.sqlite3", "asyncorm.backends.postgresql")
    record = LegacyRecord(name="x")
    for call in (
        lambda: LegacyRecord.objects.native_count(),
        lambda: LegacyRecord.objects.native_create(name="x"),
        lambda: LegacyRecord.objects.all().anative(),
        lambda: LegacyRecord.objects.anative(),
        lambda: record.native_save(),
        lambda: LegacyRecord.objects.raw("SELECT 1 AS id").anative(),
    ):
        with failing(NotSupportedError, *words):
            await call()
    with failing(NotSupportedError, *words):
        async for _ in LegacyRecord.objects.native_iterator():
            pass
    with failing(NotSupportedError, *words):
        async with asyncorm.atomic(using="legacy"):
            pass
    with failing(NotSupportedError, *words):
        async with asyncorm.connection(using="legacy"):
            pass
    with failing(NotSupportedError, *words):
        async with asyncorm.cursor(using="legacy") as cursor:
            await cursor.execute("SELECT 1")


async def test_native_code_refuses_other_engines() -> None:
    with failing(SynchronousOnlyOperation, "'legacy'", "sqlite3", "sync_to_async"):
        await native(lambda: LegacyRecord.objects.count())()


async def test_without_a_database_in_the_settings() -> None:
    with (
        database(ENGINE="django.db.backends.dummy", OPTIONS={}) as alias,
        failing(ImproperlyConfigured, "settings.DATABASES"),
    ):
        await native(lambda: connections[alias].cursor())()


async def test_djangos_async_methods_work_on_other_engines(django_db_blocker: Any) -> None:
    from asgiref.sync import sync_to_async

    def create() -> None:
        with connections["legacy"].schema_editor() as editor:
            if LegacyRecord._meta.db_table not in connections["legacy"].introspection.table_names():
                editor.create_model(LegacyRecord)

    await sync_to_async(create)()
    await LegacyRecord.objects.acreate(name="kept")
    assert await LegacyRecord.objects.acount() == 1
    await LegacyRecord.objects.all().adelete()


async def test_an_alias_that_does_not_exist() -> None:
    with failing(ConnectionDoesNotExist, "nowhere"):
        await Tag.objects.using("nowhere").native_count()
    with failing(ConnectionDoesNotExist, "nowhere"):
        async with asyncorm.atomic(using="nowhere"):
            pass


async def test_autocommit_off_is_refused() -> None:
    with database(AUTOCOMMIT=False) as alias:
        with failing(ImproperlyConfigured, "DATABASES['extra']['AUTOCOMMIT']", "asyncorm.atomic"):
            await native(backend_pid)(alias)


async def test_synchronous_calls_on_the_loop_are_refused_as_in_django() -> None:
    with failing(SynchronousOnlyOperation, "async context"):
        Tag.objects.count()
    with failing(SynchronousOnlyOperation):
        connections["default"].cursor()
    # Also after native code, and beside native code that waits.
    task = asyncio.create_task(native(sleep)(0.2))
    await asyncio.sleep(0.05)
    with failing(SynchronousOnlyOperation):
        list(Tag.objects.all())
    await task


async def test_a_thread_inside_a_block_is_refused() -> None:
    from asgiref.sync import sync_to_async

    async with asyncorm.atomic():
        with failing(TransactionManagementError, "asyncorm.native", "'default'"):
            await sync_to_async(Tag.objects.count)()
        with failing(TransactionManagementError, "asyncorm.native"):
            await Tag.objects.acount()
        assert await Tag.objects.native_count() == 6
    assert await in_thread(Tag.objects.count) == 6


def test_the_app_is_not_installed() -> None:
    script = """
import asyncio, json, os
import django
from django.conf import settings
server = json.loads(os.environ["ASYNCORM_TEST_DATABASE"])
settings.configure(
    DATABASES={"default": {"ENGINE": "asyncorm.backends.postgresql", **server}},
    INSTALLED_APPS=[],
)
django.setup()
import asyncorm
from django.db import connection

async def main():
    async def block():
        async with asyncorm.atomic():
            pass
    async def raw():
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT 1")
    async def kept():
        async with asyncorm.connection():
            pass
    for way in (asyncorm.native(connection.ensure_connection), block, raw, kept):
        try:
            await way()
        except Exception as exc:
            print(type(exc).__name__, exc)

asyncio.run(main())
# Synchronous code does not need the app.
with connection.cursor() as cursor:
    cursor.execute("SELECT 1")
    print(cursor.fetchone())
connection.close()
"""
    done = run_script(script)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines[:4]:
        assert line.startswith("ImproperlyConfigured")
        assert "INSTALLED_APPS" in line
    assert lines[4] == "(1,)"


def test_the_stock_engine_is_told_what_to_change() -> None:
    script = """
import asyncio, django
from django.conf import settings
settings.DATABASES["default"]["ENGINE"] = "django.db.backends.postgresql"
django.setup()
from tests.project.shop.models import Tag
from django.db import NotSupportedError
try:
    asyncio.run(Tag.objects.native_count())
except NotSupportedError as exc:
    print(exc)
print(Tag.objects.count())
from django.core.checks import run_checks
print([message.id for message in run_checks() if message.id.startswith("asyncorm")])
from django.db import connections
connections.close_all()
connections["default"].close_pool()
"""
    done = run_script(script)
    assert done.stderr == ""
    message, count, checks = done.stdout.splitlines()
    assert "django.db.backends.postgresql" in message
    assert "asyncorm.backends.postgresql" in message
    assert count == "6"
    assert checks in ("['asyncorm.W001']", "[]")  # `other` may still be one of ours


@pytest.mark.parametrize("value", ["True", {"SWAP_MANAGERS": "yes"}, {"SWAP_MANAGER": True}])
def test_a_wrong_setting_ends_the_start(value: Any) -> None:
    script = f"""
import django
from django.conf import settings
settings.ASYNCORM = {value!r}
try:
    django.setup()
except Exception as exc:
    print(type(exc).__name__, exc)
"""
    done = run_script(script)
    assert done.stdout.startswith("ImproperlyConfigured ASYNCORM"), done.stdout + done.stderr


def test_ctrl_c_ends_quietly() -> None:
    """An interrupted asyncio.run() cancels the statement and leaves no connection."""
    script = """
import asyncio, os, signal, django
django.setup()
from django.db import connection
import asyncorm
def sleep():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(600)")
async def main():
    asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGINT)
    await asyncorm.native(sleep)()
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""
    done = run_script(script)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
