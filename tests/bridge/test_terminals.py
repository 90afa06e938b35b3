"""Awaited methods of querysets whose statement is known: no operation, and nothing else changes."""

import asyncio
import datetime as dt
import functools
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import FieldDoesNotExist, FieldError
from django.db import connections, models, router, transaction
from django.db.models import Count, F, Max, QuerySet, Sum, Value
from django.db.models.functions import Concat
from django.db.models.signals import post_init, post_save, pre_delete, pre_save
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from django.test.utils import CaptureQueriesContext, isolate_apps

import asyncorm
from asyncorm import _events, bridge, native, statements
from asyncorm._hooks import terminals
from tests.cancellation.test_cancellation import by_anyio, by_cancel, by_many_cancels, by_timeout
from tests.project.myapp.models import Item
from tests.project.shop.models import Author, Book, Country, Publisher
from tests.support import administrator, all_given_back, database, eventually, in_thread

ALIAS = "few"
SWAPPED = override_settings(ASYNCORM={"SWAP_MANAGERS": True})


FILL = """
DO $$ BEGIN
    LOCK TABLE myapp_item;  -- no test may leave a transaction open
    IF (SELECT last_value FROM myapp_item_id_seq) <> 250
        OR (SELECT array_agg((id, remote_id, name)::text) FROM myapp_item) IS DISTINCT FROM
           (SELECT array_agg((i, i, 'name ' || i % 40)::text) FROM generate_series(1, 250) i)
    THEN
        TRUNCATE myapp_item RESTART IDENTITY;
        INSERT INTO myapp_item (remote_id, name)
            SELECT i, 'name ' || i % 40 FROM generate_series(1, 250) i;
    END IF;
END $$
"""
askers: list[Callable[..., Any]] = []


def fill() -> None:
    """The items as each test finds them."""
    askers[-1](FILL)


@pytest.fixture(autouse=True, scope="module")
def _asker(stock: Any) -> Iterator[None]:
    with administrator() as ask:
        askers.append(ask)
        yield
        askers.remove(ask)
        ask("TRUNCATE myapp_item")


@pytest.fixture(autouse=True)
def _items(shop_data: None, django_db_blocker: Any) -> Iterator[None]:
    fill()
    with SWAPPED:
        yield


