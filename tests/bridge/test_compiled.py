"""`asyncorm.compiled()` gives what the function's queryset gives, whatever that depends on."""

import asyncio
import contextvars
import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from django.db.models import Case, Count, Exists, F, Q, Value, When
from django.db.transaction import TransactionManagementError
from django.test import override_settings

import asyncorm
from tests.compare import differences
from tests.project.shop.models import Author, Book, Product, Publisher, Review, Tag
from tests.project.shop.sample import moment, uid
from tests.support import in_thread

pytestmark = pytest.mark.usefixtures("shop_data")

COMPILABLE: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
    "pk": (lambda pk: Book.objects.filter(pk=pk), [(1,), (2,), (-1,)]),
    "two": (
        lambda pages, price: Book.objects.filter(pages__gte=pages, price__lt=price).order_by("pk"),
        [(1, Decimal(20)), (100, Decimal("5.5")), (0, Decimal(1000))],
    ),
    "twice": (
        lambda n: Book.objects.filter(Q(pk=n) | ~Q(sold__gt=n)).order_by("-pk"),
        [(1,), (5,)],
    ),
    "constants beside": (
        lambda n: (
            Book.objects.filter(in_print=True, isbn=None, pk__in=[1, 2, 3, 4], pages__gt=n)
            .exclude(title="x")
            .order_by("pk")
        ),
        [(1,), (100,)],
    ),
    "equal strings": (lambda s: Book.objects.filter(slug=s).order_by("pk"), [("x",), ("y",)]),
    "strings": (lambda s: Tag.objects.filter(name__icontains=s), [("c",), ("%",), ("_",)]),
    "times": (
        lambda t: Book.objects.filter(created__gt=t).order_by("pk"),
        [(moment(1),), (moment(99),)],
    ),
    "dates": (
        lambda d: Book.objects.filter(published__gt=d).order_by("pk"),
        [(dt.date(2000, 1, 1),), (dt.date(2023, 1, 1),)],
    ),
    "uuid": (lambda u: Product.objects.filter(sku=u), [(uid(1),), (uid(2),)]),
    "joins": (
        lambda s, n: (
            Book.objects.filter(publisher__name=s, authors__pk__gt=n)
            .select_related("publisher__country")
            .order_by("pk", "authors__pk")
        ),
        [("Addison", 1), ("Blauwald", 12)],
    ),
    "prefetch": (
        lambda n: Publisher.objects.filter(pk__lt=n).prefetch_related("books__tags").order_by("pk"),
        [(3,), (5,)],
    ),
    "values": (lambda n: Book.objects.filter(pk__lt=n).order_by("pk").values(), [(3,), (5,)]),
    "flat": (
        lambda n: Book.objects.filter(pk__lt=n).order_by("pk").values_list("title", flat=True),
        [(3,), (5,)],
    ),
    "a slice": (lambda n: Book.objects.filter(pk__gt=n).order_by("pk")[1:4], [(1,), (3,)]),
    "inheritance": (lambda n: Author.objects.filter(pk__gt=n).order_by("pk"), [(11,), (15,)]),
}


def synchronously(function: Callable[..., Any], *args: Any) -> Any:
    return list(function(*args))


@pytest.mark.parametrize("name", COMPILABLE)
async def test_it_is_run(name: str) -> None:
    function, arguments = COMPILABLE[name]
    query = asyncorm.compiled(function)
    for args in [*arguments, *arguments]:
        expected = await in_thread(synchronously, function, *args)
        assert differences(expected, await query(*args)) == []


EXPRESSIONS: list[Callable[..., Any]] = [
    lambda v, w: Book.objects.filter(pages__gt=F("sold") - v, pk__gt=w),
    lambda v, w: Book.objects.annotate(m=F("pages") + v).filter(pages__gt=w),
    lambda v, w: Book.objects.annotate(m=Value(v), n=Value(w)),
    lambda v, w: Book.objects.alias(m=Value(v)).filter(pages__gt=w, m__gt=w),
    lambda v, w: Book.objects.annotate(m=Case(When(pages__gt=v, then=1), default=w)),
    lambda v, w: Book.objects.annotate(n=Count("tags", filter=Q(tags__weight__gt=v))).filter(pk=w),
    lambda v, w: Book.objects.annotate(n=Count("tags")).filter(n__gte=v, pages__gt=w),
    lambda v, w: Book.objects.annotate(n=Count("tags")).filter(Q(n__gte=v) | Q(pages=w), pk__gt=v),
    lambda v, w: Book.objects.filter(Exists(Review.objects.filter(stars__gt=v)), pk__gt=w),
    lambda v, w: Book.objects.annotate(m=Exists(Tag.objects.filter(pk__gt=v))).filter(pk__gt=w),
    lambda v, w: Book.objects.filter(created__year=2020 + v, published__month__gt=w),
    lambda v, w: Book.objects.filter(published__year__gt=v, published__month__gt=w),
    lambda v, w: Book.objects.filter(data__a=v, pages__gt=w),
    lambda v, w: Book.objects.exclude(tags__weight=v).exclude(authors__pk=w),
]


