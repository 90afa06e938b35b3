"""What an adapter has to offer; works that it cannot do raise Unsupported."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator
from typing import Any

from ..works import BOOK

POOL = 10  # connections of each contestant's pool


class Unsupported(Exception):
    """The library has no way to do a work; the message says why."""


class Adapter:
    """One contestant.

    The methods named like a work do it once. `first` and `end` are a range of ids, `end` excluded.
    """

    packages: tuple[str, ...] = ()
    sync = False
    remarks: dict[str, str] = {}  # work: what is special about it here

    def __init__(self, settings: dict[str, Any], options: dict[str, Any]) -> None:
        self.settings = settings
        self.options = options

    def url(self, scheme: str) -> str:
        """The database as a URL, for libraries that want one; a socket's folder is the host."""
        from urllib.parse import quote

        s = self.settings
        auth = ":".join(quote(s[key], safe="") for key in ("USER", "PASSWORD") if s[key])
        return f"{scheme}://{auth}@{quote(s['HOST'], safe='')}:{s['PORT'] or 5432}/{s['NAME']}"

    def versions(self) -> dict[str, str]:
        """The versions of what is measured."""
        found = {}
        for name in self.packages:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "from source"
        return found

    async def open(self) -> None:
        """Get ready; not measured."""

    async def close(self) -> None:
        """Close connections."""

    async def rest(self) -> None:
        """The end of what a task did; not measured."""

    async def request(self, pk: int) -> Any:
        """get() in an HTTP request, with whatever the library does at a request's end."""
        return await self.get(pk)

    # Results as plain tuples

    def values_rows(self, result: Any) -> Any:
        return [tuple(row) for row in result]

    def row(self, book: Any) -> tuple[Any, ...]:
        return tuple(getattr(book, name) for name in BOOK)

    def related_row(self, book: Any) -> Any:
        author = book.author
        return (*self.row(book), author.name, author.publisher.name, author.publisher.country)

    def prefetched_row(self, publisher: Any) -> Any:
        """(id, [(id, [books])]), in the order of the ids."""
        return publisher.id, sorted(
            (author.id, sorted(self.row(book) for book in self.books_of(author)))
            for author in self.authors_of(publisher)
        )

    def authors_of(self, publisher: Any) -> Any:
        return publisher.authors

    def books_of(self, author: Any) -> Any:
        return author.books

    # The works

    async def empty(self) -> None:
        """Nothing, the way it calls synchronous code."""
        raise Unsupported

    async def get(self, pk: int) -> Any:
        raise Unsupported

    async def get_100(self, pks: tuple[int, ...]) -> Any:
        return await asyncio.gather(*[self.get(pk) for pk in pks])

    async def page(self, first: int, end: int) -> Any:
        """The books of ten authors."""
        raise Unsupported

    async def rows(self, first: int, end: int) -> Any:
        """Books by range of id."""
        raise Unsupported

    async def related(self, first: int, end: int) -> Any:
        """The same with author and publisher."""
        raise Unsupported

    async def prefetch(self, first: int, end: int) -> Any:
        """Publishers by range of id with authors and books."""
        raise Unsupported

    async def values(self, first: int, end: int) -> Any:
        """(id, title, price) of books by range of id."""
        raise Unsupported

    async def count(self, first: int, end: int) -> Any:
        """How many books the authors of a range have."""
        raise Unsupported

    async def exists(self, pk: int) -> Any:
        raise Unsupported

    async def aggregate(self, first: int, end: int) -> Any:
        """(sum of price, maximum of pages) over the books of the authors of a range."""
        raise Unsupported

    async def create(self, values: dict[str, Any]) -> Any:
        raise Unsupported

    async def drafts(self, keys: list[int]) -> list[Any]:
        """The drafts with these keys, in this order; not measured."""
        raise Unsupported

    async def save(self, obj: Any, pages: int) -> Any:
        raise Unsupported

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        """The new keys."""
        raise Unsupported

    async def update(self, pk: int, pages: int) -> Any:
        """How many rows were updated."""
        raise Unsupported

    async def delete(self, obj: Any) -> Any:
        raise Unsupported

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        """By title."""
        raise Unsupported

    async def transaction(self, values: dict[str, Any]) -> Any:
        """create, get, update, exists, delete in one transaction; what exists() said."""
        raise Unsupported

    async def sleep_once(self) -> None:
        """One query of SLEEP seconds."""
        raise Unsupported

    async def sleep(self) -> Any:
        await asyncio.gather(*[self.sleep_once() for _ in range(10)])

    def stream(self) -> AsyncIterator[Any]:
        """All events, in constant memory."""
        raise Unsupported

    async def load(self, count: int) -> Any:
        """That many books in a list."""
        return await self.rows(1, count + 1)
