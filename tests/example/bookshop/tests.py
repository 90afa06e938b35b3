"""What `manage.py test` runs, also with --parallel: each class proves a promise of docs/testing.md.

Names of tests say in which order they run where that matters: every test looks for what the one
before it left behind.
"""

import asyncio
import gc
import time

import psycopg
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.db import IntegrityError, close_old_connections, connection, connections, transaction
from django.test import (
    AsyncClient,
    SimpleTestCase,
    TestCase,
    TransactionTestCase,
    override_settings,
)
from django.test.testcases import DatabaseOperationForbidden
from django.test.utils import CaptureQueriesContext

import asyncorm
from bookshop.models import Book, Publisher


async def backend(seconds=0.0, using=None):
    """The server process that serves the task."""
    async with asyncorm.cursor(using) as cursor:
        await cursor.execute("SELECT pg_backend_pid(), pg_sleep(%s)", [seconds])
        return (await cursor.fetchone())[0]


async def create(title):
    return await Book.objects.acreate(title=title)


class Rollback(TestCase):
    """Nothing stays, whatever a test does: the class counts on two books at the start of each."""

    @classmethod
    def setUpTestData(cls):
        cls.publisher = Publisher.objects.create(name="from setUpTestData")
        cls.native = async_to_sync(create)("native, from setUpTestData")

    def setUp(self):
        self.book = Book.objects.create(title="from setUp", publisher=self.publisher)

    async def asyncSetUp(self):
        raise AssertionError("Django has no asyncSetUp")

    def assertStart(self):
        self.assertEqual(Book.objects.count(), 2)

    async def start(self):
        await sync_to_async(self.assertStart)()
        self.assertEqual(await Book.objects.acount(), 2)
        self.assertEqual((await Book.objects.aget(pk=self.book.pk)).title, "from setUp")

    async def test_1_both_worlds(self):
        await self.start()
        await Book.objects.acreate(title="native")
        await sync_to_async(Book.objects.create)(title="sync")
        await asyncorm.native(Book.objects.create)(title="natively run")
        self.assertEqual(await sync_to_async(Book.objects.count)(), 5)
        self.assertEqual(await Book.objects.acount(), 5)

    async def test_2_gather(self):
        await self.start()
        await asyncio.gather(*[Book.objects.acreate(title=f"book {n}") for n in range(20)])
        self.assertEqual(await Book.objects.acount(), 22)

    async def test_3_failure(self):
        await self.start()
        with self.assertRaises(IntegrityError):
            async with asyncorm.atomic():
                await Book.objects.acreate(title="from setUp")
        await Book.objects.acreate(title="after the failure")
        with self.assertRaises(IntegrityError):
            await Book.objects.acreate(title="from setUp")
        with self.assertRaisesMessage(transaction.TransactionManagementError, "can't execute"):
            await Book.objects.acount()

    async def test_4_cancellation(self):
        await self.start()
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(0.05), asyncorm.atomic():
                await Book.objects.acreate(title="cancelled")
                await backend(30)
        self.assertEqual(await Book.objects.acount(), 2)
        task = asyncio.ensure_future(backend(30))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        with self.assertRaisesMessage(transaction.TransactionManagementError, "can't execute"):
            await Book.objects.acount()

    async def test_5_tasks_left_running(self):
        await self.start()
        self.left = [asyncio.ensure_future(backend(30)), asyncio.ensure_future(backend(30))]
        await asyncio.sleep(0.05)

    async def test_6_streams_left_open(self):
        await self.start()
        async for _ in Book.objects.aiterator(chunk_size=1):
            break
        rows = Book.objects.aiterator(chunk_size=1)
        await anext(rows)
        self.assertEqual(await Book.objects.acount(), 2)
        del rows
        gc.collect()
        await asyncio.sleep(0)
        self.assertEqual(await Book.objects.acount(), 2)

    async def test_7_blocks_left_open(self):
        await self.start()

        async def leave_open():
            async with asyncorm.atomic():
                await Book.objects.acreate(title="never committed")
                await asyncio.sleep(30)

        self.left = asyncio.ensure_future(leave_open())
        await asyncio.sleep(0.05)

    async def test_8_many_threads_and_tasks(self):
        await self.start()

        def create(number):
            for part in range(5):
                with transaction.atomic():
                    Book.objects.create(title=f"thread {number} {part}")

        def slow():
            with connections["default"].cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = '20s'")
                cursor.execute("SELECT pg_advisory_xact_lock(8)")

        # A thread's statement that ends only when the loop, which waits for it, lets it.
        params = connection.get_connection_params()
        address = {key: params[key] for key in ("dbname", "user", "host", "port") if key in params}
        with psycopg.connect(**address, password=params.get("password"), autocommit=True) as other:
            other.execute("SELECT pg_advisory_lock(8)")
            shared = connections["default"]
            running = asyncio.ensure_future(asyncio.to_thread(sleep_on, shared, slow))
            waits = (
                "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database"
                " WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"
            )
            while other.execute(waits).fetchone() == (0,):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            everybody = asyncio.gather(
                *[sync_to_async(create)(n) for n in range(4)],
                *[Book.objects.acreate(title=f"task {n}") for n in range(20)],
            )
            for _ in range(100):
                await asyncio.sleep(0)
            self.assertFalse(everybody.done())
            other.execute("SELECT pg_advisory_unlock(8)")
            await everybody
            await running
        self.assertEqual(await Book.objects.acount(), 42)

    async def test_9_blocks_of_threads_and_tasks(self):
        await self.start()

        def threads(number):
            with transaction.atomic():
                Book.objects.create(title=f"thread {number}")
                with transaction.atomic():
                    Book.objects.create(title=f"thread {number}, nested")
                time.sleep(0.001)
                if number % 2:
                    raise ValueError(number)

        async def tasks(number):
            async with asyncorm.atomic():
                await create(f"task {number}")
                await asyncio.sleep(0.001)
                async with asyncorm.atomic():
                    await create(f"task {number}, nested")
                if number % 2:
                    raise ValueError(number)

        results = await asyncio.gather(
            *[tasks(n) for n in range(10)],
            *[sync_to_async(threads)(n) for n in range(10)],
            *[tasks(n) for n in range(10, 20)],
            return_exceptions=True,
        )
        self.assertEqual([result is None for result in results], [True, False] * 15)
        self.assertEqual(await Book.objects.acount(), 2 + 30)

    async def test_9_native_code_of_a_thread(self):
        await self.start()

        async def both():
            await asyncio.gather(create("one"), create("two"))
            with self.assertRaises(IntegrityError):
                async with asyncorm.atomic():
                    await asyncio.gather(create("three"), create("two"))
            async with asyncorm.atomic():
                await create("four")

        def thread(fails):
            with transaction.atomic():
                with transaction.atomic():
                    async_to_sync(both)()
                if fails:
                    raise ValueError

        with self.assertRaises(ValueError):
            await sync_to_async(thread)(True)
        self.assertEqual(await Book.objects.acount(), 2)
        beside = asyncio.gather(*[create(f"beside {n}") for n in range(10)])
        await sync_to_async(thread)(False)
        await beside
        self.assertEqual(await Book.objects.acount(), 2 + 3 + 10)

    def test_9_native_code_of_a_synchronous_test(self):
        self.assertStart()
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            async_to_sync(create)("one")
            self.assertEqual(Book.objects.count(), 3)
            raise ZeroDivisionError
        self.assertStart()
        with transaction.atomic():
            async_to_sync(create)("one")
        self.assertEqual(Book.objects.count(), 3)
        with self.assertRaises(IntegrityError), transaction.atomic():
            async_to_sync(create)("one")
        self.assertEqual(asyncio.run(create("two")).title, "two")

    @override_settings(ASYNCORM={"SWAP_MANAGERS": True, "LOCK_TIMEOUT": 0.1})
    async def test_9_a_slow_thread_is_waited_for(self):
        def thread():
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(0.4)")

        running = asyncio.ensure_future(sync_to_async(thread)())
        await asyncio.sleep(0.05)
        await create("one")
        await running
        self.assertEqual(await Book.objects.acount(), 3)

    @override_settings(ASYNCORM={"SWAP_MANAGERS": True, "LOCK_TIMEOUT": 0.1})
    async def test_9_a_block_that_waits_for_a_thread(self):
        done = asyncio.Event()

        def thread():
            return Book.objects.count()

        async def block():
            async with asyncorm.atomic():
                await create("one")
                started.set()
                await done.wait()

        started = asyncio.Event()
        waiting = asyncio.ensure_future(block())
        await started.wait()
        with self.assertRaisesMessage(transaction.TransactionManagementError, "A thread waited"):
            await sync_to_async(thread)()
        done.set()
        await waiting
        self.assertEqual(await sync_to_async(thread)(), 3)

    def test_9_synchronous(self):
        self.assertStart()


