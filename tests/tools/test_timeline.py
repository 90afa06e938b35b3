"""timeline(): which task ran which query when, on which connection, and what it waited for."""

import asyncio
import contextlib
import io
import logging
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import OperationalError
from django.test import TestCase

import asyncorm
from asyncorm import native, pools
from asyncorm.timeline import Timeline
from tests.project.myapp.models import Item
from tests.project.shop.models import Author, Book, Publisher, Tag
from tests.support import backend_pid, database, sleep

pytestmark = pytest.mark.usefixtures("shop_data")


async def warm() -> None:
    """Connections are there, and configured."""
    await asyncio.gather(*(native(sleep)(0.02) for _ in range(4)))


async def test_it_records_who_ran_what_where() -> None:
    await warm()
    async with asyncorm.timeline() as seen:
        async with asyncio.TaskGroup() as group:
            group.create_task(Tag.objects.native_count(), name="first")
            group.create_task(native(sleep)(0.1), name="second")
        pid = await native(backend_pid)()
    await Tag.objects.native_count()  # not recorded any more
    assert len(seen.queries) == 3
    (first,) = [span for span in seen.by_task["first"] if not span.is_wait]
    (second,) = [span for span in seen.by_task["second"] if not span.is_wait]
    assert first.what.startswith("SELECT COUNT(*)") and first.alias == "default"
    assert first.connection != second.connection
    assert 0.1 <= second.seconds < 1
    assert first.began < second.ended and second.began < first.ended + 0.1
    assert seen.queries[-1].connection == pid
    assert not seen.queries[-1].in_block
    assert first.place == "an unknown place"  # the task is the native call itself
    assert "support.py" in second.place


async def test_waits_for_a_connection_and_for_a_block() -> None:
    await warm()
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:

        async def hold() -> None:
            async with asyncorm.atomic(alias), asyncorm.cursor(alias) as cursor:
                await cursor.execute("SELECT pg_sleep(0.1)")

        async with asyncorm.timeline() as seen:
            await asyncio.gather(hold(), hold(), hold())
        waits = [span for span in seen.waits if span.seconds > 0.05]
        assert len(waits) >= 2
        assert {span.what for span in waits} == {"for a connection"}
        assert any(text.startswith("Waiting: ") for text in seen.findings())
        await asyncorm.close_pools(alias)

    async with asyncorm.timeline() as seen, asyncorm.atomic():
        await asyncio.gather(*(native(sleep)(0.05) for _ in range(3)))
    assert len(seen.waits) >= 2
    assert all("for the block that began at" in span.what for span in seen.waits)
    for span in seen.queries:  # a query does not include its wait
        assert span.seconds < 0.5 and span.in_block
    ordered = sorted(span.began for span in seen.queries if "pg_sleep" in span.what)
    assert ordered[1] - ordered[0] > 0.04


async def test_statements_that_travel_together_name_their_connection() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        pid = await native(backend_pid)(alias)
        async with asyncorm.timeline() as seen:
            pids = await asyncio.gather(*(native(backend_pid)(alias) for _ in range(20)))
        assert set(pids) == {span.connection for span in seen.queries} == {pid}
        await asyncorm.close_pools(alias)


async def test_begin_commit_and_rollback() -> None:
    await warm()
    async with asyncorm.timeline() as seen:
        async with asyncorm.atomic():
            await Tag.objects.native_count()
            pid = await native(backend_pid)()
        async with asyncorm.atomic():
            await Tag.objects.native_count()
            asyncorm.set_rollback(True)
    assert [span.what for span in seen.commands] == ["BEGIN", "COMMIT", "BEGIN", "ROLLBACK"]
    assert len(seen.queries) == 3  # as assertNumQueries() counts them
    begin, commit, *_ = seen.commands
    assert begin.connection == commit.connection == pid
    assert "test_timeline.py" in commit.place and commit.in_block
    first = seen.queries[0]
    assert begin.ended <= first.began < first.ended <= commit.began
    assert seen.findings() == []
    assert sum("COMMIT" in line for line in str(seen).splitlines()) == 1
    assert "COMMIT" in seen.svg() and "COMMIT" in seen.html()


async def first_by_cursor() -> None:
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT 1")


async def first_by_stream() -> None:
    async for _ in Tag.objects.native_iterator():
        break