@pytest.fixture
def few() -> Iterator[str]:
    """An alias with two connections."""
    with database(ALIAS, OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        yield alias


def items() -> Any:
    return Item.objects.using(ALIAS)


def some() -> Any:
    return items().filter(remote_id__gt=3, name__startswith="name")


# The method and its arguments, the queryset, how the method is awaited.
Call = tuple[Callable[[], Any], str, dict[str, Any]]
CALLS: dict[str, Call] = {
    "get": (items, "get", {"remote_id": 7}),
    "get by two": (items, "get", {"remote_id": 7, "name": "name 7"}),
    "get after filter": (lambda: items().filter(remote_id=7), "get", {}),
    "get some": (some, "get", {"remote_id": 7}),
    "get in": (items, "get", {"remote_id__in": [7]}),
    "get none": (items, "get", {"remote_id": -7}),
    "get many": (items, "get", {"name": "name 7"}),
    "get too many": (items, "get", {"remote_id__gt": 7}),
    "get values": (lambda: items().values("name"), "get", {"remote_id": 7}),
    "count": (some, "count", {}),
    "count of a slice": (lambda: some()[5:9], "count", {}),
    "count distinct": (lambda: some().values("name").distinct(), "count", {}),
    "exists": (some, "exists", {}),
    "exists not": (lambda: items().filter(remote_id=-1), "exists", {}),
    "aggregate": (some, "aggregate", {"most": Max("remote_id"), "all": Sum("remote_id")}),
    "aggregate of none": (lambda: items().filter(remote_id=-1), "aggregate", {"n": Max("name")}),
    "first": (some, "first", {}),
    "first in order": (lambda: some().order_by("-name", "remote_id"), "first", {}),
    "first of none": (lambda: items().filter(remote_id=-1), "first", {}),
    "first values": (lambda: some().values_list("remote_id", flat=True), "first", {}),
    "last": (some, "last", {}),
    "last in order": (lambda: some().order_by("name", "remote_id"), "last", {}),
    "list": (lambda: some().order_by("pk")[:20], "_fetch_all", {}),
    "long list": (lambda: some().order_by("pk"), "_fetch_all", {}),
    "values": (lambda: some().order_by("pk").values("pk", "name"), "_fetch_all", {}),
    "tuples": (lambda: some().order_by("pk").values_list("name"), "_fetch_all", {}),
    "flat": (lambda: some().order_by("pk").values_list("name", flat=True), "_fetch_all", {}),
    "named": (lambda: some().order_by("pk").values_list("name", named=True), "_fetch_all", {}),
    "annotated": (
        lambda: some().values("name").annotate(n=Count("pk")).order_by("name"), "_fetch_all", {},
    ),
    "dividing by zero": (
        lambda: items().filter(remote_id__gt=1 / (F("remote_id") - 7)).order_by("pk"),
        "_fetch_all", {},
    ),
    "update": (lambda: items().filter(remote_id=7), "update", {"name": "new"}),
    "update none": (lambda: items().filter(remote_id=-7), "update", {"name": "new"}),
    "delete": (lambda: items().filter(remote_id=7), "delete", {}),
    "delete some": (lambda: some().order_by("name"), "delete", {}),
    "delete none": (lambda: items().filter(remote_id=-7), "delete", {}),
    "update to a taken key": (lambda: items().filter(remote_id=7), "update", {"remote_id": 8}),
}  # fmt: skip
# Django says what is wrong; no statement is sent.
WRONG: dict[str, Call] = {
    "no such field": (items, "get", {"no_such": 7}),
    "no such value": (items, "get", {"remote_id": "seven"}),
    "get of a slice": (lambda: items().all()[:3], "get", {"remote_id": 7}),
    "last of a slice": (lambda: items().all()[:3], "last", {}),
    "delete of a slice": (lambda: items().all()[:3], "delete", {}),
    "delete of values": (lambda: items().values("name"), "delete", {}),
    "delete of distinct": (lambda: items().distinct("name"), "delete", {}),
    "update of a slice": (lambda: items().all()[:3], "update", {"name": "new"}),
    "update of no field": (items, "update", {"no_such": 7}),
    "no expression": (items, "aggregate", {"n": 7}),
    "first of groups": (lambda: items().values("name").annotate(n=Count("pk")), "first", {}),
}


async def awaited(call: Call) -> Any:
    """As an application awaits it."""
    queryset, name, kwargs = call
    if name == "_fetch_all":
        return [each async for each in queryset()]
    return await getattr(queryset(), f"a{name}")(**kwargs)


async def operated(call: Call) -> Any:
    """As an operation."""
    queryset, name, kwargs = call
    if name == "_fetch_all":
        return await native(list)(queryset())
    return await native(getattr(queryset(), name))(**kwargs)


async def outcome(coroutine: Any) -> Any:
    """What can be compared of a result or an error."""
    try:
        found = await coroutine
    except Exception as exc:
        return type(exc), str(exc), type(exc.__cause__)
    each = found if isinstance(found, list) else [found]
    states = [(vars(one._state), one.__dict__.keys()) for one in each if isinstance(one, Item)]
    return found, [type(one) for one in each], str(states)


def known() -> int:
    return int(Item.objects.using(ALIAS).count())


class Coded(models.CharField):
    """Asks the database for what a value means."""

    def from_db_value(self, value: str, expression: Any, connection: Any) -> str:
        return f"{value} of {known()}"


class Asking:
    """A router that asks the database."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return ALIAS if known() else "default"

    db_for_write = db_for_read


class Relating:
    """One that asks it whether two instances may be related."""

    def allow_relation(self, *objects: Any, **hints: Any) -> bool:
        return bool(known())


@functools.cache
@isolate_apps("tests.project.myapp")
def coded() -> Any:
    class CodedItem(models.Model):
        remote_id = models.IntegerField(unique=True)
        name = Coded(max_length=50)

        class Meta:
            app_label = "myapp"
            db_table = Item._meta.db_table

        label = property(lambda self: self._label, lambda self, value: self.see(value))

        def see(self, value: Any) -> None:
            self._label = f"{value} of {known()}"

    return CodedItem


def coded_items() -> Any:
    return coded().objects.using(ALIAS).order_by("pk")


def labelled() -> Any:
    return coded_items().defer("name").annotate(label=F("remote_id") + 1)


def shown(found: Any) -> Any:
    return list(map(str, map(vars, found if isinstance(found, list) else [found])))


ASKING: dict[str, tuple[Any, Call]] = {
    f"{what}: {name}": (routers, (queryset, name, kwargs))
    for what, routers, queryset in (
        ("field", [], coded_items),
        ("property", [], labelled),
        ("router", [Asking()], lambda: Item.objects.order_by("pk")),
    )
    for name, kwargs in (("get", {"remote_id": 7}), ("first", {}), ("last", {}), ("_fetch_all", {}))
}
ASKING |= {
    f"related: {name}": ([Relating()], (lambda: Publisher(pk=1).books.order_by("pk"), name, {}))
    for name in ("first", "last", "_fetch_all")
}


class Statements(_events.Listener):
    def __init__(self) -> None:
        self.ended: list[_events.Statement] = []
        self.errors: dict[_events.Statement, type] = {}

    def statement_ended(self, statement: _events.Statement) -> None:
        if not re.search("pg_sleep|SAVEPOINT", statement.sql):  # of the place
            self.ended.append(statement)
            self.errors[statement] = type(statement.error)

    def __enter__(self) -> "Statements":
        _events.listen(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _events.unlisten(self)

    @property
    def seen(self) -> list[Any]:
        return [
            (
                each.alias, each.sql, each.params, each.in_block, each.rows, self.errors[each],
                each.cache, each.by_cursor, each.native, each.pooled,
            )
            for each in self.ended
        ]  # fmt: skip


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function was run as an operation, which has a greenlet."""
    counted: Counter[str] = Counter()
    run = bridge.run

    def counting(func: Any, *args: Any, **kwargs: Any) -> Any:
        counted[func.__name__] += 1
        return run(func, *args, **kwargs)

    monkeypatch.setattr(bridge, "run", counting)
    return counted


# Places


@asynccontextmanager
async def free() -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def block() -> AsyncIterator[None]:
    async with asyncorm.atomic(ALIAS):
        yield
        asyncorm.set_rollback(True, ALIAS)


@asynccontextmanager
async def nested() -> AsyncIterator[None]:
    async with block(), asyncorm.atomic(ALIAS):
        yield
        asyncorm.set_rollback(True, ALIAS)


@asynccontextmanager
async def kept() -> AsyncIterator[None]:
    async with asyncorm.connection(ALIAS):
        await operated(CALLS["count"])
        yield


@asynccontextmanager
async def beside() -> AsyncIterator[None]:
    """In a block whose other task's statement runs: this one waits for its turn."""
    async with block():
        pausing = asyncio.create_task(pause(0.05))
        # Who is cancelled here does not await it: its error is taken for seen, since a report of it
        # (from the garbage collector, in the midst of another test) is nobody's.
        pausing.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.sleep(0)
        yield
        await pausing


@asynccontextmanager
async def crowd() -> AsyncIterator[None]:
    """Both connections are in use until somebody waits for one."""
    over = asyncio.Event()

    async def hold() -> None:
        async with asyncorm.connection(ALIAS):
            await pause(0)
            await over.wait()

    async def release() -> None:
        while not (over.is_set() or asyncorm.pool_stats(ALIAS)["requests_waiting"]):  # noqa: ASYNC110
            await asyncio.sleep(0)
        over.set()

    tasks = [asyncio.create_task(hold()) for _ in range(2)]
    try:
        await eventually(lambda: not asyncorm.pool_stats(ALIAS)["pool_available"])
        tasks.append(asyncio.create_task(release()))
        yield
    finally:
        over.set()
    await asyncio.gather(*tasks)


async def pause(seconds: float) -> None:
    async with asyncorm.cursor(ALIAS) as cursor:
        await cursor.execute("SELECT pg_sleep(%s)", [seconds])


async def grow() -> None:
    """Have both connections opened and set up."""
    await asyncio.gather(pause(0.05), pause(0.05))
    assert (await all_given_back(ALIAS))["pool_size"] == 2


PLACES = {each.__name__: each for each in (free, block, nested, kept, beside, crowd)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CALLS)
async def test_as_an_operation(name: str, place: str, few: str, operations: Counter[str]) -> None:
    call = CALLS[name]
    await grow()
    fails = name == "update to a taken key" or name == "dividing by zero"
    with override_settings(ASYNCORM={"SWAP_MANAGERS": True}):
        await operated(CALLS["count"])  # what kept() begins with: it may be the first of its kind
        for _ in range(8 if call[1] == "delete" else 1):  # now it is known, step by step
            await outcome(operated(call))
        fill()
        async with PLACES[place]():
            with Statements() as expected:
                before = await outcome(operated(call))
        fill()
        async with PLACES[place]():
            operations.clear()
            with Statements() as found:
                after = await outcome(awaited(call))
            count = operations[call[1]] + operations["list"]
    assert after == before
    if call[1] == "delete":  # outside a block it is sent alone
        for each in (*expected.ended, *found.ended):
            assert each.in_block or place in ("free", "kept")
            each.in_block = False
    assert found.seen == expected.seen
    assert isinstance(after[0], type) is (fails or name in ("get none", "get many", "get too many"))
    known = [each.cache for each in expected.ended] == ["hit"]
    alone = place == "crowd" and call[1] in (
        "update",
        "delete",
    )  # which waits for a connection of its own
    assert count == (not known or alone), known
    assert known or name == "count of a slice"
    await all_given_back(few)


# What is done to which instance; without one, it is created.
Write = tuple[Callable[[], Any] | None, str, dict[str, Any]]


def item(**values: Any) -> Any:
    found = Item(**{"pk": 7, "remote_id": 7, "name": "name 7", **values})
    found._state.adding, found._state.db = False, ALIAS
    return found


WRITES: dict[str, Write] = {
    "save": (lambda: item(name="new"), "save", {}),
    "save some fields": (lambda: item(name="new"), "save", {"update_fields": ["name"]}),
    "save no fields": (lambda: item(name="new"), "save", {"update_fields": []}),
    "save to a taken key": (lambda: item(remote_id=8), "save", {}),
    "save what is gone": (lambda: item(pk=700, remote_id=700), "save", {}),
    "save fields of what is gone": (
        lambda: item(pk=700), "save", {"update_fields": ["name"]},
    ),
    "update what is gone": (lambda: item(pk=700), "save", {"force_update": True}),
    "save a new one": (lambda: Item(remote_id=300, name="new"), "save", {"using": ALIAS}),
    "save one with a key": (lambda: Item(pk=300, remote_id=300), "save", {"using": ALIAS}),
    "insert one with a key": (
        lambda: Item(pk=300, remote_id=300), "save", {"using": ALIAS, "force_insert": True},
    ),
    "insert a taken key": (lambda: Item(remote_id=8), "save", {"using": ALIAS}),
    "save an expression": (lambda: item(name=Concat("name", Value("!"))), "save", {}),
    "save a wrong value": (lambda: item(remote_id="seven"), "save", {}),
    "save no such field": (item, "save", {"update_fields": ["no_such"]}),
    "force both": (item, "save", {"force_insert": True, "force_update": True}),
    "delete": (item, "delete", {}),
    "delete what is gone": (lambda: item(pk=700), "delete", {}),
    "delete nothing": (lambda: item(pk=None), "delete", {}),
    "create": (None, "create", {"remote_id": 300, "name": "new"}),
    "create a taken key": (None, "create", {"remote_id": 8}),
    "create no such field": (None, "create", {"no_such": 8}),
    "create a wrong value": (None, "create", {"remote_id": "eight"}),
}  # fmt: skip
# Two statements, or an expression; what Django does not get to ask.
BY_OPERATIONS = {
    "save what is gone", "save fields of what is gone", "update what is gone",
    "save one with a key", "save an expression", "save a wrong value", "delete nothing",
    "create no such field", "create a wrong value",
}  # fmt: skip


async def written(write: Write, place: str, *, native_way: bool) -> Any:
    """What can be compared of a write, of the instance and of the table."""
    make, method, kwargs = write
    target = items() if make is None else make()
    fill()
    with Statements() as statements:
        async with PLACES[place]():
            if native_way:
                result = await outcome(native(getattr(target, method))(**kwargs))
            else:
                result = await outcome(getattr(target, f"a{method}")(**kwargs))
            failed = isinstance(result[0], type)
            left = None if failed else await operated((items, "count", {}))
    if isinstance(target, Item):
        state = vars(target._state), {**vars(target), "_state": None}
    else:
        made = result[0]
        state = None if failed else (vars(made._state), {**vars(made), "_state": None})
    text = str(state)
    return result[failed:3], text, left, statements.seen


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRITES)
async def test_writes_as_operations(
    name: str, place: str, few: str, operations: Counter[str]
) -> None:
    write = WRITES[name]
    await grow()
    for native_way in (True, True):
        expected = await written(write, place, native_way=native_way)
    operations.clear()
    found = await written(write, place, native_way=False)
    count = sum(operations[name] for name in ("save", "_go_on", "create", "delete"))
    assert found == expected
    assert count == (name in BY_OPERATIONS or place == "crowd")
    await all_given_back(few)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRONG)