def sleep_on(shared, function):
    """Run `function` in a thread on the test's connection, as a live server of Django does."""
    connections["default"] = shared
    try:
        function()
    finally:
        del connections["default"]


class OwnTransaction(TestCase):
    """The test case's own transaction is not a block."""

    async def test_durable(self):
        async with asyncorm.atomic(durable=True):
            await Book.objects.acreate(title="durable")

    async def test_retrying(self):
        calls = []

        @asyncorm.retrying(on=ValueError, backoff=0.001)
        @asyncorm.atomic
        async def twice():
            calls.append(await Book.objects.acreate(title="retried"))
            if len(calls) < 2:
                raise ValueError

        await twice()
        self.assertEqual(await Book.objects.acount(), 1)

    async def test_on_commit(self):
        calls = []
        asyncorm.on_commit(lambda: calls.append("at once"))
        self.assertEqual(calls, ["at once"])

    async def test_captured_callbacks(self):
        calls = []

        async def callback():
            await asyncio.sleep(0)
            calls.append(await Book.objects.acount())

        with self.captureOnCommitCallbacks() as callbacks:
            async with asyncorm.atomic():
                await Book.objects.acreate(title="one")
                asyncorm.on_commit(lambda: calls.append("sync"))
                asyncorm.on_commit(callback)
                await asyncorm.native(transaction.on_commit)(lambda: calls.append("Django's"))
            with self.assertRaises(ZeroDivisionError):
                async with asyncorm.atomic():
                    asyncorm.on_commit(lambda: calls.append("rolled back"))
                    raise ZeroDivisionError
        self.assertEqual((len(callbacks), calls), (3, []))
        with self.captureOnCommitCallbacks(execute=True):
            async with asyncorm.atomic():
                asyncorm.on_commit(lambda: calls.append("sync"))
                asyncorm.on_commit(callback)
        self.assertEqual(calls, ["sync"])
        await asyncio.sleep(0.2)
        self.assertEqual(calls, ["sync", 1])

    async def test_options_are_ignored_with_a_warning(self):
        with self.assertWarnsRegex(UserWarning, "read_only is ignored"):
            async with asyncorm.atomic(read_only=True):
                await Book.objects.acreate(title="written")


