"""Verify mode: every use of the statement cache is compared with Django's compiler."""

import datetime as dt
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from django.db.models import Count, F
from django.db.models.sql.compiler import SQLCompiler
from django.test import override_settings
from psycopg.types.json import Jsonb
from psycopg.types.numeric import Int4, Int8

import asyncorm
from asyncorm import grounds, statements, verifying
from asyncorm._chains import nodes
from asyncorm.verifying import StatementCacheError, equal
from tests.project.shop.models import Book, Customer, Publisher, Review, Tag

stats = asyncorm.statement_cache_stats


@pytest.fixture(autouse=True)
def verify_mode(fresh_shop: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(verifying, "different", 0)
    with override_settings(ASYNCORM={"STATEMENT_CACHE": "verify"}):
        yield


def saved() -> None:
    tag = Tag.objects.get(pk=1)
    tag.weight += 1
    tag.save(update_fields=["weight"])


def deleted() -> None:
    Tag.objects.create(name="one more").delete()


def prefetched() -> Any:
    return list(Publisher.objects.order_by("pk").prefetch_related("books__publisher"))


numbers = itertools.count(1)
by_weight = asyncorm.compiled(lambda weight: Tag.objects.filter(weight__gt=weight))

# Each way to the cache: what takes it.
WAYS: dict[str, Callable[[], Any]] = {
    "get": lambda: Book.objects.get(pk=1),
    "list": lambda: list(Book.objects.filter(pages__gt=next(numbers)).select_related("publisher")),
    "page": lambda: list(Book.objects.order_by("pk")[next(numbers) :][:3]),
    "values": lambda: list(Book.objects.values("title")),
    "stream": lambda: list(Book.objects.order_by("pk").iterator(chunk_size=2)),
    "expressions": lambda: list(Book.objects.annotate(n=F("pages") + next(numbers))),
    "exists": lambda: Book.objects.filter(pk=1).exists(),
    "count": lambda: Book.objects.filter(pages__gt=next(numbers)).count(),
    "aggregate": lambda: Book.objects.aggregate(Count("pk")),
    "prefetch": prefetched,
    "update": lambda: Book.objects.filter(pk=1).update(pages=next(numbers)),
    "save": saved,
    "create": lambda: Publisher.objects.create(name=f"{next(numbers)}"),
    "delete": deleted,
    "delete of a queryset": lambda: Review.objects.filter(pk=-next(numbers)).delete(),
    "bulk_create": lambda: Customer.objects.bulk_create(
        [Customer(name=f"Customer {next(numbers)}") for _ in range(3)]
    ),
    "many": lambda: Tag.objects.bulk_create(
        [Tag(name=f"tag {next(numbers)}") for _ in range(31)], batch_size=10
    ),
}


async def called(way: str) -> None:
    if way == "compiled":
        await by_weight(next(numbers))
    else:
        await asyncorm.native(WAYS[way])()


@pytest.mark.parametrize("way", [*WAYS, "compiled"])
async def test_each_hit_is_verified(way: str) -> None:
    await called(way)
    before = stats()
    for _ in range(3):
        await called(way)
    after = stats()
    assert after["hits"] - before["hits"] >= 3
    assert after["verified"] - before["verified"] == after["hits"] - before["hits"]
    assert after["different"] == 0


def plans() -> Iterator[Any]:
    """Those in the cache, whatever they are kept in."""
    for kept in list(statements.plans.values()):
        for each in kept if isinstance(kept, tuple) else [kept]:
            plan = getattr(each, "plan", each)
            if isinstance(plan, statements.Plan):
                yield plan


@pytest.mark.parametrize("way", [*WAYS, "compiled"])
async def test_a_wrong_statement_is_an_error(way: str) -> None:
    await called(way)
    await called(way)
    for plan in plans():
        plan.sql = plan.sql.replace("shop_", "shop_wrong_")
    with pytest.raises(StatementCacheError) as raised:
        await called(way)
    assert "report" in str(raised.value)
    assert all(table in str(raised.value) for table in ("shop_wrong_", '"shop_'))
    assert stats()["different"] > 0


async def test_a_wrong_parameter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = statements.Shape.bind
    await Book.objects.filter(pages__gt=1).anative()
    monkeypatch.setattr(
        statements.Shape, "bind", lambda self, **kwargs: [Int4(v + 1) for v in bind(self, **kwargs)]
    )
    with pytest.raises(StatementCacheError, match="parameters"):
        await Book.objects.filter(pages__gt=1).anative()


def weighing(lookup: str) -> Any:
    return Tag.objects.filter(**{lookup: 100})


USES: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "count": lambda tags: tags.count(),
    "get": lambda tags: tags.get(name="none"),
    "made": lambda tags: tags.query.where,
}


