"""pytest-asyncio in its strict mode, one loop for the session."""

import pytest
import pytest_asyncio
from bookshop.models import Book
from promises import *  # noqa: F403

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def native_book(request):
    if not request.node.get_closest_marker("django_db"):
        request.getfixturevalue("db")
    return await Book.objects.acreate(title="from a coroutine fixture")
