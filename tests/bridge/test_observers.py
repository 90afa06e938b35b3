"""What a task installs on its thread's connection by sync_to_async() sees its native statements."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.contrib.auth.models import Group
from django.db import IntegrityError, connection, connections, reset_queries, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

import asyncorm
from tests.support import value

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def swapped() -> Iterator[None]:
    with override_settings(ASYNCORM={"SWAP_MANAGERS": True}):
        yield
    SyncToAsync.single_thread_executor.submit(connections.close_all).result()


@pytest.fixture(params=["production", "test case"])
def alike(request: pytest.FixtureRequest, swapped: None) -> Iterator[None]:
    if request.param == "production":
        yield
        return
    atomic = transaction.atomic()
    atomic._from_testcase = True  # type: ignore[attr-defined]
    with atomic:
        yield
        transaction.set_rollback(True)


class History:
    """As pghistory's context: a wrapper entered in a thread, its state in a threading.local."""

    local = threading.local()

    def __init__(self, user: str = "me") -> None:
        self.user = user
        self.seen: list[str] = []

    def wrapper(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        self.seen.append(sql)
        assert context["cursor"].connection is not None
        if sql.startswith(("SAVEPOINT", "RELEASE")):
            return execute(sql, params, many, context)
        return execute(f"/* by {self.local.user} */ {sql}", params, many, context)

    def __enter__(self) -> Any:
        self.hook = connection.execute_wrapper(self.wrapper)
        self.hook.__enter__()
        self.local.user = self.user
        return self

    def __exit__(self, *exc: Any) -> None:
        del self.local.user
        self.hook.__exit__(*exc)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.local.user = self.user
        with connection.execute_wrapper(self.wrapper):
            yield

    async def __aenter__(self) -> Any:
        return await sync_to_async(self.__enter__)()

    async def __aexit__(self, *exc: Any) -> None:
        await sync_to_async(self.__exit__)(*exc)


def run(coroutine: Any) -> Any:
    async def main() -> Any:
        try:
            return await asyncio.wait_for(coroutine, 20)
        finally:
            await asyncorm.close_pools()

    return asyncio.run(main())


def current() -> str:
    query = "SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    return str(value(query))


def test_execute_wrappers(alike: None) -> None:
    async def work() -> None:
        history = History()
        await Group.objects.acount()
        async with history:
            await Group.objects.acount()
            await Group.objects.acreate(name="a")
            await Group.objects.native_get(name="a")
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT 1")
            assert "by me" in await asyncorm.native(current)()
            assert len(history.seen) == 5
            await asyncio.gather(*(Group.objects.acount() for _ in range(3)))
            assert len(history.seen) == 8
            await sync_to_async(Group.objects.count)()
            assert len(history.seen) == 9
            with pytest.raises(IntegrityError):
                async with asyncorm.atomic():
                    await Group.objects.acreate(name="a")
        seen = len(history.seen)
        await Group.objects.acount()
        await Group.objects.native_create(name="b")
        assert len(history.seen) == seen

    run(work())


def test_of_this_task_alone() -> None:
    async def work() -> None:
        entered, over = asyncio.Event(), asyncio.Event()

        async def other() -> None:
            await entered.wait()
            assert "by" not in await asyncorm.native(current)()
            over.set()

        async def observed() -> None:
            async with History() as history:
                entered.set()
                await over.wait()
                assert history.seen == []
                await Group.objects.acount()
                assert len(history.seen) == 1

        await asyncio.gather(other(), observed())

    run(work())


def test_inside_a_block_and_a_block_inside(alike: None) -> None:
    async def work() -> None:
        async with asyncorm.atomic():
            await Group.objects.acreate(name="a")
        async with History() as history, asyncorm.atomic():
            await Group.objects.acreate(name="b")
            assert [sql.split()[0] for sql in history.seen if "SAVEPOINT" not in sql] == ["INSERT"]
        assert await Group.objects.acount() == 2

    run(work())


def test_nested_and_left_in_another_task() -> None:
    async def work() -> None:
        outer, inner = History(), History()
        stack = contextlib.ExitStack()
        for history in (outer, inner):
            await sync_to_async(lambda h=history: stack.enter_context(h.entered()))()
        await Group.objects.acount()
        assert (len(outer.seen), len(inner.seen)) == (1, 1)
        await asyncio.create_task(sync_to_async(stack.close)())
        await Group.objects.acount()
        assert (len(outer.seen), len(inner.seen)) == (1, 1)

    run(work())


def test_wrappers_that_are_put_into_the_list() -> None:
    async def work() -> None:
        seen = []

        def see(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            seen.append(threading.get_ident())
            return execute(sql, params, many, context)

        await sync_to_async(lambda: connection.execute_wrappers.insert(0, see))()
        await Group.objects.acount()
        await sync_to_async(lambda: connection.execute_wrappers.remove(see))()
        await Group.objects.acount()
        assert seen == [await sync_to_async(threading.get_ident)()], "in its thread"

    run(work())


def test_captured_queries(alike: None) -> None:
    async def work() -> None:
        captured = CaptureQueriesContext(connection)
        await sync_to_async(captured.__enter__)()
        await Group.objects.acount()
        await Group.objects.native_create(name="a")
        await sync_to_async(captured.__exit__)(None, None, None)
        await Group.objects.acount()
        queries = await sync_to_async(list)(captured)  # `connection` is the thread's there
        assert [query["sql"].split()[0] for query in queries] == ["SELECT", "INSERT"]

    run(work())


def test_queries_of_a_debugged_project_read_in_a_thread(alike: None, settings: Any) -> None:
    async def work() -> None:
        await sync_to_async(reset_queries)()
        await Group.objects.acount()
        settings.DEBUG = True
        await Group.objects.native_count()
        await sync_to_async(Group.objects.exists)()
        await asyncio.gather(*(Group.objects.native_create(name=n) for n in "ab"))
        read = await sync_to_async(lambda: [q["sql"].split()[0] for q in connection.queries])()
        assert sorted(read) == ["INSERT", "INSERT", "SELECT", "SELECT"]

        def captured() -> list[str]:
            with CaptureQueriesContext(connection) as context:
                Group.objects.count()
            return [query["sql"].split()[0] for query in context]

        assert await sync_to_async(captured)() == ["SELECT"]

    run(work())


def test_cancelled_in_a_wrapper() -> None:
    async def work() -> None:
        async with History():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncorm.native(value)("SELECT pg_sleep(60)"), 0.2)
            assert await Group.objects.acount() == 0

    run(work())


def test_errors_of_a_wrapper_and_of_the_statement() -> None:
    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        try:
            execute(sql, params, many, context)
        except IntegrityError:
            raise LookupError from None

    async def work() -> None:
        await Group.objects.acreate(name="a")
        hook = connection.execute_wrapper(fail)
        await sync_to_async(hook.__enter__)()
        with pytest.raises(LookupError):
            await Group.objects.native_create(name="a")
        await sync_to_async(hook.__exit__)(None, None, None)

    run(work())


def test_too_many_queries_for_the_log() -> None:
    """Django's warning names the place that reads them."""
    with mock.patch.object(BaseDatabaseWrapper, "queries_limit", 2):
        wrapper = connection.copy()
        wrapper.queries_log.extend([{"sql": "", "time": ""}] * 3)
        with pytest.warns(UserWarning, match="only the last 2 queries will be") as caught:
            assert len(wrapper.queries) == 2
    assert [each.filename for each in caught] == [__file__]
