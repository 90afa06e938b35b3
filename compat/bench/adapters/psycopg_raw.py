"""Bare psycopg: its pool, the SQL of an ORM, plain tuples. The floor of all comparisons."""

from __future__ import annotations

from typing import Any

from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool

from ..schema import conninfo
from ..works import BOOK, DRAFT, SLEEP
from .base import POOL, Adapter

_BOOK = ", ".join(f'"bench_book"."{name}"' for name in BOOK)
_DRAFT = ", ".join(f'"bench_draft"."{name}"' for name in ("id", *DRAFT))
GET = f'SELECT {_BOOK} FROM "bench_book" WHERE "bench_book"."id" = %s LIMIT 21'
PAGE = (
    f'SELECT {_BOOK} FROM "bench_book" WHERE ("bench_book"."author_id" >= %s'
    ' AND "bench_book"."author_id" < %s) ORDER BY "bench_book"."id" ASC'
)
ROWS = (
    f'SELECT {_BOOK} FROM "bench_book" WHERE ("bench_book"."id" >= %s'
    ' AND "bench_book"."id" < %s) ORDER BY "bench_book"."id" ASC'
)
RELATED = (
    f'SELECT {_BOOK}, "bench_author"."id", "bench_author"."publisher_id", "bench_author"."name",'
    ' "bench_publisher"."id", "bench_publisher"."name", "bench_publisher"."country"'
    ' FROM "bench_book"'
    ' INNER JOIN "bench_author" ON ("bench_book"."author_id" = "bench_author"."id")'
    ' INNER JOIN "bench_publisher" ON ("bench_author"."publisher_id" = "bench_publisher"."id")'
    ' WHERE ("bench_book"."id" >= %s AND "bench_book"."id" < %s) ORDER BY "bench_book"."id" ASC'
)
PUBLISHERS = (
    'SELECT "id", "name", "country" FROM "bench_publisher" WHERE ("id" >= %s AND "id" < %s)'
    ' ORDER BY "id" ASC'
)
AUTHORS = 'SELECT "id", "publisher_id", "name" FROM "bench_author" WHERE "publisher_id" = ANY(%s)'
BOOKS = f'SELECT {_BOOK} FROM "bench_book" WHERE "author_id" = ANY(%s)'
VALUES = 'SELECT "id", "title", "price" FROM "bench_book" WHERE ("id" >= %s AND "id" < %s)'
COUNT = 'SELECT COUNT(*) FROM "bench_book" WHERE ("author_id" >= %s AND "author_id" < %s)'
EXISTS = 'SELECT 1 AS "a" FROM "bench_book" WHERE "id" = %s LIMIT 1'
AGGREGATE = (
    'SELECT SUM("price"), MAX("pages") FROM "bench_book"'
    ' WHERE ("author_id" >= %s AND "author_id" < %s)'
)
INSERT = (
    f'INSERT INTO "bench_draft" ({", ".join(DRAFT)}) VALUES (%s, %s, %s, %s, %s, %s, %s)'
    ' RETURNING "id"'
)
SAVE = f'UPDATE "bench_draft" SET {", ".join(f"{name} = %s" for name in DRAFT)} WHERE "id" = %s'
UPDATE = 'UPDATE "bench_draft" SET "pages" = %s WHERE "id" = %s'
DELETE = 'DELETE FROM "bench_draft" WHERE "id" = %s'
BY_TITLE = f'SELECT {_DRAFT} FROM "bench_draft" WHERE "title" = %s LIMIT 21'
BY_ID = f'SELECT {_DRAFT} FROM "bench_draft" WHERE "id" = %s LIMIT 21'
HAS = 'SELECT 1 AS "a" FROM "bench_draft" WHERE "id" = %s LIMIT 1'
DRAFTS = f'SELECT {_DRAFT} FROM "bench_draft" WHERE "id" = ANY(%s)'
EVENTS = 'SELECT "id", "book_id", "kind", "at", "amount" FROM "bench_event"'
KEYS = "SELECT nextval(pg_get_serial_sequence('bench_draft', 'id')) FROM generate_series(1, %s)"
COLUMNS = ", ".join(("id", *DRAFT))
TYPES = ("int8", "varchar", "int4", "numeric", "timestamptz", "timestamptz", "jsonb", "bool")


def params(values: dict[str, Any]) -> list[Any]:
    """A draft's values in the order of the columns, jsonb wrapped."""
    return [Jsonb(values[name]) if name == "meta" else values[name] for name in DRAFT]


