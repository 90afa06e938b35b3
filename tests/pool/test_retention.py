"""What a burst of operations needed, and what a statement returned, is not kept."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from greenlet import greenlet

import asyncorm
from asyncorm import _events, await_, bridge, native, pools
from asyncorm._sessions.scopes import current_scope
from asyncorm._wire.lazy import DeferredConnection
from asyncorm.bridge import Runner
from asyncorm.driver import Connection
from asyncorm.multiplexing import _Request
from tests.project.shop.models import Book, Tag
from tests.support import database, eventually, sleep

pytestmark = pytest.mark.usefixtures("shop_data")

MOST = 128  # greenlets that a thread keeps


@pytest.fixture(autouse=True)
def _no_runners_of_others() -> None:
    """Greenlets that earlier tests left in this thread are of no interest."""
    bridge._idle.runners.clear()


def runners() -> int:
    gc.collect()
    return sum(type(thing) is Runner for thing in gc.get_objects())


def requests() -> int:
    return sum(type(thing) is _Request for thing in gc.get_objects())


async def waiting(count: int) -> None:
    """So many operations at once that await something."""
    entered = asyncio.Event()
    inside = 0

    def operation() -> None:
        nonlocal inside
        inside += 1
        if inside == count:
            entered.set()
        await_(entered.wait())

    await asyncio.gather(*[native(operation)() for _ in range(count)])


async def test_greenlets_of_a_burst_end() -> None:
    others = runners()  # of other threads
    for _ in range(3):
        await waiting(2000)
        assert runners() - others <= MOST


def test_greenlets_end_with_their_thread() -> None:
    before = runners()
    for _ in range(3):
        thread = threading.Thread(target=lambda: asyncio.run(waiting(200)))
        thread.start()
        thread.join()
        assert runners() == before


def test_threads_with_loops_leave_no_greenlet_behind() -> None:
    async def many() -> None:
        for _ in range(300):
            await Tag.objects.native_count()
        async with asyncorm.atomic():
            await asyncio.gather(*[Tag.objects.native_count() for _ in range(300)])
        async for _ in Tag.objects.native_iterator(chunk_size=1):
            break

    def greenlets() -> int:
        gc.collect()
        return sum(issubclass(type(thing), greenlet) for thing in gc.get_objects())

    before = greenlets()
    for _ in range(5):
        threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Those that greenlet makes for a thread itself end when the next one begins.
    assert greenlets() - before <= 4


async def test_greenlets_keep_nothing_of_an_operation() -> None:
    class Big:
        def use(self, other: "Big") -> "Big":
            return other

    async def operation() -> weakref.ref[Any]:
        big = Big()
        assert await native(big.use)(big) is big
        with pytest.raises(AttributeError):
            await native(lambda: big.gone)()  # type: ignore[attr-defined]
        return weakref.ref(big)

    left = await asyncio.gather(*[operation() for _ in range(10)])
    gc.collect()
    assert [ref() for ref in left] == [None] * 10


async def test_wrappers_and_connections_of_a_burst_are_dropped() -> None:
    def several(using: str) -> None:
        for _ in range(2):
            assert Tag.objects.using(using).count() == 6
            sleep_a_little(using)

    def sleep_a_little(using: str) -> None:
        from django.db import connections

        with connections[using].cursor() as cursor:
            cursor.execute("SELECT 1")

    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2, "timeout": 60}}) as alias:
        for _ in range(2):
            await asyncio.gather(*[native(several)(alias) for _ in range(500)])
            pool = pools.find(alias)
            assert pool is not None
            assert len(pool.wrappers) <= 32
            gc.collect()
            for kind in (type(pool.wrappers[0]), DeferredConnection, Connection):
                left = sum(type(thing) is kind for thing in gc.get_objects())
                assert left < 100, "those of other tests included"
        await asyncorm.close_pools(alias)


async def test_idle_connections_keep_no_result() -> None:
    def rows(using: str) -> list[Any]:
        books = list(Book.objects.using(using).order_by("pk"))
        with_times = list(Book.objects.using(using).values_list("pk", "title").order_by("pk"))
        assert len(books) == len(with_times) > 1
        return [weakref.ref(book) for book in books]

    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        for _ in range(3):  # the second time from the statement cache
            some = await asyncio.gather(*[native(rows)(alias) for _ in range(4)])
            await native(lambda: Book.objects.using(alias).get(pk=1))()
            await Tag.objects.using(alias).native_count()
        pool = pools.find(alias)
        assert pool is not None
        twins = [conn.twin for conn in pool.connections.live]  # type: ignore[union-attr]
        assert len(twins) == 2
        for twin in twins:
            assert twin.transformer.pgresult is None
            assert twin.text_transformer.pgresult is None
        gc.collect()
        assert not [ref for refs in some for ref in refs if ref() is not None]
        await asyncorm.close_pools(alias)


@pytest.fixture(params=[False, True])
def listening(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nobody listens to events, or somebody who keeps nothing."""
    listener = _events.Listener
    if request.param:
        listener = type("Keeps nothing", (listener,), {
            name: lambda self, event: None for name in _events._heard
        })  # fmt: skip
    others, mine = [*_events._listeners], listener()
    for each in others:
        _events.unlisten(each)
    _events.listen(mine)
    yield
    _events.unlisten(mine)
    for each in others:
        _events.listen(each)