FIRST: dict[str, Callable[[], Awaitable[Any]]] = {
    "query": lambda: Tag.objects.native_count(),
    "compiled": lambda: asyncorm.compiled(lambda pk: Tag.objects.filter(pk=pk))(1),
    "raw": lambda: Tag.objects.raw("SELECT * FROM shop_tag").anative(),
    "cursor": first_by_cursor,
    "stream": first_by_stream,
    "prefetch": lambda: Book.objects.prefetch_related("tags", "publisher").anative(),
    "update": lambda: Tag.objects.filter(pk=-1).native_update(name="x"),
    "batch": lambda: asyncorm.batch(Tag.objects.count, Book.objects.count),
    "gather": lambda: asyncio.gather(*(Tag.objects.native_count() for _ in range(5))),
    "COPY TO": lambda: asyncorm.copy_to(Tag.objects.order_by("pk"), io.StringIO()),
    "COPY FROM": lambda: Item.objects.native_bulk_create([Item(remote_id=1)], method="copy"),
}


@pytest.mark.parametrize("first", FIRST)
async def test_a_block_begins_before_whatever_is_first(first: str) -> None:
    async with asyncorm.timeline() as seen:
        async with asyncorm.atomic():
            await FIRST[first]()
            asyncorm.set_rollback(True)
    what = [span.what for span in seen.commands if span.what in ("BEGIN", "COMMIT", "ROLLBACK")]
    assert what == ["BEGIN", "ROLLBACK"]
    spans = sorted((span for span in seen.spans if not span.is_wait), key=lambda span: span.ended)
    began = [span.what for span in spans].index("BEGIN")
    assert all("pg_type" in span.what for span in spans[:began])  # a connection that is new


async def test_a_commit_is_its_tasks_also_when_that_is_cancelled() -> None:
    with database(OPTIONS={"application_name": "cancelled"}) as alias:

        async def work() -> None:
            async with asyncorm.atomic(alias):
                await Tag.objects.using(alias).native_count()
                asyncio.get_running_loop().call_soon(task.cancel)

        async with asyncorm.timeline() as seen:
            task = asyncio.create_task(work(), name="cancelled one")
            with pytest.raises(asyncio.CancelledError):
                await task
        assert seen.commands[-1].what in ("COMMIT", "ROLLBACK")
        assert {span.task for span in seen.commands} == {"cancelled one"}
        await asyncorm.close_pools(alias)


