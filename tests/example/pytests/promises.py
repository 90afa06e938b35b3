"""The same tests for each plugin that runs coroutines: what pytest-django's fixtures promise.

They run in the order of the file; each looks for what the ones before it left behind.
"""

import asyncio

import pytest
from asgiref.sync import sync_to_async
from bookshop.models import Book
from django.db import IntegrityError, connection
from django.test.utils import CaptureQueriesContext

import asyncorm


async def backend(seconds=0.0):
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT pg_backend_pid(), pg_sleep(%s)", [seconds])
        return (await cursor.fetchone())[0]


@pytest.fixture
def book(db):
    return Book.objects.create(title="from a synchronous fixture")


@pytest.mark.parametrize("again", range(2))
async def test_both_worlds(again, book, native_book):
    assert await Book.objects.acount() == await sync_to_async(Book.objects.count)() == 2
    assert await Book.objects.aget(pk=book.pk) == book
    await asyncio.gather(*[Book.objects.acreate(title=f"{n}") for n in range(10)])
    await sync_to_async(Book.objects.create)(title="sync")
    assert await Book.objects.acount() == 13
    assert len(set(await asyncio.gather(*[backend() for _ in range(3)]))) == 1


@pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
async def test_failure(book):
    async with asyncorm.atomic():
        await asyncio.gather(*[Book.objects.acreate(title=f"{n}") for n in range(10)])
        asyncio.current_task().left = asyncio.ensure_future(backend(10))
        await asyncio.sleep(0.01)
        asyncio.current_task().left.cancel()
        raise ZeroDivisionError


@pytest.mark.xfail(raises=IntegrityError, strict=True)
async def test_database_error(book):
    assert await Book.objects.acount() == 1
    await Book.objects.acreate(title=book.title)


async def test_cancellation(book):
    assert await Book.objects.acount() == 1
    task = asyncio.ensure_future(backend(30))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])


async def test_nothing_is_left(db):
    assert await Book.objects.acount() == 0


async def test_queries(book, django_assert_num_queries, django_assert_max_num_queries):
    with django_assert_num_queries(2):
        await asyncio.gather(Book.objects.acount(), Book.objects.acount())
    with pytest.raises(pytest.fail.Exception, match="Expected to perform 2 queries"):
        with django_assert_num_queries(2):
            await Book.objects.acount()
    with CaptureQueriesContext(connection) as queries:
        await Book.objects.acount()
    assert len(queries) == 1


async def test_on_commit(book, django_capture_on_commit_callbacks):
    calls = []
    with django_capture_on_commit_callbacks(execute=True) as callbacks:
        async with asyncorm.atomic(durable=True):
            asyncorm.on_commit(lambda: calls.append("called"))
    assert len(callbacks) == 1
    assert calls == ["called"]


async def test_clients(book, async_client, client, admin_user):
    assert (await async_client.get("/books/")).json()["number"] == 1
    await async_client.aforce_login(admin_user)
    response = await async_client.get("/admin/bookshop/book/")
    assert b"from a synchronous fixture" in response.content
    assert (await sync_to_async(client.get)("/books/")).json()["number"] == 1


@pytest.mark.django_db(databases=["default", "other"])
async def test_databases():
    await Book.objects.using("other").acreate(title="on other")
    assert await Book.objects.acount() == 0


@pytest.mark.django_db(databases=["default", "other"])
async def test_databases_are_rolled_back():
    assert await Book.objects.using("other").acount() == 0


@pytest.mark.django_db
async def test_other_databases_are_forbidden():
    with pytest.raises(AssertionError, match="'other'"):
        await Book.objects.using("other").acount()


async def test_without_the_fixture():
    with pytest.raises(RuntimeError, match="Database access not allowed"):
        await Book.objects.acount()


@pytest.mark.django_db(transaction=True)
async def test_parallel_when_asked_for(native_book):
    assert await Book.objects.acount() == 1
    assert len(set(await asyncio.gather(*[backend(0.5) for _ in range(3)]))) > 1
    await Book.objects.acreate(title="committed")


async def test_parallel_by_fixture(transactional_db):
    assert await Book.objects.acount() == await sync_to_async(Book.objects.count)() == 0
    assert len(set(await asyncio.gather(*[backend(0.5) for _ in range(3)]))) > 1
    await Book.objects.acreate(title="committed")


async def test_nothing_is_left_again(db):
    assert await Book.objects.acount() == 0
