"""For orientation: FastAPI with SQLAlchemy on asyncpg, on the same tables."""

import json
import os
from datetime import datetime
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import URL, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from . import process

_database = json.loads(os.environ["SITE"])["database"]
_url = URL.create(
    "postgresql+asyncpg", _database["USER"] or None, _database["PASSWORD"] or None,
    _database["HOST"] or None, int(_database["PORT"] or 5432), _database["NAME"],
)  # fmt: skip
if _database["HOST"].startswith("/"):
    _url = _url.set(host=None, port=None, query={"host": _database["HOST"]})
_engine = create_async_engine(_url, pool_size=20, max_overflow=0)
_session = async_sessionmaker(_engine, expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "auth_user"
    id: Mapped[int] = mapped_column(primary_key=True)
    username: Mapped[str]
    first_name: Mapped[str]
    last_name: Mapped[str]
    email: Mapped[str]
    is_staff: Mapped[bool]
    date_joined: Mapped[datetime]


class UserOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int
    username: str
    first_name: str
    last_name: str
    email: str
    is_staff: bool
    date_joined: datetime


application = FastAPI()


@application.get("/empty/", response_class=PlainTextResponse)
async def empty() -> str:
    return "empty"


@application.get("/one/", response_class=PlainTextResponse)
async def one() -> str:
    async with _session() as session:
        return (await session.execute(select(User).where(User.id == 1))).scalar_one().username


@application.get("/rest/", response_model=list[UserOut])
async def rest() -> Any:
    async with _session() as session:
        return (await session.execute(select(User).order_by(User.id))).scalars().all()


@application.get("/taken/", response_class=PlainTextResponse)
async def taken() -> str:
    return process.taken()