async def test_errors_of_djangos(name: str, place: str, few: str) -> None:
    call = WRONG[name]
    await grow()
    async with PLACES[place]():
        expected = await outcome(operated(call))
        assert await outcome(awaited(call)) == expected
        assert isinstance(expected[0], type), expected
        assert await items().acount() == 250  # the block is as it was
    await all_given_back(few)


@pytest.mark.parametrize("swapped", [False, True])
async def test_native_twins_and_managers(swapped: bool, few: str, operations: Counter[str]) -> None:
    with override_settings(ASYNCORM={"SWAP_MANAGERS": swapped}):
        manager = Item.objects.db_manager(few)
        for _ in range(2):
            operations.clear()
            assert await manager.native_count() == 250
            assert (await manager.native_get(remote_id=3)).remote_id == 3
            assert await manager.filter(remote_id=3).native_exists()
            assert (await manager.native_first()).pk == (await manager.native_last()).pk - 249
            assert len(await manager.anative()) == 250
            assert await manager.native_aggregate(n=Count("pk")) == {"n": 250}
    assert not operations


async def test_the_manager_of_a_relation(operations: Counter[str]) -> None:
    author = await Author.objects.filter(books__isnull=False).afirst()
    for _ in range(3):
        operations.clear()
        books = [book async for book in author.books.order_by("pk")]
        assert await author.books.acount() == len(books)
        first = await author.books.order_by("pk").afirst()
        assert first == books[0]
    assert not operations
    publisher = (
        await Book.objects.filter(publisher__isnull=False).select_related("publisher").afirst()
    )
    for _ in range(2):
        operations.clear()
        books = [book async for book in publisher.publisher.books.all()]
        one = await publisher.publisher.books.aget(pk=books[0].pk)
        assert all(book.publisher is publisher.publisher for book in [*books, one])
    assert not operations


