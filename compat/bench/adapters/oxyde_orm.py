"""oxyde: Pydantic models, an engine in Rust."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

from oxyde import Field, Max, Model, Sum, db, execute_raw
from oxyde.db import PoolSettings, transaction

from ..works import SLEEP
from .base import POOL, Adapter, Unsupported


class Publisher(Model):
    id: int | None = Field(default=None, db_pk=True)
    name: str
    country: str
    authors: list[Author] = Field(default=[], db_reverse_fk="publisher")

    class Meta:
        is_table = True
        table_name = "bench_publisher"


class Author(Model):
    id: int | None = Field(default=None, db_pk=True)
    publisher: Publisher | None = Field(default=None, db_on_delete="CASCADE")
    name: str
    books: list[Book] = Field(default=[], db_reverse_fk="author")

    class Meta:
        is_table = True
        table_name = "bench_author"


class Book(Model):
    id: int | None = Field(default=None, db_pk=True)
    author: Author | None = Field(default=None, db_on_delete="CASCADE")
    title: str
    pages: int
    price: Decimal = Field(max_digits=10, decimal_places=2)
    published: datetime = Field(db_type="TIMESTAMPTZ")
    updated: datetime = Field(db_type="TIMESTAMPTZ")
    meta: dict[str, Any] = Field(db_type="JSONB")

    class Meta:
        is_table = True
        table_name = "bench_book"


class Draft(Model):
    id: int | None = Field(default=None, db_pk=True)
    title: str = Field(db_unique=True)
    pages: int
    price: Decimal = Field(max_digits=10, decimal_places=2)
    published: datetime = Field(db_type="TIMESTAMPTZ")
    updated: datetime = Field(db_type="TIMESTAMPTZ")
    meta: dict[str, Any] = Field(db_type="JSONB")
    active: bool

    class Meta:
        is_table = True
        table_name = "bench_draft"


class Oxyde(Adapter):
    packages = ("oxyde", "oxyde-core")

    async def open(self) -> None:
        settings = PoolSettings(max_connections=POOL, min_connections=POOL)
        await db.init(default=self.url("postgresql"), settings=settings)

    async def close(self) -> None:
        await db.close()

    async def get(self, pk: int) -> Any:
        return await Book.objects.get(id=pk)

    async def page(self, first: int, end: int) -> Any:
        return await (
            Book.objects.filter(author_id__gte=first, author_id__lt=end).order_by("id").all()
        )

    async def rows(self, first: int, end: int) -> Any:
        return await Book.objects.filter(id__gte=first, id__lt=end).order_by("id").all()

    async def related(self, first: int, end: int) -> Any:
        books = Book.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return await books.join("author", "author__publisher").all()

    async def prefetch(self, first: int, end: int) -> Any:
        publishers = Publisher.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return await publishers.prefetch("authors__books").all()

    async def values(self, first: int, end: int) -> Any:
        books = Book.objects.filter(id__gte=first, id__lt=end)
        return await books.values_list("id", "title", "price").all()

    async def count(self, first: int, end: int) -> Any:
        return await Book.objects.filter(author_id__gte=first, author_id__lt=end).count()

    async def exists(self, pk: int) -> Any:
        return await Book.objects.filter(id=pk).exists()

    async def aggregate(self, first: int, end: int) -> Any:
        books = Book.objects.filter(author_id__gte=first, author_id__lt=end)
        found = await books.annotate(a=Sum("price"), b=Max("pages")).values_list("a", "b").all()
        return found[0]

    async def create(self, values: dict[str, Any]) -> Any:
        return await Draft.objects.create(**values)

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = {each.id: each for each in await Draft.objects.filter(id__in=keys).all()}
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        obj.pages = pages
        await obj.save()

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        made = await Draft.objects.bulk_create([Draft(**value) for value in values])
        return [obj.id for obj in made]

    async def update(self, pk: int, pages: int) -> Any:
        return await Draft.objects.filter(id=pk).update(pages=pages)

    async def delete(self, obj: Any) -> Any:
        await obj.delete()

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        return await Draft.objects.get_or_create(title=values["title"], defaults=values)

    async def transaction(self, values: dict[str, Any]) -> Any:
        async with transaction.atomic():
            key = (await Draft.objects.create(**values)).id
            await Draft.objects.get(id=key)
            await Draft.objects.filter(id=key).update(pages=7)
            there = await Draft.objects.filter(id=key).exists()
            await Draft.objects.filter(id=key).delete()
        return there

    async def sleep_once(self) -> None:
        await execute_raw(f"SELECT pg_sleep({SLEEP})::text AS pause")

    def stream(self) -> Any:
        raise Unsupported("it fetches all rows before the first comes")


ADAPTER = Oxyde
