"""anyio's own pytest plugin."""

import pytest
from bookshop.models import Book
from promises import *  # noqa: F403

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def native_book(request):
    if not request.node.get_closest_marker("django_db"):
        request.getfixturevalue("db")
    return await Book.objects.acreate(title="from a coroutine fixture")