async def test_what_is_new_is_learnt_by_an_operation(few: str, operations: Counter[str]) -> None:
    from asyncorm.statements import clear

    clear()
    for count in (1, 0, 0):
        operations.clear()
        assert await some().acount() == 247
        assert operations["count"] == count


@pytest.mark.parametrize("cache", [False, "verify"])
async def test_the_settings_of_the_cache(cache: Any, few: str, operations: Counter[str]) -> None:
    with override_settings(ASYNCORM={"SWAP_MANAGERS": True, "STATEMENT_CACHE": cache}):
        before = asyncorm.statement_cache_stats()["verified"]
        for name, call in CALLS.items():
            await outcome(operated(call))
            operations.clear()
            expected = await outcome(operated(call))
            found = await outcome(awaited(call))
            assert name.startswith("update") or found == expected
            assert cache or operations[call[1]] + operations["list"] == 2
        assert (asyncorm.statement_cache_stats()["verified"] > before) is bool(cache)


# Who would notice, has an operation


class Counting(QuerySet):
    """Overrides what the methods call."""

    def _fetch_all(self) -> None:
        super()._fetch_all()
        self.fetched = True

    def count(self) -> int:
        return -super().count()


async def test_overrides_are_called(few: str, operations: Counter[str]) -> None:
    queryset = Counting(Item, using=few)
    for _ in range(2):
        operations.clear()
        assert await queryset.acount() == -250
        all_of_it = queryset.all()
        assert len([each async for each in all_of_it]) == 250 and all_of_it.fetched
        assert len(await queryset.all().anative()) == 250
        assert (await queryset.afirst()).remote_id == 1
        assert (await queryset.aget(remote_id=1)).remote_id == 1
        assert await queryset.aexists()
    assert operations.total() == 5  # not exists()


