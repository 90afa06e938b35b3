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
from django.db import connection, connections, models, transaction
from django.db.models import Case, Count, Exists, F, OuterRef, Q, Subquery, Value, When
from django.db.models.expressions import CombinedExpression, RawSQL
from django.db.models.functions import Abs, Cast, Coalesce, ExtractDay, Lower
from django.db.models.lookups import GreaterThan

import asyncorm
from asyncorm import statements
from asyncorm.binding import in_place_of_expressions
from tests.checked import hits_checked
from tests.compare import differences
from tests.project.shop.models import Book, Event, Note, Publisher, Review
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


async def test_values_that_django_cannot_compare() -> None:
    """An instance without a key; count() and aggregate() compare annotations."""

    def counted(v: Any) -> Any:
        chosen = Case(When(publisher=v, then=Value(v)), output_field=models.IntegerField())
        return Book.objects.annotate(x=chosen).count()

    await same_as_djangos(counted, (1,), (2,), (Publisher(),), (1,))


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


def created_together(name: str, value: Any, *others: Any) -> Any:
    Legacy.objects.bulk_create(Legacy(**{name: each}) for each in (value, *others))
    return text_of(name)


def updated_together(name: str, value: Any) -> Any:
    rows = [Legacy.objects.create(), Legacy.objects.create()]
    for row in rows:
        setattr(row, name, value)
    return Legacy.objects.bulk_update(rows, [name]), text_of(name)


def number_found(lookup: str, value: Any) -> int:
    return Legacy.objects.filter(**{lookup: value}).count()


# For the quick profile one column for each type of values.
FIRST = {name.partition("_")[0]: name for name in reversed(COLUMNS)}.values()


@pytest.mark.parametrize(
    "name",
    [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in COLUMNS],
)
@pytest.mark.usefixtures("legacy")
async def test_values_in_columns_of_other_types(name: str) -> None:
    values = VALUES[name.partition("_")[0]]

    def work(value: Any) -> Any:
        with transaction.atomic():
            for function in (created, set_everywhere, saved):
                yield first_line(function, name, value)
            yield first_line(created_together, name, value, *values[:3])
            yield first_line(created_together, name, value, None)
            yield first_line(updated_together, name, value)
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
            before = dict(statements.counts)
            actual = await asyncorm.native(lambda v: list(work(v)))(value)
            assert differences(expected, actual) == [], value
            if before == {**statements.counts, "hits": before["hits"]}:
                break  # all of it was found in the cache


@pytest.mark.slow
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


async def test_a_range_of_more_than_two_values() -> None:
    """Django's SQL has two placeholders for them all the same, and the server's driver says so."""

    def between(values: Any) -> Any:
        return (
            first_line(
                lambda: Book.objects.aggregate(n=Count("pk", filter=Q(pages__range=values)))
            ),
            first_line(lambda: list(by_pk.annotate(n=Case(When(pages__range=values, then=1))))),
        )

    await same_as_djangos(between, ((1, 100),), ((1, 100, 200),), ((1, 100),))


# Text of the user's


class Days(models.Func):
    template = "INTERVAL '%(expressions)s days'"
    output_field = models.DurationField()


class Tagged(models.Func):
    template = "$tag$%(expressions)s$tag$"
    output_field = models.TextField()


class Half(models.Transform):
    lookup_name = "half"
    template = "(%(expressions)s / 2)"


class Prefixed(models.Lookup):
    lookup_name = "prefixed"

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        lhs, lhs_params = self.process_lhs(compiler, connection)
        rhs, rhs_params = self.process_rhs(compiler, connection)
        return f"{lhs} = '{rhs}'", [*lhs_params, *rhs_params]


class Scaled(models.DecimalField):
    """A type whose name is the user's."""

    def db_type(self, connection: Any) -> str:
        return "numeric(10, 1)"


