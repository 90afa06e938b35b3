"""Django's own a* methods; with asyncorm's swap (an option) the same code runs natively."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from .base import Adapter
from .django_setup import setup
from .django_sync import sleeping


class DjangoAsync(Adapter):
    packages: tuple[str, ...] = ("Django", "psycopg", "asgiref")

    def __init__(self, settings: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__(settings, options)
        if self.asyncorm:
            self.packages = (*self.packages, "django-asyncorm", "greenlet")
            setup(
                settings, options, "asyncorm", ASYNCORM={"SWAP_MANAGERS": bool(options.get("swap"))}
            )
        else:
            setup(settings, options)
        from ..shop import models

        self.m = models

    @property
    def asyncorm(self) -> bool:
        return str(self.options.get("engine", "")).startswith("asyncorm.")

    async def close(self) -> None:
        if self.asyncorm:
            import asyncorm

            await asyncorm.close_pools()

    def authors_of(self, publisher: Any) -> Any:
        return publisher.authors.all()

    def books_of(self, author: Any) -> Any:
        return author.books.all()

    async def get(self, pk: int) -> Any:
        return await self.m.Book.objects.aget(pk=pk)

    async def page(self, first: int, end: int) -> Any:
        books = self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end)
        return [book async for book in books.order_by("id")]

    async def rows(self, first: int, end: int) -> Any:
        books = self.m.Book.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return [book async for book in books]

    async def related(self, first: int, end: int) -> Any:
        books = self.m.Book.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return [book async for book in books.select_related("author__publisher")]

    async def prefetch(self, first: int, end: int) -> Any:
        publishers = self.m.Publisher.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return [each async for each in publishers.prefetch_related("authors__books")]

    async def values(self, first: int, end: int) -> Any:
        books = self.m.Book.objects.filter(id__gte=first, id__lt=end)
        return [row async for row in books.values_list("id", "title", "price")]

    async def count(self, first: int, end: int) -> Any:
        return await self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end).acount()

    async def exists(self, pk: int) -> Any:
        return await self.m.Book.objects.filter(pk=pk).aexists()

    async def aggregate(self, first: int, end: int) -> Any:
        from django.db.models import Max, Sum

        books = self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end)
        return (await books.aaggregate(a=Sum("price"), b=Max("pages"))).values()

    async def create(self, values: dict[str, Any]) -> Any:
        return await self.m.Draft.objects.acreate(**values)

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = await self.m.Draft.objects.ain_bulk(keys)
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        obj.pages = pages
        await obj.asave()

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        Draft = self.m.Draft
        objects = [Draft(**value) for value in values]
        return [obj.pk for obj in await Draft.objects.abulk_create(objects)]

    async def update(self, pk: int, pages: int) -> Any:
        return await self.m.Draft.objects.filter(pk=pk).aupdate(pages=pages)

    async def delete(self, obj: Any) -> Any:
        await obj.adelete()

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        return await self.m.Draft.objects.aget_or_create(title=values["title"], defaults=values)

    async def transaction(self, values: dict[str, Any]) -> Any:
        Draft = self.m.Draft
        if self.asyncorm:
            import asyncorm

            async with asyncorm.atomic():
                key = (await Draft.objects.acreate(**values)).pk
                await Draft.objects.aget(pk=key)
                await Draft.objects.filter(pk=key).aupdate(pages=7)
                there = await Draft.objects.filter(pk=key).aexists()
                await Draft.objects.filter(pk=key).adelete()
            return there

        # What Django's documentation advises: transactions do not work in async code.
        from asgiref.sync import sync_to_async

        return await sync_to_async(self._transaction)(values)

    def _transaction(self, values: dict[str, Any]) -> Any:
        from django.db.transaction import atomic

        Draft = self.m.Draft
        with atomic():
            key = Draft.objects.create(**values).pk
            Draft.objects.get(pk=key)
            Draft.objects.filter(pk=key).update(pages=7)
            there = Draft.objects.filter(pk=key).exists()
            Draft.objects.filter(pk=key).delete()
        return there

    async def sleep_once(self) -> None:
        _ = [each async for each in sleeping(self.m)]

    def stream(self) -> AsyncIterator[Any]:
        return self.m.Event.objects.aiterator(chunk_size=2000)


ADAPTER = DjangoAsync
