"""Tests that roll back: native code in the transaction of TestCase and of pytest-django."""

import asyncio
import contextlib
import gc
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import IntegrityError, connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext

import asyncorm
from asyncorm import sessions
from tests.project.myapp.models import Item
from tests.support import database, value


async def add(number: int) -> Item:
    return await Item.objects.native_create(remote_id=number, name=f"item {number}")


async def count() -> int:
    return await Item.objects.native_count()


def usable() -> list[Any]:
    """What a connection says of itself in whole and broken blocks."""
    said: list[Any] = []

    def ask() -> None:
        said.append((connection.is_usable(), connection.needs_rollback))

    connection.ensure_connection()
    ask()
    with transaction.atomic():
        with transaction.atomic():
            ask()
            transaction.set_rollback(True)
            ask()
        with contextlib.suppress(IntegrityError), transaction.atomic():
            Item.objects.create(remote_id=1)
            try:
                Item.objects.create(remote_id=1)
            finally:
                ask()
        ask()
        transaction.set_rollback(True)
    return said


def test_a_broken_block_says_whether_its_connection_is_usable(transactional_db: None) -> None:
    expected = [(True, False), (True, False), (True, True), (False, True), (True, False)]
    assert usable() == expected
    assert async_to_sync(asyncorm.native(usable))() == expected


def test_a_case_that_has_ended_keeps_no_session_of_the_server(django_db_blocker: Any) -> None:
    """Some context may keep the case's own."""
    with django_db_blocker.unblock(), database() as alias:
        case = transaction.atomic(using=alias)
        case._from_testcase = True  # type: ignore[attr-defined]
        with case:
            assert async_to_sync(asyncorm.native(value))("SELECT 1", using=alias) == 1
            kept = sessions.test_sessions[alias]
        wrapper = connections[alias]
        server = weakref.ref(wrapper.connection.pgconn)
        wrapper.connection = None  # as where its thread ends; not closed
        assert kept.over and server() is None


class RollbackTests(TestCase):
    """Each test finds what setUpTestData and setUp made, and nothing of the others."""

    @classmethod
    def setUpTestData(cls) -> None:
        cls.first = Item.objects.create(remote_id=1, name="from setUpTestData")

    def setUp(self) -> None:
        Item.objects.create(remote_id=2, name="from setUp")

    async def test_sees_both_and_is_seen(self) -> None:
        assert await count() == 2
        await add(3)
        assert await sync_to_async(Item.objects.count)() == 3
        await sync_to_async(Item.objects.create)(remote_id=4, name="sync")
        assert await count() == 4

    async def test_what_is_usable(self) -> None:
        assert await asyncorm.native(usable)() == await sync_to_async(usable)()

    async def test_many_at_once(self) -> None:
        items = [Item(remote_id=number) for number in range(10, 2510)]
        await Item.objects.native_bulk_create(items)
        assert all(item.pk and not item._state.adding for item in items)
        with pytest.raises(IntegrityError):
            async with asyncorm.atomic():
                await Item.objects.native_bulk_create(
                    [Item(remote_id=n) for n in range(3000, 509, -1)]
                )
        assert await count() == 2502

    async def test_nothing_of_the_other_tests(self) -> None:
        assert await count() == 2
        await asyncio.gather(*[add(number) for number in range(10, 20)])
        assert await count() == 12

    @override_settings(ASYNCORM={"SWAP_MANAGERS": True})
    async def test_swapped(self) -> None:
        item = await Item.objects.acreate(remote_id=3, name="swapped")
        assert [row.pk async for row in Item.objects.filter(pk=item.pk)] == [item.pk]
        assert [row.pk async for row in Item.objects.order_by("remote_id").aiterator()]

    async def test_blocks_nest_in_it(self) -> None:
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic():
                await add(3)
                async with asyncorm.atomic():
                    await add(4)
                assert await count() == 4
                raise ZeroDivisionError
        assert await count() == 2
        async with asyncorm.atomic(durable=True):
            await add(5)
        assert await count() == 3

    async def test_gather_of_blocks(self) -> None:
        async def block(number: int) -> None:
            async with asyncorm.atomic():
                await add(number)
                await asyncio.sleep(0.001)
                if number % 2:
                    raise ValueError(number)

        results = await asyncio.gather(*[block(n) for n in range(10, 20)], return_exceptions=True)
        assert sum(isinstance(result, ValueError) for result in results) == 5
        assert await count() == 7

    async def test_error_in_a_block_spares_the_test(self) -> None:
        with pytest.raises(IntegrityError):
            async with asyncorm.atomic():
                await add(1)
        assert await count() == 2

    async def test_cancelled_in_a_block(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), asyncorm.atomic():
                await add(3)
                async with asyncorm.cursor() as cursor:
                    await cursor.execute("SELECT pg_sleep(30)")
        assert await count() == 2

    async def test_number_of_queries(self) -> None:
        with CaptureQueriesContext(connection) as queries:
            await count()
            await asyncio.gather(count(), count())
        assert len(queries) == 3
        async with asyncorm.atomic():
            with self.assertNumQueries(1):
                await count()

    async def test_on_commit_callbacks_are_captured(self) -> None:
        called: list[str] = []
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            async with asyncorm.atomic():
                asyncorm.on_commit(lambda: called.append("native"))
                await asyncorm.native(transaction.on_commit)(lambda: called.append("django"))
            with pytest.raises(ZeroDivisionError):
                async with asyncorm.atomic():
                    asyncorm.on_commit(lambda: called.append("rolled back"))
                    raise ZeroDivisionError
        assert len(callbacks) == 2
        assert called == ["native", "django"]

    async def test_a_generator_left_early(self) -> None:
        async def held() -> AsyncIterator[int]:
            async with asyncorm.atomic():
                await add(3)
                async for row in Item.objects.native_iterator(chunk_size=1):
                    yield row.pk

        async for _ in held():
            break
        await add(4)
        await asyncio.gather(add(5), add(6))
        assert await count() == 5

    async def test_a_block_that_nobody_leaves(self) -> None:
        async def forgets() -> None:
            await asyncorm.atomic().__aenter__()
            await add(3)

        await asyncio.create_task(forgets())
        gc.collect()
        await add(4)
        assert await count() == 3

    async def test_djangos_functions_in_a_block(self) -> None:
        called: list[str] = []

        async def awaited() -> None:
            called.append("awaited")

        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            async with asyncorm.atomic():
                transaction.on_commit(lambda: called.append("called"))
                transaction.on_commit(awaited)  # type: ignore[arg-type]
            async with asyncorm.atomic():
                await add(3)
                transaction.on_commit(lambda: called.append("lost"))
                transaction.set_rollback(True)
        await asyncio.sleep(0)
        assert len(callbacks) == 2
        assert called == ["called", "awaited"]
        assert await count() == 2

    async def test_isolation_level_is_ignored_with_a_warning(self) -> None:
        with pytest.warns(UserWarning, match="read_only is ignored"):
            async with asyncorm.atomic(read_only=True):
                await add(3)
        assert await count() == 3

    async def test_set_rollback(self) -> None:
        async with asyncorm.atomic():
            await add(3)
            asyncorm.set_rollback(True)
        assert await count() == 2

    async def test_threads_inside_a_block_are_refused_as_in_production(self) -> None:
        async with asyncorm.atomic():
            with pytest.raises(TransactionManagementError, match=r"asyncorm\.native"):
                await sync_to_async(Item.objects.count)()

    async def test_tasks_and_threads_at_once(self) -> None:
        await asyncio.gather(
            *[add(number) for number in range(100, 110)],
            *[
                sync_to_async(Item.objects.create)(remote_id=number, name="sync")
                for number in range(200, 210)
            ],
        )
        assert await count() == 22

    async def test_streams(self) -> None:
        await asyncio.gather(*[add(number) for number in range(10, 30)])
        rows = [
            row.remote_id async for row in Item.objects.order_by("remote_id").native_iterator(5)
        ]
        assert rows == [1, 2, *range(10, 30)]

    def test_synchronous(self) -> None:
        Item.objects.create(remote_id=3, name="sync")
        assert Item.objects.count() == 3

    async def test_sessions_of_its_own_server_process(self) -> None:
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT pg_backend_pid()")
            native = await cursor.fetchone()

        def backend() -> Any:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                return cursor.fetchone()

        assert native == await sync_to_async(backend)()