@pytest.mark.usefixtures("listening")
async def test_what_is_saved_and_read_ends_without_the_garbage_collector(fresh_shop: Any) -> None:
    async def operations(using: str) -> list[weakref.ref[Any]]:
        tags = Tag.objects.using(using)
        made = await tags.native_create(name="New")
        made.name = "Newer"
        await made.native_save()
        async with asyncorm.atomic(using):
            block = weakref.ref(current_scope.get().block)
            await asyncio.gather(*[made.native_save() for _ in range(3)])
        read = await asyncio.gather(*[tags.native_get(pk=made.pk) for _ in range(20)])
        await made.native_delete()
        failing = [asyncio.create_task(tags.native_get(pk=0)) for _ in range(3)]
        await asyncio.wait(failing)
        assert {type(task.exception()) for task in failing} == {Tag.DoesNotExist}
        return [block, *map(weakref.ref, [made, *read, *failing])]

    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        for _ in range(3):  # then the statements are known
            await operations(alias)
        gc.collect()
        gc.disable()
        try:
            before = requests()
            left = await operations(alias)
            assert ([ref() for ref in left], requests()) == ([None] * 25, before)
        finally:
            gc.enable()
        await asyncorm.close_pools(alias)


@pytest.mark.parametrize("native_child", [False, True])
@pytest.mark.usefixtures("listening")
async def test_a_block_that_ends_by_force_ends_without_the_garbage_collector(
    fresh_shop: Any, native_child: bool
) -> None:
    async def nested(using: str, go: asyncio.Event) -> None:
        async with asyncorm.atomic(using):
            await Tag.objects.using(using).native_count()
            await go.wait()

    def native_nested(using: str, go: asyncio.Event) -> None:
        with transaction.atomic(using):
            Tag.objects.using(using).count()
            await_(go.wait())

    async def operation(using: str) -> weakref.ref[Any]:
        go = asyncio.Event()
        with pytest.raises(TransactionManagementError, match="does nothing"):
            async with asyncorm.atomic(using):
                block = weakref.ref(current_scope.get().block)
                await Tag.objects.using(using).native_count()
                child = asyncio.create_task(
                    native(native_nested)(using, go) if native_child else nested(using, go)
                )
                await eventually(lambda: block().inner is not None)
                waiting = asyncio.create_task(Tag.objects.using(using).native_count())
                await asyncio.sleep(0)
        go.set()
        await asyncio.wait((child, waiting))
        for task in (child, waiting):
            assert isinstance(task.exception(), TransactionManagementError)
        return block

    with (
        database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias,
        override_settings(ASYNCORM={"LOCK_TIMEOUT": 0.1}),
    ):
        await operation(alias)
        gc.collect()
        gc.disable()
        try:
            before = requests()
            block = await operation(alias)
            assert (block(), requests()) == (None, before)
        finally:
            gc.enable()
        await asyncorm.close_pools(alias)


async def test_limits_end_with_their_pool() -> None:

    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        limit = asyncorm.parallelism(2, using=alias)
        async with limit:
            await native(sleep)(0)
            await Tag.objects.using(alias).native_count()
        pool: Any = weakref.ref(pools.find(alias))
        await asyncorm.close_pools(alias)
        await asyncio.sleep(0)  # this may be running in the callback of a connection's reader
        gc.collect()
        assert pool() is None
    assert limit.size == 2
