"""What batch() gives is what evaluating each operation by itself gives, types included.

The cases are those that django-querysets-single-query-fetch tests (it builds one SQL statement of
JSON), and the types that it loses on the way. test_equality.py does the same with every shape.
"""

import datetime as dt
import functools
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import django
import pytest
from django.db import connection
from django.db.models import Avg, Count, F, IntegerField, Max, Min, Prefetch, Sum, Value
from django.test.utils import CaptureQueriesContext

import asyncorm
from tests.compare import differences
from tests.project.shop.models import (
    Author,
    Book,
    Category,
    Country,
    Customer,
    Event,
    Order,
    OrderLine,
    Person,
    Product,
    Publisher,
    Review,
    Tag,
)
from tests.ways import outcome

pytestmark = [
    pytest.mark.usefixtures("shop_data"),
    pytest.mark.filterwarnings("ignore:Calling select_related:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Calling select_related:PendingDeprecationWarning"),
]

Operation = Callable[[], Any]
books = Book.objects.order_by("pk")
products = Product.objects.order_by("pk")


def of_category(number: int) -> Any:
    """A related manager's, with a known related object; the category is another one each time."""
    return Category.objects.get(pk=number).products.only("name").order_by("pk")


# Each gives a queryset, whose list is wanted, or a value.
LISTS: dict[str, Operation] = {
    "by key": lambda: products.filter(pk=1),
    "of another model": lambda: Category.objects.filter(pk=1),
    "joined": lambda: products.select_related("category", "book__publisher"),
    "joined to nothing": lambda: products.filter(book=None).select_related("book", "category"),
    "decimals": lambda: products.filter(price__gte=Decimal("9.99")),
    "generated decimals": lambda: products.filter(value__gt=0).values("value", "price"),
    "times and dates": lambda: books.only("created", "changed", "published"),
    "by time": lambda: books.filter(created__lte=dt.datetime(2030, 1, 1, tzinfo=dt.UTC)),
    "by date": lambda: Publisher.objects.filter(founded__lt=dt.date(2020, 1, 1)).order_by("pk"),
    "uuids": lambda: Event.objects.order_by("pk"),
    "by uuid": lambda: Product.objects.filter(sku=products[0].sku),
    "joined uuids": lambda: Event.objects.select_related("host").order_by("pk"),
    "durations and times": lambda: Event.objects.values_list("lasts", "doors").order_by("pk"),
    "ranges": lambda: Event.objects.values("slot", "days", "seats", "fee").order_by("pk"),
    "addresses, bytes, hstore": lambda: Event.objects.values_list(
        "address", "poster", "attributes"
    ).order_by("pk"),
    "arrays": lambda: books.values_list("keywords", "matrix"),
    "json objects and lists": lambda: books.only("data", "extra"),
    "a value in json": lambda: books.values_list("data__format", "extra__0"),
    "floats and booleans": lambda: books.values_list("rating", "in_print", "sold"),
    "choices": lambda: books.filter(language=Book.Language.GERMAN).only("language"),
    "inherited": lambda: Author.objects.order_by("pk"),
    "composite keys": lambda: OrderLine.objects.order_by("order_id", "number"),
    "quotes": lambda: Tag.objects.filter(name="O'Reilly's \"100%\""),
    "percents": lambda: books.filter(title__contains="%"),
    "patterns": lambda: books.filter(title__istartswith="The", slug__icontains="A"),
    "in a list": lambda: books.filter(pk__in=[3, 1, 2]),
    "never any": lambda: products.filter(pk__in=[]),
    "none": lambda: products.none(),
    "none, annotated": lambda: products.none().annotate(ten=Value(10)),
    "no row": lambda: products.filter(pk=-1),
    "values": lambda: products.values("pk", "sku", "price", "category__name"),
    "values, all": lambda: Customer.objects.order_by("pk").values(),
    "values_list": lambda: products.values_list("sku", "price"),
    "values_list, flat": lambda: products.values_list("price", flat=True),
    "values_list, named": lambda: products.values_list("sku", "price", named=True),
    "sliced": lambda: books[2:7],
    "distinct": lambda: books.order_by("language").values_list("language").distinct(),
    "distinct on": lambda: Review.objects.order_by("book_id", "pk").distinct("book_id"),
    "a union": lambda: Tag.objects.filter(pk=1).union(Tag.objects.filter(pk=2)).order_by("name"),
    "a constant": lambda: products.annotate(ten=Value(10)),
    "a count": lambda: Category.objects.annotate(n=Count("products")).order_by("pk"),
    "arithmetic": lambda: products.annotate(double=F("price") * 2),
    "several annotations": lambda: Category.objects.annotate(
        n=Count("products"), five=Value(5, output_field=IntegerField())
    ).order_by("pk"),
    "a filtered annotation": lambda: (
        Category.objects.annotate(n=Count("products")).filter(n__gt=0).order_by("pk")
    ),
    "grouped": lambda: (
        Product.objects.values("category")
        .annotate(total=Sum("price"), n=Count("pk"))
        .order_by("category")
    ),
    "deferred": lambda: products.only("name"),
    "deferred and joined": lambda: products.select_related("category").only(
        "name", "category__name"
    ),
    "of a related manager": lambda: of_category(1),
    "many to many": lambda: Book.objects.get(pk=1).tags.all(),
    "prefetched": lambda: books.prefetch_related("tags", "publisher__country", "reviews"),
    "prefetched, to_attr": lambda: books.prefetch_related(
        Prefetch("tags", Tag.objects.filter(weight__gt=0), to_attr="heavy")
    )[:5],
    "reversed": lambda: books.reverse(),
    "extra": lambda: books.extra(select={"longer": "pages > 300"}),
    "raw": lambda: Book.objects.raw("SELECT id, title FROM shop_book ORDER BY id LIMIT 3"),
    "strings as keys": lambda: Country.objects.order_by("pk"),
}
if django.VERSION >= (6, 1):
    from django.db.models import FETCH_PEERS, FETCH_RAISE

    LISTS["peers"] = lambda: products.fetch_mode(FETCH_PEERS)
    LISTS["no fetching"] = lambda: (
        products.fetch_mode(FETCH_RAISE).select_related("category").only("name", "category__name")
    )

