"""Blocks and the like in asynchronous generators: who is inside, and who is not any more."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from typing import Any

import anyio
import pytest
from asgiref.sync import async_to_sync
from django.db import OperationalError, connection
from django.db.transaction import TransactionManagementError
from django.test import override_settings

import asyncorm
from asyncorm import generators, limits
from tests.project.myapp.models import Item
from tests.support import all_given_back, database

ids = count(1)


@pytest.fixture(autouse=True)
def clean(django_db_setup: Any, django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield
        with connection.cursor() as cursor:
            cursor.execute("TRUNCATE myapp_item")
        connection.close()


async def add(name: str) -> Item:
    return await Item.objects.native_create(remote_id=next(ids), name=name)


async def names() -> list[str]:
    return sorted(await Item.objects.values_list("name", flat=True).anative())


async def committed() -> list[str]:
    """What other connections see."""
    async with asyncorm.detached():
        return await names()


class Value:
    """What weak references may refer to."""


async def backend() -> int:
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT pg_backend_pid()")
        return (await cursor.fetchone())[0]  # type: ignore[index,no-any-return]


# Generators that hold something


async def in_block() -> AsyncIterator[int]:
    async with asyncorm.atomic():
        await add("lost")
        yield 1
        yield 2


async def in_nested_blocks() -> AsyncIterator[int]:
    async with asyncorm.atomic(), asyncorm.connection(), asyncorm.atomic():
        await add("lost")
        async for number in in_block():
            yield number


async def in_connection() -> AsyncIterator[int]:
    async with asyncorm.connection():
        await backend()
        yield 1
        yield 2


async def streaming() -> AsyncIterator[int]:
    async with asyncorm.atomic():
        await add("lost")
        await add("lost")
        async for _ in Item.objects.native_iterator(chunk_size=1):
            yield 1


async def by_context_manager() -> AsyncIterator[int]:
    @contextlib.asynccontextmanager
    async def unit() -> AsyncIterator[None]:
        async with asyncorm.atomic():
            yield

    async with unit():
        await add("lost")
        yield 1
        yield 2


async def in_another() -> AsyncIterator[int]:
    async for number in in_block():
        yield number


GENERATORS = [
    in_block,
    in_nested_blocks,
    in_connection,
    streaming,
    by_context_manager,
    in_another,
]


# Ways to leave one


async def by_break(make: Callable[[], AsyncIterator[int]]) -> None:
    async for _ in make():
        break


async def by_return(make: Callable[[], AsyncIterator[int]]) -> int:
    async for number in make():
        return number
    return 0


async def by_exception(make: Callable[[], AsyncIterator[int]]) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for _ in make():
            raise ZeroDivisionError


async def by_anext(make: Callable[[], AsyncIterator[int]]) -> int:
    return await anext(make())


async def by_comprehension(make: Callable[[], AsyncIterator[int]]) -> None:
    with contextlib.suppress(ZeroDivisionError):
        [1 / (number - 1) async for number in make()]


async def by_variable(make: Callable[[], AsyncIterator[int]]) -> None:
    generator = make()
    await anext(generator)
    await anext(generator)
    del generator


async def by_cancellation(make: Callable[[], AsyncIterator[int]]) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        async with asyncio.timeout(0.01):
            async for _ in make():
                await asyncio.sleep(30)


async def by_anyio(make: Callable[[], AsyncIterator[int]]) -> None:
    with anyio.move_on_after(0.01):
        async for _ in make():
            await anyio.sleep(30)


async def by_closing(make: Callable[[], AsyncIterator[int]]) -> None:
    async with contextlib.aclosing(make()) as generator:  # type: ignore[type-var]
        async for _ in generator:
            break


async def by_throwing(make: Callable[[], AsyncIterator[int]]) -> None:
    generator: Any = make()
    await anext(generator)
    with contextlib.suppress(ZeroDivisionError):
        await generator.athrow(ZeroDivisionError)


WAYS = [
    by_break,
    by_return,
    by_exception,
    by_anext,
    by_comprehension,
    by_variable,
    by_cancellation,
    by_anyio,
    by_closing,
    by_throwing,
]


@pytest.mark.parametrize("make", GENERATORS)
@pytest.mark.parametrize("leave", WAYS)
async def test_the_consumer_is_outside_at_once(
    leave: Callable[..., Awaitable[Any]], make: Callable[[], AsyncIterator[int]]
) -> None:
    await leave(make)
    await add("kept")
    await asyncio.gather(add("kept"), add("kept"))
    async with asyncorm.atomic():
        await add("kept")
        await leave(make)
        await add("kept")
    await all_given_back()
    assert await names() == ["kept"] * 5
    stats = asyncorm.pool_stats()
    assert stats["pool_size"] == stats["pool_available"] <= stats["pool_max"]


@pytest.mark.parametrize("make", GENERATORS)
async def test_a_block_around_is_not_left(make: Callable[[], AsyncIterator[int]]) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with asyncorm.atomic():
            await by_break(make)
            await add("lost")
            await asyncio.gather(add("lost"), add("lost"))
            raise ZeroDivisionError
    await all_given_back()
    assert await names() == []


async def test_detached_in_a_generator() -> None:
    async def outside() -> AsyncIterator[int]:
        async with asyncorm.detached():
            await add("kept")
            yield 1

    with contextlib.suppress(ZeroDivisionError):
        async with asyncorm.atomic():
            await by_break(outside)
            await add("lost")
            await asyncio.gather(add("lost"), add("lost"))
            raise ZeroDivisionError
    assert await names() == ["kept"]


async def test_parallelism_in_a_generator() -> None:
    async def limited() -> AsyncIterator[int]:
        with asyncorm.parallelism(1):
            yield 1

    def limit() -> Any:
        return limits._current.get()

    await by_break(limited)
    assert limit() is None
    with asyncorm.parallelism(3):
        outside = limit()
        async for _ in limited():
            assert limit() is not outside
            break
        assert limit() is outside
        assert len({*await asyncio.gather(*(backend() for _ in range(9)))}) <= 3
    assert limit() is None


async def test_a_second_generator_in_the_place_of_one_that_was_left() -> None:
    """Its frame is where that of the first one was, and it is told, too, when it is dropped."""

    async def limited() -> AsyncIterator[int]:
        with asyncorm.parallelism(1):
            yield 1

    before = len(generators.places)
    for _ in range(50):
        await by_break(limited)
        assert limits._current.get() is None
        await asyncio.sleep(0)
    assert len(generators.places) == before


async def test_a_kept_connection_goes_on_without_a_generators_block() -> None:
    """The block that was left in it is rolled back before the next statement."""

    async def block() -> AsyncIterator[int]:
        async with asyncorm.atomic():
            await add("lost")
            yield 1

    async def in_block() -> None:
        async with asyncorm.atomic():
            await add("kept")

    async def nothing() -> None:
        pass

    nexts: list[Callable[[], Awaitable[Any]]] = [
        lambda: add("kept"), in_block, lambda: asyncorm.batch(lambda: add("kept")), nothing,
    ]  # fmt: skip
    for then in nexts:
        async with asyncorm.connection():
            before = await backend()
            await by_break(block)
            await then()
            assert await backend() == before
            await by_break(block)
    await all_given_back()
    assert await names() == ["kept"] * 3


async def test_tasks_that_the_generator_started() -> None:
    """They were started in its block, and are not in what the consumer does then."""
    go = asyncio.Event()
    tasks = []

    async def late() -> None:
        await go.wait()
        await add("never")

    async def starts() -> AsyncIterator[int]:
        async with asyncorm.atomic():
            tasks.append(asyncio.create_task(late()))
            yield 1

    await by_break(starts)
    tasks.append(asyncio.create_task(add("kept")))  # type: ignore[arg-type]
    go.set()
    with pytest.raises(TransactionManagementError, match=r"test_generators\.py"):
        await tasks[0]
    await tasks[1]
    assert await names() == ["kept"]


@pytest.mark.parametrize("inside", [in_block, in_connection, by_context_manager])
async def test_a_generator_that_is_dropped_elsewhere(inside: Any) -> None:
    """By the garbage collector, in another thread."""
    for thread in (False, True):
        generator = inside()
        await anext(generator)
        cycle = [generator]
        cycle.append(cycle)
        del generator, cycle
        await (asyncio.to_thread(gc.collect) if thread else asyncio.sleep(0, gc.collect()))
        await add("kept")
        await asyncio.gather(add("kept"), add("kept"))
        await all_given_back()
    assert await names() == ["kept"] * 6


@pytest.mark.parametrize("make", GENERATORS)
def test_nothing_is_left_in_the_thread(make: Callable[[], AsyncIterator[int]]) -> None:
    """asgiref copies the context of a coroutine back."""

    async def gathered() -> None:
        await asyncio.gather(add("kept"), add("kept"))

    async def suspended() -> None:
        generator = make()
        held.append(generator)
        await anext(generator)

    async def left() -> None:
        await by_break(make)

    held: list[Any] = []
    for peek in (left, suspended):
        async_to_sync(peek)()
        async_to_sync(add)("kept")
        async_to_sync(gathered)()
        asyncio.run(gathered())
    assert async_to_sync(names)() == ["kept"] * 10


# Who is inside


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="since Python 3.12")
async def test_an_eager_task_of_a_generator_is_a_child_task() -> None:
    async def pids() -> AsyncIterator[int]:
        async with asyncorm.connection():
            yield await backend()
            yield await asyncio.create_task(backend())
            async with asyncorm.atomic():
                yield await backend()
                yield await asyncio.create_task(backend())

    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    try:
        kept, other, *inside = [pid async for pid in pids()]
    finally:
        loop.set_task_factory(factory)
    assert other != kept
    assert inside == [kept, kept]


async def step_here(generator: Any) -> Any:
    return await anext(generator)


async def step_in_a_task(generator: Any) -> Any:
    return await asyncio.create_task(step_here(generator))


async def step_in_time(generator: Any) -> Any:
    return await asyncio.wait_for(anext(generator), 30)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("step", [step_here, step_in_a_task, step_in_time])
async def test_steps_driven_by_different_tasks(step: Any, fails: bool) -> None:
    """As for heartbeats between the events of a stream."""

    async def events() -> AsyncIterator[int]:
        async with asyncorm.connection():
            pid = await backend()
            yield 0
            assert await backend() == pid
            async with asyncorm.atomic():
                for number in range(3):
                    await add("event")
                    yield number
                    assert await names() == ["event"] * (number + 1)
                    assert await backend() == pid
                    async with asyncorm.atomic():
                        await Item.objects.select_for_update().anative()
                if fails:
                    raise ZeroDivisionError

    generator = events()
    with contextlib.suppress(StopAsyncIteration, ZeroDivisionError):
        while True:
            await step(generator)
    await all_given_back()
    assert await names() == ([] if fails else ["event"] * 3)


async def test_the_body_of_a_loop_is_inside() -> None:
    async def twice() -> AsyncIterator[int]:
        async with asyncorm.atomic():
            yield 1
            yield 2
            asyncorm.set_rollback(True)

    async for _ in twice():
        await add("lost")
        await asyncio.gather(add("lost"), add("lost"))
        async with asyncorm.atomic():
            await add("lost")
        assert await committed() == []
    assert await names() == []
    await add("kept")
    assert await committed() == ["kept"]


async def test_what_the_body_wrote_is_not_lost_silently(caplog: pytest.LogCaptureFixture) -> None:
    async def reading() -> AsyncIterator[int]:
        async with asyncorm.atomic():
            yield 1
            yield 2

    for writes in (False, True):
        async for _ in reading():
            await (add("lost") if writes else names())
            break
        await all_given_back()
        assert ("left before its end" in caplog.text) is writes
        assert await names() == []
    assert "test_generators.py" in caplog.text


async def test_a_loop_that_is_left_while_the_generator_is_kept() -> None:
    generator: Any = in_block()
    async for _ in generator:
        await add("lost")
        gone = weakref.ref(value := Value())
        del value
        assert gone() is None
        await add("lost")
        break
    with pytest.raises(TransactionManagementError, match="Close the generator"):
        await add("refused")
    await generator.aclose()
    await add("kept")
    assert await committed() == ["kept"]


async def test_a_generator_that_is_stepped_by_hand_keeps_others_inside() -> None:
    generator: Any = in_block()
    async for _ in generator:  # a loop that goes on is no hindrance either
        await add("lost")
    await Item.objects.all().adelete()

    async def by_hand() -> None:
        generator: Any = in_block()
        await anext(generator)
        await add("written")
        with contextlib.suppress(StopAsyncIteration):
            while True:
                await anext(generator)

    await by_hand()
    assert await committed() == ["lost", "written"]


async def test_context_managers_and_dependencies_keep_others_inside() -> None:
    async def dependency() -> AsyncIterator[int]:
        async with asyncorm.atomic():
            yield 1

    async def handler() -> None:
        await asyncio.gather(add("lost"), add("lost"))
        assert await committed() == []
        raise ZeroDivisionError

    async def by_hand() -> None:
        generator: Any = dependency()
        await anext(generator)
        try:
            await handler()
        except ZeroDivisionError as exc:
            await generator.athrow(exc)

    async def by_contextlib() -> None:
        async with contextlib.AsyncExitStack() as stack:
            manager: Any = contextlib.asynccontextmanager(dependency)
            await stack.enter_async_context(manager())
            await handler()

    for drive in (by_hand, by_contextlib):
        with pytest.raises(ZeroDivisionError):
            await drive()
        assert await names() == []


async def test_a_block_of_the_consumer_inside_that_of_a_generator() -> None:
    async def twice() -> AsyncIterator[int]:
        async with asyncorm.atomic():
            yield 1
            await add("inner")
            yield 2

    generator = twice()
    await anext(generator)
    async with asyncorm.atomic():
        await add("outer")
        await anext(generator)  # its statement is in the innermost block
    with contextlib.suppress(StopAsyncIteration):
        await anext(generator)
    assert await committed() == ["inner", "outer"]


# What nobody leaves


async def all_collected() -> None:
    async with asyncio.timeout(30):
        while True:
            gc.collect()
            stats = asyncorm.pool_stats()
            if stats["pool_available"] == stats["pool_size"]:
                return
            await asyncio.sleep(0.01)


async def entered_by_hand() -> None:
    await asyncorm.atomic().__aenter__()
    await asyncorm.atomic().__aenter__()
    await add("lost")


async def on_a_stack() -> None:
    stack = contextlib.AsyncExitStack()
    await stack.enter_async_context(asyncorm.atomic())
    await stack.enter_async_context(asyncorm.atomic())
    await add("lost")


async def kept() -> None:
    await asyncorm.connection().__aenter__()
    await backend()


async def waiting_for_nobody() -> None:
    async with asyncorm.connection(), asyncorm.atomic(), asyncorm.atomic():
        await add("lost")
        await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("forget", [entered_by_hand, on_a_stack, kept, waiting_for_nobody])
async def test_what_nobody_leaves_is_given_back(
    forget: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    task = asyncio.create_task(forget())
    await asyncio.wait((task,), timeout=0.5)
    del task
    await all_collected()
    await add("kept")
    assert await committed() == ["kept"]
    assert "test_generators.py" in caplog.text or forget is waiting_for_nobody


async def test_a_block_is_not_forgotten_while_somebody_is_in_it() -> None:
    async def inside() -> None:
        await asyncorm.atomic().__aenter__()
        await add("lost")
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.gather(add("lost"), add("lost"))
        assert await committed() == []

    await asyncio.create_task(inside())
    await all_collected()
    assert await names() == []


# Streams that are left


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("limited", [False, True])
async def test_a_stream_that_is_being_closed_is_no_deadlock(size: int, limited: bool) -> None:
    async def first(alias: str) -> Item:
        async for item in Item.objects.using(alias).order_by("pk").native_iterator(chunk_size=1):
            return item
        raise AssertionError

    async def request(alias: str) -> None:
        for _ in range(3):
            item = await first(alias)
            await item.native_save()

    await add("a")
    await add("b")
    options = {"pool": {"min_size": 0, "max_size": 4 if limited else size, "timeout": 30}}
    with database(OPTIONS=options) as alias:
        with asyncorm.parallelism(size if limited else 100, using=alias):
            await asyncio.gather(*(request(alias) for _ in range(20)))
        await all_given_back(alias)
        await asyncorm.close_pools(alias)


async def test_two_that_hold_what_they_wait_for_are_told() -> None:
    await add("a")
    await add("b")
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1, "timeout": 30}}) as alias:
        items = Item.objects.using(alias)
        rows: Any = items.native_iterator(chunk_size=1)
        await anext(rows)
        with pytest.raises(OperationalError, match="Deadlock"):
            await items.native_count()
        await rows.aclose()
        assert await items.native_count() == 2
        await asyncorm.close_pools(alias)


async def test_the_connection_goes_on_without_a_stream_that_is_left_in_it() -> None:
    """Its cursor is closed before the next statement, not in the midst of it."""

    async def left() -> None:
        async for _ in Item.objects.order_by("pk").native_iterator(chunk_size=1):
            break

    async def block() -> None:
        async with asyncorm.atomic():
            await add("in a block")

    async def nothing() -> None:
        pass

    async def open_cursors() -> int:
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT count(*) FROM pg_cursors WHERE name <> ''")
            return (await cursor.fetchone())[0]  # type: ignore[index,no-any-return]

    nexts: list[Callable[[], Awaitable[Any]]] = [
        Item.objects.native_count, lambda: add("next"), block, left, nothing, backend,
        lambda: asyncorm.batch(Item.objects.count, Item.objects.count),
    ]  # fmt: skip
    await add("a")
    await add("b")
    for then in nexts:
        async with asyncorm.connection():
            before = await backend()
            await left()
            await then()
            assert await backend() == before
            async with asyncio.timeout(30):
                # Until the loop has closed the generator.
                while await open_cursors():  # noqa: ASYNC110
                    await asyncio.sleep(0)
            await left()
        assert await backend() == before
    await all_given_back()


@pytest.mark.parametrize("way", ["aiterator", "native_iterator"])
async def test_closing_a_stream_gives_its_connection_back(way: str) -> None:
    await add("a")
    await add("b")
    with override_settings(ASYNCORM={"SWAP_MANAGERS": True}):
        for queryset in (Item.objects.all(), Item.objects):
            rows = getattr(queryset, way)(chunk_size=1)
            async with contextlib.aclosing(rows):
                async for _ in rows:
                    break
                stats = asyncorm.pool_stats()
                assert stats["pool_available"] == stats["pool_size"] - 1
            stats = asyncorm.pool_stats()
            assert stats["pool_available"] == stats["pool_size"]
        async with asyncorm.atomic():
            async with contextlib.aclosing(getattr(Item.objects, way)(chunk_size=1)) as rows:
                await anext(rows)
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT count(*) FROM pg_cursors WHERE name <> ''")
                assert await cursor.fetchone() == (0,)
