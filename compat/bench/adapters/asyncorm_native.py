"""asyncorm's native_* methods."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from .django_async import DjangoAsync
from .django_sync import sleeping


def _nothing() -> None:
    pass


class Native(DjangoAsync):
    async def empty(self) -> None:
        import asyncorm

        await asyncorm.native(_nothing)()

    async def get(self, pk: int) -> Any:
        return await self.m.Book.objects.native_get(pk=pk)

    async def page(self, first: int, end: int) -> Any:
        books = self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end)
        return await books.order_by("id").anative()

    async def rows(self, first: int, end: int) -> Any:
        return await self.m.Book.objects.filter(id__gte=first, id__lt=end).order_by("id").anative()

    async def related(self, first: int, end: int) -> Any:
        books = self.m.Book.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return await books.select_related("author__publisher").anative()

    async def prefetch(self, first: int, end: int) -> Any:
        publishers = self.m.Publisher.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return await publishers.prefetch_related("authors__books").anative()

    async def values(self, first: int, end: int) -> Any:
        books = self.m.Book.objects.filter(id__gte=first, id__lt=end)
        return await books.values_list("id", "title", "price").anative()

    async def count(self, first: int, end: int) -> Any:
        books = self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end)
        return await books.native_count()

    async def exists(self, pk: int) -> Any:
        return await self.m.Book.objects.filter(pk=pk).native_exists()

    async def aggregate(self, first: int, end: int) -> Any:
        from django.db.models import Max, Sum

        books = self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end)
        return (await books.native_aggregate(a=Sum("price"), b=Max("pages"))).values()

    async def create(self, values: dict[str, Any]) -> Any:
        return await self.m.Draft.objects.native_create(**values)

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = await self.m.Draft.objects.native_in_bulk(keys)
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        obj.pages = pages
        await obj.native_save()

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        Draft = self.m.Draft
        objects = [Draft(**value) for value in values]
        return [obj.pk for obj in await Draft.objects.native_bulk_create(objects)]

    async def update(self, pk: int, pages: int) -> Any:
        return await self.m.Draft.objects.filter(pk=pk).native_update(pages=pages)

    async def delete(self, obj: Any) -> Any:
        await obj.native_delete()

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        return await self.m.Draft.objects.native_get_or_create(
            title=values["title"], defaults=values
        )

    async def transaction(self, values: dict[str, Any]) -> Any:
        import asyncorm

        Draft = self.m.Draft
        async with asyncorm.atomic():
            key = (await Draft.objects.native_create(**values)).pk
            await Draft.objects.native_get(pk=key)
            await Draft.objects.filter(pk=key).native_update(pages=7)
            there = await Draft.objects.filter(pk=key).native_exists()
            await Draft.objects.filter(pk=key).native_delete()
        return there

    async def sleep_once(self) -> None:
        await sleeping(self.m).anative()

    def stream(self) -> AsyncIterator[Any]:
        return self.m.Event.objects.native_iterator(chunk_size=2000)


ADAPTER = Native
