"""The API: the native_* methods, raw SQL, kept connections, blocks, and Django beside them."""

import asyncio
import gc
import inspect
import pkgutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import AbstractBaseUser, PermissionsMixin, User, UserManager
from django.core.exceptions import FieldError, SynchronousOnlyOperation
from django.db import (
    DataError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    connection,
    transaction,
)
from django.db.models import Manager, Model, Prefetch, QuerySet
from django.db.models.query import RawQuerySet
from django.db.transaction import TransactionManagementError
from django.test.utils import CaptureQueriesContext

import asyncorm
from asyncorm import native
from tests.project.shop.models import AuditEntry, Basket, Book, Document, Publisher, Tag
from tests.support import (
    administrator,
    backend_pid,
    database,
    eventually,
    in_thread,
    value,
    watched_threads,
)

pytestmark = pytest.mark.usefixtures("fresh_shop")


async def all_given_back(using: str = "default") -> None:
    """No connection of the pool is in use, soon."""

    def given_back() -> bool:
        stats = asyncorm.pool_stats(using)
        return stats["pool_available"] == stats["pool_size"]

    await eventually(given_back, 3)


# Twins


def surfaces() -> Iterator[tuple[str, type]]:
    book, publisher = Book(pk=1), Publisher(pk=1)
    yield "QuerySet", QuerySet
    yield "Manager", Manager
    yield "RawQuerySet", RawQuerySet
    yield "Model", Model
    yield "UserManager", UserManager
    yield "User", User
    yield "reverse foreign key", type(publisher.books)
    yield "many to many", type(book.tags)
    yield "many to many, reverse", type(Tag(pk=1).books)
    yield "generic relation", Book.__dict__["notes"].related_manager_cls
    yield "queryset's own manager", type(Document.objects)
    yield "from_queryset", type(Book.objects)


SURFACES = dict(surfaces())


def asynchronous(cls: type) -> dict[str, Any]:
    """The a* methods that Django defines on a class, inherited ones included."""
    return {
        name: method
        for name, method in inspect.getmembers(cls, callable)
        if name.startswith("a")
        and hasattr(cls, name[1:])
        # A manager's are plain functions around the queryset's.
        and inspect.iscoroutinefunction(inspect.unwrap(method))
    }


OURS = {"method"}  # what native_bulk_create() takes beside Django's parameters


@pytest.mark.parametrize("surface", SURFACES)
def test_every_asynchronous_method_has_a_native_twin(surface: str) -> None:
    cls = SURFACES[surface]
    methods = asynchronous(cls)
    methods.pop("acheck_password", None)  # no database work
    if surface != "RawQuerySet":
        assert len(methods) >= 3
    for name, method in methods.items():
        twin = getattr(cls, f"native_{name[1:]}", None)
        assert twin is not None, f"{surface} has {name}() but no native_{name[1:]}()"
        assert inspect.iscoroutinefunction(twin)
        parameters = [n for n in inspect.signature(twin).parameters if n not in OURS]
        assert parameters == list(inspect.signature(method).parameters)
        assert twin.__name__ == f"native_{name[1:]}"
        assert name[1:] in (twin.__doc__ or "")


@pytest.mark.parametrize("surface", SURFACES)
def test_there_are_no_twins_of_nothing(surface: str) -> None:
    cls = SURFACES[surface]
    for name in dir(cls):
        if name.startswith("native_") and name != "native_iterator":
            assert hasattr(cls, f"a{name[7:]}"), name


def test_the_known_ones_are_there() -> None:
    for name in (
        "aggregate", "bulk_create", "bulk_update", "contains", "count", "create", "delete",
        "earliest", "exists", "explain", "first", "get", "get_or_create", "in_bulk", "last",
        "latest", "update", "update_or_create",
    ):  # fmt: skip
        assert hasattr(QuerySet, f"native_{name}"), name
    for name in ("add", "clear", "create", "remove", "set", "get_or_create", "update_or_create"):
        assert hasattr(SURFACES["many to many"], f"native_{name}"), name
        assert hasattr(SURFACES["generic relation"], f"native_{name}"), name
    for name in ("save", "delete", "refresh_from_db"):
        assert hasattr(Model, f"native_{name}"), name
    for cls, name in (
        (UserManager, "create_user"), (UserManager, "create_superuser"),
        (UserManager, "get_by_natural_key"), (PermissionsMixin, "has_perm"),
    ):  # fmt: skip
        assert hasattr(cls, f"native_{name}"), name
    assert not hasattr(AbstractBaseUser, "native_check_password")


