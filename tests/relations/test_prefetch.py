"""Parallel prefetch: the same queries, results, caches and errors as Django's, sooner."""

import asyncio
import contextlib
import copy
import pickle
import time
from collections import Counter
from typing import Any
from unittest import mock

import django
import pytest
from django.apps import apps
from django.contrib.contenttypes.models import ContentType
from django.db import DataError, connection, connections, models
from django.db.backends.signals import connection_created
from django.db.models import (
    DateTimeField,
    Func,
    IntegerField,
    Prefetch,
    QuerySet,
    TextField,
    Value,
    prefetch_related_objects,
)
from django.db.models.sql import Query
from django.db.models.sql.where import WhereNode
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from django.test.utils import CaptureQueriesContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import asyncorm
from asyncorm import native, statements
from asyncorm.limits import parallelism
from tests.project.shop.models import (
    Author,
    Book,
    Category,
    Country,
    Customer,
    Note,
    Order,
    Person,
    PrintedBook,
    Product,
    Publisher,
    Review,
    Tag,
)
from tests.support import all_given_back, backend_pid, database, in_thread, value

pytestmark = pytest.mark.usefixtures("shop_data")


class Slow(Func):
    """A column that takes its time: the server sleeps before the first row."""

    template = "(SELECT pg_backend_pid() FROM (SELECT pg_sleep(%(expressions)s)) AS s)"
    output_field = IntegerField()


def slow(model: Any, seconds: float = 1) -> Any:
    """Rows that know when their query began, and where it ran."""
    began = Func(template="clock_timestamp()", output_field=DateTimeField())
    return model.objects.annotate(began=began, pid=Slow(Value(seconds)))


def related(books: list[Any]) -> dict[str, list[Any]]:
    """What the lookups of RELATED fetched."""
    return {
        "tags": [tag for book in books for tag in book.tags.all()],
        "reviews": [review for book in books for review in book.reviews.all()],
        "publisher": [book.publisher for book in books if book.publisher],
        "notes": [note for book in books for note in book.notes.all()],
    }


def overlap(found: dict[str, list[Any]]) -> bool:
    """Whether the queries ran at once, by the server's clock."""
    times = [min(row.began for row in rows) for rows in found.values()]
    # One after the other, two seconds at least are between the first and the last; sorted rows
    # are made after the second, others before.
    return (max(times) - min(times)).total_seconds() < 1.9


def dump(value: Any, depth: int = 0) -> Any:
    """Everything that prefetching leaves in an instance, caches included."""
    if isinstance(value, list | models.QuerySet):
        cached = value if isinstance(value, list) else value._result_cache
        return [dump(one, depth) for one in cached or []]
    if not isinstance(value, models.Model) or depth > 6:
        return repr(value)
    return (
        type(value).__name__,
        value.pk,
        {
            name: dump(one, depth + 1)
            for name, one in sorted(value.__dict__.items())
            if name not in ("_state", "_prefetched_objects_cache", "pid", "began")
            and isinstance(one, list | models.Model)
        },
        {name: dump(one, depth + 1) for name, one in sorted(value._state.fields_cache.items())},
        {
            name: dump(one, depth + 1)
            for name, one in sorted(getattr(value, "_prefetched_objects_cache", {}).items())
        },
    )


def evaluate(queryset: Any) -> tuple[Any, Counter[str]]:
    """What the queryset holds, or the error, and its queries."""
    with CaptureQueriesContext(connection) as queries:
        try:
            found: Any = dump(list(queryset))
        except Exception as exc:
            found = type(exc), str(exc)
    return found, Counter(query["sql"] for query in queries)


# At once


async def test_lookups_run_at_once_on_several_backends() -> None:
    books = Book.objects.filter(pk__lte=4).prefetch_related(
        *(Prefetch(name, slow(model)) for name, model in RELATED.items())
    )
    await asyncio.gather(*(native(value)("SELECT pg_sleep(0.05)") for _ in range(6)))
    found = related(await books.anative())
    assert all(found.values())
    assert len({rows[0].pid for rows in found.values()}) == len(RELATED)
    assert overlap(found)


RELATED = {"tags": Tag, "reviews": Review, "publisher": Publisher, "notes": Note}


