"""pytest-asyncio in its auto mode: no marks."""

import pytest
from bookshop.models import Book
from promises import *  # noqa: F403


@pytest.fixture
async def native_book(request):
    if not request.node.get_closest_marker("django_db"):
        request.getfixturevalue("db")
    return await Book.objects.acreate(title="from a coroutine fixture")