def test_twins_are_not_for_templates() -> None:
    """What changes data is not called by a template: Django's mark is kept."""
    assert QuerySet.native_delete.alters_data
    assert Model.native_save.alters_data
    assert SURFACES["many to many"].native_add.alters_data  # type: ignore[attr-defined]


def test_managers_do_not_get_native_delete() -> None:
    """As Django keeps delete() off managers: also off those made after asyncorm was installed."""
    made = Manager.from_queryset(QuerySet)
    assert made.native_get
    assert not hasattr(made, "native_delete")


def test_values_are_not_deleted_by_name() -> None:
    """Managers offer what Django's managers offer: no delete() of the whole table."""
    assert not hasattr(Manager, "delete")
    assert hasattr(Manager, "native_delete") == hasattr(Manager, "adelete")


async def test_native_methods_of_users() -> None:
    with watched_threads() as seen:
        user = await User.objects.native_create_user("dora", password="secret")
        found = await User.objects.native_get_by_natural_key("dora")
        assert found == user
        assert not await user.native_has_perm("shop.add_tag")
        boss = await User.objects.native_create_superuser("boss")
        assert await boss.native_has_perm("shop.add_tag")
    assert seen == []


async def test_without_the_swap_the_a_methods_are_djangos() -> None:
    await native(backend_pid)()
    with watched_threads() as seen:
        await Tag.objects.acount()
    assert seen
    await in_thread(lambda: None)


# anative


async def test_anative_of_everything() -> None:
    assert [tag.pk for tag in await Tag.objects.order_by("pk").anative()] == [1, 2, 3, 4, 5, 6]
    assert len(await Tag.objects.anative()) == 6
    assert (await Tag.objects.order_by("pk").values("pk").anative())[0] == {"pk": 1}
    assert (await Tag.objects.order_by("pk").values_list("pk", flat=True).anative())[0] == 1
    assert await Tag.objects.none().anative() == []
    assert len(await Tag.objects.raw("SELECT * FROM shop_tag").anative()) == 6
    publisher = await Publisher.objects.native_get(pk=1)
    assert len(await publisher.books.anative()) == await publisher.books.native_count()
    assert len(await (await Book.objects.native_get(pk=1)).tags.all().anative()) == 2


async def test_anative_fills_the_querysets_cache() -> None:
    tags = Tag.objects.all()
    first = await tags.anative()
    with watched_threads():
        assert list(tags) == first  # no query: the loop's thread may read it
        assert await tags.anative() == first
    assert isinstance(first, list)


async def test_anative_of_a_slice_and_of_a_sliced_list() -> None:
    tags = await Tag.objects.order_by("pk")[1:3].anative()
    assert [tag.pk for tag in tags] == [2, 3]


# Streams


async def test_a_stream_has_every_row_once() -> None:
    for size in (1, 5, 6, 7, 29, 30, 31, 2000):
        books = Book.objects.order_by("pk").native_iterator(chunk_size=size)
        assert [book.pk async for book in books] == list(range(1, 31))
    await all_given_back()


@pytest.mark.parametrize("size", [0, -1, None])
async def test_a_stream_refuses_wrong_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match="strictly positive"):
        Tag.objects.native_iterator(chunk_size=size)


async def test_a_stream_does_not_fill_the_cache() -> None:
    tags = Tag.objects.all()
    assert len([tag async for tag in tags.native_iterator()]) == 6
    assert tags._result_cache is None


async def test_a_stream_fetches_in_chunks() -> None:
    """Rows of the next chunk are not read before they are asked for."""
    with (
        database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias,
        administrator() as ask,
    ):
        rows = Tag.objects.using(alias).order_by("pk").native_iterator(chunk_size=2)
        await anext(rows)
        state = "SELECT query FROM pg_stat_activity WHERE application_name = 'extra'"
        assert "FETCH FORWARD 2 " in ask(state)
        await rows.aclose()
        await asyncorm.close_pools(alias)


async def test_a_stream_prefetches_chunk_by_chunk() -> None:
    books = Book.objects.order_by("pk").prefetch_related(
        Prefetch("tags", Tag.objects.order_by("pk")), "publisher__country"
    )
    expected = await books.all().anative()
    found = [book async for book in books.native_iterator(chunk_size=7)]
    assert found == expected
    for book, other in zip(found, expected, strict=True):
        assert list(book.tags.all()) == list(other.tags.all())