async def test_deeper_levels_run_at_once_too() -> None:
    authors = Author.objects.prefetch_related(
        Prefetch("books__tags", slow(Tag)),
        Prefetch("books__reviews", slow(Review)),
        Prefetch("books__publisher", slow(Publisher).prefetch_related(
            Prefetch("country", slow(Country)), Prefetch("notes", slow(Note))
        )),
        Prefetch("pupils", slow(Author)),
    )  # fmt: skip
    await asyncio.gather(*(native(value)("SELECT pg_sleep(0.05)") for _ in range(6)))
    began = time.monotonic()
    await authors.anative()
    # The slowest chain has two slow queries; one after the other all six would take 6 s.
    assert time.monotonic() - began < 5


async def test_the_setting_turns_it_off() -> None:
    books = Book.objects.prefetch_related(
        Prefetch("tags", slow(Tag, 0.1)), Prefetch("reviews", slow(Review, 0.1))
    )
    with override_settings(ASYNCORM={"PARALLEL_PREFETCH": False}):
        began = time.monotonic()
        found = await books.anative()
        assert time.monotonic() - began >= 0.2
    with override_settings(ASYNCORM={"PARALLEL_PREFETCH": True}):
        assert dump(await books.anative()) == dump(found)


async def test_a_cold_pool_grows() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 4}}) as alias:
        books = Book.objects.using(alias).prefetch_related(
            *(Prefetch(name, slow(model)) for name, model in RELATED.items())
        )
        found = related(await books.anative())
        assert len({rows[0].pid for rows in found.values()}) > 1
        assert asyncorm.pool_stats(alias)["pool_size"] > 1
        await asyncorm.close_pools(alias)


@override_settings(ASYNCORM={"MULTIPLEXING": False})
async def test_a_new_connection_is_kept_though_the_call_has_ended() -> None:
    def receiver(connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.1)")

    connection_created.connect(receiver)
    try:
        with database(OPTIONS={"pool": {"min_size": 0, "max_size": 3}}) as alias:
            books = Book.objects.using(alias).prefetch_related(*RELATED)
            for _ in range(3):  # from the second on it finds connections that nobody has set up
                assert all(related(await books.all().anative()).values())
                await all_given_back(alias)
            assert asyncorm.pool_stats(alias).get("returns_bad") is None
            await asyncorm.close_pools(alias)
    finally:
        connection_created.disconnect(receiver)


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_a_small_pool_that_many_use(size: int) -> None:
    """Nobody waits for a second connection while holding one."""
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": size, "timeout": 20}}) as alias:
        books = Book.objects.using(alias).order_by("pk").prefetch_related(
            "tags", "authors__notes", "publisher__country", "reviews__customer__orders__lines"
        )  # fmt: skip
        expected = dump(await in_thread(list, books.all()))
        async with asyncio.timeout(40):
            for found in await asyncio.gather(*(books.all().anative() for _ in range(20))):
                assert dump(found) == expected
        await all_given_back(alias)
        assert asyncorm.pool_stats(alias)["pool_size"] <= size
        await asyncorm.close_pools(alias)


async def test_within_parallelism() -> None:
    books = Book.objects.prefetch_related(
        *(Prefetch(name, slow(model, 0.1)) for name, model in RELATED.items())
    )
    async with parallelism(1):
        found = await books.anative()
    pids = {tag.pid for book in found for tag in book.tags.all()}
    pids |= {review.pid for book in found for review in book.reviews.all()}
    assert len(pids) == 1


# Inside blocks and kept connections


async def test_inside_a_block_they_use_its_connection() -> None:
    async with asyncorm.atomic():
        pid = await native(backend_pid)()
        tag = await Tag.objects.native_create(name="inside")
        book = await Book.objects.native_first()
        await book.tags.native_add(tag)
        books = Book.objects.filter(pk=book.pk).prefetch_related(
            *(Prefetch(name, slow(model, 0.01)) for name, model in RELATED.items())
        )
        (found,) = await books.anative()
        assert tag in found.tags.all()
        assert {one.pid for one in (*found.tags.all(), *found.reviews.all())} == {pid}
        asyncorm.set_rollback(True)