VALUES: dict[str, Operation] = {
    "sliced with a step": lambda: books[:9:3],
    "count": Product.objects.count,
    "filtered count": lambda: products.filter(pk=1).count(),
    "count of none": lambda: products.none().count(),
    "count, distinct": lambda: Product.objects.values("category").distinct().count(),
    "count, sliced": lambda: products[1:3].count(),
    "count, from the second on": lambda: products[1:].count(),
    "count, annotated": lambda: products.annotate(n=Count("category__products")).count(),
    "count, grouped": lambda: Product.objects.values("category").annotate(n=Count("pk")).count(),
    "count of a union": lambda: Tag.objects.filter(pk=1).union(Tag.objects.filter(pk=2)).count(),
    "count, ordered by others": lambda: (
        Category.objects.order_by("products__name").distinct().count()
    ),
    "exists": lambda: products.filter(price__gt=0).exists(),
    "exists not": lambda: products.filter(pk=-1).exists(),
    "exists in none": lambda: products.none().exists(),
    "get": lambda: Product.objects.get(pk=1),
    "get, none there": lambda: Product.objects.get(pk=-1),
    "get, several there": lambda: Product.objects.get(pk__gt=0),
    "one or none": lambda: products.filter(pk=1).first(),
    "one or none: none": lambda: products.filter(pk=-1).first(),
    "one or none of several": lambda: products.first(),
    "one or none of none": lambda: products.none().first(),
    "first, last": lambda: (Tag.objects.first(), Tag.objects.last()),
    "latest, earliest": lambda: (books.latest("published"), books.earliest("pk")),
    "a sum": lambda: Product.objects.aggregate(total=Sum("price")),
    "several aggregates": lambda: Product.objects.aggregate(
        total=Sum("price"), n=Count("pk"), mean=Avg("price"), most=Max("price"), least=Min("price")
    ),
    "filtered aggregates": lambda: products.filter(category=1).aggregate(Sum("price"), Count("pk")),
    "aggregates of nothing": lambda: products.filter(pk=-1).aggregate(Sum("price"), n=Count("pk")),
    "aggregates of none": lambda: products.none().aggregate(Sum("price"), n=Count("pk")),
    "dates and floats": lambda: books.aggregate(Max("published"), Avg("rating"), Max("created")),
    "in bulk": lambda: Tag.objects.in_bulk(["crime"], field_name="name"),
    "explained": lambda: type(products.explain()),
    "dates": lambda: list(Book.objects.dates("published", "year")),
    "datetimes": lambda: list(Order.objects.datetimes("placed", "month")),
    "an item": lambda: Person.objects.order_by("pk")[0],
    "contains": lambda: products.contains(Product(pk=1)),
}


def evaluated(operation: Operation) -> Any:
    result = operation()
    return list(result) if hasattr(result, "db") and not hasattr(result, "_state") else result


@pytest.mark.parametrize("name", [*LISTS, *VALUES])
def test_each_alone(run: Any, name: str) -> None:
    if name in LISTS:
        expected = outcome(evaluated, LISTS[name])
        operation = LISTS[name]()  # a queryset
        assert type(expected) is list
    else:
        expected = outcome(VALUES[name])
        operation = VALUES[name]
    (actual,) = run(asyncorm.batch(operation, return_exceptions=True))
    assert differences(expected, actual) == []


@pytest.mark.parametrize("inside", ["a pool", "connection", "atomic"])
def test_all_together(run: Any, inside: str) -> None:
    operations = [*LISTS.values(), *VALUES.values()]
    expected = [outcome(evaluated, operation) for operation in operations]

    async def together() -> list[Any]:
        made = [functools.partial(evaluated, operation) for operation in operations]
        if inside == "connection":
            async with asyncorm.connection():
                return await asyncorm.batch(*made, return_exceptions=True)
        if inside == "atomic":
            async with asyncorm.atomic():
                return await asyncorm.batch(*made, return_exceptions=True)
        return await asyncorm.batch(*made, return_exceptions=True)

    for name, one, other in zip([*LISTS, *VALUES], expected, run(together()), strict=True):
        assert differences(one, other) == [], name


def statements(function: Callable[[], Any]) -> int:
    with CaptureQueriesContext(connection) as seen:
        outcome(function)
    return len(seen)


def test_as_few_round_trips_as_one_alone(run: Any) -> None:
    simple = [
        operation
        for operation in [*LISTS.values(), *VALUES.values()]
        if statements(functools.partial(evaluated, operation)) == 1
    ]
    assert len(simple) > 60

    async def round_trips() -> int:
        before = asyncorm.pool_stats().get("pipelines", 0)
        made = [functools.partial(evaluated, operation) for operation in simple]
        await asyncorm.batch(*made, return_exceptions=True)
        return asyncorm.pool_stats()["pipelines"] - before

    assert run(round_trips()) <= -(-len(simple) // 64)


@pytest.mark.parametrize("name", ["never any", "none", "none, annotated"])
def test_nothing_is_asked_for_nothing(run: Any, name: str) -> None:
    async def asked() -> int:
        with CaptureQueriesContext(connection) as seen:
            assert await asyncorm.batch(LISTS[name](), products.none().count) == [[], 0]
        return len(seen)

    assert run(asked()) == 0