async def test_a_stream_left_early_gives_its_connection_back() -> None:
    async for _ in Book.objects.native_iterator(chunk_size=2):
        break
    gc.collect()
    await all_given_back()


async def test_a_stream_left_by_an_exception() -> None:
    with pytest.raises(ZeroDivisionError):
        async for _ in Book.objects.native_iterator(chunk_size=2):
            raise ZeroDivisionError
    gc.collect()
    await all_given_back()


async def test_a_stream_closed_by_hand() -> None:
    rows = Book.objects.native_iterator(chunk_size=2)
    await anext(rows)
    assert asyncorm.pool_stats()["pool_available"] == asyncorm.pool_stats()["pool_size"] - 1
    await rows.aclose()
    assert asyncorm.pool_stats()["pool_available"] == asyncorm.pool_stats()["pool_size"]
    with pytest.raises(StopAsyncIteration):
        await anext(rows)


async def test_a_stream_in_a_cancelled_task() -> None:
    began = asyncio.Event()

    async def read() -> None:
        async for _ in Book.objects.native_iterator(chunk_size=2):
            began.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(read())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()
    await all_given_back()
    assert await Tag.objects.native_count() == 6


async def test_an_abandoned_stream() -> None:
    for _ in range(30):  # more than the pool has connections
        rows = Book.objects.native_iterator(chunk_size=2)
        await anext(rows)
        del rows
        await asyncio.sleep(0.01)
    gc.collect()
    await all_given_back()


async def test_statements_between_chunks() -> None:
    seen = []
    async for tag in Tag.objects.order_by("pk").native_iterator(chunk_size=1):
        seen.append(await Tag.objects.filter(pk__lte=tag.pk).native_count())
    assert seen == [1, 2, 3, 4, 5, 6]


async def test_two_streams_at_once() -> None:
    first = Tag.objects.order_by("pk").native_iterator(chunk_size=1)
    second = Tag.objects.order_by("-pk").native_iterator(chunk_size=2)
    pairs = [((await anext(first)).pk, (await anext(second)).pk) for _ in range(6)]
    assert pairs == [(n, 7 - n) for n in range(1, 7)]
    await first.aclose()
    await second.aclose()
    await all_given_back()


async def test_a_stream_inside_a_block_sees_its_rows() -> None:
    async with asyncorm.atomic():
        await Tag.objects.native_create(name="inside")
        pid = await native(backend_pid)()
        names = []
        async for tag in Tag.objects.native_iterator(chunk_size=2):
            names.append(tag.name)
            assert await native(backend_pid)() == pid
            await Tag.objects.filter(pk=tag.pk).native_update(weight=8)
        assert "inside" in names
        asyncorm.set_rollback(True)
    assert await Tag.objects.native_count() == 6
    assert not await Tag.objects.filter(weight=8).native_exists()


async def test_two_streams_inside_a_block() -> None:
    async with asyncorm.atomic():
        first = Tag.objects.order_by("pk").native_iterator(chunk_size=2)
        second = Tag.objects.order_by("-pk").native_iterator(chunk_size=3)
        pairs = [((await anext(first)).pk, (await anext(second)).pk) for _ in range(6)]
        await first.aclose()
        await second.aclose()
    assert pairs == [(n, 7 - n) for n in range(1, 7)]


async def test_a_stream_that_fails_in_the_middle() -> None:
    rows = Tag.objects.extra(select={"x": "1 / (4 - id)"}).order_by("pk")
    seen = []
    with pytest.raises(DataError, match="division by zero"):
        async for tag in rows.native_iterator(chunk_size=1):
            seen.append(tag.pk)
    assert seen in ([1, 2, 3], [])
    await all_given_back()


# Raw SQL


async def test_cursor() -> None:
    async with asyncorm.cursor() as cursor:
        assert await cursor.execute("SELECT id, name FROM shop_tag ORDER BY id") is cursor
        assert cursor.rowcount == 6
        assert [column.name for column in cursor.description] == ["id", "name"]
        assert await cursor.fetchone() == (1, "classic")
        assert len(await cursor.fetchmany(2)) == 2
        assert len(await cursor.fetchall()) == 3
        assert await cursor.fetchone() is None
        await cursor.execute("SELECT %(a)s::int + %(b)s::int", {"a": 1, "b": 2})
        assert await cursor.fetchall() == [(3,)]
        await cursor.execute("SELECT generate_series(1, 3)")
        assert [row async for row in cursor] == [(1,), (2,), (3,)]
        await cursor.executemany("UPDATE shop_tag SET weight = %s WHERE id = %s", [(1, 1), (2, 2)])
    assert (await Tag.objects.native_get(pk=2)).weight == 2
    await all_given_back()


