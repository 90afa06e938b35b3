"""What a parameter means is what Django's literal means, and each has the source it had before."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import models, transaction
from django.db.models import Case, Count, Exists, F, OuterRef, Q, Value, When

import asyncorm
from asyncorm import statements
from tests.checked import hits_checked
from tests.compare import differences
from tests.project.shop.models import Book, Event, Note, Review
from tests.support import in_thread
from tests.ways import outcome

pytestmark = pytest.mark.usefixtures("shop_data")


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    statements.clear()
    yield
    statements.clear()


async def same_as_djangos(function: Callable[..., Any], *calls: tuple[Any, ...]) -> int:
    """Call it natively, each time as Django has it synchronously; how often the cache was hit."""
    before = asyncorm.statement_cache_stats()["hits"]
    with hits_checked():
        for args in calls:
            expected = await in_thread(outcome, function, *args)
            assert differences(expected, await asyncorm.native(outcome)(function, *args)) == []
    return asyncorm.statement_cache_stats()["hits"] - before


# Where parameters come from

by_pk = Book.objects.order_by("pk")


def content_type(model: Any) -> int:
    return ContentType.objects.get_for_model(model).pk


async def test_the_condition_of_a_generic_relation_has_no_source() -> None:
    """Its parameter, the content type's key, equals others of the first query."""
    key = await in_thread(content_type, Book)
    wide: list[Callable[[int], Any]] = [
        lambda v: list(by_pk.filter(created__year=2024, notes__object_id=v)),
        lambda v: list(by_pk.filter(notes__object_id=v, pages__gt=F("sold") - v)),
        lambda v: list(by_pk.annotate(n=Count("notes", filter=Q(notes__object_id__gt=v)))),
        lambda v: by_pk.filter(notes__object_id=v, pages__gt=F("sold") - v).count(),
        lambda v: list(Note.objects.filter(book__pages__gt=F("pk") - v, book=v).order_by("pk")),
        lambda v: list(by_pk.exclude(notes__object_id=v, pages__gt=F("sold") - v)),
    ]
    for function in wide:
        await same_as_djangos(function, (key,), (1,), (key + 1,), (key,))


async def test_equal_values_are_not_taken_for_each_other() -> None:
    def cases(field: str, x: Any, y: Any) -> Any:
        found = Event.objects.annotate(
            a=Case(When(**{field: x}, then=Value("A")), default=Value("-")),
            b=Case(When(**{field: y}, then=Value("B")), default=Value("-")),
        )
        return list(found.order_by("pk").values_list("pk", "b", "a"))

    class Secret(str):
        def __repr__(self) -> str:
            return "Secret"

    long = b"A" * 60
    calls: list[tuple[Any, ...]] = [
        ("poster", long + b"1", long + b"2"),
        ("poster", long + b"2", long + b"1"),
        ("poster", memoryview(long + b"1"), long + b"1"),
        ("name", Secret("Event 1"), Secret("Event 2")),
        ("name", Secret("Event 2"), Secret("Event 1")),
    ]
    assert await same_as_djangos(cases, *calls) >= 1


async def test_one_node_in_two_places() -> None:
    """A node that is there twice does not tell which of two equal parameters is which."""

    def both(v: int, w: int) -> Any:
        some = Review.objects.filter(book=OuterRef("pk"), stars__gt=v)
        others = some if v == w else Review.objects.filter(book=OuterRef("pk"), stars__gt=w)
        return list(by_pk.annotate(m=Exists(some), n=~Exists(others)).filter(pk__gt=v))

    assert await same_as_djangos(both, (1, 1), (3, 3), (1, 3), (3, 1), (1, 1), (2, 4)) >= 4

    def either(v: int, w: int) -> Any:
        base = Book.objects.filter(pages__gt=F("sold") - v)
        other = base if v == w else Book.objects.filter(pages__gt=F("sold") - w)
        return list((base.filter(pk__lt=9) | other.filter(pk__gt=w)).order_by("pk"))

    await same_as_djangos(either, (1, 1), (500, 500), (1, 500), (500, 1), (1, 1))


async def test_hidden_constants() -> None:
    def exists(v: int) -> Any:
        return [
            Book.objects.filter(pk=v).exists(),
            Book.objects.annotate(a=Value(v)).filter(pages__gt=F("a") + v, pk__gt=v).exists(),
            Book.objects.annotate(a=F("pages") % v).values("a").distinct()[:1].exists(),
            list(by_pk.filter(Exists(Review.objects.filter(book=OuterRef("pk"), stars=v)))),
        ]

    assert await same_as_djangos(exists, (1,), (2,), (1,), (7,)) >= 8


def updated(**changes: Any) -> Any:
    with transaction.atomic():
        count = Book.objects.filter(pk__gt=1).update(**changes)
        books = list(by_pk.values())
        transaction.set_rollback(True)
    return count, books


async def test_updates() -> None:
    functions: list[Callable[[int, int], Any]] = [
        lambda v, w: updated(pages=v, sold=w, rating=None, isbn=None),
        lambda v, w: updated(rating=None, pages=F("pages") + v, sold=w, title=str(v)),
        lambda v, w: updated(pages=Case(When(pk=v, then=Value(w)), default=Value(v)), sold=v),
        lambda v, w: updated(sold=v, pages=Value(w), extra={"a": v}, data=[w]),
    ]
    for function in functions:
        assert await same_as_djangos(function, (1, 1), (1, 2), (2, 1), (1, 1)) >= 3


async def test_aggregates() -> None:
    functions: list[Callable[[int, int], Any]] = [
        lambda v, w: Book.objects.filter(pk__gt=v).aggregate(
            a=Count("pk", filter=Q(pages__gt=w)), b=models.Sum(F("pages") + v, default=w)
        ),
        lambda v, w: Book.objects.filter(pk__gt=w).aggregate(
            b=Count("tags", filter=Q(tags__weight=v) | Q(pages=w)), a=models.Max(F("pages") % v)
        ),
    ]
    for function in functions:
        assert await same_as_djangos(function, (1, 1), (1, 2), (2, 1), (1, 1)) >= 3
