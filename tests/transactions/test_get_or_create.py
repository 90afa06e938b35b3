"""get_or_create() outside a block: two round trips where nothing else can happen in between."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest import mock

import psycopg
import pytest
from django.db import IntegrityError, connections, models
from django.db.models.signals import post_init, post_save, pre_save

import asyncorm
from asyncorm.demo.postgres import Server
from tests.project.myapp.models import Item
from tests.support import eventually
from tests.transactions.test_begin import (  # noqa: F401
    ALIAS,
    EXTENDED,
    options,
    proxy,
    query,
    segments,
    server,
)
from tests.transactions.test_fate import Proxy

ids = count(100_000)
ONE = EXTENDED + "S"


def items() -> Any:
    return Item.objects.using(ALIAS)


async def sent(proxy: Proxy, work: Callable[[], Awaitable[Any]]) -> tuple[Any, list[str]]:  # noqa: F811
    proxy.sent.clear()
    result = await work()
    return result, segments(proxy.sent)


def new(**defaults: Any) -> Any:
    return items().native_get_or_create(remote_id=next(ids), defaults={"name": "new", **defaults})


async def test_two_round_trips(proxy: Proxy) -> None:  # noqa: F811
    await new()
    (made, created), messages = await sent(proxy, new)
    assert created and made.pk and made.name == "new" and messages == [ONE, ONE]
    again = lambda: items().native_get_or_create(remote_id=made.remote_id)  # noqa: E731
    (found, created), messages = await sent(proxy, again)
    assert found == made and not created and messages == [ONE]


@contextmanager
def received(signal: Any, receiver: Callable[..., Any]) -> Iterator[None]:
    signal.connect(receiver, sender=Item)
    try:
        yield
    finally:
        signal.disconnect(receiver, sender=Item)


def saves(self: Any, *args: Any, **kwargs: Any) -> None:
    models.Model.save(self, *args, **kwargs)


def receives(**kwargs: Any) -> None:
    pass


@contextmanager
def watched() -> Iterator[None]:
    with connections[ALIAS].execute_wrapper(lambda execute, *args: execute(*args)):
        yield


OTHERS: dict[str, Callable[[], Any]] = {
    "a receiver": lambda: received(post_save, receives),
    "a receiver before": lambda: received(pre_save, receives),
    "a receiver of new instances": lambda: received(post_init, receives),
    "an override": lambda: mock.patch.object(Item, "save", saves, create=True),
    "an override of all models'": lambda: mock.patch.object(models.Model, "save_base", _save_base),
    "who watches": watched,
}
_djangos = models.Model.save_base


def _save_base(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _djangos(self, *args, **kwargs)


@pytest.mark.parametrize("other", OTHERS)
async def test_others_code_has_its_transaction(proxy: Proxy, other: str) -> None:  # noqa: F811
    """From the moment that it is there, and no longer."""
    await new()
    with OTHERS[other]():
        (_, created), messages = await sent(proxy, new)
        assert created and len(messages) == 3 and messages[-1] == "Q"
    assert len((await sent(proxy, new))[1]) == 2


async def test_what_a_receiver_refuses_is_not_there(proxy: Proxy, query: Any) -> None:  # noqa: F811
    def refuse(**kwargs: Any) -> None:
        raise ValueError("refused")

    with received(post_save, refuse), pytest.raises(ValueError, match="refused"):
        await new(name="refused")
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'refused'") == 0


async def test_what_a_default_writes_is_undone_with_it(proxy: Proxy, query: Any) -> None:  # noqa: F811
    def name() -> str:
        items().create(remote_id=next(ids), name="beside")
        return "x" * 51  # too long

    with pytest.raises(Exception, match="too long"):
        await new(name=name)
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'beside'") == 0


async def test_a_conflict_is_raised_as_django_does(proxy: Proxy, query: Any) -> None:  # noqa: F811
    with pytest.raises(IntegrityError, match="remote_id"):
        await items().native_get_or_create(name="absent", defaults={"remote_id": 0})
    assert (await items().native_get(remote_id=0)).name == "first"
    assert query("SELECT count(*) FROM myapp_item") == 1


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside a block"])
async def test_who_was_second_gets_the_firsts(
    proxy: Proxy,  # noqa: F811
    server: Server,  # noqa: F811
    query: Any,  # noqa: F811
    inside: bool,
) -> None:
    where = server.settings
    number = next(ids)
    names = {"host": "HOST", "port": "PORT", "user": "USER", "dbname": "NAME"}
    params = {name: where[key] for name, key in names.items()} | {"password": where["PASSWORD"]}
    first = await asyncio.to_thread(psycopg.connect, **params)
    first.execute("INSERT INTO myapp_item (remote_id, name) VALUES (%s, 'first')", [number])

    async def second() -> tuple[Any, bool]:
        work = items().native_get_or_create(remote_id=number, defaults={"name": "second"})
        if not inside:
            return await work  # type: ignore[no-any-return]
        async with asyncorm.atomic(ALIAS):
            found = await work
            await items().native_create(remote_id=next(ids), name="after")
            return found  # type: ignore[no-any-return]

    task = asyncio.create_task(second())
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    await eventually(lambda: query(waiting))
    await asyncio.to_thread(first.commit)
    await asyncio.to_thread(first.close)
    found, created = await task
    assert found.name == "first" and not created
    assert query("SELECT count(*) FROM myapp_item WHERE name = 'after'") == int(inside)


async def test_inside_a_block_it_is_a_savepoint(proxy: Proxy) -> None:  # noqa: F811
    async def inside() -> Any:
        async with asyncorm.atomic(ALIAS):
            return await new()

    await inside()
    (_, created), messages = await sent(proxy, inside)
    assert created and len(messages) == 5 and messages[0] == EXTENDED + ONE
