"""Streams that read ahead: the same rows, sooner, and never in anybody's way."""

import asyncio
import contextlib
import gc
import random
from typing import Any

import pytest
from django.db import DataError, NotSupportedError
from django.db.models import DateTimeField, Func, IntegerField, Prefetch, Value
from django.test import override_settings
from django.utils import timezone

import asyncorm
from asyncorm import native
from tests.project.legacy.models import LegacyRecord
from tests.project.shop.models import Book, Tag
from tests.support import all_given_back, backend_pid, database, value

pytestmark = pytest.mark.usefixtures("shop_data")


class Slow(Func):
    """A column that takes its time: the server sleeps before the first row."""

    template = "(SELECT pg_backend_pid() FROM (SELECT pg_sleep(%(expressions)s)) AS s)"
    output_field = IntegerField()


@contextlib.asynccontextmanager
async def block_if(inside: bool) -> Any:
    if inside:
        async with asyncorm.atomic():
            yield
    else:
        yield


inside = pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])


@inside
@pytest.mark.parametrize("ahead", [1, 2, 50])
async def test_every_row_once(inside: bool, ahead: int) -> None:
    async with block_if(inside):
        for size in (1, 7, 29, 30, 31, 2000):
            rows = Book.objects.order_by("pk").native_iterator(size, read_ahead=ahead)
            assert [book.pk async for book in rows] == list(range(1, 31))
        assert [row async for row in Book.objects.none().native_iterator(read_ahead=ahead)] == []
    await all_given_back()


@pytest.mark.parametrize("ahead", [-1, 1.5, True, None, "1"])
async def test_wrong_numbers_are_refused(ahead: Any) -> None:
    with pytest.raises(ValueError, match="read_ahead"):
        Tag.objects.native_iterator(read_ahead=ahead)
    with pytest.raises(NotSupportedError):
        LegacyRecord.objects.native_iterator(read_ahead=1)


@inside
@pytest.mark.parametrize("ahead", [0, 1])
async def test_the_next_chunk_travels_while_one_is_used(inside: bool, ahead: int) -> None:
    # In a prefetch: outside a transaction the cursor's rows are all there when it is declared.
    began = Func(template="clock_timestamp()", output_field=DateTimeField())
    tags = Tag.objects.order_by("pk").prefetch_related(
        Prefetch("books", Book.objects.annotate(began=began))
    )
    async with block_if(inside):
        used_until = None
        async for tag in tags.native_iterator(chunk_size=1, read_ahead=ahead):
            books = list(tag.books.all())
            if used_until is not None and books:
                assert (books[0].began < used_until) == bool(ahead)
            await asyncio.sleep(0.2)
            used_until = timezone.now()


async def test_not_more_than_asked_for() -> None:
    """The server has been asked for as many rows as the stream may be ahead, and no more."""
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        rows = Book.objects.using(alias).order_by("pk").native_iterator(2, read_ahead=3)
        await anext(rows)
        await asyncio.sleep(0.2)
        sql = "SELECT query FROM pg_stat_activity WHERE query LIKE 'FETCH%%'"
        assert "FETCH FORWARD 2" in await native(value)(sql)
        assert len(rows.ag_frame.f_locals["ahead"].ready) == 3  # type: ignore[attr-defined]
        await rows.aclose()  # type: ignore[attr-defined]
        await asyncorm.close_pools(alias)


@inside
async def test_it_keeps_one_connection(inside: bool) -> None:
    async with block_if(inside):
        rows = Tag.objects.annotate(pid=Slow(Value(0))).native_iterator(1, read_ahead=2)
        pids = {tag.pid async for tag in rows}
        assert len(pids) == 1
        if inside:
            assert pids == {await native(backend_pid)()}


@inside
async def test_prefetches_are_read_ahead_too(inside: bool) -> None:
    books = Book.objects.order_by("pk").prefetch_related(
        Prefetch("tags", Tag.objects.order_by("pk")), "publisher__country"
    )
    expected = await books.all().anative()
    async with block_if(inside):
        found = [book async for book in books.native_iterator(4, read_ahead=2)]
    assert found == expected
    for book, other in zip(found, expected, strict=True):
        assert list(book.tags.all()) == list(other.tags.all())


@inside
@pytest.mark.parametrize("how", ["break", "error", "abandoned"])
async def test_left_early(inside: bool, how: str) -> None:
    async with block_if(inside):
        await Tag.objects.native_count()
        for taken in range(1, 8):
            rows = Book.objects.annotate(pid=Slow(Value(0.01))).native_iterator(2, read_ahead=2)
            if how == "abandoned":
                for _ in range(taken):
                    await anext(rows)
                del rows
                gc.collect()
                await asyncio.sleep(0.1)
                continue
            with contextlib.suppress(ZeroDivisionError):
                async with contextlib.aclosing(rows):  # type: ignore[type-var]
                    n = 0
                    async for _ in rows:
                        n += 1
                        if n == taken:
                            if how == "error":
                                raise ZeroDivisionError
                            break
        # The transaction is alive, and no cursor is left.
        if how != "abandoned":
            assert await native(value)("SELECT count(*) FROM pg_cursors") == 0
        assert await Tag.objects.native_count() == 6
    await all_given_back()


@inside
async def test_rows_before_an_error_are_delivered(inside: bool) -> None:
    rows = Tag.objects.extra(select={"x": "1 / (4 - id)"}).extra(where=["random() < 2"])
    for ahead in (1, 2, 5):
        seen = []
        with pytest.raises(DataError, match="division by zero"):
            async with block_if(inside):
                async for tag in rows.order_by().native_iterator(1, read_ahead=ahead):
                    seen.append(tag.pk)
                    await asyncio.sleep(0.02)
        assert seen == ([1, 2, 3] if inside else [])  # outside DECLARE fails
    await all_given_back()


