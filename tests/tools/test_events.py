"""One stream of events: what listeners hear, and that listening changes nothing."""

import asyncio
import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from asgiref.sync import sync_to_async
from django.db import connection
from django.test import TestCase

import asyncorm
from asyncorm import _events, native, sessions
from tests.project.shop.models import Book, Tag
from tests.support import backend_pid, database

pytestmark = pytest.mark.usefixtures("fresh_shop", "_alone")


@pytest.fixture
def _alone() -> Iterator[None]:
    """Nobody else listens, as a router for replicas does from its first use in this process on."""
    others = list(_events._listeners)
    for each in others:
        _events.unlisten(each)
    yield
    for each in others:
        _events.listen(each)


class Heard(_events.Listener):
    """Everything, in order."""

    def __init__(self) -> None:
        self.all: list[tuple[str, Any]] = []
        self.errors: dict[_events.Statement, BaseException | None] = {}

    def of(self, kind: str) -> list[Any]:
        return [event for name, event in self.all if name == kind]

    @property
    def queries(self) -> list[_events.Statement]:
        return [each for each in self.of("statement_ended") if "pg_type" not in each.sql]

    def __enter__(self) -> "Heard":
        _events.listen(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _events.unlisten(self)


for _name in vars(_events.Listener):
    if not _name.startswith("_"):

        def _hear(self: Heard, event: Any, name: str = _name) -> None:
            self.all.append((name, event))
            if name == "statement_ended":
                self.errors[event] = event.error

        setattr(Heard, _name, _hear)


async def warm() -> Tag:
    tag = await Tag.objects.native_create(name="watched")
    for _ in range(3):
        await Tag.objects.native_get(pk=tag.pk)
    await asyncio.gather(*(Tag.objects.native_get(pk=tag.pk) for _ in range(20)))
    return tag


async def test_what_is_said_of_a_statement() -> None:
    tag = await warm()
    with Heard() as heard:
        await Tag.objects.native_get(pk=tag.pk)
        rows = len(await Tag.objects.anative())
        pid = await native(backend_pid)()
        with pytest.raises(Exception, match="nothing"):
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT nothing WHERE %s", [True])
    got, listed, raw, failed = heard.queries
    assert heard.of("statement_begun") == [got, listed, raw, failed]
    assert got.sql.startswith("SELECT") and "%s" in got.sql and "$1" not in got.sql
    assert got.params == (tag.pk,)
    assert (got.alias, got.rows, heard.errors[got], got.cache) == ("default", 1, None, "hit")
    assert got.native and got.task is asyncio.current_task()
    assert not (got.by_cursor or got.pipelined or got.in_block)
    assert got.connection == listed.connection == raw.connection == pid
    assert got.began <= got.sent <= got.ended and 0 <= got.seconds < 5
    assert listed.rows == rows and raw.by_cursor and raw.cache is None
    assert "nothing" in str(heard.errors[failed]) and failed.params == [True]


async def test_the_ways_statements_take() -> None:
    tag = await warm()

    async def work() -> None:
        await Tag.objects.native_get(pk=tag.pk)
        await asyncio.gather(*(Tag.objects.native_get(pk=tag.pk) for _ in range(30)))
        await Tag.objects.native_count()
        await Tag.objects.filter(pk=tag.pk).native_update(name="other")
        await tag.native_save()
        await Tag.objects.native_bulk_create([Tag(name=f"few {uuid4()}") for _ in range(3)])
        await Tag.objects.native_bulk_create(
            [Tag(name=f"many {uuid4()}") for _ in range(30)], batch_size=10
        )
        await Book.objects.prefetch_related("tags").anative()
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT 1")
        assert len([each async for each in Tag.objects.native_iterator(chunk_size=5)]) > 30
        await asyncorm.batch(Tag.objects.count, Book.objects.count)
        async with asyncorm.connection():  # its session is reset
            await Tag.objects.native_count()
        async with asyncorm.atomic():
            await asyncio.gather(*(Tag.objects.native_get(pk=tag.pk) for _ in range(5)))

    await work()
    with Heard() as heard:
        await work()
    queries = heard.queries
    # Only the stream has a cursor of Django's, as it has when nobody listens.
    assert ["CURSOR" in q.sql or "shop_tag" in q.sql for q in queries if q.by_cursor] == [True]
    assert len(queries) == 1 + 30 + 1 + 1 + 1 + 1 + 3 + 2 + 1 + 1 + 2 + 1 + 5
    assert all(query.connection and query.ended for query in queries)
    assert not any(heard.errors.values())
    assert any(query.pipelined for query in queries)
    assert all(query.in_block for query in queries[-5:])
    assert sum(query.rows for query in queries if query.sql.startswith("INSERT")) == 33
    assert {query.cache for query in queries if not query.by_cursor} == {"hit", None}
    assert heard.of("checked_out") and len(heard.of("checked_out")) == len(heard.of("checked_in"))
    assert all(each.ended >= each.began for each in heard.of("checked_in"))


async def test_the_cache_is_asked() -> None:
    with Heard() as heard:
        for _ in range(2):
            await Tag.objects.filter(name="a", pk__gte=3, pk__lte=7).order_by("-name").anative()
        await Tag.objects.extra(where=["name = 'a'"]).anative()
    assert heard.of("cached") in (["miss", "hit", "uncacheable"], ["miss", "hit", "miss"])
    assert [query.cache for query in heard.queries][:2] == ["miss", "hit"]


async def test_blocks_commands_and_waits() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:

        async def block() -> None:
            async with asyncorm.atomic(alias):
                await Tag.objects.using(alias).native_count()
                async with asyncorm.atomic(alias):
                    asyncorm.set_rollback(True, alias)

        with Heard() as heard:
            await asyncio.gather(block(), block())
        ended = heard.of("block_ended")
        assert [(each.outermost, each.rolled_back) for each in ended] == [
            (False, True), (True, False)] * 2  # fmt: skip
        assert set(heard.of("block_begun")) == set(ended)
        assert all("test_events.py" in each.origin and each.ended > each.began for each in ended)
        texts = [command.text for command in heard.of("command_ended")]
        assert texts.count("BEGIN") == texts.count("COMMIT") == 2
        assert heard.of("command_begun") == heard.of("command_ended")
        assert any(wait.what == "for a connection" for wait in heard.of("waited"))
        outs = heard.of("checked_out")
        assert len(outs) == 2 and {each.alias for each in outs} == {alias}
        await asyncorm.close_pools(alias)


async def test_a_statement_knows_how_long_it_waited() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        await native(backend_pid)(alias)

        async def hold() -> None:
            async with asyncorm.atomic(alias), asyncorm.cursor(alias) as cursor:
                await cursor.execute("SELECT pg_sleep(0.2)")

        with Heard() as heard:
            holding = asyncio.create_task(hold())
            await asyncio.sleep(0.05)
            await Tag.objects.using(alias).native_count()
            await holding
        (count,) = [query for query in heard.queries if "COUNT" in query.sql]
        assert 0.05 < count.waited <= count.sent - count.began + 0.01
        assert count.ended - count.began > count.seconds
        await asyncorm.close_pools(alias)


async def test_a_listener_with_an_error_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(_events.Listener):
        def statement_ended(self, statement: _events.Statement) -> None:
            raise RuntimeError("bad listener")

    bad = Bad()
    _events.listen(bad)
    try:
        with Heard() as heard, caplog.at_level(logging.ERROR, "asyncorm"):
            await Tag.objects.native_count()
            await Tag.objects.native_count()
    finally:
        _events.unlisten(bad)
    assert len(heard.queries) == 2
    assert sum("Later ones are not logged" in r.getMessage() for r in caplog.records) == 1


async def test_execute_wrappers_keep_their_meaning() -> None:
    """They may change the statement: listeners are told what was asked for, in a cursor."""
    tag = await warm()
    seen: list[str] = []

    def wrapper(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    with Heard() as heard, connection.execute_wrapper(wrapper):
        await Tag.objects.native_get(pk=tag.pk)
    assert seen == [query.sql for query in heard.queries]
    assert [query.by_cursor for query in heard.queries] == [True]


async def test_who_ceases_to_listen_leaves_nothing_behind() -> None:
    with Heard() as heard:
        await Tag.objects.native_count()
        told = weakref.ref(heard.queries[0])
        assert sessions.everywhere
    heard.all.clear()
    heard.errors.clear()
    gc.collect()
    assert told() is None
    assert not sessions.everywhere and not _events.statements and not _events.checkouts
    await Tag.objects.native_count()
    assert not heard.all


class InATest(TestCase):
    async def test_native_and_synchronous_statements_of_a_test(self) -> None:
        with Heard() as heard:
            await Tag.objects.native_count()
            await sync_to_async(Tag.objects.count)()
        assert [query.native for query in heard.queries] == [True, False]
        assert not connection.execute_wrappers