async def test_cursor_attributes_beside_rows() -> None:
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT generate_series(1, 5) AS n")
        assert await cursor.fetchmany(2) == [(1,), (2,)]
        assert (cursor.rownumber, cursor.rowcount, cursor.statusmessage) == (2, 5, "SELECT 5")
        assert cursor.description[0].name == "n"
        assert await cursor.fetchone() == (3,)
        assert await cursor.fetchall() == [(4,), (5,)]
        await cursor.execute("UPDATE shop_tag SET weight = weight RETURNING id")
        assert cursor.rowcount == len(await cursor.fetchall()) == 6
        await cursor.execute("SELECT 1; SELECT 2")
        assert await cursor.fetchall() == [(1,)]
        await cursor.execute("SELECT %s::text, '%%', %s::jsonb", ["it's", '{"a": 1}'])
        assert await cursor.fetchall() == [("it's", "%", '{"a": 1}')]


async def test_cursor_of_another_alias() -> None:
    async with asyncorm.cursor(using="other") as cursor:
        await cursor.execute("SELECT current_database(), current_setting('TimeZone')")
        name, zone = await cursor.fetchone()
    assert name.endswith("_other")
    assert zone == "America/New_York"


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SELECT nonsense", ProgrammingError),
        ("SELECT 1 / 0", DataError),
        ("INSERT INTO shop_tag (name, weight) VALUES ('classic', 1)", IntegrityError),
        ("SELECT pg_terminate_backend(pg_backend_pid())", OperationalError),
    ],
)
async def test_cursor_raises_djangos_exceptions(sql: str, kind: type[Exception]) -> None:
    async with asyncorm.cursor() as cursor:
        with pytest.raises(kind):
            await cursor.execute(sql)
        await cursor.execute("SELECT 1")  # it can be used again
        assert await cursor.fetchall() == [(1,)]


async def test_cursor_without_a_result() -> None:
    async with asyncorm.cursor() as cursor:
        with pytest.raises(InterfaceError, match="Nothing was executed"):
            await cursor.fetchone()
        await cursor.execute("UPDATE shop_tag SET weight = 1")
        with pytest.raises(ProgrammingError):
            await cursor.fetchone()


async def test_cursor_inside_a_block_is_part_of_it() -> None:
    async with asyncorm.atomic():
        async with asyncorm.cursor() as cursor:
            await cursor.execute("UPDATE shop_tag SET weight = 77")
        assert await Tag.objects.filter(weight=77).native_count() == 6
        asyncorm.set_rollback(True)
    assert not await Tag.objects.filter(weight=77).native_exists()


async def test_queries_are_captured() -> None:
    with CaptureQueriesContext(connection) as captured:
        await Tag.objects.native_count()
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT 1")
    assert len(captured) == 2
    assert "COUNT" in captured[0]["sql"]


async def test_execute_wrappers_are_obeyed() -> None:
    seen: list[str] = []

    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(wrapper):
        await Tag.objects.native_count()
    await Tag.objects.native_count()
    assert len(seen) == 1


# A kept connection


async def test_connection_keeps_one() -> None:
    async with asyncorm.connection():
        async with asyncorm.cursor() as cursor:
            await cursor.execute("CREATE TEMP TABLE kept (n int)")
            await cursor.execute("INSERT INTO kept VALUES (1), (2)")
        await asyncio.sleep(0.01)
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT count(*) FROM kept")
            assert await cursor.fetchall() == [(2,)]
        pids = {await native(backend_pid)() for _ in range(3)}
        async with asyncorm.atomic():
            pids.add(await native(backend_pid)())
        assert len(pids) == 1
    await all_given_back()


async def test_connection_holds_an_advisory_lock_until_its_end() -> None:
    with administrator() as ask:
        async with asyncorm.connection():
            await native(value)("SELECT pg_advisory_lock(4711)::text")
            assert ask("SELECT pg_try_advisory_lock(4711)") is False
        assert ask("SELECT pg_try_advisory_lock(4711)") is True


