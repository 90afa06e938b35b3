"""Tortoise ORM, on asyncpg or on psycopg (an option)."""

from __future__ import annotations

from typing import Any

from tortoise import Tortoise, fields
from tortoise.functions import Max, Sum
from tortoise.models import Model
from tortoise.transactions import in_transaction

from ..works import SLEEP
from .base import POOL, Adapter, Unsupported


class Publisher(Model):
    id = fields.BigIntField(primary_key=True)
    name = fields.CharField(100)
    country = fields.CharField(2)
    authors: Any

    class Meta:
        table = "bench_publisher"


class Author(Model):
    id = fields.BigIntField(primary_key=True)
    publisher: Any = fields.ForeignKeyField("models.Publisher", related_name="authors")
    name = fields.CharField(100)
    books: Any

    class Meta:
        table = "bench_author"


class Book(Model):
    id = fields.BigIntField(primary_key=True)
    author: Any = fields.ForeignKeyField("models.Author", related_name="books")
    title = fields.CharField(200)
    pages = fields.IntField()
    price = fields.DecimalField(10, 2)
    published = fields.DatetimeField()
    updated = fields.DatetimeField()
    meta: Any = fields.JSONField()

    class Meta:
        table = "bench_book"


class Draft(Model):
    id = fields.BigIntField(primary_key=True)
    title = fields.CharField(200, unique=True)
    pages = fields.IntField()
    price = fields.DecimalField(10, 2)
    published = fields.DatetimeField()
    updated = fields.DatetimeField()
    meta: Any = fields.JSONField()
    active = fields.BooleanField()

    class Meta:
        table = "bench_draft"


class TortoiseORM(Adapter):
    remarks = {"bulk_create": "returns no keys"}

    def __init__(self, settings: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__(settings, options)
        self.packages = ("tortoise-orm", options["driver"])

    async def open(self) -> None:
        s = self.settings
        credentials = {
            "host": s["HOST"], "port": int(s["PORT"] or 5432), "user": s["USER"],
            "password": s["PASSWORD"], "database": s["NAME"],
        }  # fmt: skip
        sizes = {"minsize": POOL, "maxsize": POOL}
        if self.options["driver"] == "psycopg":
            sizes = {"min_size": POOL, "max_size": POOL}
        await Tortoise.init(
            config={
                "connections": {
                    "default": {
                        "engine": f"tortoise.backends.{self.options['driver']}",
                        "credentials": credentials | sizes,
                    }
                },
                "apps": {
                    "models": {
                        "models": [__name__], "default_connection": "default"
                    }
                },
                "use_tz": True,
            },
            _enable_global_fallback=True,
        )  # fmt: skip

    async def close(self) -> None:
        await Tortoise.close_connections()

    async def get(self, pk: int) -> Any:
        return await Book.get(pk=pk)

    async def page(self, first: int, end: int) -> Any:
        return await Book.filter(author_id__gte=first, author_id__lt=end).order_by("id")

    async def rows(self, first: int, end: int) -> Any:
        return await Book.filter(id__gte=first, id__lt=end).order_by("id")

    async def related(self, first: int, end: int) -> Any:
        books = Book.filter(id__gte=first, id__lt=end).order_by("id")
        return await books.select_related("author__publisher")

    async def prefetch(self, first: int, end: int) -> Any:
        publishers = Publisher.filter(id__gte=first, id__lt=end).order_by("id")
        return await publishers.prefetch_related("authors__books")

    async def values(self, first: int, end: int) -> Any:
        return await Book.filter(id__gte=first, id__lt=end).values_list("id", "title", "price")

    async def count(self, first: int, end: int) -> Any:
        return await Book.filter(author_id__gte=first, author_id__lt=end).count()

    async def exists(self, pk: int) -> Any:
        return await Book.filter(pk=pk).exists()

    async def aggregate(self, first: int, end: int) -> Any:
        books = Book.filter(author_id__gte=first, author_id__lt=end)
        return (await books.annotate(a=Sum("price"), b=Max("pages")).values_list("a", "b"))[0]

    async def create(self, values: dict[str, Any]) -> Any:
        return await Draft.create(**values)

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = await Draft.in_bulk(keys, "id")
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        obj.pages = pages
        await obj.save()

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        await Draft.bulk_create([Draft(**value) for value in values])

    async def update(self, pk: int, pages: int) -> Any:
        return await Draft.filter(pk=pk).update(pages=pages)

    async def delete(self, obj: Any) -> Any:
        await obj.delete()

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        return await Draft.get_or_create(title=values["title"], defaults=values)

    async def transaction(self, values: dict[str, Any]) -> Any:
        async with in_transaction():
            key = (await Draft.create(**values)).pk
            await Draft.get(pk=key)
            await Draft.filter(pk=key).update(pages=7)
            there = await Draft.filter(pk=key).exists()
            await Draft.filter(pk=key).delete()
        return there

    async def sleep_once(self) -> None:
        from tortoise import connections

        await connections.get("default").execute_query(f"SELECT pg_sleep({SLEEP})")

    def stream(self) -> Any:
        raise Unsupported("it has no server-side cursors")


ADAPTER = TortoiseORM