@pytest.mark.parametrize("use", USES)
async def test_a_chain_that_is_taken_for_another_is_an_error(use: str) -> None:
    """What was recorded is not what the program did: to repeat it proves nothing."""

    def used(lookup: str) -> Any:
        with suppress(Tag.DoesNotExist):
            USES[use](weighing(lookup))

    for _ in range(3):
        await asyncorm.native(used)("weight__gt")
        await asyncorm.native(used)("weight__lt")
    node, other = (
        vars(weighing(each))["_query"].chain_node for each in ("weight__gt", "weight__lt")
    )
    children = node.parent.children
    (form,) = (form for form, child in children.items() if child is node)
    children[form] = other
    try:
        with pytest.raises(StatementCacheError, match="Please report"):
            await asyncorm.native(used)("weight__gt")
    finally:
        nodes.clear()


async def test_an_error_does_not_stay_hidden() -> None:
    """Where the cache takes an exception for "leave it to Django", Django's way comes upon it."""
    await Book.objects.filter(pk=1).order_by()[:21].anative()
    for plan in plans():
        plan.sql += " "
    with pytest.raises(StatementCacheError):
        await Book.objects.native_get(pk=1)


async def test_sql_that_is_another_one_each_time_is_left_to_django(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_sql = SQLCompiler.as_sql

    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        sql, params = as_sql(self, *args, **kwargs)
        return f"{sql} /* {next(numbers)} */", params

    monkeypatch.setattr(SQLCompiler, "as_sql", changing)
    monkeypatch.setattr(grounds, "is_anothers", lambda value: False)  # as if it were Django's
    before = stats()
    for _ in range(3):
        assert [tag.pk for tag in await Tag.objects.filter(pk=1).anative()] == [1]
    after = stats()
    assert after["hits"] == before["hits"]
    assert after["unfit"] == before["unfit"] + 2
    assert after["different"] == 0


UTC = dt.UTC
ZONE = dt.timezone(dt.timedelta(0), "another")
nan = float("nan")
SAME: list[tuple[Any, Any]] = [
    (nan, nan),
    (bytearray(b"\0a"), bytearray(b"\0a")),
    (memoryview(b"ab"), memoryview(b"ab")),
    (Jsonb({"a": [1, 2.0]}), Jsonb({"a": [1, 2.0]})),
    (Decimal("1.10"), Decimal("1.10")),
    (dt.datetime(2024, 1, 1, tzinfo=UTC), dt.datetime(2024, 1, 1, tzinfo=UTC)),
]
DIFFERENT: list[tuple[Any, Any]] = [
    (1, True),
    (1, 1.0),
    (Int4(1), Int8(1)),
    (0.0, -0.0),
    (0.1, 0.1 + 2**-55),
    (nan, 1.0),
    ("a", b"a"),
    (b"ab", b"ac"),
    (memoryview(b"a" * 100 + b"b"), memoryview(b"a" * 100 + b"c")),
    (Jsonb({"a": 1}), Jsonb({"a": True})),
    (Jsonb({"a": 1}), Jsonb({"a": 1}, dumps=str)),
    ([1, 2], [1, 2, 3]),
    ([1, 2], (1, 2)),
    (Decimal("1.1"), Decimal("1.10")),
    (dt.datetime(2024, 1, 1, tzinfo=UTC), dt.datetime(2024, 1, 1, tzinfo=ZONE)),
    (dt.datetime(2024, 1, 1, tzinfo=UTC), dt.datetime(2024, 1, 1)),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a: Any, b: Any) -> None:
    assert equal(a, b)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a: Any, b: Any) -> None:
    assert not equal(a, b)
    assert not equal([a], [b])
    assert equal(a, a)
