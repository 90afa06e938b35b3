"""yara-orm: models of its own, an engine in Rust."""

from __future__ import annotations

from typing import Any

from yara_orm import Max, Model, Sum, YaraOrm, connections, fields, in_transaction

from ..works import SLEEP
from .base import POOL, Adapter, Unsupported


class Publisher(Model):
    id = fields.BigIntField(pk=True)
    name = fields.CharField(max_length=100)
    country = fields.CharField(max_length=2)
    authors: Any

    class Meta:
        table = "bench_publisher"


class Author(Model):
    id = fields.BigIntField(pk=True)
    publisher: Any = fields.ForeignKeyField("Publisher", related_name="authors")
    name = fields.CharField(max_length=100)
    books: Any

    class Meta:
        table = "bench_author"


class Book(Model):
    id = fields.BigIntField(pk=True)
    author: Any = fields.ForeignKeyField("Author", related_name="books")
    title = fields.CharField(max_length=200)
    pages = fields.IntField()
    price = fields.DecimalField(max_digits=10, decimal_places=2)
    published = fields.DatetimeField()
    updated = fields.DatetimeField()
    meta: Any = fields.JSONField()

    class Meta:
        table = "bench_book"


class Draft(Model):
    id = fields.BigIntField(pk=True)
    title = fields.CharField(max_length=200, unique=True)
    pages = fields.IntField()
    price = fields.DecimalField(max_digits=10, decimal_places=2)
    published = fields.DatetimeField()
    updated = fields.DatetimeField()
    meta: Any = fields.JSONField()
    active = fields.BooleanField()

    class Meta:
        table = "bench_draft"


class Yara(Adapter):
    packages = ("yara-orm",)

    async def open(self) -> None:
        await YaraOrm.init(self.url("postgres") + f"?min_size={POOL}&max_size={POOL}")

    async def close(self) -> None:
        await YaraOrm.close()

    def authors_of(self, publisher: Any) -> Any:
        return publisher._prefetch["authors"]

    def books_of(self, author: Any) -> Any:
        return author._prefetch["books"]

    async def get(self, pk: int) -> Any:
        return await Book.get(id=pk)

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
        return await Book.filter(id=pk).exists()

    async def aggregate(self, first: int, end: int) -> Any:
        books = Book.filter(author_id__gte=first, author_id__lt=end)
        return (await books.annotate(a=Sum("price"), b=Max("pages")).values_list("a", "b"))[0]

    async def create(self, values: dict[str, Any]) -> Any:
        return await Draft.create(**values)

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = await Draft.in_bulk(keys)
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        obj.pages = pages
        await obj.save()

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        return [obj.id for obj in await Draft.bulk_create([Draft(**value) for value in values])]

    async def update(self, pk: int, pages: int) -> Any:
        return await Draft.filter(id=pk).update(pages=pages)

    async def delete(self, obj: Any) -> Any:
        await obj.delete()

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        return await Draft.get_or_create(title=values["title"], defaults=values)

    async def transaction(self, values: dict[str, Any]) -> Any:
        async with in_transaction():
            key = (await Draft.create(**values)).id
            await Draft.get(id=key)
            await Draft.filter(id=key).update(pages=7)
            there = await Draft.filter(id=key).exists()
            await Draft.filter(id=key).delete()
        return there

    async def sleep_once(self) -> None:
        await connections.get("default").fetch_all(f"SELECT pg_sleep({SLEEP})::text")

    def stream(self) -> Any:
        raise Unsupported("it fetches all rows before the first comes")


ADAPTER = Yara