@pytest.mark.parametrize("ahead", [0, 1])
async def test_code_that_fails_at_a_row_costs_no_connection(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = await native(backend_pid)()
    error = None

    def fail(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Book, "from_db", classmethod(fail))
        try:
            async for _ in Book.objects.native_iterator(5, read_ahead=ahead):
                pass
        except ZeroDivisionError as exc:
            error = exc  # it keeps what made the rows
    await all_given_back()
    assert await native(backend_pid)() == pid
    assert error is not None


async def test_blocks_between_chunks() -> None:
    """Blocks that open and close while a chunk is read, with statements in them."""
    with override_settings(ASYNCORM={"LOCK_TIMEOUT": 5.0}):
        async with asyncorm.atomic():
            seen = []
            async for book in Book.objects.order_by("pk").native_iterator(3, read_ahead=1):
                seen.append(book.pk)
                async with asyncorm.atomic():
                    await Tag.objects.filter(pk=1).native_update(weight=book.pk)
                    if book.pk % 2:
                        asyncorm.set_rollback(True)
                kept = await Tag.objects.filter(pk=1, weight=book.pk).native_exists()
                assert kept == (book.pk % 2 == 0)
            assert seen == list(range(1, 31))
            asyncorm.set_rollback(True)


async def test_a_chunk_asked_for_in_a_block_that_keeps_it_from_being_read() -> None:
    """The reading task waits for a lock that the asking task holds: no deadlock."""
    with override_settings(ASYNCORM={"LOCK_TIMEOUT": 3.0}):
        async with asyncorm.atomic():
            rows = Book.objects.order_by("pk").native_iterator(2, read_ahead=1)
            seen = [(await anext(rows)).pk]
            async with asyncorm.atomic():
                seen += [(await anext(rows)).pk for _ in range(10)]
                async with asyncorm.atomic():
                    seen += [(await anext(rows)).pk for _ in range(10)]
            seen += [book.pk async for book in rows]
            assert seen == list(range(1, 31))


@pytest.mark.parametrize("seed", range(12))
async def test_random_programs(seed: int) -> None:
    """Whatever happens between the chunks, two streams give their rows, in order, once."""
    dice = random.Random(seed)

    async def step(depth: int = 0) -> None:
        match dice.randrange(7):
            case 0:
                await asyncio.sleep(dice.choice([0, 0, 0.001, 0.01]))
            case 1:
                await Tag.objects.native_count()
            case 2 if depth < 3:
                async with asyncorm.atomic():
                    await step(depth + 1)
                    await take()
                    if dice.random() < 0.3:
                        asyncorm.set_rollback(True)
            case 3 if depth < 3:
                await asyncio.gather(Tag.objects.native_count(), take(), take())
            case 4:
                await Tag.objects.filter(pk=1).native_update(weight=1)
            case _:
                await take()

    async def take() -> None:
        number = dice.randrange(2)
        if not busy[number]:
            busy[number] = True
            book = await anext(streams[number], None)
            busy[number] = False
            if book is not None:
                seen[number].append(book.pk)

    with override_settings(ASYNCORM={"LOCK_TIMEOUT": 5.0}):
        async with asyncio.timeout(30):
            async with block_if(seed % 3 != 0):
                busy = [False, False]
                streams = [
                    Book.objects.order_by("pk").native_iterator(
                        dice.choice([1, 2, 5, 40]), read_ahead=dice.choice([1, 1, 3])
                    )
                    for _ in range(2)
                ]
                # A cursor goes with the savepoint that it was declared in.
                seen = [[(await anext(rows)).pk] for rows in streams]
                for _ in range(40):
                    await step()
                for number, rows in enumerate(streams):
                    if dice.random() < 0.7:
                        seen[number] += [book.pk async for book in rows]
                        assert seen[number] == list(range(1, 31))
                    else:
                        await rows.aclose()  # type: ignore[attr-defined]
                        assert seen[number] == list(range(1, len(seen[number]) + 1))
                assert await Tag.objects.native_count() == 6
    await all_given_back()


async def test_a_stream_that_outlives_its_block() -> None:
    async with asyncorm.atomic():
        rows = Book.objects.order_by("pk").native_iterator(2, read_ahead=1)
        await anext(rows)
    with pytest.raises(Exception, match=r"cursor|block|operation"):
        async for _ in rows:
            pass
    assert await Tag.objects.native_count() == 6
    await all_given_back()


async def test_inside_connection() -> None:
    async with asyncorm.connection():
        async with asyncorm.cursor() as cursor:
            await cursor.execute("CREATE TEMPORARY TABLE mine (n integer)")
        seen = 0
        async for _ in Book.objects.native_iterator(2, read_ahead=2):
            seen += await native(value)("SELECT 1 + count(*) FROM mine")
        assert seen == 30


@inside
@pytest.mark.parametrize("ahead", [0, 1])
async def test_a_cancelled_reader(inside: bool, ahead: int) -> None:
    async def read() -> None:
        async with block_if(inside):
            slow = Book.objects.annotate(pid=Slow(Value(0.005)))
            async for _ in slow.native_iterator(4, read_ahead=ahead):
                await asyncio.sleep(0.01)

    for milliseconds in range(0, 60, 4):
        task = asyncio.create_task(read())
        await asyncio.sleep(milliseconds / 1000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    del task
    gc.collect()
    await all_given_back()
    assert await Tag.objects.native_count() == 6