async def test_inside_a_block_they_travel_together() -> None:
    books = Book.objects.prefetch_related("tags", "reviews", "notes", "authors__notes", "publisher")
    async with asyncorm.atomic():
        await books.all().anative()  # the connection is there, content types are known
        before = asyncorm.pool_stats()
        await books.all().anative()
        after = asyncorm.pool_stats()
    together = after["statements_pipelined"] - before["statements_pipelined"]
    assert together >= 4
    assert after["pipelines"] - before["pipelines"] <= together / 2


async def test_inside_connection_they_use_its_session() -> None:
    async with asyncorm.connection():
        async with asyncorm.cursor() as cursor:
            await cursor.execute("CREATE TEMPORARY TABLE shop_tag AS SELECT * FROM shop_tag")
            await cursor.execute("UPDATE shop_tag SET name = 'x'")
        books = Book.objects.prefetch_related("reviews", "tags", "publisher", "authors")
        assert {tag.name for book in await books.anative() for tag in book.tags.all()} == {"x"}


# Only from an operation that has left nothing in its session


def here(model: Any) -> Any:
    """Rows that know where they were read, and what was set there."""
    tenant = Func(template="current_setting('my.tenant', true)", output_field=TextField())
    pid = Func(template="pg_backend_pid()", output_field=IntegerField())
    return model.objects.annotate(pid=pid, tenant=tenant)


def execute(statement: str, using: str = "default") -> None:
    with connections[using].cursor() as cursor:
        cursor.execute(statement)


def places(using: str = "default", **others: Any) -> set[Any]:
    """The server processes and the tenants of the rows that prefetching several lookups gave."""
    lookups = (Prefetch(name, others.get(name, here(model))) for name, model in RELATED.items())
    books = Book.objects.using(using).filter(pk__lte=4).prefetch_related(*lookups)
    return {(row.pid, row.tenant) for rows in related(list(books)).values() for row in rows}


async def places_before(prepare: Any, using: str = "default", **others: Any) -> tuple[Any, Any]:
    def work() -> Any:
        with contextlib.ExitStack() as stack:
            prepare(stack)
            return places(using, **others), backend_pid(using)

    await asyncio.gather(*(native(value)("SELECT pg_sleep(0.05)", None, using) for _ in range(6)))
    return await native(work)()


async def test_from_an_untouched_operation_they_use_several_connections() -> None:
    found, _ = await places_before(lambda stack: None)
    assert len(found) > 1


@pytest.mark.parametrize(
    "statement",
    [
        "SET my.tenant = '7'",
        "SELECT set_config('my.tenant', '7', false)",
        "SET my.tenant = '7'; CREATE TEMPORARY TABLE mine (a int)",
    ],
)
async def test_after_session_state_they_use_the_operations_connection(statement: str) -> None:
    found, pid = await places_before(lambda stack: execute(statement))
    assert found == {(pid, "7")}