async def test_the_session_is_reset() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        zone = await native(value)("SHOW TimeZone", using=alias)
        async with asyncorm.connection(using=alias):
            async with asyncorm.cursor(using=alias) as cursor:
                await cursor.execute("SET TIME ZONE 'Asia/Tokyo'")
                await cursor.execute("SET my.marker = 'left'")
                await cursor.execute("CREATE TEMP TABLE kept (n int)")
                await cursor.execute("LISTEN channel")
            pid = await native(backend_pid)(alias)
        assert await native(backend_pid)(alias) == pid
        assert await native(value)("SHOW TimeZone", using=alias) == zone
        marker = "SELECT current_setting('my.marker', true)"
        assert await native(value)(marker, using=alias) in (None, "")
        assert await native(value)("SELECT to_regclass('kept')::text", using=alias) is None
        assert await native(value)("SELECT count(*) FROM pg_listening_channels()", using=alias) == 0


async def test_child_tasks_do_not_inherit_it() -> None:
    async with asyncorm.connection():
        mine = await native(backend_pid)()
        child = await asyncio.create_task(native(backend_pid)())
        gathered = await asyncio.gather(*[native(backend_pid)() for _ in range(2)])
        assert mine not in {child, *gathered}
        assert await native(backend_pid)() == mine


async def test_connection_is_given_back_after_failures() -> None:
    with pytest.raises(ProgrammingError):
        async with asyncorm.connection():
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT nonsense")

    async def waits() -> None:
        async with asyncorm.connection():
            await native(backend_pid)()
            await asyncio.sleep(60)

    task = asyncio.create_task(waits())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await all_given_back()


async def test_nested_connection_changes_nothing() -> None:
    async with asyncorm.connection():
        pid = await native(backend_pid)()
        async with asyncorm.connection():
            assert await native(backend_pid)() == pid
        assert await native(backend_pid)() == pid
    async with asyncorm.atomic():
        pid = await native(backend_pid)()
        async with asyncorm.connection():
            assert await native(backend_pid)() == pid


# Blocks (test_transactions.py has the tree of them)


async def test_atomic_commits_and_rolls_back() -> None:
    async with asyncorm.atomic():
        await Tag.objects.native_create(name="kept")
    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            await Tag.objects.native_create(name="lost")
            raise ZeroDivisionError
    assert await Tag.objects.filter(name="kept").native_exists()
    assert not await Tag.objects.filter(name="lost").native_exists()


async def test_atomic_decorates() -> None:
    @asyncorm.atomic
    async def plain(fail: bool) -> str:
        """What it does."""
        await Tag.objects.native_create(name=f"plain {fail}")
        if fail:
            raise ZeroDivisionError
        return "done"

    @asyncorm.atomic(using="other", durable=True)
    async def with_options() -> bool:
        return bool(await native(lambda: transaction.get_connection("other").in_atomic_block)())

    class Service:
        @asyncorm.atomic
        async def method(self, n: int) -> int:
            return n

    assert await plain(False) == "done"
    with pytest.raises(ZeroDivisionError):
        await plain(True)
    names = (
        await Tag.objects.filter(name__startswith="plain").values_list("name", flat=True).anative()
    )
    assert names == ["plain False"]
    assert plain.__name__ == "plain"
    assert plain.__doc__ == "What it does."
    assert await with_options()
    assert await Service().method(3) == 3
    assert await asyncio.gather(*[Service().method(n) for n in range(5)]) == list(range(5))


def test_atomic_refuses_synchronous_functions() -> None:
    with pytest.raises(TypeError, match=r"django\.db\.transaction\.atomic"):
        asyncorm.atomic(lambda: None)


async def test_savepoints() -> None:
    async with asyncorm.atomic():
        await Tag.objects.native_create(name="outer")
        with pytest.raises(IntegrityError):
            async with asyncorm.atomic():
                await Tag.objects.native_create(name="inner")
                await Tag.objects.native_create(name="classic")
        async with asyncorm.atomic():
            await Tag.objects.native_create(name="second")
    names = set(await Tag.objects.filter(pk__gt=6).values_list("name", flat=True).anative())
    assert names == {"outer", "second"}


async def test_durable() -> None:
    async with asyncorm.atomic(durable=True):
        pass
    async with asyncorm.atomic():
        with pytest.raises(RuntimeError, match="durable"):
            async with asyncorm.atomic(durable=True):
                pass