class Psycopg(Adapter):
    packages = ("psycopg", "psycopg-pool", "psycopg-binary")

    async def open(self) -> None:
        self.pool = AsyncConnectionPool(
            conninfo(self.settings),
            kwargs={"autocommit": True, "prepare_threshold": self.options["prepare_threshold"]},
            min_size=POOL,
            max_size=POOL,
            open=False,
        )
        await self.pool.open(wait=True)

    async def close(self) -> None:
        await self.pool.close()

    def row(self, book: Any) -> tuple[Any, ...]:
        return tuple(book)

    def related_row(self, book: Any) -> Any:
        return (*book[:8], book[10], book[12], book[13])

    def prefetched_row(self, publisher: Any) -> Any:
        key, authors = publisher
        return key, sorted((author, sorted(books)) for author, books in authors)

    async def one(self, sql: str, *args: Any) -> Any:
        async with self.pool.connection() as conn:
            return await (await conn.execute(sql, args)).fetchone()

    async def all(self, sql: str, *args: Any) -> list[Any]:
        async with self.pool.connection() as conn:
            return await (await conn.execute(sql, args)).fetchall()

    async def empty(self) -> None:
        """A coroutine that does nothing: what a native() that does nothing is compared with."""

    async def get(self, pk: int) -> Any:
        return await self.one(GET, pk)

    async def page(self, first: int, end: int) -> Any:
        return await self.all(PAGE, first, end)

    async def rows(self, first: int, end: int) -> Any:
        return await self.all(ROWS, first, end)

    async def related(self, first: int, end: int) -> Any:
        return await self.all(RELATED, first, end)

    async def prefetch(self, first: int, end: int) -> Any:
        publishers = await self.all(PUBLISHERS, first, end)
        authors = await self.all(AUTHORS, [row[0] for row in publishers])
        books = await self.all(BOOKS, [row[0] for row in authors])
        return nest(publishers, authors, books)

    async def values(self, first: int, end: int) -> Any:
        return await self.all(VALUES, first, end)

    async def count(self, first: int, end: int) -> Any:
        return (await self.one(COUNT, first, end))[0]

    async def exists(self, pk: int) -> Any:
        return await self.one(EXISTS, pk) is not None

    async def aggregate(self, first: int, end: int) -> Any:
        return await self.one(AGGREGATE, first, end)

    async def create(self, values: dict[str, Any]) -> Any:
        return await self.one(INSERT, *params(values))

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = {row[0]: row for row in await self.all(DRAFTS, keys)}
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        key, title, _, *rest, meta, active = obj
        async with self.pool.connection() as conn:
            await conn.execute(SAVE, (title, pages, *rest, Jsonb(meta), active, key))

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        # Keys first, then COPY: the fastest of five ways that know the keys. unnest(), rows of
        # VALUES and executemany() took 1.5 to 3 times as long.
        async with self.pool.connection() as conn:
            keys = [key for (key,) in await (await conn.execute(KEYS, (len(values),))).fetchall()]
            async with (
                conn.cursor() as cursor,
                cursor.copy(f"COPY bench_draft ({COLUMNS}) FROM STDIN (FORMAT BINARY)") as copy,
            ):
                copy.set_types(TYPES)
                for key, value in zip(keys, values, strict=True):
                    await copy.write_row((key, *params(value)))
        return keys

    async def update(self, pk: int, pages: int) -> Any:
        async with self.pool.connection() as conn:
            return (await conn.execute(UPDATE, (pages, pk))).rowcount

    async def delete(self, obj: Any) -> Any:
        async with self.pool.connection() as conn:
            await conn.execute(DELETE, (obj[0],))

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        async with self.pool.connection() as conn:
            row = await (await conn.execute(BY_TITLE, (values["title"],))).fetchone()
            if row is None:
                async with conn.transaction():
                    row = await (await conn.execute(INSERT, params(values))).fetchone()
        return row

    async def transaction(self, values: dict[str, Any]) -> Any:
        async with self.pool.connection() as conn, conn.transaction():
            (key,) = await (await conn.execute(INSERT, params(values))).fetchone()
            await (await conn.execute(BY_ID, (key,))).fetchone()
            await conn.execute(UPDATE, (7, key))
            there = await (await conn.execute(HAS, (key,))).fetchone() is not None
            await conn.execute(DELETE, (key,))
        return there

    async def sleep_once(self) -> None:
        await self.one("SELECT pg_sleep(%s)", SLEEP)

    async def stream(self) -> Any:
        async with (
            self.pool.connection() as conn,
            conn.transaction(),
            conn.cursor(name="events") as cursor,
        ):
            cursor.itersize = 2000
            await cursor.execute(EVENTS)
            async for row in cursor:
                yield row


def nest(publishers: Any, authors: Any, books: Any) -> Any:
    """Rows of three tables put into one another: [(publisher, [(author, [books])])]."""
    of_author: dict[int, list[Any]] = {row[0]: [] for row in authors}
    for row in books:
        of_author[row[1]].append(tuple(row))
    of_publisher: dict[int, list[Any]] = {row[0]: [] for row in publishers}
    for row in authors:
        of_publisher[row[1]].append((row[0], of_author[row[0]]))
    return list(of_publisher.items())


ADAPTER = Psycopg