async def test_without_autocommit_or_with_an_execute_wrapper_too() -> None:
    def in_a_transaction(stack: Any) -> None:
        connection.set_autocommit(False)
        stack.callback(connection.set_autocommit, True)
        stack.callback(connection.rollback)
        value("SELECT set_config('my.tenant', '7', true)")

    found, pid = await places_before(in_a_transaction)
    assert found == {(pid, "7")}

    texts = []

    def see(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        texts.append(context["connection"].connection.info.backend_pid)
        return execute(sql, params, many, context)

    found, pid = await places_before(
        lambda stack: stack.enter_context(connection.execute_wrapper(see))
    )
    assert {where for where, _ in found} == {pid} == set(texts)


class Tenants(models.QuerySet[Any]):
    """Sets the tenant when it is evaluated, for itself and what comes after it."""

    def _fetch_all(self) -> None:
        if self._result_cache is None:
            execute("SET my.tenant = '7'", self.db)
        super()._fetch_all()


@pytest.mark.parametrize("name", RELATED)
async def test_what_a_lookup_sets_is_kept(name: str) -> None:
    querysets: Any = Tenants(RELATED[name])
    tenants = querysets.annotate(**here(RELATED[name]).query.annotations)

    def work() -> Any:
        after = list(RELATED)[list(RELATED).index(name) :]
        lookups = [Prefetch(one, tenants if one == name else here(RELATED[one])) for one in RELATED]
        books = list(Book.objects.filter(pk__lte=4).prefetch_related(*lookups))
        found = related(books)
        assert {row.tenant for one in after for row in found[one]} == {"7"}
        return value("SELECT current_setting('my.tenant', true)")

    await asyncio.gather(*(native(value)("SELECT pg_sleep(0.05)") for _ in range(6)))
    assert await native(work)() == "7"


async def test_a_wrapper_with_state_of_its_own() -> None:
    def set_tenant(stack: Any) -> None:
        connections["tenants"].tenant = "7"

    with database("tenants", ENGINE="tests.project.tenants"):
        found, pid = await places_before(set_tenant, "tenants")
        await asyncorm.close_pools("tenants")
    assert found == {(pid, "7")}


# Equal to Django's


GRAPH: dict[Any, dict[str, Any]] = {
    Book: {
        "tags": Tag, "reviews": Review, "publisher": Publisher, "notes": Note, "authors": Author,
        "related": Book, "product": Product, "authorship_set": None,
    },
    Tag: {"books": Book},
    Review: {"book": Book, "customer": None},
    Publisher: {"books": Book, "country": Country, "notes": Note},
    Country: {"publishers": Publisher},
    Author: {"books": Book, "mentor": Author, "pupils": Author, "influences": Author, "notes": Note,
             "friends": Person},
    Product: {"book": Book, "category": None, "lines": None},
    Note: {"target": None, "content_type": None},
    Person: {"friends": Person, "events": None},
}  # fmt: skip


@st.composite
def lookups(draw: Any, model: Any = Book, depth: int = 2) -> list[Any]:
    """Lookups that may share prefixes, cross, come twice, and not all be right."""
    found: list[Any] = []
    for _ in range(draw(st.integers(0 if depth < 2 else 1, 4 if depth == 2 else 2))):
        path, at = [], model
        for _ in range(draw(st.integers(1, 3))):
            if at not in GRAPH:
                break
            name = draw(st.sampled_from(sorted(GRAPH[at])))
            path.append(name)
            at = GRAPH[at][name]
        lookup: Any = "__".join(path)
        kind = draw(st.integers(0, 5))
        if kind == 0 and at is not None:
            queryset = at.objects.order_by("pk")
            if depth and draw(st.booleans()):
                queryset = queryset.prefetch_related(*draw(lookups(at, depth - 1)))
            if draw(st.booleans()):
                queryset = queryset.filter(pk__lte=12)
            to_attr = f"x{draw(st.integers(0, 2))}" if draw(st.booleans()) else None
            lookup = Prefetch(lookup, queryset, to_attr=to_attr)
        elif kind == 1:
            lookup = Prefetch(lookup, to_attr=f"x{draw(st.integers(0, 2))}")
        elif kind == 2 and draw(st.integers(0, 4)) == 0:
            lookup += draw(st.sampled_from(["__nothing", "__pk", "__title"]))
        found.append(lookup)
    return found


PROFILE = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@PROFILE
@given(trees=lookups(), selected=st.booleans())
def test_random_trees(inside: bool, run: Any, trees: list[Any], selected: bool) -> None:
    def queryset() -> Any:
        books = Book.objects.order_by("pk").filter(pk__lte=9)
        if selected:
            books = books.select_related("publisher", "product")
        try:
            return books.prefetch_related(*trees)
        except ValueError:
            return books

    async def natively() -> Any:
        if not inside:
            return await native(evaluate)(queryset())
        async with asyncorm.atomic():
            await native(value)("SELECT 1")
            return await native(evaluate)(queryset())

    ContentType.objects.get_for_models(*apps.get_models())  # or the first needs more queries
    expected, queries = evaluate(queryset())
    found, ours = run(natively())
    assert found == expected
    if isinstance(expected, list):
        assert ours == queries


def state_of(owner: Any, queryset: Any) -> dict[str, Any]:
    """All that a queryset in the cache of an instance holds, the instance as "owner"."""

    def plain(value: Any) -> Any:
        if value is owner:
            return "owner"
        if isinstance(value, dict):
            return {plain(key): plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(plain, value))
        if isinstance(value, Query):
            return {"type": type(value), **plain(vars(value))}
        if isinstance(value, WhereNode):
            return type(value), plain(vars(value))
        return value

    queryset._query  # noqa: B018
    return {"type": type(queryset), **plain(vars(queryset))}


OWNERS: list[tuple[Any, str]] = [
    (Country, "publishers"), (Publisher, "books"), (Book, "reviews"), (Book, "authorship_set"),
    (Book, "tags"), (Book, "related"), (Book, "authors"), (Tag, "books"), (Person, "friends"),
    (Author, "books"), (Author, "friends"), (Author, "pupils"), (PrintedBook, "reviews"),
    (Category, "children"), (Customer, "favourites"), (Customer, "orders"), (Order, "lines"),
    (Publisher, "notes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name"), OWNERS, ids=lambda each: getattr(each, "__name__", each)
)
async def test_the_querysets_of_instances_are_djangos(model: Any, name: str) -> None:
    def load() -> list[Any]:
        # Some of them twice, and one that has more to be asked for.
        found = [*model._base_manager.order_by("pk")[:12], *model._base_manager.order_by("pk")[:2]]
        prefetch_related_objects([*found, *found[:3]], name)
        return found

    def cached(owners: list[Any]) -> list[Any]:
        return [owner._prefetched_objects_cache[name] for owner in owners]

    def described(owners: list[Any]) -> list[Any]:
        return [
            state_of(owner, queryset)
            for owner, queryset in zip(owners, cached(owners), strict=True)
        ]

    def used(owners: list[Any]) -> list[Any]:
        querysets = cached(owners)
        assert len({id(queryset) for queryset in querysets}) == len(owners)
        assert len({id(queryset.query) for queryset in querysets}) == len(owners)
        return [
            (str(each.query), list(each.order_by("pk")), list(each), len(each.all()[:1]))
            for each in querysets
        ]

    def copied(owners: list[Any]) -> list[Any]:
        both = zip(pickle.loads(pickle.dumps(owners)), copy.deepcopy(owners), owners, strict=True)
        copies = [copy.copy(queryset) for queryset in cached(owners)]
        copies += [one._prefetched_objects_cache[name] for three in both for one in three[:2]]
        assert all("_query" in vars(each) for each in copies)
        return [(list(each), str(each.query)) for each in copies]

    def shared(owners: list[Any]) -> list[Any]:
        """The querysets' dictionaries belong to each alone."""
        for queryset in cached(owners):
            queryset._hints["x"] = queryset._query.annotations["x"] = 1
            queryset._known_related_objects["x"] = 1
        return [len(queryset._hints) for queryset in cached(owners)]

    def kept(owners: list[Any]) -> list[Any]:
        """What is set before anything else is asked for stays, whichever it is."""
        for queryset in cached(owners):
            queryset._hints = {"x": 1}
        others = [each._known_related_objects for each in cached(owners)]
        return [
            (each._hints, str(each.query), each._deferred_filter, [len(kept) for kept in others])
            for each in cached(owners)
        ]

    for way in (described, used, copied, shared, kept):
        expected = await in_thread(lambda: way(load()))  # noqa: B023
        assert await native(lambda: way(load()))() == expected  # noqa: B023
    assert any(expected)


ASKS_FOR_NULL = pytest.mark.skipif(
    django.VERSION < (5, 2, 1), reason="Django 5.2.0 asks for NULL as well, which is in no plan"
)


@pytest.mark.parametrize(
    "name", ["reviews", pytest.param("publisher", marks=ASKS_FOR_NULL), "tags"]
)
async def test_keys_of_all_lengths_share_a_plan(name: str) -> None:
    def load(count: int) -> Any:
        books = list(Book.objects.order_by("pk")[:count])
        with CaptureQueriesContext(connection) as queries:
            prefetch_related_objects(books, name)
        unwatched = list(Book.objects.order_by("pk")[:count])
        prefetch_related_objects(unwatched, name)
        return dump(books), dump(unwatched), [query["sql"] for query in queries]

    statements.clear()
    sizes = []
    for count in (9, 3, 12, 2, 1, 7):
        assert await native(load)(count) == await in_thread(load, count)
        sizes.append(asyncorm.statement_cache_stats()["size"])
    # The books have a plan for each LIMIT. What is asked by keys has two, as it is known by its
    # filter as well; a single key is no list.
    assert [size - number for number, size in enumerate(sizes)] == [3, 3, 3, 3, 5, 5]


async def test_keys_of_another_type_find_their_rows() -> None:
    def load() -> list[Any]:
        books = list(Book.objects.order_by("pk")[:5])
        for book in books:
            book.pk = str(book.pk)
        prefetch_related_objects(books, "tags")
        return [sorted(tag.pk for tag in book.tags.all()) for book in books]

    for _ in range(2):
        assert await native(load)() == await in_thread(load)
    assert any(await native(load)())


@pytest.mark.parametrize(
    "trees",
    [
        ["authors", "authorship_set", "product__book__authorship_set"],
        ["product__book__authorship_set", "authorship_set", "authors"],
        ["tags", "reviews__book__tags", "reviews"],
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
async def test_lookups_that_lead_back_to_the_same_objects(trees: Any, inside: bool) -> None:
    books = Book.objects.order_by("pk").filter(pk__lte=9).prefetch_related(*trees)
    expected, queries = await in_thread(evaluate, books.all())
    async with contextlib.AsyncExitStack() as stack:
        if inside:
            await stack.enter_async_context(asyncorm.atomic())
        await native(value)("SELECT 1")
        found, ours = await native(evaluate)(books.all())
    assert (found, ours) == (expected, queries)


async def test_instances_that_are_prefetched_already() -> None:
    books = await Book.objects.order_by("pk").prefetch_related("tags").anative()

    def again() -> int:
        with CaptureQueriesContext(connection) as queries:
            prefetch_related_objects(books, "tags__books", "publisher", "reviews")
        return len(queries)

    assert await native(again)() == 3
    assert await native(again)() == 0


async def test_errors_of_the_database() -> None:
    fails = Func(template="1 / (length(name) - length(name))", output_field=IntegerField())
    bad = Tag.objects.annotate(x=fails)
    for order in (1, -1):
        lookups = [Prefetch("reviews", slow(Review, 0.05)), Prefetch("tags", bad), "publisher"]
        with pytest.raises(DataError, match="division by zero"):
            await Book.objects.prefetch_related(*lookups[::order]).anative()
    await all_given_back()


async def test_errors_leave_a_block_in_order() -> None:
    async with asyncorm.atomic():
        with pytest.raises(AttributeError, match="nothing"):
            await Book.objects.prefetch_related("nothing", "tags", "reviews", "notes").anative()
        with pytest.raises(AttributeError, match="nothing"):
            await Book.objects.prefetch_related("tags", "nothing", "reviews", "notes").anative()
        assert await Tag.objects.native_count() == 6


@pytest.mark.parametrize("inside", [False, True])
async def test_cancelled(inside: bool) -> None:
    books = Book.objects.prefetch_related(
        *(Prefetch(name, slow(model)) for name, model in RELATED.items()),
        Prefetch("authors__notes", slow(Note)),
    )

    async def read() -> None:
        if inside:
            async with asyncorm.atomic():
                await books.all().anative()
        else:
            await books.all().anative()

    for milliseconds in (0, 3, 10, 30, 60, 90):
        task = asyncio.create_task(read())
        await asyncio.sleep(milliseconds / 1000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [t for t in asyncio.all_tasks() if "_work" in repr(t)]
    await all_given_back()
    busy = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    assert await native(value)(busy) == 0


async def test_a_stream_prefetches_in_parallel() -> None:
    books = Book.objects.filter(pk__lte=4).prefetch_related(
        *(Prefetch(name, slow(model)) for name, model in RELATED.items())
    )
    found = related([book async for book in books.native_iterator(chunk_size=10)])
    assert overlap(found)


@pytest.mark.skipif(django.VERSION < (6, 1), reason="Django 6.1 takes any iterable")
async def test_instances_that_are_no_list() -> None:
    def fetch() -> list[int]:
        found = {book.pk: book for book in Book.objects.order_by("pk")[:3]}
        prefetch_related_objects(found.values(), "tags", "publisher")
        with CaptureQueriesContext(connection) as queries:
            [tag for book in found.values() for tag in book.tags.all()]
        return [len(found), len(queries)]

    assert await native(fetch)() == [3, 0]


async def test_a_block_that_ends_while_a_lookup_is_fetched() -> None:
    """A task that outlives it is told so, whatever it waited for."""
    fetching, ended = asyncio.Event(), asyncio.Event()

    class Waiting(models.QuerySet[Any]):
        def _fetch_all(self) -> None:
            if self._result_cache is None:
                fetching.set()
                asyncorm.await_(ended.wait())
            super()._fetch_all()

    reviews = Prefetch("reviews", Waiting(Review))
    async with asyncorm.atomic():
        books = Book.objects.prefetch_related("authors", "tags", reviews)
        task = asyncio.create_task(native(list)(books))
        await fetching.wait()
    ended.set()
    with pytest.raises(TransactionManagementError, match="has ended"):
        await task


REVIEWED = Prefetch("reviews", Review.objects.order_by("pk"), to_attr="reviewed")
RAW = f"SELECT * FROM {Book._meta.db_table} ORDER BY id"
SHARED = {
    "attribute": lambda: Book.objects.prefetch_related(REVIEWED).order_by("pk"),
    "managers": lambda: Book.objects.prefetch_related("tags", "reviews").order_by("pk"),
    "none": lambda: Book.objects.order_by("pk"),
    "raw": lambda: Book.objects.raw(RAW).prefetch_related("tags"),
    "raw, none": lambda: Book.objects.raw(RAW),
}


@pytest.mark.parametrize("which", SHARED)
@pytest.mark.parametrize("way", ["list", "async for"])
async def test_tasks_that_evaluate_one_queryset_at_the_same_time(which: str, way: str) -> None:
    """Each finds what was prefetched, in the same instances."""
    pks = await Book.objects.order_by("pk").values_list("pk", flat=True).anative()
    for turns in range(12):
        queryset = SHARED[which]()

        async def evaluate(number: int, queryset: Any = queryset, turns: int = turns) -> Any:
            for _ in range(number * turns):
                await asyncio.sleep(0)
            if way == "list":
                found = await native(list)(queryset)
            else:
                found = [book async for book in queryset]
            for book in found:
                if which == "attribute":
                    assert all(review.book_id == book.pk for review in book.reviewed)
                elif "none" not in which:
                    assert "tags" in book._prefetched_objects_cache
            return found

        with override_settings(ASYNCORM={"SWAP_MANAGERS": True}):
            first, *others = await asyncio.gather(*[evaluate(number) for number in range(3)])
        assert [book.pk for book in first] == pks
        if "raw" in which:
            assert "id" in queryset.columns, "known without asking again"
        for other in others:
            assert list(map(id, other)) == list(map(id, first))


async def test_items_of_another_task_are_not_seen_before_their_prefetch() -> None:
    queryset = Book.objects.prefetch_related(REVIEWED).order_by("pk")

    async def look() -> int:
        looks = 0
        while not task.done():
            await asyncio.sleep(0)
            for book in queryset._result_cache or ():
                assert hasattr(book, "reviewed")
            looks += 1
        return looks

    task = asyncio.create_task(native(list)(queryset))
    assert await look() > 1
    assert queryset._result_cache is not None
    assert queryset._prefetch_done
    await task


async def test_a_queryset_that_prefetches_in_its_own_way() -> None:
    class Own(QuerySet[Book]):
        def _prefetch_related_objects(self) -> None:
            super()._prefetch_related_objects()  # type: ignore[misc]
            self.prefetched_for = len(self._result_cache)

    queryset = Own(Book).prefetch_related("tags")
    found = await native(list)(queryset)
    assert found and queryset.prefetched_for == len(found)
    with mock.patch.object(QuerySet, "_prefetch_related_objects") as patched:
        assert await native(list)(Book.objects.prefetch_related("tags"))
    assert patched.call_count  # it does not say that it is done: list() asks twice
