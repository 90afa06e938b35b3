"""asyncorm's native methods, the reads by `asyncorm.compiled()`."""

from __future__ import annotations

from typing import Any

from .asyncorm_native import Native


class Compiled(Native):
    async def open(self) -> None:
        import asyncorm

        await super().open()
        books = self.m.Book.objects
        self.by_pk = asyncorm.compiled(lambda pk: books.filter(pk=pk))
        self.by_author = asyncorm.compiled(
            lambda first, end: books.filter(author_id__gte=first, author_id__lt=end).order_by("id")
        )
        self.by_id = asyncorm.compiled(
            lambda first, end: books.filter(id__gte=first, id__lt=end).order_by("id")
        )

    async def get(self, pk: int) -> Any:
        (book,) = await self.by_pk(pk)
        return book

    async def page(self, first: int, end: int) -> Any:
        return await self.by_author(first, end)

    async def rows(self, first: int, end: int) -> Any:
        return await self.by_id(first, end)


ADAPTER = Compiled