async def test_a_broken_block_refuses_statements() -> None:
    with pytest.raises(TransactionManagementError, match="until the end"):
        async with asyncorm.atomic():
            with pytest.raises(IntegrityError):
                await Tag.objects.native_create(name="classic")
            await Tag.objects.native_count()
    async with asyncorm.atomic():
        with pytest.raises(IntegrityError):
            async with asyncorm.atomic(savepoint=False):
                await Tag.objects.native_create(name="classic")
        with pytest.raises(TransactionManagementError):
            await Tag.objects.native_count()
    assert await Tag.objects.native_count() == 6


async def test_set_rollback() -> None:
    async with asyncorm.atomic():
        await Tag.objects.native_create(name="outer")
        async with asyncorm.atomic():
            await Tag.objects.native_create(name="inner")
            asyncorm.set_rollback(True)
    names = set(await Tag.objects.filter(pk__gt=6).values_list("name", flat=True).anative())
    assert names == {"outer"}
    with pytest.raises(TransactionManagementError, match="outside"):
        asyncorm.set_rollback(True)


async def test_on_commit() -> None:
    ran: list[Any] = []

    async def awaited() -> None:
        await asyncio.sleep(0)
        ran.append(("awaited", await Tag.objects.filter(name="new").native_exists()))

    async with asyncorm.atomic():
        asyncorm.on_commit(lambda: ran.append("first"))
        await Tag.objects.native_create(name="new")
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic():
                asyncorm.on_commit(lambda: ran.append("never"))
                raise ZeroDivisionError
        async with asyncorm.atomic():
            asyncorm.on_commit(awaited)
        asyncorm.on_commit(lambda: ran.append("last"))
        assert ran == []
    assert ran == ["first", ("awaited", True), "last"]
    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            asyncorm.on_commit(lambda: ran.append("never"))
            raise ZeroDivisionError
    asyncorm.on_commit(lambda: ran.append("at once"))
    assert ran[3:] == ["at once"]


