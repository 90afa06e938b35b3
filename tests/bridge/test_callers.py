"""Synchronous code that waits for a coroutine: what its connection has is lent to that."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.contrib.auth.models import Group, Permission, User
from django.contrib.contenttypes.models import ContentType
from django.core.management import BaseCommand, call_command
from django.db import (
    DatabaseError,
    IntegrityError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.models import Func, IntegerField, TextField
from django.db.models.signals import post_save
from django.db.transaction import TransactionManagementError
from django.dispatch import Signal
from django.http import HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import include, path
from psycopg import IsolationLevel

import asyncorm
from asyncorm import sessions
from tests.support import backend_pid, eventually, value

HERE = __name__
pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
WAIT = 10


@pytest.fixture(autouse=True)
def swapped() -> Iterator[None]:
    with override_settings(ASYNCORM={"SWAP_MANAGERS": True, "LOCK_TIMEOUT": 5}):
        yield
    connections.close_all()
    SyncToAsync.single_thread_executor.submit(connections.close_all).result()
    connection.close_pool()  # what was set in its sessions is of no concern to other tests


@pytest.fixture(params=["production", "test case"])
def alike(request: pytest.FixtureRequest, swapped: None) -> Iterator[None]:
    """Both as in production and in the transaction of a test."""
    if request.param == "production":
        yield
        return
    with contextlib.ExitStack() as stack:
        for alias in ("default", "other"):
            atomic = transaction.atomic(using=alias)
            atomic._from_testcase = True  # type: ignore[attr-defined]
            stack.enter_context(atomic)
            stack.callback(transaction.set_rollback, True, using=alias)
        yield


def run_in_main_thread(body: Callable[[], Any]) -> Any:
    return body()


def run_under_a_loop(body: Callable[[], Any]) -> Any:
    """In a thread, as a synchronous view under ASGI."""

    def close() -> Any:
        try:
            return body()
        finally:
            if not sessions.test_sessions:
                connections.close_all()

    async def main() -> Any:
        try:
            return await asyncio.wait_for(sync_to_async(close)(), 3 * WAIT)
        finally:
            await asyncorm.close_pools()

    return asyncio.run(main())


@pytest.fixture(params=[run_in_main_thread, run_under_a_loop])
def run(request: pytest.FixtureRequest) -> Any:
    return request.param


def called(coroutine: Callable[[], Any]) -> Any:
    """What synchronous code gets of a coroutine function; it must not hang."""

    async def limited() -> Any:
        return await asyncio.wait_for(coroutine(), WAIT)

    return async_to_sync(limited)()


def execute(sql: str, using: str = "default") -> None:
    with connections[using].cursor() as cursor:
        cursor.execute(sql)


class Undo(Exception):
    pass


async def by_django() -> int:
    await Group.objects.filter(name="mine").aupdate(name="changed")  # a row that the caller holds
    group = await Group.objects.aget(name="changed")
    permission = Permission(name="p", codename="p", content_type=await ContentType.objects.afirst())  # type: ignore[misc]
    await permission.asave()
    await group.permissions.aadd(permission)
    assert [g.name async for g in Group.objects.all()] == ["changed"]
    assert [g.name async for g in Group.objects.aiterator()] == ["changed"]
    pid = Func(template="pg_backend_pid()", output_field=IntegerField())
    return (await Group.objects.annotate(pid=pid).afirst()).pid  # type: ignore


async def natively() -> int:
    await Group.objects.filter(name="mine").native_update(name="changed")
    group = await Group.objects.native_get(name="changed")
    permission = Permission(name="p", codename="p", content_type=await ContentType.objects.afirst())  # type: ignore[misc]
    await permission.native_save()
    await group.permissions.native_add(permission)
    assert [g.name async for g in Group.objects.native_iterator()] == ["changed"]
    return await asyncorm.native(backend_pid)()


async def with_blocks() -> int:
    async def one(name: str) -> None:
        async with asyncorm.atomic():
            await Group.objects.acreate(name=name)
            if name == "b":
                asyncorm.set_rollback(True)

    await asyncio.gather(*map(one, "abc"), Group.objects.acreate(name="d"))
    with contextlib.suppress(IntegrityError):
        async with asyncorm.atomic():
            await Group.objects.acreate(name="a")
    assert await Group.objects.acount() == 4
    assert await asyncorm.native(transactional)() == 4
    return await asyncorm.native(backend_pid)()


def transactional() -> int:
    with contextlib.suppress(Undo), transaction.atomic():
        Group.objects.create(name="undone")
        raise Undo
    return Group.objects.count()


async def by_cursor() -> int:
    async with asyncorm.cursor() as cursor:
        await cursor.execute("UPDATE auth_group SET name = 'changed' WHERE name = 'mine'")
        await cursor.execute("SELECT pg_backend_pid(), name FROM auth_group")
        pid, name = await cursor.fetchone()  # type: ignore[misc]
    assert name == "changed"
    return int(pid)


async def in_a_batch() -> int:
    pid, groups, number = await asyncorm.batch(
        backend_pid, Group.objects.all(), lambda: Group.objects.filter(name="mine").update(name="c")
    )
    assert (len(groups), number) == (1, 1)
    return int(pid)


async def mixed() -> int:
    pids = await asyncio.gather(
        *(asyncorm.native(backend_pid)() for _ in range(4)),
        *(sync_to_async(backend_pid)() for _ in range(4)),
        *(Group.objects.acreate(name=str(n)) for n in range(8)),
        *(Group.objects.native_create(name=str(n)) for n in range(8, 16)),
    )
    assert await Group.objects.acount() == 17
    (pid,) = set(pids[:8])
    return int(pid)


WAYS = [by_django, by_cursor, natively, with_blocks, in_a_batch, mixed]


@pytest.mark.parametrize("way", WAYS)
def test_inside_an_open_transaction(way: Callable[[], Any], run: Any, alike: None) -> None:
    def body() -> None:
        ContentType.objects.get_for_model(Group)
        with contextlib.suppress(Undo), transaction.atomic():
            Group.objects.create(name="mine")
            assert called(way) == backend_pid()
            assert Group.objects.count() >= 1
            raise Undo
        assert not Group.objects.exists(), "rolled back with the caller's transaction"
        assert not Permission.objects.filter(codename="p").exists()

    run(body)


def test_an_error_in_the_coroutine_is_one_in_the_transaction(run: Any, alike: None) -> None:
    def body() -> None:
        for create in (Group.objects.acreate, Group.objects.native_create):
            with pytest.raises(IntegrityError), transaction.atomic():
                Group.objects.create(name="mine")
                called(lambda: create(name="mine"))  # noqa: B023
            with pytest.raises(TransactionManagementError), transaction.atomic():
                Group.objects.create(name="mine")
                with contextlib.suppress(IntegrityError):
                    called(lambda: create(name="mine"))  # noqa: B023
                Group.objects.count()
        assert not Group.objects.exists()

    run(body)


# What a connection has


def pid_and(sql: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_backend_pid(), {sql}")
        return cursor.fetchone()


async def tenants() -> set[Any]:
    """Where statements run in whatever way, and what is set there."""
    text = "current_setting('my.tenant', true)"
    found = await Group.objects.annotate(
        pid=Func(template="pg_backend_pid()", output_field=IntegerField()),
        tenant=Func(template=text, output_field=TextField()),
    ).aget()
    async with asyncorm.cursor() as cursor:
        await cursor.execute(f"SELECT pg_backend_pid(), {text}")
        row = await cursor.fetchone()
    native = await asyncio.gather(*(asyncorm.native(pid_and)(text) for _ in range(3)))
    return {(found.pid, found.tenant), row, *native}


@pytest.mark.parametrize(
    "statement",
    [
        "SET my.tenant = '7'",
        "SELECT set_config('my.tenant', '7', false)",
        "CREATE TEMPORARY TABLE mine (a int); SET my.tenant = '7'",
    ],
)
def test_session_state(statement: str, run: Any) -> None:
    Group.objects.create(name="one")

    def body() -> None:
        execute(statement)
        assert called(tenants) == {(backend_pid(), "7")}
        assert called(tenants) == {(backend_pid(), "7")}, "again"

    run(body)
    connection.close()


def test_session_state_that_a_function_hides() -> None:
    Group.objects.create(name="one")
    execute(
        "CREATE FUNCTION pg_temp.hide() RETURNS void LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM set_config('TimeZone', 'Asia/Tokyo', false); END $$"
    )
    connection.connection.session_dirty = False  # as if the function had been there before

    async def zone() -> Any:
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SHOW TimeZone")
            return await cursor.fetchone()

    assert called(zone) != ("Asia/Tokyo",)
    execute("SELECT pg_temp.hide()")
    assert called(zone) == ("Asia/Tokyo",)
    connection.close()


def test_without_autocommit(run: Any) -> None:
    def body() -> None:
        connection.set_autocommit(False)
        execute("SET LOCAL my.tenant = '7'")
        Group.objects.create(name="mine")
        assert called(tenants) == {(backend_pid(), "7")}
        called(lambda: Group.objects.native_create(name="another"))
        connection.rollback()
        connection.set_autocommit(True)
        assert not Group.objects.exists()

    run(body)


def test_nothing_is_lent_where_there_is_nothing(run: Any) -> None:
    def body() -> None:
        Group.objects.create(name="one")
        with transaction.atomic():
            execute("SET LOCAL my.tenant = '7'")
        found = called(tenants)
        assert backend_pid() not in {pid for pid, _ in found}
        assert {tenant for _, tenant in found} <= {None, ""}
        assert called(at_once) > 1

    async def at_once() -> int:
        return len(set(await asyncio.gather(*(asyncorm.native(slow_pid)() for _ in range(3)))))

    run(body)


def slow_pid() -> Any:
    return pid_and("pg_sleep(0.2)")[0]


def test_only_the_alias_that_has_something_is_lent(run: Any, alike: None) -> None:
    def body() -> None:
        async def both() -> Any:
            await Group.objects.using("other").acreate(name="kept")
            await Group.objects.acreate(name="undone")
            return await asyncorm.native(backend_pid)("other")

        with contextlib.suppress(Undo), transaction.atomic():
            backend_pid("other")
            pid = called(both)
            if "test case" not in str(connections["other"].session):
                assert pid != backend_pid("other")
            raise Undo
        assert not Group.objects.exists()
        assert Group.objects.using("other").get().name == "kept"

    run(body)


@pytest.mark.parametrize("connected", [True, False])
def test_execute_wrappers(connected: bool, run: Any) -> None:
    here = threading.local()  # as pghistory's and pgtrigger's wrappers use

    def body() -> None:
        seen = []

        def see(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            seen.append(sql)
            return execute(f"/* {here.user} */ {sql}", params, many, context)

        here.user = "me"
        connection.ensure_connection() if connected else connection.close()
        with connection.execute_wrapper(see):
            called(Group.objects.acount)
            assert len(seen) == 1
            called(lambda: Group.objects.acreate(name="a"))
            assert len(seen) == 2
        called(Group.objects.acount)
        assert len(seen) == 2

    run(body)


def test_execute_wrappers_of_native_statements(run: Any) -> None:
    seen = []

    def see(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    async def work() -> None:
        await Group.objects.native_count()
        async with asyncorm.atomic():
            await Group.objects.acreate(name="a")
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT 1")

    def body() -> None:
        connection.close()
        with connection.execute_wrapper(see):
            called(work)

    run(body)
    assert [sql.split()[0] for sql in seen if "SAVEPOINT" not in sql] == [
        "SELECT",
        "INSERT",
        "SELECT",
    ]
    assert Group.objects.count() == 1


def test_captured_queries(run: Any, alike: None) -> None:
    def body() -> None:
        with CaptureQueriesContext(connection) as captured:
            called(Group.objects.acount)
            called(Group.objects.native_count)
        assert len(captured) == 2

    run(body)


# Scopes


def test_detached_escapes(run: Any) -> None:
    async def work() -> None:
        async with asyncorm.detached():
            await Group.objects.acreate(name="kept")
            await Group.objects.native_create(name="kept, too")
        await asyncorm.detached_task(Group.objects.acreate(name="kept as well"))

    def body() -> None:
        with contextlib.suppress(Undo), transaction.atomic():
            Group.objects.create(name="undone")
            called(work)
            raise Undo

    run(body)
    assert {g.name for g in Group.objects.all()} == {"kept", "kept, too", "kept as well"}


def test_a_task_that_outlives_the_caller() -> None:
    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []
        free = asyncio.Event()

        async def later(create: Any) -> None:
            await free.wait()
            await create(name="late")

        async def work() -> None:
            for create in (Group.objects.acreate, Group.objects.native_create):
                tasks.append(asyncio.create_task(later(create)))

        def body(prepare: str) -> None:
            if prepare == "atomic":
                with transaction.atomic():
                    called(work)
            else:
                execute("SET my.tenant = '7'")
                called(work)
                connections.close_all()

        await sync_to_async(body)("atomic")
        free.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, TransactionManagementError)
            assert "synchronous code at" in str(result) and "test_callers.py" in str(result)
        assert not await Group.objects.aexists()
        tasks.clear()
        free.clear()
        await sync_to_async(body)("state")
        free.set()
        with contextlib.suppress(IntegrityError):
            await asyncio.gather(*tasks)
        assert await Group.objects.acount() == 1, "they are on their own"
        await asyncio.sleep(0.1)
        await asyncorm.close_pools()

    asyncio.run(main())


def test_a_statement_that_is_left_running_is_waited_for() -> None:
    async def main() -> None:
        async def work() -> None:
            asyncio.create_task(in_block())  # noqa: RUF006
            await asyncio.sleep(0.1)

        async def in_block() -> None:
            async with asyncorm.atomic():
                await Group.objects.acreate(name="late")
                await asyncorm.native(value)("SELECT pg_sleep(0.3), 1")

        def body() -> None:
            with transaction.atomic():
                called(work)
                assert Group.objects.get().name == "late"
            connections.close_all()

        await sync_to_async(body)()
        assert await Group.objects.acount() == 1
        await asyncorm.close_pools()

    asyncio.run(main())


@pytest.mark.parametrize("alike", ["test case"], indirect=True)
def test_a_statement_whose_loop_is_gone_is_stopped(
    alike: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server process had not read it yet."""
    monkeypatch.setattr("asyncorm.callers.STOP_TIMEOUT", WAIT)
    pid = backend_pid()

    async def leave() -> None:
        await asyncorm.native(value)("SELECT 1")
        os.kill(pid, signal.SIGSTOP)
        left.append(asyncio.create_task(asyncorm.native(value)("SELECT pg_sleep(600)")))
        await eventually(lambda: sessions.test_sessions["default"].waits_for_server, 30)

    left: list[asyncio.Task[Any]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    timer = threading.Timer(0.3, os.kill, (pid, signal.SIGCONT))
    timer.start()
    with contextlib.suppress(DatabaseError):
        Group.objects.count()
    timer.join()
    running = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
    deadline = time.monotonic() + 3 * WAIT
    while value(running, [pid], using="other"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(OperationalError):
        loop.run_until_complete(left[0])
    loop.close()


def test_nested(run: Any, alike: None) -> None:
    """Synchronous, asynchronous, synchronous, asynchronous, with blocks everywhere."""

    async def inner() -> None:
        await Group.objects.acreate(name="4")
        async with asyncorm.atomic():
            await Group.objects.acreate(name="4 in a block")
        await asyncio.gather(Group.objects.native_create(name="4 natively"), sync_to_async(third)())

    def third() -> None:
        Group.objects.create(name="3, from 4")

    def second(fails: bool) -> None:
        with transaction.atomic():
            Group.objects.create(name="3")
            called(inner)
            if fails:
                raise Undo

    async def outer(fails: bool) -> None:
        await Group.objects.acreate(name="2")
        with contextlib.suppress(Undo):
            await sync_to_async(second)(fails)
        await Group.objects.native_create(name="2 again")

    def first(fails: bool) -> set[str]:
        with contextlib.suppress(Undo), transaction.atomic():
            Group.objects.create(name="1")
            called(lambda: outer(fails))
            names = {group.name for group in Group.objects.all()}
            raise Undo
        assert not Group.objects.exists()
        return names

    outside = {"1", "2", "2 again"}
    assert run(lambda: first(True)) == outside
    assert run(lambda: first(False)) == {
        *outside, "3", "3, from 4", "4", "4 in a block", "4 natively"
    }  # fmt: skip


def test_on_commit_waits_for_the_callers_commit(run: Any) -> None:
    calls: list[str] = []

    async def awaited() -> None:
        calls.append(f"{await Group.objects.acount()} committed")

    async def work() -> None:
        asyncorm.on_commit(lambda: calls.append("called"))
        asyncorm.on_commit(awaited)
        async with asyncorm.atomic():
            asyncorm.on_commit(lambda: calls.append("of a block"))
        with contextlib.suppress(Undo):
            async with asyncorm.atomic():
                asyncorm.on_commit(lambda: calls.append("never"))
                raise Undo
        assert not calls

    def body() -> None:
        with contextlib.suppress(Undo), transaction.atomic():
            called(work)
            raise Undo
        assert not calls
        with transaction.atomic():
            Group.objects.create(name="a")
            called(work)
            assert not calls
        assert calls == ["called", "1 committed", "of a block"]

    run(body)


def test_on_commit_of_a_block_in_a_session_with_state(run: Any) -> None:
    calls: list[Any] = []

    async def awaited() -> None:
        calls.append(await asyncorm.native(pid_and)("current_setting('my.tenant', true)"))

    async def work() -> None:
        async with asyncorm.atomic(isolation_level=IsolationLevel.SERIALIZABLE):
            assert (await asyncorm.native(pid_and)("current_setting('transaction_isolation')"))[
                1
            ] == "serializable"
            asyncorm.on_commit(awaited)
            assert not calls
        asyncorm.on_commit(lambda: calls.append("at once"))
        assert calls[1:] == ["at once"]

    def body() -> None:
        execute("SET my.tenant = '7'")
        called(work)
        assert calls[0] == (backend_pid(), "7")
        called(lambda: asyncio.sleep(0))

    run(body)
    connection.close()


def test_set_rollback(run: Any, alike: None) -> None:
    async def work() -> None:
        await Group.objects.acreate(name="undone")
        asyncorm.set_rollback(True)

    def body() -> None:
        with transaction.atomic():
            called(work)
            assert connection.needs_rollback
        assert not Group.objects.exists()

    run(body)


@pytest.mark.parametrize("how", ["statement", "atomic"])
def test_a_thread_that_a_block_waits_for_is_refused(how: str, run: Any, alike: None) -> None:
    def work() -> int:
        with transaction.atomic() if how == "atomic" else contextlib.nullcontext():
            return Group.objects.count()

    async def block() -> None:
        async with asyncorm.atomic():
            await sync_to_async(work)()

    def body() -> None:
        with transaction.atomic():
            with pytest.raises(TransactionManagementError, match=r"Use 'await asyncorm.native"):
                async_to_sync(block)()
            assert not Group.objects.exists()

    run(body)


def test_a_waiting_thread_does_not_stop_a_block(run: Any) -> None:
    """A block that needs the thread while a sibling's statement wants the connection there."""

    async def block() -> None:
        async with asyncorm.atomic():
            for n in range(3):
                await Group.objects.acreate(name=f"block {n}")
                await sync_to_async(lambda: None)()

    async def work() -> None:
        await asyncio.gather(block(), *(Group.objects.acreate(name=str(n)) for n in range(5)))

    def body() -> None:
        with transaction.atomic():
            called(work)
        assert Group.objects.count() == 8

    run(body)


# In a project


async def receive(sender: Any, instance: Any, **kwargs: Any) -> None:
    """Reads what is being saved, writes what refers to it."""
    group = await Group.objects.aget(pk=instance.pk)
    content_type = await ContentType.objects.afirst()
    permission, _ = await Permission.objects.aget_or_create(
        codename=f"of {group.pk}", content_type=content_type, defaults={"name": group.name}
    )
    await group.permissions.aadd(permission)
    await Group.objects.filter(pk=group.pk).aupdate(name=f"{group.name}!")
    if instance.name == "refused":
        raise Undo


@pytest.fixture
def received() -> Iterator[None]:
    ContentType.objects.get_for_model(Group)
    post_save.connect(receive, sender=Group)
    yield
    post_save.disconnect(receive, sender=Group)


def saved() -> tuple[list[str], list[str]]:
    """The groups, and what the receiver has written for each."""
    permissions = Permission.objects.filter(codename__startswith="of ")
    return [g.name for g in Group.objects.all()], [p.name for p in permissions]


@pytest.mark.parametrize("handler", [Client, AsyncClient])
def test_the_admin(handler: Any, received: None, alike: None) -> None:
    user = User.objects.create_superuser("admin", "", "pass")
    client = handler(raise_request_exception=False)

    def post(name: str, where: str = "add/") -> int:
        if handler is Client:
            client.force_login(user)
            return int(client.post(f"/admin/auth/group/{where}", {"name": name}).status_code)

        async def request() -> Any:
            await client.aforce_login(user)
            return await client.post(f"/admin/auth/group/{where}", {"name": name})

        async def main() -> Any:
            try:
                return await asyncio.wait_for(request(), WAIT)
            finally:
                await asyncorm.close_pools()

        return int(asyncio.run(main()).status_code)

    assert post("a") == 302
    assert saved() == (["a!"], ["a"])
    assert post("refused") == 500
    assert saved() == (["a!"], ["a"])
    assert post("b", f"{Group.objects.get().pk}/change/") == 302
    assert saved() == (["b!"], ["a"])


class Command(BaseCommand):
    stealth_options = ("fails",)

    def handle(self, *args: Any, **options: Any) -> None:
        with transaction.atomic():
            Group.objects.create(name="by a command")
            called(lambda: Group.objects.filter(name="by a command!").aupdate(name="changed"))
            if options.get("fails"):
                raise Undo


def test_a_management_command(received: None, alike: None) -> None:
    with pytest.raises(Undo):
        call_command(Command(), fails=True)
    assert saved() == ([], [])
    call_command(Command())
    assert saved() == (["changed"], ["by a command"])


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


@contextlib.contextmanager
def a_tenant() -> Iterator[None]:
    execute("SET my.tenant = '7'")
    yield
    execute("RESET my.tenant")


@contextlib.contextmanager
def a_transaction() -> Iterator[None]:
    with transaction.atomic():
        yield


@contextlib.contextmanager
def a_wrapper() -> Iterator[None]:
    def tag(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        return execute(f"SET my.tenant = '7'; {sql}", params, many, context)

    with connection.execute_wrapper(tag):
        yield


AROUND: dict[str, Any] = {"nothing": nothing, "tenant": a_tenant, "transaction": a_transaction}


def around(get_response: Any) -> Any:
    """A synchronous middleware."""

    def middleware(request: Any) -> Any:
        with AROUND[request.headers["around"]]():
            response = get_response(request)
            response["pid"] = str(backend_pid())
            if response.status_code >= 400 and connection.in_atomic_block:
                transaction.set_rollback(True)
            return response

    return middleware


async def view(request: Any) -> HttpResponse:
    await Group.objects.acreate(name=request.headers["around"])
    found = await tenants()
    status = 409 if "fails" in request.headers else 200
    return HttpResponse(repr(sorted(found, key=repr)), status=status)


async def stream(request: Any) -> StreamingHttpResponse:
    await Group.objects.acreate(name="first")

    async def body() -> Any:
        async for group in Group.objects.all():
            yield group.name
        await Group.objects.acreate(name="after the transaction")

    return StreamingHttpResponse(body())


def atomic_view(request: Any) -> HttpResponse:
    """Synchronous, in ATOMIC_REQUESTS."""
    Group.objects.create(name="mine")
    called(by_django)
    called(natively_again)
    if "fails" in request.headers:
        raise Undo
    return HttpResponse()


async def natively_again() -> None:
    assert await Group.objects.native_count() == 1


urlpatterns = [
    path("view/", view),
    path("stream/", stream),
    path("atomic/", atomic_view),
    path("", include("tests.project.urls")),
]


async def get(url: str, **headers: str) -> Any:
    client = AsyncClient(raise_request_exception=False)
    try:
        response = await asyncio.wait_for(client.get(url, headers=headers), WAIT)
        if response.streaming:
            response.body = b"".join([part async for part in response.streaming_content])  # type: ignore
        return response
    finally:
        await asyncorm.close_pools()


@override_settings(ROOT_URLCONF=HERE, MIDDLEWARE=[f"{HERE}.around"])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("what", AROUND)
def test_a_synchronous_middleware(what: str, fails: bool) -> None:
    headers = {"fails": "1"} if fails else {}
    response = asyncio.run(get("/view/", around=what, **headers))
    assert response.status_code == (409 if fails else 200), response.content
    pids = {pid for pid, _ in eval(response.content)}
    if what == "nothing":
        assert int(response["pid"]) not in pids, "native"
    else:
        assert {int(response["pid"])} == pids
    if what == "tenant":
        assert {tenant for _, tenant in eval(response.content)} == {"7"}
    assert Group.objects.count() == (0 if fails and what == "transaction" else 1)


@override_settings(ROOT_URLCONF=HERE, MIDDLEWARE=[f"{HERE}.around"])
def test_a_streaming_response_goes_on_after_the_middleware() -> None:
    response = asyncio.run(get("/stream/", around="transaction"))
    assert response.body == b"first"
    assert [g.name for g in Group.objects.order_by("pk")] == ["first", "after the transaction"]


@override_settings(ROOT_URLCONF=HERE, MIDDLEWARE=[])
@pytest.mark.parametrize("fails", [True, False])
def test_atomic_requests_of_a_synchronous_view(fails: bool) -> None:
    ContentType.objects.get_for_model(Group)
    headers = {"fails": "1"} if fails else {}
    connections.settings["default"]["ATOMIC_REQUESTS"] = True
    try:
        response = asyncio.run(get("/atomic/", **headers))
    finally:
        connections.settings["default"]["ATOMIC_REQUESTS"] = False
    assert response.status_code == (500 if fails else 200)
    assert [g.name for g in Group.objects.all()] == ([] if fails else ["changed"])


def test_receivers_of_a_signal_that_a_coroutine_sends(run: Any, alike: None) -> None:
    signal = Signal()

    def synchronous(sender: Any, **kwargs: Any) -> None:
        Group.objects.create(name="synchronous")

    async def asynchronous(sender: Any, **kwargs: Any) -> None:
        await Group.objects.acreate(name="asynchronous")

    signal.connect(synchronous)
    signal.connect(asynchronous)

    def body() -> None:
        with contextlib.suppress(Undo), transaction.atomic():
            called(lambda: signal.asend(None))
            assert Group.objects.count() == 2
            raise Undo
        assert not Group.objects.exists()

    run(body)


def test_asynchronous_generators(run: Any, alike: None) -> None:
    async def generate() -> Any:
        async with asyncorm.atomic():
            yield await Group.objects.acount()
        yield await Group.objects.acount()

    async def work() -> list[int]:
        return [n async for n in generate()]

    def body() -> None:
        with transaction.atomic():
            Group.objects.create(name="a")
            assert called(work) == [1, 1]

    run(body)


@pytest.mark.parametrize("method", ["aiterator", "native_iterator"])
def test_a_stream_that_the_loop_closes_while_a_thread_has_the_connection(
    method: str, run: Any, alike: None
) -> None:
    async def work() -> None:
        entered = asyncio.Event()
        stream = getattr(Group.objects.order_by("pk"), method)(chunk_size=1)
        assert (await anext(stream)).name == "a"

        async def close() -> None:  # as the loop does after a `break`, not in the thread's block
            await entered.wait()
            await stream.aclose()

        closing = asyncio.create_task(close())

        async def within() -> int:
            entered.set()
            await closing
            return await Group.objects.acount()

        def inside() -> int:
            with transaction.atomic():
                return async_to_sync(within)()

        assert await sync_to_async(inside)() == 2

    def body() -> None:
        Group.objects.bulk_create([Group(name="a"), Group(name="b")])
        execute("SET application_name TO 'mine'")
        with CaptureQueriesContext(connection) as queries:
            called(work)
        assert not any("CLOSE" in query["sql"] for query in queries)
        assert sessions.test_sessions or value("SELECT count(*) FROM pg_cursors") == 0

    run(body)


def test_a_stream_that_is_gone_with_its_savepoint(run: Any) -> None:
    async def work() -> None:
        streams = [Group.objects.order_by("pk").iterator(chunk_size=1)]

        def inside() -> None:
            with contextlib.suppress(Undo), transaction.atomic():
                assert next(streams[0]).name == "a"
                raise Undo

        await sync_to_async(inside)()
        streams.clear()

    def body() -> None:
        with contextlib.suppress(Undo), transaction.atomic():
            Group.objects.bulk_create([Group(name="a"), Group(name="b")])
            called(work)
            assert Group.objects.count() == 2
            raise Undo

    run(body)


def test_a_stream_that_outlives_the_coroutine(run: Any, alike: None) -> None:
    async def work() -> Iterator[Group]:
        rows = Group.objects.order_by("pk").iterator(chunk_size=1)
        assert (await sync_to_async(next)(rows)).name == "a"
        return rows

    def body() -> None:
        Group.objects.bulk_create([Group(name="a"), Group(name="b")])
        execute("SET application_name TO 'mine'")
        rows = called(work)
        assert next(rows).name == "b"
        rows.close()  # type: ignore[attr-defined]
        assert value("SELECT count(*) FROM pg_cursors") == 0

    run(body)


def test_a_cancelled_coroutine(run: Any) -> None:
    async def work() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncorm.native(value)("SELECT pg_sleep(60)"), 0.1)

    def body() -> None:
        with pytest.raises(DatabaseError), transaction.atomic():
            Group.objects.create(name="a")
            called(work)
            Group.objects.count()
        assert not Group.objects.exists()

    run(body)