class Queries(TestCase):
    """assertNumQueries and CaptureQueriesContext see native queries of every task of the test."""

    async def test_counted(self):
        with self.assertNumQueries(3):
            await Book.objects.acount()
            await asyncio.gather(Book.objects.acount(), Publisher.objects.acount())
        with self.assertRaisesMessage(AssertionError, "1 != 2 : 1 queries executed, 2 expected"):
            with self.assertNumQueries(2):
                await Book.objects.acount()

    async def test_captured(self):
        with CaptureQueriesContext(connection) as queries:
            async with asyncorm.atomic():
                await Book.objects.acreate(title="one")
            await sync_to_async(Book.objects.count)()
        self.assertEqual(
            [query["sql"].split()[0] for query in queries],
            ["SAVEPOINT", "INSERT", "RELEASE", "SELECT"],
        )


class Views(TestCase):
    """Both test clients, on async views, are inside the test's transaction."""

    @classmethod
    def setUpTestData(cls):
        cls.admin = User.objects.create_superuser("admin", password="secret")
        Book.objects.create(title="one")

    async def test_async_client(self):
        for _ in range(2):
            response = await self.async_client.get("/books/")
            self.assertEqual(response.json(), {"titles": ["one"], "number": 1})
        with self.captureOnCommitCallbacks() as callbacks:
            await self.async_client.post("/books/add/", {"title": "two"})
        self.assertEqual(len(callbacks), 1)
        both = await asyncio.gather(*[AsyncClient().get("/books/") for _ in range(4)])
        self.assertEqual({response.json()["number"] for response in both}, {2})
        self.assertEqual(await Book.objects.acount(), 2)

    async def test_gathered_requests(self):
        for sensitive in True, False:
            await sync_to_async(close_old_connections, thread_sensitive=sensitive)()
        for _ in range(10):
            await asyncio.gather(*[AsyncClient().get("/books/") for _ in range(8)])
        self.assertEqual(await Book.objects.acount(), 1)

    async def test_logged_in(self):
        await self.async_client.alogin(username="admin", password="secret")
        response = await self.async_client.get("/admin/bookshop/book/")
        self.assertContains(response, "one")
        await self.async_client.aforce_login(self.admin)
        self.assertContains(await self.async_client.get("/admin/bookshop/book/"), "one")

    def test_client(self):
        with self.assertNumQueries(2):
            response = self.client.get("/books/")
        self.assertEqual(response.json()["titles"], ["one"])
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            self.client.post("/books/add/", {"title": "two"})
        self.assertEqual(len(callbacks), 1)
        self.assertEqual(Book.objects.count(), 2)

    async def test_client_in_a_thread(self):
        response = await sync_to_async(self.client.get)("/books/")
        self.assertEqual(response.json()["titles"], ["one"])