class Twice(models.IntegerField):
    def get_placeholder(self, value: Any, compiler: Any, connection: Any) -> str:
        return "(2 * %s)"

    def get_placeholder_sql(self, value: Any, compiler: Any, connection: Any) -> Any:
        return "(2 * %s)", [value]


class Sold(models.Model):
    """The table of books."""

    pages = Twice()
    sold = models.BigIntegerField()

    class Meta:
        app_label = "not_installed"
        managed = False
        db_table = "shop_book"


def sold(**changes: Any) -> Any:
    with transaction.atomic():
        count = Sold.objects.filter(pk__gt=1).update(**changes)
        found = list(Sold.objects.order_by("pk").values())
        transaction.set_rollback(True)
    return count, found


def deleted(queryset: Any) -> Any:
    with transaction.atomic():
        found = queryset.delete()
        transaction.set_rollback(True)
    return found


USERS: dict[str, Callable[[int], Any]] = {
    "extra(where)": lambda v: list(
        by_pk.extra(where=["pages * interval '1 day' < interval '%s days'"], params=[v])
    ),
    "extra(where) counted": lambda v: by_pk.extra(
        where=["pages * interval '1 day' < interval '%s days'"], params=[v]
    ).count(),
    "extra(where) deleted": lambda v: deleted(
        Review.objects.extra(where=["stars * interval '1 day' > interval '%s days'"], params=[v])
    ),
    "extra(where) beside a filter": lambda v: list(
        by_pk.extra(where=["title <> '%%s $1'"]).filter(pages__gt=v)
    ),
    "extra(select)": lambda v: list(by_pk.extra(select={"x": "'%s'"}, select_params=[v])),
    "extra(select) in values": lambda v: list(
        by_pk.extra(select={"x": "pages + 1"}).filter(pk__gt=v).values_list("x", "pk")
    ),
    "extra(order_by)": lambda v: list(Book.objects.filter(pk__gt=v).extra(order_by=["-id"])),
    "extra(tables)": lambda v: list(
        by_pk.filter(pk__gt=v).extra(tables=["shop_tag"], where=["shop_tag.id = shop_book.id"])
    ),
    "RawSQL in a literal": lambda v: rows(title__gt=RawSQL("'c%s'", (v,))),
    "RawSQL in an order": lambda v: rows(
        pk__in=RawSQL(
            "SELECT id FROM (SELECT -id AS a, pages, id FROM shop_book ORDER BY %s LIMIT 2) q", (v,)
        )
    ),
    "RawSQL in E''": lambda v: rows(title__gt=RawSQL("E'\\'%s'", (v,))),
    "RawSQL after a comment": lambda v: rows(pages__gt=RawSQL("/* it's */ %s", (v,))),
    "RawSQL in a comment": lambda v: rows(pages__gt=RawSQL("/* %s */ 1", (v,))),
    "RawSQL that groups": lambda v: list(
        Book.objects.values(m=RawSQL("pages %% %s", (v,))).annotate(n=Count("pk")).order_by("m")
    ),
    "a type modifier": lambda v: by_pk.extra(
        where=["rating < 1.2345::numeric(10,%s)"], params=[v]
    ).count(),
    "a template": lambda v: rows(pages__lt=ExtractDay(Days(Value(v)))),
    "a template with dollars": lambda v: rows(title__gt=Tagged(Value(v))),
    "a template given": lambda v: rows(
        title__gt=Lower(Value(v, models.TextField()), template="lower('%(expressions)s')")
    ),
    "a function given": lambda v: list(
        by_pk.annotate(
            m=models.Func(
                Value(v),
                function="interval '1 day' * ",
                template="%(function)s%(expressions)s",
                output_field=models.DurationField(),
            )
        )
    ),
    "a joiner given": lambda v: list(
        by_pk.annotate(m=Coalesce(F("pages"), Value(v), arg_joiner=" + 1, "))
    ),
    "extra of a function": lambda v: list(
        by_pk.annotate(m=Days(Value(v), template="INTERVAL '%(expressions)s %(of)s'", of="hour"))
    ),
    "a function in update()": lambda v: updated(
        title=Cast(Days(Value(v)), models.CharField(max_length=30))
    ),
    "a function in aggregate()": lambda v: Book.objects.aggregate(
        m=models.Sum(Days(Value(v)), output_field=models.DurationField())
    ),
    "a template of an aggregate": lambda v: Book.objects.aggregate(
        m=Count("pk", filter=Q(pages__gt=v), template="COUNT(%(expressions)s) + '%(more)s'", more=1)
    ),
    "a subquery's template": lambda v: list(
        by_pk.annotate(
            m=Subquery(
                Review.objects.filter(book=OuterRef("pk"), stars__gt=v).values("pk"),
                template="(SELECT count(*) FROM (%(subquery)s) q)",
                output_field=models.IntegerField(),
            )
        )
    ),
    "a type of the user's": lambda v: list(
        by_pk.annotate(m=Cast(F("rating"), Scaled(max_digits=10, decimal_places=v)))
    ),
    "a connector of the user's": lambda v: list(
        by_pk.annotate(m=CombinedExpression(F("pages"), "- 2 *", Value(v)))
    ),
    "a lookup of the user's": lambda v: rows(Prefixed(F("pages"), v)),
    "a transform of the user's": lambda v: rows(GreaterThan(Half(F("pages")), v)),
    "placeholders of the user's": lambda v: (sold(pages=v), sold(pages=F("pages") + v)),
    "in HAVING": lambda v: list(
        by_pk.annotate(n=Count("tags")).filter(n__lt=ExtractDay(Days(Value(v))))
    ),
    "in a subquery": lambda v: list(
        by_pk.annotate(m=Exists(Review.objects.filter(stars__lt=ExtractDay(Days(Value(v))))))
    ),
    "in an ordering": lambda v: list(Book.objects.order_by(Days(Value(v)), "pk")),
    "in a condition": lambda v: list(
        by_pk.annotate(m=Case(When(pages__lt=ExtractDay(Days(Value(v))), then=1), default=0))
    ),
    "in a filtered relation": lambda v: list(
        by_pk.annotate(
            of=models.FilteredRelation("reviews", condition=Q(reviews__stars__gt=v))
        ).values_list("pk", "of__stars").order_by("pk", "of__stars")
    ),
}  # fmt: skip


