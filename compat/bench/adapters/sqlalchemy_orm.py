"""SQLAlchemy's ORM with asyncio, on asyncpg or on psycopg (an option).

As its documentation advises: one session for each task, expire_on_commit off.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    DateTime,
    ForeignKey,
    Numeric,
    String,
    delete,
    exists,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)

from ..works import SLEEP
from .base import POOL, Adapter


class Base(DeclarativeBase):
    pass


class Publisher(Base):
    __tablename__ = "bench_publisher"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    country: Mapped[str] = mapped_column(String(2))
    authors: Mapped[list[Author]] = relationship(back_populates="publisher")


class Author(Base):
    __tablename__ = "bench_author"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    publisher_id: Mapped[int] = mapped_column(ForeignKey("bench_publisher.id"))
    name: Mapped[str] = mapped_column(String(100))
    publisher: Mapped[Publisher] = relationship(back_populates="authors")
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "bench_book"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("bench_author.id"))
    title: Mapped[str] = mapped_column(String(200))
    pages: Mapped[int]
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    published: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    updated: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    meta: Mapped[Any] = mapped_column(JSONB)
    author: Mapped[Author] = relationship(back_populates="books")


class Draft(Base):
    __tablename__ = "bench_draft"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    title: Mapped[str] = mapped_column(String(200), unique=True)
    pages: Mapped[int]
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    published: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    updated: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    meta: Mapped[Any] = mapped_column(JSONB)
    active: Mapped[bool]


class Event(Base):
    __tablename__ = "bench_event"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    book_id: Mapped[int] = mapped_column(BigInteger)
    kind: Mapped[str] = mapped_column(String(20))
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    amount: Mapped[Decimal] = mapped_column(Numeric(10, 2))


class SQLAlchemy(Adapter):
    def __init__(self, settings: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__(settings, options)
        self.packages = ("SQLAlchemy", options["driver"])

    async def open(self) -> None:
        s = self.settings
        url = URL.create(
            f"postgresql+{self.options['driver']}", s["USER"] or None, s["PASSWORD"] or None,
            s["HOST"] or None, int(s["PORT"] or 5432), s["NAME"],
        )  # fmt: skip
        if s["HOST"].startswith("/"):
            query = {"host": s["HOST"]}
            url = url.set(host=None, port=None, query=query)
            if self.options["driver"] == "psycopg":
                url = url.update_query_dict({"port": str(s["PORT"] or 5432)})
        self.engine = create_async_engine(url, pool_size=POOL, max_overflow=0)
        self.session = async_sessionmaker(self.engine, expire_on_commit=False)

    async def close(self) -> None:
        await self.engine.dispose()

    async def all(self, statement: Any) -> Any:
        async with self.session() as session:
            return (await session.scalars(statement)).all()

    async def get(self, pk: int) -> Any:
        async with self.session() as session:
            return await session.get(Book, pk)

    async def page(self, first: int, end: int) -> Any:
        where = (Book.author_id >= first, Book.author_id < end)
        return await self.all(select(Book).where(*where).order_by(Book.id))

    async def rows(self, first: int, end: int) -> Any:
        return await self.all(select(Book).where(Book.id >= first, Book.id < end).order_by(Book.id))

    async def related(self, first: int, end: int) -> Any:
        statement = select(Book).where(Book.id >= first, Book.id < end).order_by(Book.id)
        load = joinedload(Book.author, innerjoin=True).joinedload(Author.publisher, innerjoin=True)
        return await self.all(statement.options(load))

    async def prefetch(self, first: int, end: int) -> Any:
        statement = select(Publisher).where(Publisher.id >= first, Publisher.id < end)
        load = selectinload(Publisher.authors).selectinload(Author.books)
        return await self.all(statement.order_by(Publisher.id).options(load))

    async def values(self, first: int, end: int) -> Any:
        columns = select(Book.id, Book.title, Book.price)
        async with self.session() as session:
            result = await session.execute(columns.where(Book.id >= first, Book.id < end))
            return result.all()

    async def count(self, first: int, end: int) -> Any:
        where = (Book.author_id >= first, Book.author_id < end)
        async with self.session() as session:
            return await session.scalar(select(func.count()).select_from(Book).where(*where))

    async def exists(self, pk: int) -> Any:
        async with self.session() as session:
            return await session.scalar(select(exists().where(Book.id == pk)))

    async def aggregate(self, first: int, end: int) -> Any:
        where = (Book.author_id >= first, Book.author_id < end)
        statement = select(func.sum(Book.price), func.max(Book.pages)).where(*where)
        async with self.session() as session:
            return (await session.execute(statement)).one()

    async def create(self, values: dict[str, Any]) -> Any:
        obj = Draft(**values)
        async with self.session() as session, session.begin():
            session.add(obj)
        return obj

    async def drafts(self, keys: list[int]) -> list[Any]:
        found = {each.id: each for each in await self.all(select(Draft).where(Draft.id.in_(keys)))}
        return [found[key] for key in keys]

    async def save(self, obj: Any, pages: int) -> Any:
        async with self.session() as session, session.begin():
            session.add(obj)
            obj.pages = pages

    async def bulk_create(self, values: list[dict[str, Any]]) -> Any:
        objects = [Draft(**value) for value in values]
        async with self.session() as session, session.begin():
            session.add_all(objects)
        return [obj.id for obj in objects]

    async def update(self, pk: int, pages: int) -> Any:
        async with self.session() as session, session.begin():
            result = await session.execute(update(Draft).where(Draft.id == pk).values(pages=pages))
            return result.rowcount

    async def delete(self, obj: Any) -> Any:
        async with self.session() as session, session.begin():
            await session.delete(obj)

    async def get_or_create(self, values: dict[str, Any]) -> Any:
        async with self.session() as session, session.begin():
            obj = await session.scalar(select(Draft).where(Draft.title == values["title"]))
            if obj is None:
                obj = Draft(**values)
                session.add(obj)
        return obj

    async def transaction(self, values: dict[str, Any]) -> Any:
        obj = Draft(**values)
        async with self.session() as session, session.begin():
            session.add(obj)
            await session.flush()
            key = obj.id
            await session.get(Draft, key, populate_existing=True)
            await session.execute(update(Draft).where(Draft.id == key).values(pages=7))
            there = await session.scalar(select(exists().where(Draft.id == key)))
            await session.execute(delete(Draft).where(Draft.id == key))
        return there

    async def sleep_once(self) -> None:
        async with self.session() as session:
            await session.execute(text(f"SELECT pg_sleep({SLEEP})"))

    async def stream(self) -> Any:
        async with self.session() as session:
            result = await session.stream_scalars(select(Event).execution_options(yield_per=2000))
            async for event in result:
                yield event


ADAPTER = SQLAlchemy