@pytest.mark.parametrize("block", [False, True])
async def test_each_fetch_of_a_stream(block: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        if block:
            await stack.enter_async_context(asyncorm.atomic())
        async with asyncorm.timeline() as seen:
            rows = [book async for book in Book.objects.native_iterator(chunk_size=12)]
    assert len(rows) == 30 and len(seen.queries) == 1
    fetches = [span for span in seen.commands if span.what.startswith("FETCH FORWARD 12 ")]
    assert len(fetches) == 4  # Django asks until no row comes
    assert {span.connection for span in fetches} == {seen.queries[0].connection}
    assert {span.in_block for span in fetches} == {block}
    assert seen.commands[-1].what.startswith("CLOSE ")
    assert seen.findings() == []


async def test_nothing_is_replaced_without_a_timeline() -> None:
    original = psycopg.Connection._exec_command
    async with asyncorm.timeline() as outer:
        async with asyncorm.timeline() as inner, asyncorm.atomic():
            await Tag.objects.native_count()
        assert psycopg.Connection._exec_command is not original
    assert psycopg.Connection._exec_command is original
    assert len(inner.commands) == len(outer.commands) == 2
    async with asyncorm.atomic():
        await Tag.objects.native_count()
    assert len(inner.commands) == len(outer.commands) == 2


async def test_n_plus_1_is_found() -> None:
    def names() -> list[Any]:
        return [book.publisher and book.publisher.name for book in Book.objects.order_by("pk")]

    async with asyncorm.timeline() as seen:
        await native(names)()
    (finding,) = [text for text in seen.findings() if text.startswith("N+1")]
    assert "test_timeline.py" in finding and "shop_publisher" in finding
    async with asyncorm.timeline() as seen:
        await Book.objects.select_related("publisher").anative()
        await Book.objects.prefetch_related("tags", "publisher").anative()
    assert not [text for text in seen.findings() if text.startswith("N+1")]


async def test_needless_serialisation_is_found() -> None:
    async def dashboard() -> None:
        await Book.objects.native_count()
        await Author.objects.native_count()
        await Publisher.objects.native_count()

    async with asyncorm.timeline() as seen:
        await dashboard()
    (finding,) = seen.findings()
    assert finding.startswith("In turn: 3 queries") and "gather()" in finding
    assert finding.count("test_timeline.py") == 3

    async with asyncorm.timeline() as seen:
        await asyncio.gather(
            Book.objects.native_count(), Author.objects.native_count(), Tag.objects.native_count()
        )
    assert not [text for text in seen.findings() if text.startswith("In turn")]
    async with asyncorm.timeline() as seen, asyncorm.atomic():
        await dashboard()
    assert seen.findings() == []
    async with asyncorm.timeline() as seen:  # a write is none of those that might run at once
        await Tag.objects.filter(pk=-1).native_update(name="x")
        await Book.objects.native_count()
        await Author.objects.native_count()
    assert seen.findings() == []


async def test_text_picture_and_page(tmp_path: Path) -> None:
    async with asyncorm.timeline() as seen:
        async with asyncio.TaskGroup() as group:
            for n in range(3):
                group.create_task(Tag.objects.filter(name="<&>").native_count(), name=f"<{n}>")
    lines = str(seen).splitlines()
    assert lines[0].startswith("3 queries of 3 tasks on ")
    assert sum("SELECT COUNT(*)" in line for line in lines) == 3
    seen.save(tmp_path / "seen.svg")
    seen.save(str(tmp_path / "seen.html"))
    root = ET.parse(tmp_path / "seen.svg").getroot()
    assert root.tag.endswith("svg")
    assert "<0>" in "".join(root.itertext())
    page = (tmp_path / "seen.html").read_text()
    assert page.count("<tr>") >= 4 and "&lt;0&gt;" in page and "<svg" in page
    with pytest.raises(ValueError, match=r"seen\.png"):
        seen.save(tmp_path / "seen.png")
    shown = seen._repr_html_()  # in a notebook
    assert shown.startswith("<svg") and "<style" not in shown and "3 queries of 3 tasks" in shown
    async with asyncorm.timeline() as one:
        await Tag.objects.native_count()
    assert str(one).startswith("1 query of 1 task on 1 connection, ")
    assert str(Timeline()).startswith("0 queries")
    assert Timeline().svg().startswith("<?xml")


async def test_failed_queries_are_recorded() -> None:
    async with asyncorm.timeline() as seen:
        with pytest.raises(Exception, match="nothing"):
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT nothing")
    assert [span.what for span in seen.queries] == ["SELECT nothing"]


async def test_a_connection_that_is_closed_meanwhile() -> None:
    """The error stays what it was, and the recording knows where."""
    with database() as alias:
        pid = await native(backend_pid)(alias)

        async def work() -> None:
            async with asyncorm.atomic(alias), asyncorm.cursor(alias) as cursor:
                await cursor.execute("SELECT pg_sleep(0.5)")

        async with asyncorm.timeline() as seen:
            task = asyncio.create_task(work())
            await asyncio.sleep(0.1)
            (conn,) = pools.find(alias).connections.live  # type: ignore[union-attr]
            conn.twin.terminate()
            with pytest.raises(OperationalError, match=r"^The connection was closed\.$"):
                await task
        assert {span.connection for span in seen.queries} == {pid}
        await asyncorm.close_pools(alias)
        await asyncio.sleep(0.5)  # the server goes on with the statement


class InATest(TestCase):
    async def test_synchronous_queries_are_recorded_in_a_tests_transaction(self) -> None:
        from asgiref.sync import sync_to_async

        with asyncorm.timeline() as seen:
            await Tag.objects.native_count()
            await sync_to_async(Tag.objects.count)()
        assert len(seen.queries) == 2

    async def test_fetches_are_recorded_in_a_tests_transaction(self) -> None:
        await Tag.objects.native_bulk_create([Tag(name=f"tag {n}") for n in range(5)])
        with asyncorm.timeline() as seen:
            new = Tag.objects.filter(name__startswith="tag ")
            assert len([tag async for tag in new.native_iterator(chunk_size=2)]) == 5
        assert sum(span.what.startswith("FETCH") for span in seen.commands) == 4


async def test_a_slow_checkout_is_warned_of(
    caplog: pytest.LogCaptureFixture, settings: Any
) -> None:
    settings.ASYNCORM = {"SLOW_CHECKOUT": 0.05}
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        with caplog.at_level(logging.WARNING, "asyncorm"):
            async with asyncorm.atomic(alias):
                waiting = asyncio.create_task(native(backend_pid)(alias))
                other = asyncio.create_task(_begin(alias))
                await asyncio.sleep(0.3)
            await asyncio.gather(waiting, other)
        (message, *_) = [r.getMessage() for r in caplog.records if r.name == "asyncorm"]
        assert "waited 0.05 s" in message and f"'{alias}'" in message
        assert "the transaction block that began at" in message and "test_timeline.py" in message
        await asyncorm.close_pools(alias)


async def _begin(alias: str) -> None:
    async with asyncorm.detached(), asyncorm.atomic(alias):
        pass


async def test_only_the_users_tasks() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:

        async def count() -> None:
            await Tag.objects.using(alias).native_count()

        await count()
        async with asyncorm.timeline() as seen:
            tasks = [asyncio.create_task(count()) for _ in range(12)]
            await asyncio.gather(*tasks)
        await asyncorm.close_pools(alias)
    assert {span.task for span in seen.spans} == {task.get_name() for task in tasks}
    assert str(seen).startswith("12 queries of 12 tasks on ")