async def test_replaced_methods_are_called(few: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await items().acount() == 250
    monkeypatch.setattr(QuerySet, "count", lambda self: "mine")
    monkeypatch.setattr(QuerySet, "exists", lambda self: "mine")
    assert (await items().acount(), await items().aexists()) == ("mine", "mine")
    monkeypatch.undo()
    assert await items().acount() == 250


@pytest.mark.parametrize("of", ["all models", "the instance"])
@pytest.mark.parametrize(
    "name",
    ["_prepare_related_fields_for_save", "save_base", "_save_table", "_do_insert", "_do_update"],
)
async def test_replaced_steps_of_saving_are_called(
    few: str, name: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    djangos = getattr(models.Model, name)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return djangos(self, *args, **kwargs)

    async def save() -> set[Any]:
        made, changed = Item(remote_id=1000), await items().aget(pk=7)
        if of == "the instance":
            for each in (made, changed):
                monkeypatch.setattr(each, name, functools.partial(step, each))
        seen.clear()
        await made.asave(using=few)
        await changed.asave()
        assert await items().filter(pk=made.pk).adelete() == (1, {"myapp.Item": 1})
        return {"made" if each is made else "changed" for each in seen}

    expected = {"_do_insert": {"made"}, "_do_update": {"changed"}}.get(name, {"made", "changed"})
    if of == "all models":
        assert await save() == set()
        monkeypatch.setattr(models.Model, name, step)
    for _ in range(2):
        assert await save() == expected


@pytest.mark.parametrize("of", ["all managers", "the manager"])
@pytest.mark.parametrize("name", ["get_queryset", "using"])
async def test_replaced_methods_of_the_manager_are_called_by_saving(
    few: str, name: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = await items().aget(pk=7)
    await item.asave()
    manager: Any = models.Manager if of == "all managers" else Item._base_manager
    seen: list[str] = []
    djangos = getattr(manager, name)

    def step(*args: Any) -> Any:
        seen.append(name)
        return djangos(*args)

    monkeypatch.setattr(manager, name, step)
    for _ in range(2):
        await item.asave()
        assert seen
        seen.clear()


@pytest.mark.parametrize("given", [(), ("country_id", "founded"), ("country",)])
async def test_what_is_created_is_what_django_makes(
    few: str, given: tuple[str, ...], operations: Counter[str]
) -> None:
    country = await Country.objects.using(few).afirst()
    values = {"country": country, "country_id": country.pk, "founded": dt.date(1999, 1, 2)}  # type: ignore[union-attr]
    params = {name: values[name] for name in given}
    of = Publisher.objects.using(few)
    for number in range(2):
        operations.clear()
        made = await of.acreate(name=f"made {number}", **params)
        await of.filter(pk=made.pk).adelete()
    assert operations["save"] == 0
    own = await native(of.create)(name="own", **params)
    await of.filter(pk=own.pk).adelete()
    assert [*vars(made)] == [*vars(own)]
    assert vars(made._state) == vars(own._state)
    assert {**vars(made), "id": 0, "name": "", "_state": 0} == {
        **vars(own), "id": 0, "name": "", "_state": 0,
    }  # fmt: skip


async def test_signals_of_instances(few: str, operations: Counter[str]) -> None:
    await items().afirst()
    seen: list[Any] = []

    def receiver(sender: Any, instance: Any, **kwargs: Any) -> None:
        assert bridge.in_native_code()
        seen.append(instance)

    post_init.connect(receiver, sender=Item)
    try:
        operations.clear()
        assert [await items().afirst()] == seen
        assert operations["first"] == 1
    finally:
        post_init.disconnect(receiver, sender=Item)


async def test_who_captures_queries_sees_them(few: str) -> None:
    await items().acount()
    with CaptureQueriesContext(connections[few]) as captured:
        assert await items().acount() == 250
        assert await items().filter(remote_id=1).aupdate(name="x") == 1
    assert len(captured) == 2
    calls: list[str] = []

    def wrapper(execute: Any, sql: str, *args: Any) -> Any:
        calls.append(sql)
        return execute(sql, *args)

    with connections[few].execute_wrapper(wrapper):
        assert await items().aexists()
    assert len(calls) == 1


async def test_receivers_of_saves(few: str, operations: Counter[str]) -> None:
    seen: list[Any] = []

    def receiver(sender: Any, instance: Any, **kwargs: Any) -> None:
        assert items().count() == 250  # native code
        seen.append(instance)

    saved = item()
    for signal, call in (
        (pre_save, saved.asave), (post_save, saved.asave), (pre_delete, saved.adelete),
    ):  # fmt: skip
        signal.connect(receiver, sender=Item)
        try:
            operations.clear()
            await call()
            assert seen == [saved] and operations.total() == 1
        finally:
            signal.disconnect(receiver, sender=Item)
        seen.clear()


async def test_fields_that_are_deferred(few: str) -> None:
    await item().asave()
    found = await items().only("name").aget(pk=7)
    found.name = "new"
    with Statements() as statements:
        await found.asave()
    (statement,) = statements.ended
    assert '"remote_id" =' not in statement.sql and found.get_deferred_fields() == {"remote_id"}


async def test_defaults_that_ask_the_database(few: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted() -> str:
        return f"one of {items().count()}"

    await items().acreate(remote_id=1000)
    monkeypatch.setattr(Item._meta.get_field("name"), "_get_default", counted)
    async with asyncorm.atomic(few):
        assert (await items().acreate(remote_id=1001)).name == "one of 251"
    assert (await items().aget(remote_id=1001)).name == "one of 251"


async def test_prefetches_have_an_operation(operations: Counter[str]) -> None:
    for _ in range(2):
        operations.clear()
        async for author in Author.objects.prefetch_related("books"):
            assert list(author.books.all()) is not None
        assert operations["_fetch_all"] == 1


async def test_evaluated_querysets_ask_nothing(few: str) -> None:
    queryset = items().order_by("pk")
    await queryset.anative()
    with Statements() as statements:
        assert await queryset.acount() == len(await queryset.anative()) == 250
        assert await queryset.aexists()
        assert (await queryset.afirst()).remote_id == 1
        assert len([each async for each in queryset]) == 250
    assert not statements.ended


async def test_values_that_are_used_up(few: str) -> None:
    for _ in range(3):
        assert (await items().aget(remote_id__in=iter([5]))).remote_id == 5


@pytest.mark.django_db
async def test_in_the_transaction_of_a_test(operations: Counter[str]) -> None:
    for _ in range(2):
        operations.clear()
        assert await Book.objects.acount() == await native(Book.objects.count)()
        assert operations == {"count": 2}
        await Book.objects.all()[:1].aexists()
        assert await Book.objects.filter(pk=1).aupdate(title="changed") <= 1


def test_in_synchronous_code_with_a_transaction(
    few: str, operations: Counter[str], django_db_blocker: Any
) -> None:
    async def changed() -> int:
        assert await items().filter(remote_id=5).aexists()
        return await items().filter(name="changed").acount()

    with django_db_blocker.unblock(), transaction.atomic(few):
        items().filter(remote_id=5).update(name="changed")
        for _ in range(3):
            operations.clear()
            assert async_to_sync(changed)() == 1
        assert operations == {}  # as on Django's own backend: in the thread
        transaction.set_rollback(True, few)


# Tasks


async def test_a_task_that_outlived_its_block(few: str) -> None:
    release = asyncio.Event()

    async def late() -> Any:
        await release.wait()
        return await items().acount()

    await items().acount()
    async with asyncorm.atomic(few):
        task = asyncio.create_task(late())
        await asyncio.sleep(0)
    release.set()
    with pytest.raises(TransactionManagementError, match="has ended"):
        await task


async def test_a_block_is_seen_by_its_tasks_only(few: str) -> None:
    await grow()
    counting = lambda: items().filter(name="inside").acount()  # noqa: E731
    await counting()
    async with asyncorm.atomic(few):
        assert await items().filter(remote_id=1).aupdate(name="inside") == 1
        assert await asyncio.gather(*[counting() for _ in range(5)]) == [1] * 5
        assert await asyncorm.detached_task(counting()) == 0
        async with asyncorm.detached():
            assert await counting() == 0
        asyncorm.set_rollback(True, few)
    assert await counting() == 0


async def test_an_error_breaks_the_block_as_in_django(few: str) -> None:
    write = items().filter(remote_id=7)
    for run in (awaited, operated, awaited):
        with pytest.raises(TransactionManagementError, match="current transaction"):
            async with asyncorm.atomic(few):
                with pytest.raises(Exception, match="duplicate key"):
                    await run((lambda: write, "update", {"remote_id": 8}))
                await items().acount()
    assert await items().acount() == 250


LOCKED = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'few' "
    "AND wait_event_type = 'Lock'"
)


async def test_a_lost_connection(few: str, operations: Counter[str]) -> None:
    """Reads are repeated on another one, writes and what is in a block are not."""
    await grow()
    await items().acount()
    await items().filter(remote_id=7).aupdate(name="x")
    sleeping = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE application_name = 'few' AND pid <> pg_backend_pid()"
    )
    with administrator() as ask:
        ask("BEGIN")
        ask("LOCK TABLE myapp_item IN ACCESS EXCLUSIVE MODE")
        reading = asyncio.create_task(items().acount())
        writing = asyncio.create_task(items().filter(remote_id=7).aupdate(name="y"))
        await eventually(lambda: ask(LOCKED) == 2)
        ask(sleeping)
        await asyncio.sleep(0.05)
        ask("ROLLBACK")
        assert await reading == 250
        with pytest.raises(asyncorm.CommitUnknown):
            await writing
    await all_given_back(few)


async def test_a_pool_that_is_closed(few: str) -> None:
    await grow()
    await items().acount()
    for _ in range(2):
        counting = [asyncio.create_task(items().acount()) for _ in range(6)]
        await asyncio.sleep(0)
        await asyncorm.close_pools(few)
        found = await asyncio.gather(*counting, return_exceptions=True)
        assert all(each == 250 or "closed" in str(each) for each in found), found
        assert await items().acount() == 250
    with administrator() as ask:
        for others in (0, 2):  # who has both connections first, so that the statements go together
            ask("BEGIN")
            ask("LOCK TABLE myapp_item IN ACCESS EXCLUSIVE MODE")
            pausing = [asyncio.create_task(pause(0.05)) for _ in range(others)]
            await asyncio.sleep(0)
            counting = [asyncio.create_task(items().acount()) for _ in range(6)]
            await eventually(lambda: ask(LOCKED))
            await asyncorm.close_pools(few)
            ask("ROLLBACK")
            found = await asyncio.gather(*counting, return_exceptions=True)
            assert not [each for each in found if each != 250 and "closed" not in str(each)]
            await asyncio.gather(*pausing, return_exceptions=True)
            await grow()
    await all_given_back(few)


async def test_concurrent_use_of_a_kept_connection(few: str) -> None:
    async with asyncorm.connection(few):
        assert await items().acount() == await items().acount() == 250
        pids = {await native(lambda: connections[few].connection.info.backend_pid)()}
        with Statements() as statements:
            await items().acount()
            await items().afirst()
        assert {each.connection for each in statements.ended} == pids


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cancelled", [by_cancel, by_many_cancels, by_anyio, by_timeout])
@pytest.mark.parametrize("name", ["get", "long list", "update"])
async def test_cancelled_at_every_await(name: str, place: str, cancelled: Any, few: str) -> None:
    """No connection is lost, and what others do stays right."""
    call = CALLS[name]
    await grow()
    await operated(call)

    async def within() -> None:
        async with PLACES[place]():
            await awaited(call)

    busy = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'few' AND state <> 'idle'"
    )
    with administrator() as ask:
        for n in range(1, 200):
            async with asyncio.timeout(60):
                reached = await asyncio.create_task(cancelled(within(), n))
            assert (await all_given_back(few))["pool_size"] <= 2
            await eventually(lambda: not ask(busy))
            assert await items().acount() == 250
            if not reached:
                break
        else:
            raise AssertionError("it did not come to its end")


async def test_a_coroutine_that_is_dropped(few: str) -> None:
    """It cannot wait any more: its connection is closed, and the pool has another one."""
    await grow()
    await items().acount()
    for make in (lambda: items().acount(), lambda: some().afirst()):
        await make()
        coroutine = make()
        coroutine.send(None)
        coroutine.close()
        await all_given_back(few)
    assert await asyncio.gather(*[items().acount() for _ in range(5)]) == [250] * 5


def test_no_thread_and_no_loop(few: str, django_db_blocker: Any) -> None:
    """What drives the coroutine by hand is told, as it is of an operation."""
    before = threading.active_count()
    with django_db_blocker.unblock():
        coroutine = items().native_count()
        with pytest.raises(RuntimeError, match="event loop"):
            coroutine.send(None)
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ASKING)
async def test_somebodys_code_may_ask_the_database(few: str, name: str) -> None:
    routers, call = ASKING[name]
    with override_settings(DATABASE_ROUTERS=routers):
        for _ in range(4):  # from the second time on its statement is known
            expected = await operated(call)
            found = await awaited(call)
            assert re.sub("0x\\w+", "", str(shown(found))) == re.sub(
                "0x\\w+", "", str(shown(expected))
            )


