"""The statement cache is used, gives what Django gives, and leaves alone what it does not know."""

import asyncio
import contextlib
import datetime as dt
import gc
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any
from unittest import mock
from zoneinfo import ZoneInfo

import pytest
from django.contrib.postgres.aggregates import ArrayAgg
from django.db import DataError, connection, models, transaction
from django.db.models import (
    Case,
    Count,
    Exists,
    ExpressionWrapper,
    F,
    FilteredRelation,
    Max,
    OuterRef,
    Q,
    Subquery,
    Sum,
    Value,
    When,
)
from django.db.models.functions import (
    Abs,
    Cast,
    Coalesce,
    Concat,
    ExtractHour,
    Length,
    Lower,
    Random,
    TruncDay,
    TruncMonth,
)
from django.db.models.signals import post_init
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.functional import SimpleLazyObject
from psycopg.adapt import Loader
from psycopg.pq import Format

import asyncorm
from asyncorm import bridge, statements
from asyncorm._hooks.switch import native_wrapper
from asyncorm.driver import Connection
from tests.checked import hits_checked
from tests.compare import differences
from tests.project.shop.models import (
    Author,
    Book,
    Country,
    Customer,
    Document,
    Event,
    Order,
    OrderLine,
    Person,
    PrintedBook,
    Product,
    Profile,
    Publisher,
    Review,
    Tag,
    Ticket,
)
from tests.project.shop.sample import moment, uid
from tests.support import all_given_back, database, in_thread
from tests.ways import outcome

pytestmark = pytest.mark.usefixtures("shop_data")


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    statements.clear()
    yield
    statements.clear()


def hits() -> int:
    return asyncorm.statement_cache_stats()["hits"]


# What must come from the cache from the second time on: functions of a value, and two values.
HOT: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "get by pk": (lambda v: Book.objects.get(pk=v), 1, 2),
    "get by keywords": (lambda v: Book.objects.get(pk=v, price__gte=Decimal("0.5")), 1, 2),
    "get on a filtered queryset": (lambda v: Book.objects.filter(pages__gt=0).get(id=v), 1, 2),
    "get by a uuid": (lambda v: Product.objects.get(sku=uid(v)), 1, 2),
    "get by a string": (lambda v: Tag.objects.get(name=v), "crime", "poetry"),
    "get by a column of another table": (
        lambda v: Product.objects.get(book__title=v),
        "Night",
        "Öl",
    ),
    "get with select_related": (
        lambda v: Book.objects.select_related("publisher__country").get(pk=v),
        1,
        2,
    ),
    "ordered by a relation": (
        lambda v: list(Review.objects.filter(pk__gte=v).order_by("-book", "pk")),
        1,
        2,
    ),
    "ordered by a relation that is ordered": (
        lambda v: list(Author.objects.filter(pk__gte=v).order_by("-mentor", "pk")),
        1,
        2,
    ),
    "ordered by expressions": (
        lambda v: list(
            Book.objects.filter(pages__gt=v).order_by(
                F("rating").desc(nulls_last=True), Length("title").asc(), "pk"
            )
        ),
        1,
        2,
    ),
    "ordered by an annotation in an expression": (
        lambda v: list(
            Book.objects.annotate(n=F("pages") + v).order_by(F("n").desc(), Lower("title"), "pk")
        ),
        1,
        2,
    ),
    "count of what is ordered by an expression": (
        lambda v: Book.objects.filter(pages__gt=v).order_by(F("rating").desc()).count(),
        1,
        2,
    ),
    "filtered relation": (
        lambda v: list(
            Book.objects.annotate(
                good=FilteredRelation("reviews", condition=Q(reviews__stars__gte=v))
            )
            .filter(good__pk__gt=v)
            .order_by("pk")
            .values("pk", "good__stars")
        ),
        1,
        2,
    ),
    "count by a filtered relation": (
        lambda v: (
            Book.objects.annotate(
                good=FilteredRelation("reviews", condition=Q(reviews__stars__gte=v))
            )
            .filter(good__isnull=False)
            .count()
        ),
        1,
        2,
    ),
    "aggregate by a filtered relation": (
        lambda v: (
            Book.objects.annotate(
                good=FilteredRelation("reviews", condition=Q(reviews__stars__gte=v))
            )
            .filter(good__pk__gt=v)
            .aggregate(n=Count("pk"), m=Max("good__stars"))
        ),
        1,
        2,
    ),
    "get of a proxy": (lambda v: PrintedBook.everything.get(pk=v), 1, 2),
    "get of a child": (lambda v: Author.objects.get(pk=v), 11, 12),
    "get of an overridden get": (lambda v: Document.objects.get(key=v), "a", "b"),
    "filter": (lambda v: list(Book.objects.filter(pages__gte=v).order_by("pk")), 1, 100),
    "exclude": (lambda v: list(Book.objects.exclude(pages__lt=v).order_by("-pk")), 1, 100),
    "or": (
        lambda v: list(Book.objects.filter(Q(pk=v) | ~Q(title__contains="e")).order_by("pk")),
        1,
        2,
    ),
    "in": (lambda v: list(Book.objects.filter(pk__in=[v, v + 1]).order_by("pk")), 1, 2),
    "range": (lambda v: list(Book.objects.filter(pk__range=(v, 5)).order_by("pk")), 1, 2),
    "null": (lambda v: list(Book.objects.filter(isbn=None, pk__gt=v).order_by("pk")), 1, 2),
    "a time": (
        lambda v: list(Book.objects.filter(created__lt=moment(v)).order_by("pk")),
        100,
        200,
    ),
    "a date": (
        lambda v: list(Person.objects.filter(born__gt=dt.date(v, 1, 1)).order_by("pk")),
        1950,
        1982,
    ),
    "like": (lambda v: list(Book.objects.filter(title__icontains=v).order_by("pk")), "%", "_"),
    "a page": (lambda v: list(Book.objects.order_by("pk")[v : v + 3]), 1, 4),
    "the default order": (lambda v: list(Tag.objects.filter(weight__gt=v)), 0, 1),
    "only": (lambda v: list(Book.objects.only("title").filter(pk__lt=v).order_by("pk")), 3, 4),
    "defer": (lambda v: list(Book.objects.defer("data").filter(pk__lt=v).order_by("pk")), 3, 4),
    "select_related backwards": (
        lambda v: list(Book.objects.select_related("product").filter(pk__lt=v).order_by("pk")),
        3,
        6,
    ),
    "values": (lambda v: list(Book.objects.filter(pk__lt=v).order_by("pk").values()), 3, 4),
    "values of columns": (
        lambda v: list(Book.objects.filter(pk__lt=v).order_by("pk").values("title", "extra")),
        3,
        4,
    ),
    "values_list": (
        lambda v: list(Book.objects.filter(pk__lt=v).order_by("pk").values_list("pk", "created")),
        3,
        4,
    ),
    "values_list flat": (
        lambda v: list(
            Book.objects.filter(pk__lt=v).order_by("pk").values_list("price", flat=True)
        ),
        3,
        4,
    ),
    "values_list named": (
        lambda v: list(
            Book.objects.filter(pk__lt=v).order_by("pk").values_list("pk", "title", named=True)
        ),
        3,
        4,
    ),
    "first": (lambda v: Book.objects.filter(pages__gt=v).first(), 1, 100),
    "last": (lambda v: Book.objects.filter(pages__gt=v).last(), 1, 100),
    "exists": (lambda v: Book.objects.filter(pk=v).exists(), 1, 10**6),
    "count": (lambda v: Book.objects.filter(pages__gt=v).count(), 1, 100),
    "in_bulk": (lambda v: Book.objects.in_bulk([v, v + 1]), 1, 2),
    "a foreign key": (lambda v: Book.objects.get(pk=v).publisher, 1, 2),
    "a reverse foreign key": (
        lambda v: list(Publisher.objects.get(pk=v).books.order_by("pk")),
        1,
        2,
    ),
    "a many-to-many": (lambda v: list(Book.objects.get(pk=v).tags.order_by("pk")), 1, 2),
    "prefetch": (
        lambda v: list(
            Publisher.objects.filter(pk=v).prefetch_related("books__authors").order_by("pk")
        ),
        1,
        2,
    ),
    "a reverse foreign key, twice": (
        lambda v: [*Publisher.objects.get(pk=v).books.order_by("pk").all()],
        1,
        2,
    ),
    "a year": (lambda v: rows(created__year=v, published__year__lte=v), 2023, 2024),
    "a sum": (lambda v: rows(pages__gt=F("sold") - v), 1, 1000),
    "whether there is one": (
        lambda v: rows(Exists(Review.objects.filter(book=OuterRef("pk"), stars__gt=v))),
        1,
        4,
    ),
    "an annotated sum": (
        lambda v: list(by_pk.annotate(m=F("pages") % v, n=Value(v), k=Value(v > 1))),
        1,
        2**31,
    ),
    "an annotated subquery": (
        lambda v: list(
            by_pk.annotate(
                m=Exists(Review.objects.filter(book=OuterRef("pk"), stars__gt=v)),
                n=Subquery(of_book.filter(stars__gt=v).values("stars")[:1]),
            )
        ),
        1,
        3,
    ),
    "an update by an expression": (
        lambda v: Book.objects.filter(pk=-1).update(pages=F("pages") + v, sold=F("pk") * v),
        1,
        -(2**31),
    ),
    "no such row": (lambda v: Book.objects.filter(pk=-v).first(), 1, 2),
}