async def test_on_commit_robust(caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []

    def fails() -> None:
        raise ZeroDivisionError

    async def fails_awaited() -> None:
        raise ZeroDivisionError

    async with asyncorm.atomic():
        asyncorm.on_commit(fails, robust=True)
        asyncorm.on_commit(fails_awaited, robust=True)
        asyncorm.on_commit(lambda: ran.append("after"))
    assert ran == ["after"]
    assert caplog.text.count("ZeroDivisionError") >= 2
    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            await Tag.objects.native_create(name="committed")
            asyncorm.on_commit(fails)
    assert await Tag.objects.filter(name="committed").native_exists()
    with pytest.raises(TypeError, match="callable"):
        asyncorm.on_commit("nothing")  # type: ignore[arg-type]


async def test_djangos_atomic_inside_native_functions() -> None:
    ran: list[Any] = []

    @transaction.atomic
    def decorated() -> None:
        Tag.objects.create(name="decorated")

    def work() -> None:
        with transaction.atomic():
            Tag.objects.create(name="kept")
            transaction.on_commit(lambda: ran.append("committed"))
            try:
                with transaction.atomic():
                    Tag.objects.create(name="classic")
            except IntegrityError:
                pass
            with transaction.atomic():
                Tag.objects.create(name="undone")
                transaction.set_rollback(True)
            decorated()
            assert ran == []
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            Tag.objects.create(name="lost")
            raise ZeroDivisionError

    await native(work)()
    names = set(await Tag.objects.filter(pk__gt=6).values_list("name", flat=True).anative())
    assert names == {"kept", "decorated"}
    assert ran == ["committed"]


async def test_select_for_update_locks_until_the_end() -> None:
    with administrator() as ask:
        async with asyncorm.atomic():
            await Tag.objects.select_for_update().native_get(pk=1)
            skipped = "SELECT count(*) FROM (SELECT id FROM shop_tag FOR UPDATE SKIP LOCKED) AS t"
            assert ask(skipped) == 5
        assert ask(skipped) == 6
    with pytest.raises(TransactionManagementError):
        await Tag.objects.select_for_update().native_get(pk=1)


# Overridden methods


async def test_overridden_methods_are_honoured() -> None:
    document = await Document.objects.native_get(key="DOC1")
    revision = document.revision
    await document.native_save()
    assert document.revision == revision + 1
    await document.native_delete()
    await document.native_refresh_from_db()
    assert document.deleted
    assert await Document.objects.alive().native_count() == 2
    with pytest.raises(Document.DoesNotExist):
        await Document.objects.native_get(key="none")
    assert await AuditEntry.objects.filter(text__startswith="missed").native_count() == 1


async def test_native_save_keeps_the_arguments() -> None:
    tag = await Tag.objects.native_get(pk=1)
    tag.name, tag.weight = "changed", 99
    await tag.native_save(update_fields=["weight"])
    await tag.native_refresh_from_db()
    assert (tag.name, tag.weight) == ("classic", 99)
    with pytest.raises(IntegrityError):
        await tag.native_save(force_insert=True)
    with pytest.raises(ValueError, match="Cannot force"):
        await tag.native_save(force_insert=True, force_update=True)


async def test_receivers_of_signals_are_called() -> None:
    basket = await Basket.objects.native_create(name="new")
    await basket.tags.native_add(1)
    await basket.native_delete()
    texts = await AuditEntry.objects.values_list("text", flat=True).anative()
    assert [text.split()[0] for text in texts][:2] == ["pre_save", "post_save"]
    assert texts[-1].startswith("post_delete")


async def test_errors_of_the_orm_are_its_own() -> None:
    with pytest.raises(Tag.DoesNotExist):
        await Tag.objects.native_get(pk=1000)
    with pytest.raises(Tag.MultipleObjectsReturned):
        await Tag.objects.native_get()
    with pytest.raises(FieldError):
        await Tag.objects.filter(nonsense=1).anative()
    with pytest.raises(TypeError):
        await Tag.objects.native_in_bulk(1, 2, 3)


# Beside native code


async def test_synchronous_calls_on_the_loop_are_still_refused() -> None:
    for call in (
        Tag.objects.count,
        lambda: list(Tag.objects.all()),
        lambda: Tag(name="x").save(),
        connection.cursor,
        lambda: transaction.atomic().__enter__(),
    ):
        with pytest.raises(SynchronousOnlyOperation):
            call()
    async with asyncorm.atomic():
        with pytest.raises(SynchronousOnlyOperation):
            Tag.objects.count()


async def test_synchronous_code_in_threads_is_unaffected() -> None:
    found: list[Any] = []

    def work() -> None:
        with transaction.atomic():
            Tag.objects.create(name="from a thread")
            found.append(type(connection.connection).__module__)
            found.append(connection.connection.info.backend_pid)

    async with asyncorm.connection():
        mine = await native(backend_pid)()
        await in_thread(work)
    assert not found[0].startswith("asyncorm")
    assert found[1] != mine
    assert await Tag.objects.filter(name="from a thread").native_exists()


async def test_a_plain_thread_works_beside_a_block() -> None:
    """A thread that was not started from the block's context has nothing to do with it."""
    found: list[int] = []

    def work() -> None:
        try:
            found.append(Tag.objects.count())
        finally:
            connection.close()

    async with asyncorm.atomic():
        await Tag.objects.native_create(name="not seen")
        thread = threading.Thread(target=work)
        thread.start()
        await asyncio.sleep(0)
        thread.join(10)
        asyncorm.set_rollback(True)
    assert found == [6]


async def test_threads_inside_a_block_are_refused(fresh_shop: Callable[[], None]) -> None:
    async with asyncorm.atomic():
        with pytest.raises(TransactionManagementError, match=r"asyncorm\.native") as caught:
            await in_thread(Tag.objects.count)
        assert "test_api.py" in str(caught.value)  # where the block began
        async with asyncorm.detached():
            assert await in_thread(Tag.objects.count) == 6


def test_the_public_names() -> None:
    for name in (
        "atomic", "await_", "close_pools", "connection", "cursor", "native", "on_commit",
        "pool_stats", "set_rollback",
    ):  # fmt: skip
        assert name in asyncorm.__all__
        assert inspect.getdoc(getattr(asyncorm, name)), name


@pytest.mark.parametrize(
    "name",
    [
        "backends.mixin.NativeBackendMixin", "bridge.Runner", "driver.Connection.waiting",
        "driver.leaves_state", "multiplexing.is_read", "multiplexing.is_single",
        "multiplexing.slow", "sessions", "statements.clear",
    ],
)  # fmt: skip
def test_names_that_other_peoples_scripts_have_from_us(name: str) -> None:
    pkgutil.resolve_name(f"asyncorm.{name}")