class Turns:
    """A router that reads from two aliases in turn."""

    def __init__(self) -> None:
        self.chosen: list[str] = []

    def db_for_read(self, model: Any, **hints: Any) -> str:
        self.chosen.append((ALIAS, "default")[len(self.chosen) % 2])
        return self.chosen[-1]


@pytest.mark.parametrize(
    ("name", "queryset"),
    [
        ("count", lambda: Item.objects.filter(remote_id__gt=3)),
        ("exists", lambda: Item.objects.filter(remote_id__gt=3)),
        ("_fetch_all", lambda: Item.objects.filter(remote_id__gt=3)),
        ("_fetch_all", lambda: Book.objects.prefetch_related("authors").filter(pk__lt=0)),
        ("_fetch_all", lambda: Item.objects.extra(where=["remote_id > %s"], params=[240])),
        ("first", lambda: Item.objects.order_by("-remote_id")),
        ("last", lambda: Item.objects.extra(order_by=["remote_id"])),
        ("get", lambda: Item.objects.filter(remote_id=3)),
    ],
)
async def test_a_router_is_asked_once_for_a_read(few: str, name: str, queryset: Any) -> None:
    """One that takes turns would otherwise give the same alias to all of them."""
    for alias in (ALIAS, "default"):
        await Item.objects.using(alias).acount()  # who connects first asks for types as well
    statements.clear()
    read: list[str] = []
    with override_settings(DATABASE_ROUTERS=[Turns()]):
        chosen = router.routers[0].chosen
        for _ in range(4):
            asked = queryset()
            with Statements() as statement:
                task = asyncio.create_task(terminals.run(getattr(asked, name)))
                while not task.done():  # another task that has it may make its own of it
                    assert asked._db is None
                    await asyncio.sleep(0)
                await task
            assert (asked._result_cache is not None) == (name == "_fetch_all")
            read += [each.alias for each in statement.ended]
        assert read == chosen == [ALIAS, "default"] * 2