@pytest.mark.parametrize("number", range(len(EXPRESSIONS)))
async def test_arguments_in_expressions(number: int) -> None:
    def function(*args: Any) -> Any:
        return EXPRESSIONS[number](*args).order_by("pk")

    query = asyncorm.compiled(function)
    for args in [(1, 1), (2, 2), (1, 2), (2, 1), (4, 3), (1, 1)]:
        expected = await in_thread(synchronously, function, *args)
        assert differences(expected, await query(*args)) == []


async def test_keywords() -> None:
    query = asyncorm.compiled(lambda pk, *, pages=0: Book.objects.filter(pk=pk, pages__gte=pages))
    assert [book.pk for book in await query(1)] == [1]
    assert [book.pk for book in await query(pk=2)] == [2]
    assert await query(pk=2, pages=10**6) == []
    assert await query(pages=10**6, pk=2) == []


async def test_arguments_that_decide_what_the_sql_is() -> None:
    def find(value: Any) -> Any:
        return Book.objects.filter(isbn=value).order_by("pk")

    def where(**conditions: Any) -> Any:
        return Book.objects.filter(**conditions).order_by("pk")

    query = asyncorm.compiled(find)
    for value in ("9780000000001", None, "x", "", None):
        expected = await asyncorm.native(synchronously)(find, value)
        assert differences(expected, await query(value)) == []
    other = asyncorm.compiled(where)
    for conditions in (
        {"in_print": True}, {"in_print": False}, {"in_print": 1}, {"pk__in": [1, 2]},
        {"pk__in": []}, {"pk": 1}, {"pk": "1"}, {"pages": 1}, {"publisher": 1}, {"in_print": 0},
    ):  # fmt: skip
        expected = await where(**conditions).anative()
        assert differences(expected, await other(**conditions)) == [], conditions


tenant = contextvars.ContextVar("tenant", default=1)


def branching(n: Any) -> Any:
    return Tag.objects.filter(pk=n) if n else Tag.objects.all()


def computing(n: Any) -> Any:
    return Tag.objects.filter(pk__gt=n + 1)


def choosing(n: Any) -> Any:
    return Tag.objects.order_by({0: "pk", 1: "name", 2: "-name"}[n])


def slicing(n: Any) -> Any:
    return Tag.objects.order_by("pk")[:n]


def typed(n: Any) -> Any:
    if isinstance(n, int):
        n = n % 2
    return Tag.objects.filter(pk=n)


def trying(n: Any) -> Any:
    try:
        n = n.bit_length()
    except AttributeError:
        pass
    return Tag.objects.filter(pk=n)


def of_context(n: Any) -> Any:
    return Tag.objects.filter(pk__gt=n, weight__lt=tenant.get())


@pytest.mark.parametrize(
    "function", [branching, computing, choosing, slicing, typed, trying, of_context]
)
async def test_what_the_function_looks_at(function: Callable[..., Any]) -> None:
    query = asyncorm.compiled(function)
    for n in (1, 2, 0, 1, 2):
        tenant.set(n + 2)
        expected = await asyncorm.native(synchronously)(function, n)
        assert differences(expected, await query(n)) == []


async def test_a_lock_outside_a_transaction() -> None:
    query = asyncorm.compiled(lambda n: Tag.objects.select_for_update().filter(pk=n))
    async with asyncorm.atomic():
        assert len(await query(1)) == 1
    with pytest.raises(TransactionManagementError):
        await query(1)


async def test_wrong_functions_and_values() -> None:
    with pytest.raises(TypeError, match="takes a function"):
        asyncorm.compiled(Tag.objects.all())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no queryset"):
        await asyncorm.compiled(list)()
    query = asyncorm.compiled(lambda pk: Book.objects.filter(pk=pk))
    assert len(await query(1)) == 1
    with pytest.raises(ValueError, match="expected a number"):
        await query("abc")
    assert await query(2**70) == []
    with pytest.raises(TypeError):
        await query(1, 2)


async def test_settings_that_change() -> None:
    query = asyncorm.compiled(lambda n: Book.objects.filter(pk__lt=n).order_by("pk"))
    before = await query(4)
    with override_settings(USE_TZ=False):
        naive = await query(4)
        assert naive[0].created.tzinfo is None
    with override_settings(ASYNCORM={"STATEMENT_CACHE": False}):
        assert differences(before, await query(4)) == []
    assert differences(before, await query(4)) == []


async def test_in_transactions_and_gathered() -> None:
    query = asyncorm.compiled(lambda n: Book.objects.filter(pk=n))
    found = await asyncio.gather(*(query(n) for n in (1, 2, 3)))
    assert [book.pk for (book,) in found] == [1, 2, 3]
    async with asyncorm.atomic():
        await Book.objects.filter(pk=1).native_update(title="inside")
        assert (await query(1))[0].title == "inside"
        asyncorm.set_rollback(True)
    assert (await query(1))[0].title != "inside"
