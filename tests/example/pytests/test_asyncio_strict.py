"""pytest-asyncio in its strict mode, a loop for each test."""

import pytest
import pytest_asyncio
from bookshop.models import Book
from promises import *  # noqa: F403

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def native_book(request):
    if not request.node.get_closest_marker("django_db"):
        request.getfixturevalue("db")
    return await Book.objects.acreate(title="from a coroutine fixture")