class Noting(Turns):
    """The same, which notes all that it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def db_for_read(self, model: Any, **hints: Any) -> str:
        self.asked.append((super().db_for_read(model), model, [*hints]))
        return self.chosen[-1]

    def db_for_write(self, model: Any, **hints: Any) -> str:
        self.asked.append((model, [*hints]))
        return ALIAS


ASKED: dict[str, Call] = {
    "union": (lambda: Item.objects.all()[:2].union(Item.objects.all()[:1]), "list", {}),
    "text of the user's": (lambda: Item.objects.extra(where=["remote_id = 3"]), "list", {}),
    "raw": (lambda: Item.objects.raw("SELECT * FROM myapp_item WHERE id < 3"), "list", {}),
    "get": (lambda: Item.objects.filter(name="name 3"), "get", {"remote_id": 3}),
    "get by text": (lambda: Item.objects.extra(where=["remote_id = 3"]), "get", {"pk__gt": 0}),
    "count": (Item.objects.all, "count", {}),
    "get_or_create": (Item.objects.all, "get_or_create", {"remote_id": 3}),
    "create": (Item.objects.all, "get_or_create", {"remote_id": 999}),
    "save": (lambda: Item(pk=3, remote_id=3), "save", {}),
    "save some": (lambda: Item(pk=3, name="new"), "save", {"update_fields": ["name"]}),
    "refresh_from_db": (lambda: Item(pk=3), "refresh_from_db", {}),
    "prefetch": (
        lambda: Publisher.objects.order_by("pk").prefetch_related("books")[:3], "list", {},
    ),
    "add": (lambda: Book(pk=1, publisher_id=1).tags, "add", {}),
}  # fmt: skip


async def asked_for(call: Call, how: str) -> Any:
    """What a router is asked while something is executed again and again."""
    what, name, kwargs = call
    statements.clear()
    with override_settings(DATABASE_ROUTERS=[Noting()]):
        for _ in range(4):
            one = what()
            if how == "loop" and name == "list":
                [each async for each in one]
            elif how == "loop":
                await getattr(one, f"a{name}")(**kwargs)
            else:
                method = functools.partial(list, one) if name == "list" else getattr(one, name)
                function = functools.partial(method, **kwargs)
                await (in_thread(function) if how == "thread" else native(function)())
        return router.routers[0].asked


@pytest.mark.parametrize("name", ASKED)
async def test_a_router_is_asked_as_often_as_by_django(few: str, name: str) -> None:
    for alias in (ALIAS, "default"):
        await Item.objects.using(alias).acount()
    asked = {}
    for how in ("thread", "loop", "native"):
        fill()
        asked[how] = await asked_for(ASKED[name], how)
    assert asked["loop"] == asked["native"] == asked["thread"] != []


class Told:
    """A router that names the alias that it was told."""

    alias = ALIAS

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.alias

    db_for_write = db_for_read


@pytest.mark.parametrize("name", ["get", "update"])
async def test_what_a_router_said_for_one_call_is_not_said_to_the_next(few: str, name: str) -> None:
    """It may go by what has been written meanwhile."""
    error = FieldDoesNotExist if name == "update" else FieldError
    told = Told()

    def synchronously() -> None:
        with pytest.raises(error):
            getattr(Item.objects, name)(no_such=1)
        told.alias = "default"
        getattr(Item.objects.filter(remote_id=3), name)(name="name 3")

    async def awaiting() -> None:
        with pytest.raises(error):
            await getattr(Item.objects, f"a{name}")(no_such=1)
        told.alias = "default"
        await getattr(Item.objects.filter(remote_id=3), f"a{name}")(name="name 3")

    for call in (native(synchronously), awaiting):
        told.alias = ALIAS
        with override_settings(DATABASE_ROUTERS=[told]), Statements() as statement:
            await call()
        assert {each.alias for each in statement.ended} == {"default"}


async def test_where_a_write_goes_is_told_by_the_alias_that_it_is_for(few: str) -> None:
    """Reads are for another engine, whose calls stay in threads."""

    class Both(Noting):
        def db_for_read(self, model: Any, **hints: Any) -> str:
            super().db_for_read(model, **hints)
            return "legacy"

    fill()
    with override_settings(DATABASE_ROUTERS=[Both()]), Statements() as statement:
        assert await Item.objects.filter(remote_id=3).aupdate(name="new") == 1
        assert [each.alias for each in statement.ended] == [ALIAS]
        with pytest.raises(Exception, match="myapp_item"):
            await Item.objects.aget(remote_id=3)
        assert len(router.routers[0].chosen) == 1


async def test_a_router_may_ask_the_database_where_to_write(few: str) -> None:
    with override_settings(DATABASE_ROUTERS=[Asking()]):
        for number in range(1000, 1004):
            item = await Item.objects.acreate(remote_id=number)
            item.name = "another"
            await item.asave()
            assert await Item.objects.filter(pk=item.pk).aupdate(name="new") == 1
            assert await item.adelete() == (1, {"myapp.Item": 1})