@pytest.mark.django_db
class TestPytest:
    """pytest-django's `db` with pytest-asyncio: no configuration."""

    @pytest.mark.parametrize("again", range(3))
    async def test_rolls_back(self, again: int) -> None:
        assert await count() == 0
        await asyncio.gather(*[add(number) for number in range(5)])
        assert await count() == 5

    async def test_sees_fixtures(self, item: Item) -> None:
        assert (await Item.objects.native_get()).pk == item.pk

    async def test_counts_queries(self, django_assert_num_queries: Any) -> None:
        with django_assert_num_queries(2):
            await count()
            await count()

    async def test_error_outside_a_block(self) -> None:
        await add(1)
        with pytest.raises(IntegrityError):
            await add(1)

    async def test_after_that(self) -> None:
        assert await count() == 0


@pytest.fixture
def item(db: None) -> Item:
    return Item.objects.create(remote_id=7, name="from a fixture")


@pytest.mark.django_db
@pytest.mark.anyio
def test_synchronous_test_still_works() -> None:
    Item.objects.create(remote_id=7, name="sync")
    assert Item.objects.count() == 1
    assert asyncio.run(count()) == 1
    assert Item.objects.count() == 1


@pytest.mark.django_db(transaction=True)
async def test_real_transactions_when_asked_for() -> None:
    async def backend() -> Any:
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT pg_sleep(0.5), pg_backend_pid()")
            return (await cursor.fetchone())[1]  # type: ignore[index]

    assert len(set(await asyncio.gather(*[backend() for _ in range(3)]))) > 1


def test_a_loop_that_waits_does_not_keep_the_database(
    django_db_setup: Any, django_db_blocker: Any
) -> None:
    """A session's loop may still be open when the test databases are dropped."""

    async def backend() -> Any:
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT pg_backend_pid()")
            return (await cursor.fetchone())[0]  # type: ignore[index]

    with django_db_blocker.unblock(), asyncio.Runner() as runner:
        native = runner.run(backend())
        connection.close_pool()
        with connection.cursor() as cursor:
            for _ in range(100):
                cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [native])
                if cursor.fetchone() == (0,):
                    break
                time.sleep(0.05)
            else:
                raise AssertionError("the native connection is still open")
        connection.close()
        assert runner.run(backend()) != native
