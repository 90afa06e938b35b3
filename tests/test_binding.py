"""What a parameter means is what Django's literal means, and each has the source it had before."""

import datetime as dt
import functools
import operator
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connection, models, transaction
from django.db.models import Case, Count, Exists, F, OuterRef, Q, Value, When

import asyncorm
from asyncorm import statements
from tests.checked import hits_checked
from tests.compare import differences
from tests.project.shop.models import Book, Event, Note, Review
from tests.project.shop.sample import moment
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


# What values mean


class Legacy(models.Model):
    """A table that Django has not made: its columns are of other types than its fields'."""

    float_of_numeric = models.FloatField(null=True)
    float_of_real = models.FloatField(null=True)
    float_of_double = models.FloatField(null=True)
    float_of_integer = models.FloatField(null=True)
    decimal_of_numeric = models.DecimalField(null=True, max_digits=60, decimal_places=30)
    decimal_of_double = models.DecimalField(null=True, max_digits=60, decimal_places=30)
    decimal_of_real = models.DecimalField(null=True, max_digits=60, decimal_places=30)
    decimal_of_bigint = models.DecimalField(null=True, max_digits=60, decimal_places=30)
    integer_of_numeric = models.IntegerField(null=True)
    integer_of_bigint = models.IntegerField(null=True)
    integer_of_smallint = models.BigIntegerField(null=True)
    integer_of_real = models.IntegerField(null=True)
    integer_of_xid = models.BigIntegerField(null=True)
    boolean_of_boolean = models.BooleanField(null=True)
    text_of_char = models.CharField(null=True, max_length=9)
    text_of_enum = models.CharField(null=True, max_length=9)
    text_of_domain = models.TextField(null=True)
    text_of_varchar = models.TextField(null=True)
    text_of_name = models.TextField(null=True)
    time_of_timestamp = models.DateTimeField(null=True)
    json_of_json = models.JSONField(null=True)

    class Meta:
        app_label = "not_installed"
        managed = False
        db_table = "tests_legacy"


COLUMNS = {
    "float_of_numeric": "numeric", "float_of_real": "real", "float_of_double": "double precision",
    "float_of_integer": "integer", "decimal_of_numeric": "numeric(20, 4)",
    "decimal_of_double": "double precision", "decimal_of_real": "real",
    "decimal_of_bigint": "bigint", "integer_of_numeric": "numeric", "integer_of_bigint": "bigint",
    "integer_of_smallint": "smallint", "integer_of_real": "real", "integer_of_xid": "xid",
    "boolean_of_boolean": "boolean", "text_of_char": "char(5)", "text_of_enum": "tests_mood",
    "text_of_domain": "tests_short", "text_of_varchar": "varchar(5)", "text_of_name": "name",
    "time_of_timestamp": "timestamp", "json_of_json": "json",
}  # fmt: skip
INTEGERS: list[Any] = [
    0, 1, -1, 2**15, -(2**15), 2**24 + 1, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**70,
]  # fmt: skip
FLOATS: list[Any] = [
    0.0, 0.2, -0.0, 1.5, 2.0, 0.12345678901234568, 1e-300, 1e16, 1e300, 5e-324, float("nan"),
    float("inf"), float("-inf"),
]  # fmt: skip
DECIMALS: list[Any] = [
    Decimal("0.10"), Decimal(7), Decimal("-0"), Decimal("1E+2"), Decimal("1.50"), Decimal("1E-7"),
    Decimal("0.12345678901234567890"), Decimal(2**63), Decimal(2**53 + 1), Decimal("NaN"),
    Decimal("Infinity"),
]  # fmt: skip
TEXTS: list[Any] = ["", "a", "a ", "ok", "sad", "abcdef", "ab\\'c", "%", "é", "a" * 70]
VALUES: dict[str, list[Any]] = {
    "float": [*FLOATS, 1, 2**53 + 1, True],
    "decimal": [*DECIMALS, 1, -1, 0.1],
    "integer": [*INTEGERS, True, 1.5, 3.0],
    "boolean": [True, False, 1],
    "text": TEXTS,
    "time": [moment(1), moment(1).replace(tzinfo=ZoneInfo("Asia/Kathmandu")), dt.datetime.max],
    "json": [{"a": 1.50}, [], "x", 2**70, 0.1],
}


@pytest.fixture
async def legacy(shop_data: None) -> AsyncIterator[None]:
    columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    async with asyncorm.cursor() as cursor:
        await cursor.execute("CREATE TYPE tests_mood AS ENUM ('sad', 'ok')")
        await cursor.execute("CREATE DOMAIN tests_short AS varchar(5) CHECK (VALUE <> 'never')")
        await cursor.execute(f"CREATE TABLE tests_legacy (id serial PRIMARY KEY, {columns})")
    yield
    async with asyncorm.cursor() as cursor:
        await cursor.execute("DROP TABLE tests_legacy; DROP DOMAIN tests_short")
        await cursor.execute("DROP TYPE tests_mood")


def first_line(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a savepoint, or its error without the line that shows the SQL."""
    try:
        with transaction.atomic():
            return function(*args)
    except Exception as error:
        return type(error), str(error).splitlines()[0]


def text_of(name: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {name}::text FROM tests_legacy ORDER BY 1")
        return cursor.fetchall()


def created(name: str, value: Any) -> Any:
    Legacy.objects.create(**{name: value})
    return text_of(name)


def saved(name: str, value: Any) -> Any:
    row = Legacy.objects.create()
    setattr(row, name, value)
    row.save()
    return text_of(name)


def set_everywhere(name: str, value: Any) -> Any:
    return Legacy.objects.filter(pk__gt=0).update(**{name: value}), text_of(name)


def number_found(lookup: str, value: Any) -> int:
    return Legacy.objects.filter(**{lookup: value}).count()


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.usefixtures("legacy")
async def test_values_in_columns_of_other_types(name: str) -> None:
    values = VALUES[name.partition("_")[0]]

    def work(value: Any) -> Any:
        with transaction.atomic():
            for function in (created, set_everywhere, saved):
                yield first_line(function, name, value)
            for other in values[::7]:
                first_line(created, name, other)
            for lookup in ("exact", "gt", "lte", "contains", "iexact"):
                yield first_line(number_found, f"{name}__{lookup}", value)
            for some in ([value], [value, values[1]]):
                yield first_line(number_found, f"{name}__in", some)
            transaction.set_rollback(True)

    for value in values:
        expected = await in_thread(lambda v: list(work(v)), value)
        for _ in range(2):
            actual = await asyncorm.native(lambda v: list(work(v)))(value)
            assert differences(expected, actual) == [], value


async def test_more_parameters_than_the_server_takes() -> None:
    def many(size: int) -> int:
        lists = [Q(title__in=[f"{j}_{i}" for i in range(size)]) for j in range(34)]
        return Book.objects.filter(functools.reduce(operator.or_, lists) | Q(pk=1)).count()

    await same_as_djangos(many, (1927,), (1927,), (1928,), (1928,))


async def test_a_range_of_a_queryset() -> None:
    def between(v: int) -> Any:
        least = Book.objects.filter(pk=v).values("pages")
        return list(by_pk.filter(pages__range=(least, F("sold")))), list(
            by_pk.filter(Q(pages__range=(v, F("sold") + v)) | Q(pages__range=[least, 10**v]))
        )

    await same_as_djangos(between, (1,), (2,), (1,))
