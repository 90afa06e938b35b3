"""django-async-backend: Django models on its asynchronous connections.

It gives each task one connection and forbids sharing it: what is gathered takes a new connection
for each task (from its pool), as its documentation says.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .base import Adapter, Unsupported
from .django_setup import setup
from .django_sync import sleeping


class DjangoBackend(Adapter):
    packages = ("django-async-backend", "Django", "psycopg")
    remarks = {"get_100": "a new connection scope for each task, as it demands"}

    def __init__(self, settings: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__(settings, options)
        setup(settings, options, "django_async_backend")
        from ..shop import models

        self.m = models

    async def rest(self) -> None:
        from django_async_backend.db import close_old_async_connections

        await close_old_async_connections()

    async def request(self, pk: int) -> Any:
        try:
            return await self.get(pk)
        finally:
            await self.rest()

    async def get(self, pk: int) -> Any:
        return await self.m.Book.async_objects.aget(pk=pk)

    async def get_100(self, pks: tuple[int, ...]) -> Any:
        from django_async_backend.db.new_connection import async_new_connection

        return await asyncio.gather(*[async_new_connection(self.get(pk)) for pk in pks])

    async def page(self, first: int, end: int) -> Any:
        books = self.m.Book.async_objects.filter(author_id__gte=first, author_id__lt=end)
        return [book async for book in books.order_by("id")]

    async def rows(self, first: int, end: int) -> Any:
        books = self.m.Book.async_objects.filter(id__gte=first, id__lt=end).order_by("id")
        return [book async for book in books]

    async def related(self, first: int, end: int) -> Any:
        books = self.m.Book.async_objects.filter(id__gte=first, id__lt=end).order_by("id")
        return [book async for book in books.select_related("author__publisher")]

    async def prefetch(self, first: int, end: int) -> Any:
        raise Unsupported("it has no prefetch_related()")

    async def values(self, first: int, end: int) -> Any:
        books = self.m.Book.async_objects.filter(id__gte=first, id__lt=end)
        return [row async for row in books.values_list("id", "title", "price")]

    async def count(self, first: int, end: int) -> Any:
        books = self.m.Book.async_objects.filter(author_id__gte=first, author_id__lt=end)
        return await books.acount()

    async def exists(self, pk: int) -> Any:
        return await self.m.Book.async_objects.filter(pk=pk).aexists()

    async def aggregate(self, first: int, end: int) -> Any:
        from django.db.models import Max, Sum

        books = self.m.Book.async_objects.filter(author_id__gte=first, author_id__lt=end)
        return (await books.aaggregate(a=Sum("price"), b=Max("pages"))).values()

    async def create(self, values: dict[str, Any]) -> Any:
        return await self.m.Draft.async_objects.acreate(**values)

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = await self.m.Draft.async_objects.ain_bulk(keys)
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        obj.pages = pages
        await obj.async_save()

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        Draft = self.m.Draft
        objects = [Draft(**value) for value in values]
        return [obj.pk for obj in await Draft.async_objects.abulk_create(objects)]

    async def update(self, pk: int, pages: int) -> Any:
        return await self.m.Draft.async_objects.filter(pk=pk).aupdate(pages=pages)

    async def delete(self, obj: Any) -> Any:
        await obj.async_delete()

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        objects = self.m.Draft.async_objects
        return await objects.aget_or_create(title=values["title"], defaults=values)

    async def transaction(self, values: dict[str, Any]) -> Any:
        from django_async_backend.db.transaction import async_atomic

        objects = self.m.Draft.async_objects
        async with async_atomic():
            key = (await objects.acreate(**values)).pk
            await objects.aget(pk=key)
            await objects.filter(pk=key).aupdate(pages=7)
            there = await objects.filter(pk=key).aexists()
            await objects.filter(pk=key).adelete()
        return there

    async def sleep_once(self) -> None:
        from django_async_backend.db.new_connection import async_new_connection

        async def once() -> None:
            _ = [each async for each in sleeping(_Async(self.m))]

        await async_new_connection(once())

    def stream(self) -> Any:
        raise Unsupported("it has no aiterator()")


class _Async:
    """The models with async_objects where `sleeping()` expects objects."""

    def __init__(self, models: Any) -> None:
        self.Publisher = type("Publisher", (), {"objects": models.Publisher.async_objects})


ADAPTER = DjangoBackend
