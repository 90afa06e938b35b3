"""Piccolo (on asyncpg)."""

from __future__ import annotations

from typing import Any

from piccolo.columns import (
    JSONB,
    BigInt,
    BigSerial,
    Boolean,
    ForeignKey,
    Integer,
    Numeric,
    Timestamptz,
    Varchar,
)
from piccolo.engine.postgres import PostgresEngine
from piccolo.query.functions.aggregate import Max, Sum
from piccolo.table import Table

from ..works import BOOK, SLEEP
from .base import POOL, Adapter, Unsupported

DB = PostgresEngine(config={}, extensions=())


class Publisher(Table, tablename="bench_publisher", db=DB):
    id = BigSerial(primary_key=True)
    name = Varchar(100)
    country = Varchar(2)


class Author(Table, tablename="bench_author", db=DB):
    id = BigSerial(primary_key=True)
    publisher = ForeignKey(Publisher, db_column_name="publisher_id")
    name = Varchar(100)


class Book(Table, tablename="bench_book", db=DB):
    id = BigSerial(primary_key=True)
    author = ForeignKey(Author, db_column_name="author_id")
    title = Varchar(200)
    pages = Integer()
    price = Numeric((10, 2))
    published = Timestamptz()
    updated = Timestamptz()
    meta = JSONB()


class Draft(Table, tablename="bench_draft", db=DB):
    id = BigSerial(primary_key=True)
    title = Varchar(200, unique=True)
    pages = Integer()
    price = Numeric((10, 2))
    published = Timestamptz()
    updated = Timestamptz()
    meta = JSONB()
    active = Boolean()


class Event(Table, tablename="bench_event", db=DB):
    id = BigSerial(primary_key=True)
    book_id = BigInt()
    kind = Varchar(20)
    at = Timestamptz()
    amount = Numeric((10, 2))


class Piccolo(Adapter):
    packages = ("piccolo", "asyncpg")
    remarks = {"values": "dictionaries: it has no tuples"}

    async def open(self) -> None:
        s = self.settings
        DB.config.update(
            host=s["HOST"], port=int(s["PORT"] or 5432), user=s["USER"], password=s["PASSWORD"],
            database=s["NAME"],
        )  # fmt: skip
        await DB.start_connection_pool(min_size=POOL, max_size=POOL)

    async def close(self) -> None:
        await DB.close_connection_pool()

    def row(self, book: Any) -> tuple[Any, ...]:
        found = [getattr(book, "author" if name == "author_id" else name) for name in BOOK]
        if not isinstance(found[1], int):
            found[1] = found[1].id
        return tuple(found)

    def values_rows(self, result: Any) -> Any:
        return [tuple(row.values()) for row in result]

    async def get(self, pk: int) -> Any:
        return await Book.objects().get(Book.id == pk).output(load_json=True)

    async def page(self, first: int, end: int) -> Any:
        books = Book.objects().where(Book.author >= first, Book.author < end)
        return await books.order_by(Book.id).output(load_json=True)

    async def rows(self, first: int, end: int) -> Any:
        books = Book.objects().where(Book.id >= first, Book.id < end)
        return await books.order_by(Book.id).output(load_json=True)

    async def related(self, first: int, end: int) -> Any:
        books = Book.objects(Book.author, Book.author.publisher)
        books = books.where(Book.id >= first, Book.id < end)
        return await books.order_by(Book.id).output(load_json=True)

    async def prefetch(self, first: int, end: int) -> Any:
        raise Unsupported("it does not prefetch reverse relations")

    async def values(self, first: int, end: int) -> Any:
        return await Book.select(Book.id, Book.title, Book.price).where(
            Book.id >= first, Book.id < end
        )

    async def count(self, first: int, end: int) -> Any:
        return await Book.count().where(Book.author >= first, Book.author < end)

    async def exists(self, pk: int) -> Any:
        return await Book.exists().where(Book.id == pk)

    async def aggregate(self, first: int, end: int) -> Any:
        found = await Book.select(Sum(Book.price), Max(Book.pages)).where(
            Book.author >= first, Book.author < end
        )
        return found[0].values()

    async def create(self, values: dict[str, Any]) -> Any:
        obj = Draft(**values)
        await obj.save()
        return obj

    async def drafts(self, keys: list[int]) -> list[Any]:
        rows = await Draft.objects().where(Draft.id.is_in(keys)).output(load_json=True)
        found = {each.id: each for each in rows}
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        obj.pages = pages
        await obj.save()

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        # PostgreSQL allows 32,767 parameters in a statement.
        keys: list[int] = []
        for start in range(0, len(values), 4000):
            part = [Draft(**value) for value in values[start : start + 4000]]
            keys += [row["id"] for row in await Draft.insert(*part).returning(Draft.id)]
        return keys

    async def update(self, pk: int, pages: int) -> Any:
        rows = await Draft.update({Draft.pages: pages}).where(Draft.id == pk).returning(Draft.id)
        return len(rows)

    async def delete(self, obj: Any) -> Any:
        await obj.remove()

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        return await Draft.objects().get_or_create(Draft.title == values["title"], defaults=values)

    async def transaction(self, values: dict[str, Any]) -> Any:
        async with DB.transaction():
            obj = Draft(**values)
            await obj.save()
            key = obj.id
            await Draft.objects().get(Draft.id == key).output(load_json=True)
            await Draft.update({Draft.pages: 7}).where(Draft.id == key)
            there = await Draft.exists().where(Draft.id == key)
            await Draft.delete().where(Draft.id == key)
        return there

    async def sleep_once(self) -> None:
        await Publisher.raw(f"SELECT pg_sleep({SLEEP})")

    async def stream(self) -> Any:
        async with await Event.objects().batch(batch_size=2000) as batch:
            async for events in batch:
                for event in events:
                    yield event


ADAPTER = Piccolo