class TwoDatabases(TestCase):
    databases = {"default", "other"}

    async def check(self):
        self.assertEqual(await Book.objects.using("other").acount(), 0)
        await Book.objects.using("other").acreate(title="on other")
        await asyncio.gather(
            *[Book.objects.using("other").acreate(title=f"{n}") for n in range(5)],
            *[Book.objects.acreate(title=f"{n}") for n in range(5)],
        )
        self.assertEqual(await Book.objects.using("other").acount(), 6)
        self.assertEqual(await Book.objects.acount(), 5)
        async with asyncorm.atomic(using="other"), asyncorm.atomic():
            pids = await backend(using="other"), await backend()
        self.assertEqual(len(set(pids)), 2)

    async def test_1(self):
        await self.check()

    async def test_2(self):
        await self.check()


class Forbidden(TestCase):
    async def test_other(self):
        with self.assertRaisesMessage(DatabaseOperationForbidden, "'other'"):
            await Book.objects.using("other").acount()
        self.assertEqual(await Book.objects.acount(), 0)


class ForbiddenAll(SimpleTestCase):
    async def test_default(self):
        with self.assertRaisesMessage(DatabaseOperationForbidden, "'default'"):
            await Book.objects.acount()


class Parallel(TransactionTestCase):
    """Real connections, real commits."""

    async def test_1_parallel(self):
        self.assertEqual(await Book.objects.acount(), 0)
        self.assertGreater(len(set(await asyncio.gather(*[backend(0.5) for _ in range(3)]))), 1)
        await Book.objects.acreate(title="committed")
        calls = []

        async def callback():
            calls.append("awaited")

        async with asyncorm.atomic(read_only=True):
            asyncorm.on_commit(callback)
        self.assertEqual(calls, ["awaited"])
        self.assertEqual(await sync_to_async(Book.objects.count)(), 1)

    async def test_2_flushed(self):
        self.assertEqual(await Book.objects.acount(), 0)
        await self.async_client.post("/books/add/", {"title": "committed"})
        self.assertEqual(await Book.objects.acount(), 1)

    def test_3_flushed(self):
        self.assertEqual(Book.objects.count(), 0)