def rows(*args: Any, **kwargs: Any) -> list[Any]:
    return list(by_pk.filter(*args, **kwargs))


@pytest.mark.parametrize("name", USERS)
async def test_text_of_the_users_has_its_values_where_django_writes_them(name: str) -> None:
    def function(v: int) -> Any:
        return first_line(USERS[name], v)

    await same_as_djangos(function, (2,), (3,), (2,), (107,))
    bound = [
        plan
        for plan, _ in statements.plans.values()
        if isinstance(plan, statements.Plan) and plan.query is not None and "$1" in plan.text
    ]
    # Beside it there may be others, as the one that reads what was written.
    assert len(bound) <= name.startswith(("a function in update", "placeholders", "extra(where) d"))


async def test_classes_that_somebody_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`as_postgresql()` is the documented way to give a function other SQL."""

    def longer(v: int) -> Any:
        return list(by_pk.annotate(m=Abs(F("pages") - v)))

    def as_postgresql(self: Any, compiler: Any, connection: Any) -> Any:
        return self.as_sql(compiler, connection, template="(interval '%(expressions)s days')")

    await same_as_djangos(longer, (1,), (2,))
    monkeypatch.setattr(Abs, "as_postgresql", as_postgresql, raising=False)

    def days(v: int) -> Any:
        return list(by_pk.annotate(m=Abs(Value(v), output_field=models.DurationField())))

    await same_as_djangos(days, (1,), (2,), (3,))
    monkeypatch.undo()
    monkeypatch.setattr(Abs, "template", "(interval '%(expressions)s days')")
    statements.clear()
    await same_as_djangos(days, (1,), (2,), (3,))


async def test_a_backend_that_writes_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators are text of the user's."""

    def operators(v: int) -> Any:
        return rows(pages__gt=v), rows(title__contains=str(v))

    backend: Any = type(connections["default"])
    changed = {**backend.operators, "gt": "< 10 + %s"}
    with monkeypatch.context() as patch:
        patch.setattr(backend, "operators", changed)
        await same_as_djangos(operators, (1,), (2,))
        plans = [plan for plan, _ in statements.plans.values() if plan is not None]
        assert plans and all(plan.query is None for plan in plans)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT '%s'", "SELECT E'\\'%s'", "SELECT $$%s$$", "SELECT $a$ $$ %s $a$", 'SELECT "%s"',
        "SELECT 1 -- %s", "SELECT /* /* */ %s */ 1", "SELECT U&\"%s\"", "SELECT interval %s",
        "SELECT date %s", "SELECT 1::numeric(10,%s)", "SELECT CAST(1 AS numeric(10, %s))",
        "SELECT 1 ORDER BY %s", "SELECT 1 GROUP BY a, %s", "SELECT %s::text", "SELECT a[%s]",
        "SELECT x ORDER BY a, %s LIMIT 1", "SELECT string_agg(a ORDER BY %s)",
        "SELECT 1 WHERE a LIKE 'x' ESCAPE %s", "SELECT ARRAY[%s]", "SELECT 1)%s",
    ],
)  # fmt: skip
def test_places_that_are_none_for_parameters(sql: str) -> None:
    assert not in_place_of_expressions(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT %s", "SELECT a %% %s, '%%s', \"b\" FROM t WHERE a IN (%s, %s) AND NOT (%s = b)",
        "SELECT a WHERE b BETWEEN %s AND %s OR UPPER(c::text) LIKE UPPER(%s) ORDER BY 1 LIMIT %s",
        "SELECT CASE WHEN a > %s THEN %s ELSE %s END, (SELECT 1 ORDER BY a) WHERE a < %s OFFSET %s",
        "INSERT INTO t (a, b) VALUES (%s, %s) RETURNING id", "UPDATE t SET a = %s WHERE b = (%s)",
        "SELECT (%s)::text, a::numeric(10, 2) + %s", "SELECT UNNEST((%s)::integer[])",
    ],
)  # fmt: skip
def test_places_for_parameters(sql: str) -> None:
    assert in_place_of_expressions(sql)


