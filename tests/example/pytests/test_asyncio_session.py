"""pytest-asyncio in its strict mode, one loop for the session."""

import asyncio
import gc

import pytest
import pytest_asyncio
from bookshop.models import Book
from django.db import OperationalError
from django.db.transaction import TransactionManagementError
from promises import *  # noqa: F403

import asyncorm

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def native_book(request):
    if not request.node.get_closest_marker("django_db"):
        request.getfixturevalue("db")
    return await Book.objects.acreate(title="from a coroutine fixture")


# What a test leaves behind goes on with the loop, and must not get into the tests after it.
left = []


async def test_a_statement_left_running(db):
    await Book.objects.acreate(title="never committed")
    left.append(asyncio.ensure_future(backend(60)))
    await asyncio.sleep(0.05)


async def test_nothing_of_the_statement(db):
    assert await Book.objects.acount() == 0
    await Book.objects.acreate(title="never committed")
    with pytest.raises(OperationalError, match="closed"):
        await left.pop()
    assert await Book.objects.acount() == 1


async def test_a_block_left_open(db):
    go_on = asyncio.Event()

    async def leave_open(late):
        async with asyncorm.atomic():
            await Book.objects.acreate(title=f"never committed {late}")
            await go_on.wait()
            if late == "statement":
                await Book.objects.acreate(title="in the next test")

    left.append(go_on)
    left.append(asyncio.ensure_future(leave_open("end")))
    left.append(asyncio.ensure_future(leave_open("statement")))
    left.append(asyncio.ensure_future(Book.objects.acount()))
    await asyncio.sleep(0.05)


async def test_nothing_of_the_block(db):
    assert await Book.objects.acount() == 0
    left.pop(0).set()
    for _ in range(3):
        with pytest.raises(TransactionManagementError, match="has ended"):
            await left.pop(0)
    async with asyncorm.atomic():
        await Book.objects.acreate(title="of this test")
    assert await Book.objects.acount() == 1
    gc.collect()