@pytest.mark.parametrize("name", HOT)
@pytest.mark.parametrize("using", ["default", "other"])
async def test_hot_shapes(name: str, using: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, first, second = HOT[name]
    without_cursor = []

    def run(conn: Any, statement: Any) -> Any:
        without_cursor.append(statement)
        return original(conn, statement)

    original = Connection.run
    monkeypatch.setattr(Connection, "run", run)

    with override_settings(DATABASE_ROUTERS=[Always(using)]):
        expected = [await in_thread(outcome, function, value) for value in (first, second)]
        assert differences(expected[0], await asyncorm.native(outcome)(function, first)) == []
        before = hits()
        without_cursor.clear()
        assert differences(expected[1], await asyncorm.native(outcome)(function, second)) == []
        assert hits() > before and without_cursor
        assert differences(expected[0], await asyncorm.native(outcome)(function, first)) == []


# The same of what goes through Django's cursor: functions of two values, by equal and other ones.
WIDE: dict[str, Callable[[Any, Any], Any]] = {
    "year": lambda v, w: rows(created__year=2020 + v, published__year__lte=2025 - w),
    "month": lambda v, w: rows(created__month__gt=v, published__day__gt=w),
    "date": lambda v, w: rows(created__date__gt=dt.date(2020 + v, w, 1)),
    "json": lambda v, w: rows(Q(data__a=v) | ~Q(data__format=str(w)) | Q(extra__0__gt=w)),
    "json keys": lambda v, w: rows(Q(data__has_key="a") | Q(data__contains={"a": v}) | Q(pk=w)),
    "arrays": lambda v, w: rows(keywords__len__gte=v - 1, keywords__contained_by=["sea", str(w)]),
    "sum": lambda v, w: rows(pages__gt=F("sold") - v, pk__gt=w),
    "value": lambda v, w: rows(pages__gt=Value(v), title__gt=Value(str(w))),
    "either": lambda v, w: rows(Q(pk=v) ^ Q(pages__gt=w)),
    "annotated": lambda v, w: list(
        by_pk.annotate(m=F("pages") + v, n=Coalesce("rating", Value(float(w)))).filter(m__gt=w)
    ),
    "annotated values": lambda v, w: list(
        by_pk.annotate(m=F("pages") - v).filter(pk__gt=w).values_list("m", "title")
    ),
    "case": lambda v, w: list(
        by_pk.annotate(m=Case(When(pages__gt=v, then=Value(w)), default=Value(-v)))
    ),
    "counted": lambda v, w: by_pk.annotate(m=F("pages") + v).filter(pages__gt=w).count(),
    "is there": lambda v, w: by_pk.annotate(m=F("pages") + v).filter(pk=w).exists(),
    "is there a page": lambda v, w: (
        by_pk.annotate(m=F("pages") % v, n=F("sold") % w).values("m", "n").distinct()[:5].exists()
    ),
    "first": lambda v, w: by_pk.annotate(m=F("pages") + v).filter(pk__gt=w).first(),
    "get": lambda v, w: by_pk.annotate(m=F("pages") + v).get(pk=w),
    "an alias": lambda v, w: list(by_pk.alias(m=F("pages") + v).filter(pk__gt=w, m__gt=w)),
    "ordered by it": lambda v, w: list(
        Book.objects.alias(m=F("pages") % (v + 1)).filter(pk__gt=w).order_by("m", "pk")
    ),
    "distinct and ordered by it": lambda v, w: (
        Book.objects.annotate(m=Abs(F("pages") - v))
        .filter(m__gte=w)
        .values("pk")
        .annotate(n=Count("tags"))
        .distinct()
        .order_by("-m", "title")[:9]
        .aggregate(s=Count("pk"))
    ),
    "filtered count": lambda v, w: list(
        by_pk.annotate(n=Count("tags", filter=Q(tags__weight__gt=v))).filter(pk__gt=w)
    ),
    "aggregates": lambda v, w: Book.objects.filter(pages__gt=w).aggregate(
        n=Count("pk", filter=Q(pages__gt=v)), m=Sum("pages", default=w), k=Max(F("pages") + w)
    ),
    "aggregates of others": lambda v, w: by_pk.filter(pk__gt=w).aggregate(
        n=Count("tags", distinct=True, filter=Q(tags__weight__gt=v) | Q(authors__pk=w)),
        m=Sum(Case(When(reviews__stars__gt=v, then=1), default=w)),
    ),
    "having": lambda v, w: list(by_pk.annotate(n=Count("tags")).filter(n__gte=v, pk__gt=w)),
    "having first": lambda v, w: list(
        by_pk.annotate(n=Count("tags")).filter(Q(n__gte=v) | Q(pk=w)).filter(pages__gt=w)
    ),
    "grouped": lambda v, w: list(
        Book.objects.annotate(m=F("pages") % (v + 1), k=F("pages") % (w + 1))
        .values("m", "k")
        .annotate(n=Count("pk"))
        .order_by("m", "k")
    ),
    "values in json": lambda v, w: list(
        by_pk.filter(pk__gt=v).annotate(m=F("pages") + w).values("extra__0", "pk", "data__a", "m")
    ),
    "exists": lambda v, w: list(
        by_pk.annotate(
            some=Exists(Review.objects.filter(book=OuterRef("pk"), stars__gt=v)),
            others=~Exists(Review.objects.filter(book=OuterRef("pk"), stars__lt=w)),
        )
    ),
    "only if it exists": lambda v, w: rows(
        Exists(Review.objects.filter(book=OuterRef("pk"), stars__gt=v)), pk__gt=w
    ),
    "subquery": lambda v, w: list(
        by_pk.annotate(
            m=Subquery(
                Review.objects.filter(book=OuterRef("pk"), stars__gt=v)
                .order_by("-pk")
                .values("stars")[:1]
            )
        ).filter(pk__gt=w)
    ),
    "the first of a subquery": lambda v, w: rows(
        publisher__in=Publisher.objects.filter(pk__gt=v).order_by("pk")[:3], pk__gt=w
    ),
    "excluded over a relation": lambda v, w: list(
        by_pk.exclude(tags__weight__gt=v).exclude(authors__pk=w)
    ),
    "locked": lambda v, w: locked(by_pk.filter(pk__gt=v, pages__gt=w).select_for_update()),
    "locked partly": lambda v, w: locked(
        by_pk.filter(pk__gt=v, pages__gt=w).select_for_update(skip_locked=True, of=("self",))
    ),
    "update": lambda v, w: updated(by_pk.filter(pk__gt=w), pages=F("pages") + v),
    "update of two": lambda v, w: updated(
        by_pk.filter(pk__gt=v), title="x", pages=F("pages") + v, sold=F("pages") + w, isbn=None
    ),
    "update by cases": lambda v, w: updated(
        by_pk, pages=Case(When(pk=v, then=Value(w)), default=F("pages") + v)
    ),
    "update by a subquery": lambda v, w: updated(
        by_pk.filter(pk__gt=w),
        rating=Subquery(
            Review.objects.filter(book=OuterRef("pk"), stars__gt=v)
            .order_by("pk")
            .values("stars")[:1]
        ),
    ),
}
by_pk = Book.objects.order_by("pk")


def rows(*args: Any, **kwargs: Any) -> list[Any]:
    return list(Book.objects.filter(*args, **kwargs).order_by("pk"))


def locked(queryset: Any) -> list[Any]:
    with transaction.atomic():
        return list(queryset)


def updated(queryset: Any, **changes: Any) -> Any:
    with transaction.atomic():
        count = queryset.update(**changes)
        books = list(Book.objects.order_by("pk").values())
        transaction.set_rollback(True)
    return count, books


@pytest.mark.parametrize("name", WIDE)
async def test_wide_shapes(name: str) -> None:
    function = WIDE[name]
    with hits_checked():
        for number, values in enumerate([(1, 1), (2, 2), (1, 2), (2, 1), (1, 1), (3, 2)]):
            expected = await in_thread(outcome, function, *values)
            before = hits()
            assert differences(expected, await asyncorm.native(outcome)(function, *values)) == []
            assert not isinstance(expected, Exception)
            # Equal values in a grouped query are another shape.
            assert (
                hits() > before
                or number == 0
                or (name, number)
                in (
                    ("grouped", 2),
                    ("is there a page", 2),
                )
            )


# Querysets of another shape, whatever they have in common.
DIFFERENT: dict[str, list[Callable[[], Any]]] = {
    "transforms": [
        lambda: by_pk.filter(created__month=2),
        lambda: by_pk.filter(created__day=2),
        lambda: by_pk.filter(created__year=2),
        lambda: by_pk.filter(created__iso_year=2),
        lambda: by_pk.filter(published__year=2),
        lambda: by_pk.filter(created__year__gt=2),
        lambda: by_pk.filter(created__year__lt=2),
    ],
    "signs": [
        lambda: by_pk.annotate(m=F("pages") + 1),
        lambda: by_pk.annotate(m=F("pages") - 1),
        lambda: by_pk.annotate(m=F("sold") + 1),
        lambda: by_pk.annotate(n=F("pages") + 1),
        lambda: by_pk.alias(m=F("pages") + 1),
    ],
    "types of values": [
        lambda: by_pk.annotate(m=Value(1)),
        lambda: by_pk.annotate(m=Value("1")),
        lambda: by_pk.annotate(m=Value(None, output_field=models.IntegerField())),
        lambda: by_pk.annotate(m=Value(1, output_field=models.FloatField())),
        lambda: by_pk.annotate(m=Value(1, output_field=models.DecimalField(max_digits=3))),
        lambda: by_pk.annotate(m=Value(True)),
    ],
    "output fields": [
        lambda: by_pk.annotate(m=ExpressionWrapper(F("pages"), models.IntegerField())),
        lambda: by_pk.annotate(m=ExpressionWrapper(F("pages"), models.FloatField())),
        lambda: by_pk.annotate(m=ExpressionWrapper(F("pages"), models.DecimalField())),
        lambda: by_pk.annotate(m=ExpressionWrapper(F("pages"), Doubled())),
        lambda: by_pk.annotate(m=F("pages")),
    ],
    "lengths": [
        lambda: by_pk.annotate(m=Cast("pages", models.CharField(max_length=1))),
        lambda: by_pk.annotate(m=Cast("pages", models.CharField(max_length=2))),
        lambda: by_pk.annotate(m=Cast("price", models.DecimalField(None, None, 9, 1))),
    ],
    "models of one table": [
        lambda: by_pk.annotate(m=Subquery(Tag.objects.order_by("pk").values("weight")[:1])),
        lambda: by_pk.annotate(m=Subquery(Weight.objects.order_by("pk").values("weight")[:1])),
    ],
    "paths": [
        lambda: by_pk.values("data__a"),
        lambda: by_pk.values("data__format"),
        lambda: by_pk.values("extra__a"),
        lambda: by_pk.values_list("data__a__0"),
        lambda: by_pk.values_list("created__year"),
        lambda: by_pk.values_list("created__month"),
    ],
    "zones": [
        lambda: by_pk.annotate(m=TruncMonth("created", tzinfo=ZoneInfo("Asia/Kathmandu"))),
        lambda: by_pk.annotate(m=TruncMonth("created", tzinfo=ZoneInfo("Europe/Vienna"))),
        lambda: by_pk.annotate(m=TruncMonth("created")),
        lambda: by_pk.annotate(m=TruncDay("created")),
    ],
    "equal values": [
        lambda: pairs(1, 1),
        lambda: pairs(1, 2),
        lambda: pairs(2, 2),
        lambda: pairs(2, 1),
    ],
    "locks": [
        lambda: by_pk.select_for_update(),
        lambda: by_pk.select_for_update(nowait=True),
        lambda: by_pk.select_for_update(skip_locked=True),
        lambda: by_pk.select_for_update(no_key=True),
        lambda: by_pk.select_for_update(of=("self",)),
        lambda: by_pk.all(),
    ],
    "having": [
        lambda: by_pk.annotate(n=Count("tags")).filter(n__gt=1),
        lambda: by_pk.annotate(n=Count("tags")).filter(pages__gt=1),
        lambda: by_pk.annotate(n=Count("tags")).filter(Q(n__gt=1) | Q(pages__gt=1)),
        lambda: by_pk.annotate(n=Count("tags")).exclude(n__gt=1, pages__gt=1),
    ],
    "filters of aggregates": [
        lambda: by_pk.annotate(n=Count("tags", filter=Q(tags__weight__gt=1))),
        lambda: by_pk.annotate(n=Count("tags", filter=Q(tags__weight__lt=1))),
        lambda: by_pk.annotate(n=Count("tags", filter=~Q(tags__weight__gt=1))),
        lambda: by_pk.annotate(n=Count("tags")),
    ],
    "aggregates": [
        lambda: aggregated(Count("pk", filter=Q(pages__gt=1))),
        lambda: aggregated(Count("pk", filter=Q(sold__gt=1))),
        lambda: aggregated(Count("tags", filter=Q(pages__gt=1))),
        lambda: aggregated(Count("pk", filter=Q(pages__gt=1)), by_pk.filter(pages__gt=1)),
        lambda: aggregated(Count("pk", filter=Q(pages__gt=1)), by_pk.filter(sold__gt=1)),
        lambda: aggregated(Count("pk", filter=Q(pages__gt=1)), by_pk.exclude(sold__gt=1)),
        lambda: aggregated(Count("pk", filter=Q(pages__gt=1)), by_pk[:2]),
        lambda: aggregated(Sum("pages", default=1)),
        lambda: aggregated(Sum("pages", default=1.5, output_field=models.FloatField())),
        lambda: aggregated(Sum(F("pages") + 1)),
        lambda: aggregated(Sum(F("pages") - 1)),
        lambda: aggregated(Sum("pages")),
        lambda: aggregated(Max("created", filter=Q(pages__gt=1))),
    ],
    "subqueries": [
        lambda: by_pk.annotate(m=Exists(of_book)),
        lambda: by_pk.annotate(m=~Exists(of_book)),
        lambda: by_pk.annotate(m=Subquery(of_book.values("stars")[:1])),
        lambda: by_pk.annotate(m=Subquery(of_book.values("stars")[1:2])),
        lambda: by_pk.annotate(m=Subquery(of_book.values("customer")[:1])),
        lambda: by_pk.annotate(m=Subquery(of_book.order_by("-pk").values("stars")[:1])),
        lambda: by_pk.filter(Exists(of_book)),
        lambda: by_pk.exclude(Exists(of_book)),
    ],
}
of_book = Review.objects.filter(book=OuterRef("pk")).order_by("pk")


def aggregated(expression: Any, queryset: Any = by_pk) -> Any:
    return [queryset.aggregate(n=expression)]


def pairs(v: int, w: int) -> Any:
    grouped = Book.objects.annotate(m=F("pages") % v, k=F("pages") % w).values("m", "k")
    return grouped.annotate(n=Count("pk")).order_by("m", "k")


class Doubled(models.IntegerField):
    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        return None if value is None else value * 2


class Weight(models.Model):
    """The table of tags."""

    weight = Doubled()

    class Meta:
        app_label = "not_installed"
        managed = False
        db_table = "shop_tag"


async def hits_of_the_second_time(function: Any, expected: Any) -> int:
    """Run it natively twice: it gives what is expected, and each hit is what Django compiles."""
    with hits_checked():
        for _ in range(2):
            before = hits()
            assert differences(expected, await asyncorm.native(function)()) == []
    return hits() - before


@pytest.mark.parametrize("name", DIFFERENT)
async def test_different_shapes(name: str) -> None:
    def lists() -> list[Any]:
        with transaction.atomic():
            return [list(make()) for make in DIFFERENT[name]]

    expected = await in_thread(lists)
    assert await hits_of_the_second_time(lists, expected) > 0


async def test_integers_in_expressions_have_the_types_of_literals() -> None:
    def heavier(n: Any) -> Any:
        with transaction.atomic():
            Tag.objects.filter(pk=1).update(weight=F("weight") + n)
            weight = Tag.objects.get(pk=1).weight
            transaction.set_rollback(True)
        return weight

    edges = [0, -1, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 2**70, True, 1.5]

    def types() -> list[Any]:
        found = []
        for n in edges:
            small, book = F("weight") + Value(n), F("pk") + Value(n)
            for queryset in (
                Tag.objects.filter(pk=1, name__gt="").filter(weight__lte=small),
                Book.objects.filter(pk__in=[1, 2], sold__gte=-book),
                Book.objects.filter(pk=1, pages__lt=Cast(Value(n), models.IntegerField())),
                Book.objects.filter(pk=1, title__lt=Cast(Value(n), models.TextField())),
            ):
                with transaction.atomic():
                    found.append(outcome(list, queryset))
                    if isinstance(found[-1], Exception):
                        transaction.set_rollback(True)
            found.append(outcome(heavier, n))
        # The second line of an error shows the statement.
        return [
            (type(each), str(each).splitlines()[0]) if isinstance(each, Exception) else each
            for each in found
        ]

    expected = await in_thread(types)
    assert [each for each in expected if type(each) is tuple and each[0] is DataError]
    for _ in range(2):
        assert differences(expected, await asyncorm.native(types)()) == []


async def test_different_updates() -> None:
    updates: list[dict[str, Any]] = [
        {"pages": F("pages") + 1},
        {"pages": F("pages") * 2},
        {"pages": F("pk") + 1},
        {"sold": F("pages") + 1},
        {"pages": 1},
        {"pages": Value(1)},
        {"rating": Value(None)},
        {"rating": Value(1)},
        {"rating": None},
        {"data": Value({}, models.JSONField())},
        {"keywords": ["x"]},
        {"keywords": Value(["x"], Book._meta.get_field("keywords"))},
        {"title": Lower("title")},
        {"title": Concat("title", Value("%s"))},
    ]

    def update() -> list[Any]:
        return [updated(by_pk.filter(pk__gt=1), **changes) for changes in updates]

    expected = await in_thread(update)
    # All but the arrays, and the rows.
    assert await hits_of_the_second_time(update, expected) >= 2 * len(updates) - 2


async def test_an_instance_for_a_column_that_is_no_relation_is_refused() -> None:
    """As by Django's compiler, which is not asked once the statement is known."""
    publisher = Publisher(pk=1, name="one")

    def update() -> list[Any]:
        books = Book.objects.filter(pk=-1)  # the values matter, not the rows
        values: list[Any] = ["x", publisher, SimpleLazyObject(lambda: publisher), "y"]
        return [
            outcome(lambda value=value, name=name: books.update(**{name: value}))
            for name in ("title", "publisher")
            for value in (values if name == "title" else [1, *values[1:3]])
        ]

    expected = await in_thread(update)
    assert list(map(type, expected[:4])) == [int, TypeError, TypeError, int]
    for _ in range(2):
        assert differences(expected, await asyncorm.native(update)()) == []


@pytest.mark.parametrize("zone", ["Asia/Kathmandu", "America/New_York", "UTC"])
async def test_the_current_time_zone(zone: str) -> None:
    def by_time() -> list[Any]:
        with timezone.override(zone):
            return [
                list(by_pk.filter(created__date__gt=dt.date(2024, 1, 1), created__hour__lt=12)),
                list(by_pk.filter(created__year=2024)),
                list(by_pk.annotate(m=TruncMonth("created"), n=ExtractHour("created"))),
            ]

    with hits_checked():
        for each in ("Pacific/Kiritimati", zone, "Europe/Vienna"):
            with timezone.override(each):
                expected = await in_thread(by_time)
                assert differences(expected, await asyncorm.native(by_time)()) == []


async def test_a_lock_wants_a_transaction() -> None:
    async with asyncorm.atomic():
        await by_pk.select_for_update().anative()
    for _ in range(2):
        with pytest.raises(TransactionManagementError):
            await by_pk.select_for_update().anative()


class Always:
    """A router that names one alias."""

    def __init__(self, using: str) -> None:
        self.using = using

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.using

    db_for_write = db_for_read

    def allow_relation(self, *args: Any, **hints: Any) -> bool:
        return True


async def test_streams() -> None:
    def stream(low: int) -> Any:
        publisher = Publisher.objects.get(pk=1)
        return [
            list(Book.objects.filter(pk__gt=low).order_by("pk").iterator(chunk_size=2)),
            list(Book.objects.filter(pk__gt=low).order_by("pk")[1:5].iterator(chunk_size=2)),
            list(Book.objects.order_by("pk").values("pk", "created").iterator(chunk_size=3)),
            list(publisher.books.order_by("pk").iterator(chunk_size=1)),
        ]

    expected = await in_thread(stream, 2)
    for _ in range(2):
        assert differences(expected, await asyncorm.native(stream)(2)) == []
    assert hits() > 4
    async with asyncorm.atomic():
        assert differences(expected, await asyncorm.native(stream)(2)) == []
    streamed = [book async for book in Book.objects.order_by("pk").native_iterator(chunk_size=2)]
    assert [book.pk for book in streamed] == sorted(book.pk for book in streamed)


async def test_get_says_what_django_says() -> None:
    for _ in range(2):
        with pytest.raises(Book.DoesNotExist, match=r"^Book matching query does not exist\.$"):
            await Book.objects.native_get(pk=10**6)
        with pytest.raises(Book.MultipleObjectsReturned, match=r"it returned \d+!$"):
            await Book.objects.native_get(publisher_id=1)
    assert hits() > 0
    for value in ("abc", [], object()):
        with pytest.raises((ValueError, TypeError), match="expected a number"):
            await Book.objects.native_get(pk=value)
    with pytest.raises(DataError, match="NUL"):
        await Tag.objects.native_get(name="a\x00b")
    for value in (2**63, -(2**80)):
        assert not await Book.objects.filter(pk=value).native_exists()
        with pytest.raises(Book.DoesNotExist):
            await Book.objects.native_get(pk=value)


async def test_values_that_change_the_sql() -> None:
    """None, booleans, lists of another length, expressions."""
    querysets: list[Callable[[], Any]] = [
        lambda: Book.objects.filter(isbn=None),
        lambda: Book.objects.filter(isbn="9780000000001"),
        lambda: Book.objects.filter(in_print=True),
        lambda: Book.objects.filter(in_print=False),
        lambda: Book.objects.filter(in_print__in=[True, False]),
        lambda: Book.objects.filter(pk__in=[1, 2]),
        lambda: Book.objects.filter(pk__in=[1, 2, 3]),
        lambda: Book.objects.filter(pk__in=[1, None]),
        lambda: Book.objects.filter(pk__in=[]),
        lambda: Book.objects.filter(pages=F("sold")),
        lambda: Book.objects.filter(pages=Value(1)),
        lambda: Book.objects.filter(data={}),
        lambda: Book.objects.filter(data=None),
        lambda: Book.objects.filter(extra=Value(None, models.JSONField())),
        lambda: Book.objects.filter(publisher=1),
        lambda: Book.objects.filter(publisher__in=Publisher.objects.filter(pk=1)),
        lambda: Book.objects.filter(rating__gt=Decimal("1.5")),
        lambda: Book.objects.filter(pages__gt=1.5),
        lambda: Book.objects.filter(language=Book.Language.GERMAN),
        lambda: Book.objects.none(),
        lambda: OrderLine.objects.filter(pk=(1, 1)),
    ]
    for _ in range(2):
        for queryset in querysets:
            expected = await in_thread(lambda q: list(q()), queryset)
            assert differences(sorted(expected, key=by_key), await ordered(queryset())) == []


def by_key(obj: Any) -> Any:
    return obj.pk


async def ordered(queryset: Any) -> list[Any]:
    return sorted(await queryset.anative(), key=by_key)


async def test_sql_is_djangos() -> None:
    """Whoever watches sees the statements that Django would have executed."""

    def captured() -> list[str]:
        with CaptureQueriesContext(connection) as context:
            Book.objects.get(pk=1)
            Book.objects.filter(title__startswith="a%b").order_by("-pk")[2:5].exists()
            list(Book.objects.filter(pages__gt=1).order_by("pk")[2:5])
            Book.objects.filter(pages__gt=1).count()
            Book.objects.filter(pk=-1).update(title="x", isbn=None)
            Book.objects.filter(pk=-1).delete()
        return [query["sql"] for query in context]

    expected = await in_thread(captured)
    for _ in range(2):
        assert await asyncorm.native(captured)() == expected
    assert hits() > 0


async def test_execute_wrappers_are_called() -> None:
    seen: list[str] = []

    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    for _ in range(2):
        with connection.execute_wrapper(wrapper):
            await Book.objects.native_get(pk=1)
    assert len(seen) == 2 and seen[0] == seen[1]


async def test_receivers_of_init_signals_are_called() -> None:
    await Book.objects.native_get(pk=1)
    seen: list[Any] = []

    def receiver(instance: Any, **kwargs: Any) -> None:
        seen.append(instance)

    post_init.connect(receiver, sender=Book)
    try:
        book = await Book.objects.native_get(pk=1)
        assert seen == [book]
        (book,) = await Book.objects.filter(pk=1).anative()
        assert len(seen) == 2
    finally:
        post_init.disconnect(receiver, sender=Book)


@pytest.mark.parametrize(
    "settings",
    [{"USE_TZ": False}, {"TIME_ZONE": "Asia/Kolkata"}, {"USE_TZ": False, "TIME_ZONE": "UTC"}],
)
async def test_changed_time_zones(settings: dict[str, Any]) -> None:
    def times() -> list[Any]:
        books = Book.objects.order_by("pk").values_list("created", "changed", "published")
        return [*books, *Book.objects.order_by("pk"), *Event.objects.order_by("pk")]

    before = await asyncorm.native(times)()
    with override_settings(**settings):
        # Not Django's synchronous pool, which only notices in the thread of the change.
        with override_settings(ASYNCORM={"STATEMENT_CACHE": False}):
            expected = await asyncorm.native(times)()
        for _ in range(2):
            assert differences(expected, await asyncorm.native(times)()) == []
    assert differences(before, await asyncorm.native(times)()) == []


async def test_a_session_in_another_zone() -> None:
    def times() -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL TIME ZONE 'Europe/Vienna'")
        return list(Book.objects.order_by("pk"))

    def synchronous() -> Any:
        from django.db import transaction

        with transaction.atomic():
            return times()

    expected = await in_thread(synchronous)
    async with asyncorm.atomic():
        assert differences(expected, await asyncorm.native(times)()) == []


async def test_timestamps_inside_of_something() -> None:
    """Beside a column of timestamps, those in ranges and arrays are datetimes, too."""

    def times() -> Any:
        events = Event.objects.filter(slot__isnull=False).order_by("pk")
        begin = events.annotate(begin=F("slot__startswith"))
        grouped = begin.values("begin").order_by("begin")
        together = grouped.annotate(all=ArrayAgg("slot__endswith"))
        return [*begin, *begin.values_list("slot", "begin"), *together]

    expected = await in_thread(times)
    assert isinstance(expected[0].slot.lower, dt.datetime)
    assert isinstance(expected[0].slot.upper, dt.datetime)
    assert any(isinstance(each, dt.datetime) for each in expected[-1]["all"])
    for _ in range(2):
        assert differences(expected, await asyncorm.native(times)()) == []


async def test_a_loader_of_the_connection_for_json() -> None:
    class Shouting(Loader):
        def load(self, data: Any) -> str:
            return "as loaded: " + bytes(data).decode()

    def read() -> Any:
        with transaction.atomic():
            connection.ensure_connection()
            adapters = connection.connection.adapters
            djangos = adapters.get_loader(adapters.types["jsonb"].oid, Format.TEXT)
            adapters.register_loader("jsonb", Shouting)
            try:
                return list(Book.objects.order_by("pk"))
            finally:
                adapters.register_loader("jsonb", djangos)

    usual = await in_thread(lambda: list(Book.objects.order_by("pk")))
    expected = await in_thread(read)
    assert differences(usual, expected)
    for _ in range(2):
        assert differences(usual, await Book.objects.order_by("pk").anative()) == []
        assert differences(expected, await asyncorm.native(read)()) == []


async def test_json_is_read_without_a_call_for_each_row() -> None:
    """By the loader that Django registers, whichever of psycopg's implementations it is of."""
    books = await Book.objects.order_by("pk").anative()
    assert len(books) > 1
    asked = []

    def note(frame: Any, event: str, arg: object) -> None:
        if frame.f_code is models.JSONField.from_db_value.__code__:
            asked.append(frame)

    sys.setprofile(note)
    try:
        again = await Book.objects.order_by("pk").anative()
    finally:
        sys.setprofile(None)
    assert [book.data for book in again] == [book.data for book in books]
    assert not asked


async def test_timestamps_that_python_does_not_know() -> None:
    def read(value: str) -> Any:
        from django.db import transaction

        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("UPDATE shop_customer SET joined = %s WHERE id = 1", [value])
            try:
                return Customer.objects.get(pk=1)
            except DataError as exc:
                return exc
            finally:
                transaction.set_rollback(True)

    for value in ("infinity", "-infinity", "0044-03-15 12:00:00+00 BC", "12345-01-01 00:00:00+00"):
        expected = await in_thread(read, value)
        assert isinstance(expected, DataError)
        assert differences(expected, await asyncorm.native(read)(value)) == []


async def test_it_can_be_switched_off() -> None:
    with override_settings(ASYNCORM={"STATEMENT_CACHE": False}):
        before = asyncorm.statement_cache_stats()
        await Book.objects.native_get(pk=1)
        await Book.objects.native_get(pk=1)
        assert asyncorm.statement_cache_stats() == before
    await Book.objects.native_get(pk=1)
    assert asyncorm.statement_cache_stats()["misses"] > before["misses"]


SOME = [("pages__gte", 1), ("pages__lte", 10**4), ("title__gte", "A"), ("title__lte", "z")]


async def rotate(stop: int, start: int = 0) -> None:
    """Use each of different shapes once."""
    for number in range(start, stop):
        name, value = SOME[number % 4]
        limit = number // 4 + 1
        found = await Book.objects.filter(**{name: value}).order_by("pk")[:limit].anative()
        assert len(found) <= limit


async def test_of_more_shapes_than_it_holds_a_share_is_found() -> None:
    with override_settings(ASYNCORM={"STATEMENT_CACHE_SIZE": 40}):
        await rotate(60)
        for _ in range(2):  # the model's fields know by now all that Django makes of them
            await rotate(60)
        before = hits()
        for _ in range(5):
            await rotate(60)
        assert asyncorm.statement_cache_stats()["size"] == 40
        # Two thirds are there at most, none if those used least recently went first.
        assert 60 <= hits() - before <= 200


@pytest.mark.slow
async def test_a_shape_takes_little_memory() -> None:
    await rotate(20)
    before = asyncorm.statement_cache_stats()["size"]
    taken = []
    for start in (20, 220, 420):  # a pool that grows, a dict, takes memory in one of them only
        gc.collect()
        tracemalloc.start()
        try:
            await rotate(start + 200, start)
            gc.collect()
            taken.append(tracemalloc.get_traced_memory()[0] / 200)
        finally:
            tracemalloc.stop()
    assert asyncorm.statement_cache_stats()["size"] == before + 600
    assert min(taken) < 20_000, taken


async def test_what_is_not_let_in_is_not_remembered_as_impossible() -> None:
    with override_settings(ASYNCORM={"STATEMENT_CACHE_SIZE": 4}):
        await rotate(40)
        before = hits()
        for _ in range(60):
            assert (await Book.objects.native_get(pk=1)).pk == 1
            assert len(await Book.objects.filter(pk__in=[1, 2]).anative()) == 2
        assert hits() - before > 60


async def test_lists_of_keys_of_all_lengths_have_one_plan() -> None:
    queries: list[Callable[[Any], Any]] = [
        lambda keys: Book.objects.filter(pages__gt=0, pk__in=keys, title__gte="").order_by("pk"),
        lambda keys: Book.objects.exclude(pk__in=keys).filter(publisher__in=keys[:7]),
        lambda keys: Book.objects.filter(publisher__in=Publisher.objects.filter(pk__in=keys)),
    ]
    for query in queries:
        statements.clear()
        for number, length in enumerate((2, 5000, 3, 700, 2)):
            keys = [*range(1, length + 1)]
            before = hits()
            expected = await in_thread(list, query(keys).order_by("pk"))
            found = await query(keys).order_by("pk").anative()
            assert differences(expected, found) == []
            assert hits() - before == (number > 0)
            for name in ("count", "exists"):
                expected = await in_thread(getattr(query(keys), name))
                assert await getattr(query(keys), f"native_{name}")() == expected
        assert asyncorm.statement_cache_stats()["size"] == 3


async def test_long_lists_of_other_values_are_left_to_django() -> None:
    for _ in range(2):
        assert len(await Book.objects.filter(pages__in=range(3000)).anative()) > 1
    assert asyncorm.statement_cache_stats()["size"] == 0


async def test_lists_that_are_no_arrays_have_a_plan_for_each_length() -> None:
    with override_settings(DATABASE_ROUTERS=[]):
        query = lambda keys: Book.objects.filter(pk__in=keys).extra(where=["1 = 1"])  # noqa: E731
        for number, length in enumerate((2, 3, 2, 3, 3000, 2)):
            before = hits()
            keys = [*range(1, length + 1)]
            expected = await in_thread(list, query(keys).order_by("pk"))
            assert differences(expected, await query(keys).order_by("pk").anative()) == []
            assert hits() - before == (number in (2, 3, 5))


async def test_a_list_of_keys_is_one_parameter() -> None:
    skus = list(await Product.objects.values_list("sku", flat=True).anative())
    querysets: list[Any] = [
        Book.objects.filter(pk__in=[3, 1, 2, 2]),
        Book.objects.filter(title__gte="A", pk__in=[3, 1, -2], pages__lt=10**6),
        Book.objects.exclude(publisher__in=[1, 2]).filter(pk__in=[1, 2, 3, 4])[1:9],
        Book.objects.filter(pk__in=[1, 2**40, 2**70, -(2**70)]),
        Book.objects.filter(pk__in=[1, 2.0, 3]),
        Book.objects.filter(pages__in=[120, 2**31]),
        Product.objects.filter(sku__in=skus[:3]),
    ]
    for queryset in querysets * 2:
        queryset = queryset.all()
        expected = await in_thread(list, queryset)
        assert differences(sorted(expected, key=by_key), await ordered(queryset.all())) == []
    arrays = [plan for plan, _ in statements.plans.values() if getattr(plan, "lists", None)]
    assert [plan.query.count(b"$") for plan in arrays] == [1, 3, 3, 1]
    assert all(b" = ANY($" in plan.query for plan in arrays)


async def test_pages_share_a_plan() -> None:
    for offset in range(1, 6):
        await Book.objects.order_by("pk")[offset : offset + 2].anative()
    assert asyncorm.statement_cache_stats()["size"] == 1


async def test_an_evaluated_query_has_its_table() -> None:
    for _ in range(2):
        books = Book.objects.order_by("pk")
        await books.anative()
        assert list(books.query.alias_map) == ["shop_book"]
        assert list(books.query.alias_refcount.values()) == [0]
        assert len(await books.filter(pk=1).anative()) == 1


async def test_synchronous_code_does_not_use_it() -> None:
    before = asyncorm.statement_cache_stats()
    await in_thread(lambda: Book.objects.get(pk=1))
    assert asyncorm.statement_cache_stats() == before
    assert not native_wrapper("default")


LARGE: dict[str, Callable[[], Any]] = {
    "instances": lambda: list(Big.objects.all()),
    "tuples": lambda: list(Big.objects.values_list()),
    "by Django": lambda: list(Big.objects.annotate(n=Random())),
    "dicts by Django": lambda: list(Big.objects.values("pk", n=Random())),
    "raw": lambda: list(Big.objects.raw("SELECT * FROM tests_big")),
    "iterator": lambda: list(Big.objects.iterator(chunk_size=5000)),
    "watched": lambda: watched(lambda: list(Big.objects.all())),
}


def watched(function: Callable[[], Any]) -> Any:
    with CaptureQueriesContext(connection):
        return function()


@pytest.mark.parametrize("name", LARGE)
async def test_a_large_result_lets_other_tasks_run(
    view: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0
    seen: list[int] = []

    async def watch() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def give_turn(conn: Any) -> bool:
        before = turns
        given = original(conn)
        seen.append(turns - before)
        return given

    original = Connection.give_turn
    monkeypatch.setattr(Connection, "give_turn", give_turn)
    monkeypatch.setattr("asyncorm.driver._BUSY", 0)  # however quick this machine is
    task = asyncio.create_task(watch())
    rows = await asyncorm.native(LARGE[name])()
    task.cancel()
    assert len(rows) == 10_000
    assert len(seen) >= 100 and all(seen)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
async def test_cancelled_while_a_large_result_is_made(
    view: None, name: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_turn(conn: Any) -> bool:
        nonlocal left
        left -= 1
        if not left:
            task.cancel()
        return original(conn)

    async def load() -> None:
        async with asyncorm.atomic() if inside else contextlib.nullcontext():
            await asyncorm.native(LARGE[name])()

    left = 50
    original = Connection.give_turn
    monkeypatch.setattr(Connection, "give_turn", give_turn)
    monkeypatch.setattr("asyncorm.driver._BUSY", 0)
    closed = mock.Mock(side_effect=Connection.terminate)
    monkeypatch.setattr(Connection, "terminate", lambda conn: closed(conn))
    task = asyncio.create_task(load())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left <= 0
    assert not closed.called  # the server has answered in full
    await all_given_back()
    assert await Book.objects.native_get(pk=1)


async def test_no_turns_where_a_cancellation_must_not_arrive(
    shop_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns() -> list[bool]:
        connection.ensure_connection()
        give_turn = connection.connection.give_turn
        with bridge.shield(bridge.current()):  # type: ignore[arg-type]
            shielded = give_turn()
        return [shielded, give_turn()]

    monkeypatch.setattr("asyncorm.driver._BUSY", 0)
    assert await asyncorm.native(turns)() == [False, True]


class Big(models.Model):
    """Rows that a function makes."""

    number = models.IntegerField(primary_key=True)

    class Meta:
        app_label = "not_installed"
        managed = False
        db_table = "tests_big"


@pytest.fixture
async def view(shop_data: None) -> AsyncIterator[None]:
    async with asyncorm.cursor() as cursor:
        await cursor.execute(
            "CREATE VIEW tests_big AS SELECT n AS number FROM generate_series(1, 10000) n"
        )
    yield
    async with asyncorm.cursor() as cursor:
        await cursor.execute("DROP VIEW tests_big")


@pytest.mark.parametrize("threshold", [0, 2, None])
async def test_prepared_statements(threshold: int | None) -> None:
    """With and without, parameters mean what literals mean."""
    with database(OPTIONS={"prepare_threshold": threshold}) as alias:
        for name, (function, first, second) in HOT.items():
            with override_settings(DATABASE_ROUTERS=[Always("default")]):
                expected = await asyncorm.native(outcome)(function, first)
            with override_settings(DATABASE_ROUTERS=[Always(alias)]):
                for value in (first, second, first, first):
                    actual = await asyncorm.native(outcome)(function, value)
            assert differences(forget_alias(expected), forget_alias(actual)) == [], name
        await asyncorm.close_pools(alias)


def forget_alias(found: Any) -> Any:
    """Take the alias, and what is beside the instances, out of them."""
    found = list(found.values()) if isinstance(found, dict) else found
    for obj in found if isinstance(found, list) else [found]:
        if isinstance(obj, models.Model):
            obj._state.db = ""
            obj._state.fields_cache = {}
            obj.__dict__.pop("_prefetched_objects_cache", None)
    return found


class TestWrites:
    """INSERT, UPDATE and DELETE from the cache."""

    @pytest.fixture(autouse=True)
    def fresh(self, fresh_shop: Any) -> None:
        """Put the sample back."""

    async def test_create_save_update_delete(self) -> None:
        for n in range(3):
            before = hits()
            person = await Person.objects.native_create(
                name=f"New {n}", born=dt.date(2000, 1, n + 1)
            )
            assert person.pk and not person._state.adding and person._state.db == "default"
            person.name = f"Newer {n}"
            person.email = None if n % 2 else "a@b.c"
            await person.native_save()
            again = await Person.objects.native_get(pk=person.pk)
            assert differences(again, person) == []
            assert await Person.objects.filter(pk=person.pk).native_update(name="x", born=None) == 1
            await again.native_refresh_from_db()
            assert (again.name, again.born, again.email) == ("x", None, person.email)
            assert await Person.objects.filter(pk=-1).native_update(name="y") == 0
            await again.native_save(update_fields=["name"])
            assert n == 0 or hits() >= before + 4
        author = await Author.objects.native_create(name="Inherited", pen_name="two tables")
        assert (await Author.objects.native_get(pk=author.pk)).name == "Inherited"
        await author.native_delete()
        ticket = await Ticket.objects.native_create(title="made up")
        ticket = await Ticket.objects.native_get(pk=ticket.pk)
        assert (ticket.status, ticket.kind, ticket.label) == ("open", "BUG", "MADE UP")

    @pytest.mark.parametrize("known", [False, True])
    async def test_delete_of_one(self, known: bool) -> None:
        made: list[Any] = []
        for n in range(4):
            made.append(await Tag.objects.native_create(name=f"Gone {n}"))
            made.append(await Country.objects.native_create(code=f"{n}'", name="Gone"))
            made.append(await Author.objects.native_create(name=f"Gone {n}", pen_name="two tables"))
        keep, made = made[-3:], made[:-3]
        statements.clear()
        for number, obj in enumerate(made):
            if not known:
                statements.clear()
            key, before = obj.pk, hits()
            found = await type(obj).objects.filter(pk=key).native_count()
            count, of_models = await obj.native_delete()
            assert (found, obj.pk) == (1, None) and count == sum(of_models.values())
            assert of_models[obj._meta.label] == 1 and count == 1 + isinstance(obj, Author)
            assert not await type(obj).objects.filter(pk=key).native_exists()
            assert not known or number < 3 or hits() > before + 2
            obj.pk = key  # once more: it is not there
            assert sum((await obj.native_delete())[1].values()) == 0
        for obj in keep:
            await obj.native_refresh_from_db()
            await obj.native_delete()

    async def test_values_out_of_range(self) -> None:
        for _ in range(2):
            for value in (2**15, 2**40, -(2**70)):
                with pytest.raises(DataError, match="out of range"):
                    await Tag.objects.filter(pk=1).native_update(weight=value)
            with pytest.raises(DataError, match="too long"):
                await Tag.objects.native_create(name="x" * 51)

    async def test_json_and_times(self) -> None:
        values: list[Any] = [
            {"big": 10**30, "float": 1.5, "deep": [[{}]], "text": 'ä\\"\n'},
            [],
            "text",
            3,
            True,
            None,
        ]
        for value in values:
            await Book.objects.filter(pk=1).native_update(data=value or [], extra=value)
            book = await Book.objects.native_get(pk=1)
            assert book.data == (value or []) and type(book.data) is type(value or [])
            assert book.extra == value and type(book.extra) is type(value)
        now = timezone.now()
        order = await Order.objects.native_create(customer_id=1, placed=now, remark=None)
        order = await Order.objects.native_get(pk=order.pk)
        assert order.placed == now and order.remark is None
        assert await Profile.objects.filter(pk=1).native_update(bio=Value("b")) in (0, 1)

    async def test_instances_that_others_refer_to(self) -> None:
        for _ in range(3):  # compiled, then from the cache
            customer = Customer(name="Later")
            order = Order(customer=customer, placed=timezone.now())
            with pytest.raises(ValueError, match="unsaved related object 'customer'"):
                await order.native_save()
            await customer.native_save()
            await order.native_save()
            assert order.customer_id == customer.pk and order.customer is customer
            order.customer_id = 1
            await order.native_save()
            assert not Order._meta.get_field("customer").is_cached(order)
            assert await Order.objects.filter(pk=order.pk, customer_id=1).native_exists()

    async def test_values_of_one_type_some_of_which_are_null(self) -> None:
        event = await Event.objects.native_create(name="At", address="10.0.0.1")
        for address in ("10.0.0.2", "", "10.0.0.3", None, "", "10.0.0.4"):
            event.address = address
            await event.native_save()
            await event.native_refresh_from_db()
            assert event.address == (address or None)
            other = await Event.objects.native_create(name="At", address=address)
            await other.native_refresh_from_db()
            assert other.address == (address or None)


async def test_a_time_that_the_field_sets_is_the_same_in_the_row_and_in_the_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = timezone.now() - dt.timedelta(days=1)
    for sets in (True, False, True):
        monkeypatch.setattr(Customer._meta.get_field("joined"), "auto_now_add", sets)
        for _ in range(2):  # compiled, then from the cache
            customer = await Customer.objects.native_create(name="New", joined=given)
            assert (customer.joined != given) is sets
            again = await Customer.objects.native_get(pk=customer.pk)
            assert again.joined == customer.joined


async def test_a_mock_on_a_field_is_honoured_after_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    field = Tag._meta.get_field("name")

    async def mocked(name: str, made: Callable[[str], Any]) -> None:
        for turn in "ababa":
            monkeypatch.setattr(field, name, made(turn), raising=False)
            for _ in range(3):  # compiled, then from the cache
                tag = await Tag.objects.native_create(name="x")
                again = await Tag.objects.filter(pk=tag.pk).native_get()
                assert again.name == f"{turn}x"
                await again.native_delete()
            monkeypatch.undo()

    await mocked("from_db_value", lambda turn: lambda value, *args: turn + value)
    await mocked("get_db_prep_save", lambda turn: lambda value, connection: turn + value)
    await mocked("pre_save", lambda turn: lambda obj, add: turn + obj.name)


async def test_a_cursor_put_on_the_wrapper_is_asked() -> None:
    """As Django's test cases do to forbid queries."""

    def read() -> None:
        list(Tag.objects.all())
        connection.cursor = forbidden
        try:
            with pytest.raises(ZeroDivisionError):
                list(Tag.objects.all())
        finally:
            del connection.cursor

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    await asyncorm.native(read)()


@pytest.mark.parametrize("method", ["native_count", "native_exists", "anative"])
async def test_what_is_unfit_is_looked_at_once(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    looks = []

    class Looked(statements.Shape):
        def __init__(self, query: Any, *args: Any) -> None:
            looks.append(query)
            super().__init__(query, *args)

    monkeypatch.setattr(statements, "Shape", Looked)
    await Author.objects.native_count()  # there is a connection
    unfit = Author.objects.filter(pk=1).union(Author.objects.filter(pk=2))
    before = asyncorm.statement_cache_stats()["unfit"]
    await getattr(unfit, method)()
    assert len([query for query in looks if query is unfit.query]) == 1
    assert asyncorm.statement_cache_stats()["unfit"] > before
    # Not remembered for what is done to it next.
    fit = Author.objects.filter(pk__in=[1, 2])
    assert await fit.native_count() == await asyncorm.native(fit.count)()