# What changes later


async def test_a_field_that_a_model_gets_later() -> None:
    """In the statement of its own, and of another that selects it as well."""

    class Meta:
        app_label = "not_installed"
        managed = False
        db_table = "shop_publisher"

    publisher: Any = type(
        "LatePublisher",
        (models.Model,),
        {"__module__": __name__, "Meta": Meta, "name": models.CharField(max_length=100)},
    )
    book: Any = type(
        "LateBook",
        (models.Model,),
        {
            "__module__": __name__,
            "Meta": type("Meta", (Meta,), {"db_table": "shop_book"}),
            "title": models.CharField(max_length=200),
            "publisher": models.ForeignKey(publisher, models.CASCADE, related_name="books"),
        },
    )

    def read(v: int) -> list[Any]:
        return [
            publisher.objects.get(pk=v),
            list(publisher.objects.filter(pk__gt=v).order_by("pk").values()),
            list(book.objects.select_related("publisher").filter(pk__lt=v).order_by("pk")),
            book.objects.select_related("publisher").get(pk=v),
            list(publisher.objects.filter(pk=v).prefetch_related("books").order_by("pk")),
        ]

    assert await same_as_djangos(read, (1,), (2,), (1,)) >= 8
    publisher.add_to_class("founded", models.DateField(null=True))
    assert await same_as_djangos(read, (1,), (2,), (1,)) >= 8
    book.add_to_class("pages", models.IntegerField(default=0))
    assert await same_as_djangos(read, (1,), (2,), (1,)) >= 8
