"""Bare asyncpg: its pool, the ORM's SQL, its records."""

from __future__ import annotations

import json
import re
from typing import Any

import asyncpg

from ..works import DRAFT, SLEEP
from . import psycopg_raw as sql
from .base import POOL, Adapter


def _numbered(text: str) -> str:
    numbers = iter(range(1, 100))
    return re.sub("%s", lambda match: f"${next(numbers)}", text)


GET, PAGE, ROWS, RELATED, PUBLISHERS, AUTHORS, BOOKS, VALUES, COUNT, EXISTS, AGGREGATE, INSERT = (
    map(
        _numbered,
        (
            sql.GET, sql.PAGE, sql.ROWS, sql.RELATED, sql.PUBLISHERS, sql.AUTHORS, sql.BOOKS,
            sql.VALUES, sql.COUNT, sql.EXISTS, sql.AGGREGATE, sql.INSERT,
        ),
    )
)  # fmt: skip
SAVE, UPDATE, DELETE, BY_TITLE, BY_ID, HAS, DRAFTS = map(
    _numbered, (sql.SAVE, sql.UPDATE, sql.DELETE, sql.BY_TITLE, sql.BY_ID, sql.HAS, sql.DRAFTS)
)


async def connected(connection: Any) -> None:
    """Have asyncpg parse jsonb, as everybody else does; binary, which its COPY needs."""
    await connection.set_type_codec(
        "jsonb", encoder=_binary, decoder=_parsed, schema="pg_catalog", format="binary"
    )


def _binary(value: Any) -> bytes:
    return b"\x01" + json.dumps(value).encode()


def _parsed(data: bytes) -> Any:
    return json.loads(data[1:])


def params(values: dict[str, Any]) -> list[Any]:
    return [values[name] for name in DRAFT]


class Asyncpg(Adapter):
    packages = ("asyncpg",)

    async def open(self) -> None:
        s = self.settings
        self.pool = await asyncpg.create_pool(
            host=s["HOST"] or None, port=int(s["PORT"] or 5432), user=s["USER"] or None,
            password=s["PASSWORD"] or None, database=s["NAME"], min_size=POOL, max_size=POOL,
            init=connected,
        )  # fmt: skip

    async def close(self) -> None:
        await self.pool.close()

    def row(self, book: Any) -> tuple[Any, ...]:
        return tuple(book)

    def related_row(self, book: Any) -> Any:
        book = tuple(book)
        return (*book[:8], book[10], book[12], book[13])

    def prefetched_row(self, publisher: Any) -> Any:
        key, authors = publisher
        return key, sorted((author, sorted(books)) for author, books in authors)

    async def get(self, pk: int) -> Any:
        return await self.pool.fetchrow(GET, pk)

    async def page(self, first: int, end: int) -> Any:
        return await self.pool.fetch(PAGE, first, end)

    async def rows(self, first: int, end: int) -> Any:
        return await self.pool.fetch(ROWS, first, end)

    async def related(self, first: int, end: int) -> Any:
        return await self.pool.fetch(RELATED, first, end)

    async def prefetch(self, first: int, end: int) -> Any:
        publishers = await self.pool.fetch(PUBLISHERS, first, end)
        authors = await self.pool.fetch(AUTHORS, [row[0] for row in publishers])
        books = await self.pool.fetch(BOOKS, [row[0] for row in authors])
        return sql.nest(publishers, authors, books)

    async def values(self, first: int, end: int) -> Any:
        return await self.pool.fetch(VALUES, first, end)

    async def count(self, first: int, end: int) -> Any:
        return await self.pool.fetchval(COUNT, first, end)

    async def exists(self, pk: int) -> Any:
        return await self.pool.fetchrow(EXISTS, pk) is not None

    async def aggregate(self, first: int, end: int) -> Any:
        return await self.pool.fetchrow(AGGREGATE, first, end)

    async def create(self, values: dict[str, Any]) -> Any:
        return await self.pool.fetchrow(INSERT, *params(values))

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = {row[0]: row for row in await self.pool.fetch(DRAFTS, keys)}
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        key, title, _, *rest = obj
        await self.pool.execute(SAVE, title, pages, *rest, key)

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        async with self.pool.acquire() as conn:
            keys = [row[0] for row in await conn.fetch(sql.KEYS.replace("%s", "$1"), len(values))]
            records = [(key, *params(value)) for key, value in zip(keys, values, strict=True)]
            await conn.copy_records_to_table("bench_draft", records=records, columns=("id", *DRAFT))
        return keys

    async def update(self, pk: int, pages: int) -> Any:
        return int((await self.pool.execute(UPDATE, pages, pk)).split()[-1])

    async def delete(self, obj: Any) -> Any:
        await self.pool.execute(DELETE, obj[0])

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        async with self.pool.acquire() as conn:
            row = await conn.fetchrow(BY_TITLE, values["title"])
            if row is None:
                async with conn.transaction():
                    row = await conn.fetchrow(INSERT, *params(values))
        return row

    async def transaction(self, values: dict[str, Any]) -> Any:
        async with self.pool.acquire() as conn, conn.transaction():
            key = await conn.fetchval(INSERT, *params(values))
            await conn.fetchrow(BY_ID, key)
            await conn.execute(UPDATE, 7, key)
            there = await conn.fetchrow(HAS, key) is not None
            await conn.execute(DELETE, key)
        return there

    async def sleep_once(self) -> None:
        await self.pool.fetchval("SELECT pg_sleep($1)", SLEEP)

    async def stream(self) -> Any:
        async with self.pool.acquire() as conn, conn.transaction():
            async for row in conn.cursor(sql.EVENTS, prefetch=2000):
                yield row


ADAPTER = Asyncpg
