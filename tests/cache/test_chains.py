"""A recorded queryset is Django's: the same SQL, rows and errors, each raised by the same call.

Chains are built on the event loop, several times with other values, so that the last ones are found
recorded, and compared with what the same calls give synchronously, where nothing is recorded.
"""

import copy
import datetime as dt
import functools
import pickle
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from typing import Any
from unittest import mock

import django
import pytest
from django.db import models
from django.db.models import CharField, F, Q, QuerySet, Transform
from django.db.models.functions import Lower
from django.db.models.query import EmptyQuerySet
from django.db.models.sql.query import Query
from django.test import override_settings
from django.test.utils import isolate_apps, register_lookup
from django.utils.functional import SimpleLazyObject

import asyncorm
from asyncorm import statements
from asyncorm._chains import nodes, recorded
from tests.checked import hits_checked
from tests.compare import differences
from tests.project.shop.models import (
    Author,
    Book,
    Category,
    Document,
    Event,
    Order,
    PrintedBook,
    Product,
    Publisher,
    Review,
    Tag,
)
from tests.project.shop.sample import uid
from tests.support import in_thread

WARM = 12  # runs after which a chain is recorded in whole
pytestmark = pytest.mark.usefixtures("shop_data")

Step = Callable[[Any, int], Any]
UTC = dt.UTC

INTEGERS = [0, 1, 2, 3, 5, -1, 100, 2**31, -(2**40), 2**70]
TEXTS = ["", "a", "5", "abc", "100%", "a_b\\", "ä", "12345678901234567890", "\uff17"]
ANY = [
    *INTEGERS, *TEXTS, None, True, False, 1.5, float("nan"), Decimal("3.50"), Decimal("NaN"),
    dt.date(2024, 5, 1), dt.datetime(2024, 5, 1, tzinfo=UTC), uid(1), b"x", [1, 2], (), F("pk"),
]  # fmt: skip
LISTS = [
    [1, 2], [3], [1, 1], [], (4, 5, 1), {2, 3}, frozenset({7, 8}), [2**70, 1], [-1, 0, 1], [1, "2"],
    ["1", "2"], ["1", "01"], ["a", "5"], [1, None], [True, 1], [None], [1.5, 2.5], [[1], [2]],
    [uid(1), uid(2)], "12", [F("pk"), 1], range(3), [*range(40)], [10**5000, 1], [1, 2, 3, 3],
]  # fmt: skip

WITHIN = [Publisher(pk=2), Tag(pk=1), 1, None, "a", True, Publisher(pk=3), Publisher()]


def pick(found: list[Any], v: int) -> Any:
    return found[v % len(found)]


FILTERS: dict[Any, list[Callable[[int], dict[str, Any]]]] = {
    Book: [
        lambda v: {"pk": pick(INTEGERS, v)},
        lambda v: {"pk": pick(ANY, v)},
        lambda v: {"pk__gt": pick(INTEGERS, v), "title__contains": pick(TEXTS, v)},
        lambda v: {"title": pick(TEXTS, v)},
        lambda v: {"title__iexact": pick(TEXTS, v)},
        lambda v: {"isbn": pick([None, "a", "5"], v)},
        lambda v: {"in_print": pick([True, False], v)},
        lambda v: {"isbn__isnull": pick([True, False], v)},
        lambda v: {"price__lte": Decimal(v) / 4},
        lambda v: {"rating__gte": v / 3},
        lambda v: {"pages": pick(INTEGERS, v)},
        lambda v: {"published__gt": dt.date(2020, 1, 1 + v % 28)},
        lambda v: {"created__lt": dt.datetime(2025, 1, 1 + v % 28, tzinfo=UTC)},
        lambda v: {"publisher": pick(INTEGERS, v)},
        lambda v: {"publisher_id": pick([1, "1", "x", None], v)},
        lambda v: {"publisher__name__startswith": pick(TEXTS, v)},
        lambda v: {"publisher__country": pick(["de", "at", None], v)},
        lambda v: {"authors__name": pick(TEXTS, v), "authors__pen_name": pick(TEXTS, v)},
        lambda v: {"tags": pick(INTEGERS, v)},
        lambda v: {"tags__name": pick(TEXTS, v)},
        lambda v: {"reviews__stars__gte": v % 5},
        lambda v: {"reviews__isnull": bool(v % 2)},
        lambda v: {"product": pick([None, 1], v)},
        lambda v: {"pk__in": [1, 2, v]},
        lambda v: {"pk__in": pick(LISTS, v)},
        lambda v: {"pk__in": pick(INTEGERS, v), "title__in": {"a", pick(TEXTS, v)}},
        lambda v: {"title__in": pick(LISTS, v)},
        lambda v: {"title__in": TEXTS[: v % 5 + 1], "publisher__in": [v, *range(v % 3)]},
        lambda v: {"publisher__in": [Publisher(pk=1), Publisher(pk=pick([1, 2, None], v))]},
        lambda v: {"publisher__in": pick([(Publisher(pk=1), Tag(pk=1)), (Publisher(pk=v),)], v)},
        lambda v: {"publisher": SimpleLazyObject(lambda: pick(WITHIN, v))},
        lambda v: {"title": SimpleLazyObject(lambda: pick(WITHIN, v)), "pages": v},
        lambda v: {"tags__in": (Tag(pk=v), Tag(pk=2)), "authors__in": {v, 3}},
        lambda v: {"title": pick([5, v, uid(v), 10**5000, Book.Language.GERMAN], v)},
        lambda v: {"title__contains": v},
        lambda v: {"price__in": [Decimal(v) / 4, pick([Decimal(1), Decimal("NaN")], v)]},
        lambda v: {"published__in": [dt.date(2024, 5, 1 + v % 28), dt.date(2024, 1, 1)]},
        lambda v: {"language__in": [Book.Language.GERMAN, *Book.Language][: v % 3]},
        lambda v: {"created__year": 2020 + v % 5},
        lambda v: {"data__format": "x"},
        lambda v: {"language": Book.Language.GERMAN},
        lambda v: {"nothing": v},
        lambda v: {"title__nothing": v},
        lambda v: {"_connector": "OR"},
        lambda v: {"publisher": Publisher.objects.model(pk=pick([1, 2, None], v), name="x")},
        lambda v: {"publisher": Tag(pk=1)},
        lambda v: {},
    ],
    Order: [
        lambda v: {"status": pick([*Order.Status, 1, 7], v)},
        lambda v: {"remark": pick([None, "", "x"], v)},
        lambda v: {"customer": pick(INTEGERS, v)},
        lambda v: {"customer__name__icontains": pick(TEXTS, v)},
        lambda v: {"placed__gte": dt.datetime(2024, 1 + v % 12, 1, tzinfo=UTC)},
        lambda v: {"lines__quantity__gt": v % 3},
    ],
    Event: [
        lambda v: {"pk": uid(v)},
        lambda v: {"pk": pick([uid(1), str(uid(1)), "x"], v)},
        lambda v: {"pk__in": pick([[uid(1), uid(v)], (uid(1),), {uid(v)}, [str(uid(1)), "x"]], v)},
        lambda v: {"name__lt": pick(TEXTS, v)},
        lambda v: {"host": pick(INTEGERS, v)},
    ],
    Author: [
        lambda v: {"pk": pick(INTEGERS, v)},
        lambda v: {"name": pick(TEXTS, v)},
        lambda v: {"mentor": pick(INTEGERS, v)},
        lambda v: {"mentor__isnull": bool(v % 2)},
        lambda v: {"books__pages__gt": v},
        lambda v: {"pupils": pick([None, 1], v), "books__isnull": bool(v % 2)},
    ],
    PrintedBook: [lambda v: {"pages__gt": pick(INTEGERS, v)}, lambda v: {"pk": v}],
}
MODELS = list(FILTERS)
COLUMNS = {
    Book: ["title", "-pk", "pages", "publisher__name", "publisher", "nothing", "pk", "-price"],
    Order: ["placed", "-pk", "status", "customer__name"],
    Event: ["name", "-id"],
    Author: ["name", "-pk", "mentor__name"],
    PrintedBook: ["title", "-pages"],
}


def steps(model: Any, rng: random.Random) -> list[tuple[str, Step]]:
    """What may be done to a queryset."""
    one, other = rng.choice(FILTERS[model]), rng.choice(FILTERS[model])
    columns = rng.sample(COLUMNS[model], 2)
    plain = [name.lstrip("-") for name in columns]
    size, fixed = rng.choice([1, 3, 20]), rng.randrange(20)
    return [
        ("filter", lambda qs, v: qs.filter(**one(v))),
        ("filter", lambda qs, v: qs.filter(**one(v), **other(v))),
        ("filter same", lambda qs, v: qs.filter(**one(fixed))),
        ("exclude", lambda qs, v: qs.exclude(**one(v))),
        ("or", lambda qs, v: qs.filter(Q(**one(v)) | Q(**other(v)))),
        ("not", lambda qs, v: qs.filter(~Q(**one(v)), Q(**other(v)))),
        ("nested", lambda qs, v: qs.exclude(Q(~Q(**one(v)) | Q(pk=v)) & Q(**other(v)))),
        ("xor", lambda qs, v: qs.filter(Q(**one(v)) ^ Q(pk=v))),
        ("order", lambda qs, v: qs.order_by(*columns)),
        ("order", lambda qs, v: qs.order_by(columns[0])),
        ("unordered", lambda qs, v: qs.order_by()),
        ("order expression", lambda qs, v: qs.order_by(F("pk").desc())),
        ("reverse", lambda qs, v: qs.reverse()),
        ("first ones", lambda qs, v: qs[:size]),
        ("page", lambda qs, v: qs[v % 7 * size : (v % 7 + 1) * size]),
        ("rest", lambda qs, v: qs[v % 3 :]),
        ("none of them", lambda qs, v: qs[2:2]),
        ("select_related", lambda qs, v: qs.select_related()),
        ("select_related", lambda qs, v: qs.select_related("publisher")),
        ("select_related", lambda qs, v: qs.select_related(None)),
        ("only", lambda qs, v: qs.only(*plain)),
        ("defer", lambda qs, v: qs.defer(*plain)),
        ("defer none", lambda qs, v: qs.defer(None)),
        ("values", lambda qs, v: qs.values(*plain)),
        ("values of all", lambda qs, v: qs.values()),
        ("values_list", lambda qs, v: qs.values_list("pk", *plain)),
        ("flat", lambda qs, v: qs.values_list("pk", flat=True)),
        ("named", lambda qs, v: qs.values_list("pk", plain[0], named=True)),
        ("expression", lambda qs, v: qs.values(lower=Lower("pk"))),
        ("distinct", lambda qs, v: qs.distinct()),
        ("distinct on", lambda qs, v: qs.distinct("pk")),
        ("using", lambda qs, v: qs.using("default")),
        ("all", lambda qs, v: qs.all()),
        ("none", lambda qs, v: qs.none()),
        ("annotate", lambda qs, v: qs.annotate(more=F("pk") + v)),
        ("prefetch", lambda qs, v: qs.prefetch_related("notes" if model is Book else "lines")),
        ("or other", lambda qs, v: qs | model._default_manager.filter(**one(v))),
        ("within", lambda qs, v: model._default_manager.filter(pk__in=qs.values("pk"))),
        ("union", lambda qs, v: qs.union(model._default_manager.filter(pk=v))),
        ("copied", lambda qs, v: copy.deepcopy(qs)),
    ]


def attempt(function: Callable[[], Any]) -> Any:
    """What a call gives, or the error that it raises."""
    try:
        return function()
    except Exception as exc:
        return type(exc), str(exc)


def chain(model: Any, program: list[tuple[str, Step]], v: int) -> tuple[Any, Any]:
    """The queryset of a program, or nothing and where it was refused, with what."""
    queryset = model._default_manager.all() if v % 2 else model._default_manager.get_queryset()
    for number, (_, step) in enumerate(program):
        made = attempt(lambda: step(queryset, v))  # noqa: B023
        if isinstance(made, tuple):
            return None, (number, *made)
        queryset = made
    return queryset, None


def described(queryset: Any) -> Any:
    """All that is said of a queryset without executing it."""
    query = queryset.query
    return (
        type(queryset),
        attempt(lambda: queryset.ordered),
        isinstance(queryset, EmptyQuerySet),
        query.is_sliced,
        query.can_filter(),
        repr(attempt(query.sql_with_params)),
        [*vars(query)],
        [*vars(queryset)],
        query.deferred_loading,
        query.values_select,
        dict(query.alias_refcount),
        query.used_aliases,
        re.sub("0x[0-9a-f]+", "", repr(query.where)),
        type(query),
    )


def in_turn(queryset: Any, number: int) -> Any:
    """One way to execute it."""
    fresh = queryset.all() if number else queryset
    return [
        lambda: list(fresh),
        lambda: fresh.count(),
        lambda: fresh.exists(),
        lambda: fresh.first(),
        lambda: fresh.get(),
        lambda: fresh.aggregate(models.Max("pk"), models.Count("*")),
        lambda: fresh.get(pk=1),
        lambda: fresh.filter(pk=1).values_list("pk", flat=True)[0],
        lambda: (list(fresh), [*fresh.query.alias_map][:1], type(fresh.query))[1:],
    ][number]()


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 12))]
)
def test_random_chains_are_as_djangos(seed: int, run: Callable) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        model = rng.choice(MODELS)
        program = rng.sample(steps(model, rng), rng.randrange(1, 5))
        given = [rng.randrange(40) for _ in range(3)]
        given = [*given, *(rng.choice(given) for _ in range(5)), rng.randrange(40)]
        ways = [rng.randrange(9) for _ in given]
        with hits_checked():
            compare(model, program, list(zip(given, ways, strict=True)), run)


def compare(model: Any, program: Any, given: Any, run: Callable) -> None:
    names = [name for name, _ in program]
    expected = [chain(model, program, v) for v, _ in given]
    said = [None if qs is None else described(qs) for qs, _ in expected]
    results = [
        None if qs is None else attempt(lambda: in_turn(qs, way))  # noqa: B023
        for (qs, _), (_, way) in zip(expected, given, strict=True)
    ]

    async def native() -> None:
        for (_, error), words, result, (v, way) in zip(expected, said, results, given, strict=True):
            queryset, refused = chain(model, program, v)
            assert refused == error, (names, v)
            if queryset is None:
                continue
            other, _ = chain(model, program, v)
            found = await asyncorm.native(attempt)(lambda: in_turn(queryset, way))  # noqa: B023
            assert differences(result, found) == [], (names, v, way)
            assert described(other) == words, (names, v)

    run(native())


def is_recorded(queryset: Any) -> bool:
    return type(vars(queryset)["_query"]) is recorded.Recorded


def was_recorded(build: Callable[[int], Any]) -> bool:
    """Whether a chain is recorded once it was made often enough."""
    for v in range(WARM):
        queryset = build(v)
    return type(vars(queryset)["_query"]) is recorded.Recorded


def range_of(v: int) -> list[int]:
    return [*range(1, v + 3)]


BUILDS: dict[str, Callable[[Publisher, int], Any]] = {
    "all": lambda _, v: Book.objects.all(),
    "page": lambda _, v: Book.objects.filter(pk__gt=v, title__contains=str(v)).order_by("-pk")[
        v : v + 5
    ],
    "exclude": lambda _, v: Book.objects.exclude(isbn=None).filter(in_print=True, rating=v / 2),
    "only": lambda _, v: (
        Book.objects.select_related("publisher").only("title", "publisher").reverse()
    ),
    "named": lambda _, v: Book.objects.values_list("pk", "title", named=True).distinct(),
    "or": lambda _, v: Book.objects.filter(Q(pk=v) | ~Q(price=Decimal(v))).defer("data"),
    "digits": lambda _, v: Book.objects.filter(pk=str(v)),
    "related manager": lambda one, v: one.books.filter(pages__gt=v).order_by("title"),
    "instance": lambda one, v: Book.objects.filter(publisher=one),
    "default filter": lambda _, v: PrintedBook.objects.filter(pk=v),
    "subclass": lambda _, v: Document.objects.alive().filter(key="x"),
    "list of any length": lambda _, v: Book.objects.filter(pk__in=range_of(v)),
    "list of texts": lambda _, v: Book.objects.exclude(title__in={"a", str(v)}),
    "list of instances": lambda one, v: Book.objects.filter(publisher__in=[one, Publisher(pk=v)]),
    "lazy": lambda one, v: Book.objects.filter(publisher=SimpleLazyObject(lambda: one)),
    "number for a text": lambda _, v: Book.objects.filter(title=v),
    "many-to-many": lambda _, v: Book(pk=v + 1).tags.filter(name__gt=str(v)),
    "many-to-many, whole": lambda _, v: Tag(pk=v + 1).books.all(),
    "enum": lambda _, v: Order.objects.filter(status=Order.Status(v % 3 + 1)),
    "uuid": lambda _, v: Event.objects.using("default").filter(pk=uid(v)),
}


@pytest.mark.parametrize("name", BUILDS)
async def test_a_chain_is_recorded_whole_and_needs_no_query(name: str) -> None:
    def ways(queryset: Any) -> list[Any]:
        # A slice is counted by Django.
        count = [] if name == "page" else [queryset.native_count]
        return [*count, queryset.native_exists, queryset.anative]

    publisher = await Publisher.objects.native_get(pk=1)
    build = functools.partial(BUILDS[name], publisher)
    assert was_recorded(build)
    for v in range(5):
        for way in ways(build(v)):
            await way()
    before = statements.statement_cache_stats()
    queryset = build(5)
    for way in ways(queryset):
        await way()
    assert is_recorded(queryset)
    assert statements.statement_cache_stats()["misses"] == before["misses"]


@pytest.mark.parametrize(
    ("taken", "refused"),
    [
        ({"pk": "5"}, {"pk": "abc"}),
        ({"pk": "5"}, {"pk": "5.5"}),
        ({"pk": 5}, {"pk": Decimal("NaN")}),
        ({"price": Decimal(5)}, {"price": Decimal("Infinity")}),
        ({"publisher": 1}, {"publisher": "x"}),
        ({"publisher": Publisher(pk=1)}, {"publisher": Publisher()}),
        ({"publisher": Publisher(pk=1)}, {"publisher": Tag(pk=1)}),
        ({"title__gt": "x"}, {"title__gt": None}),
        ({"in_print": True}, {"in_print": "x"}),
        ({"pk__in": [1, 2]}, {"pk__in": [1, "x"]}),
        ({"pk__in": ["1", "2"]}, {"pk__in": ["1", "x"]}),
        ({"title": 1}, {"title": 10**5000}),
        ({"title__in": [1, 2]}, {"title__in": [1, 10**5000]}),
        ({"publisher__in": [Publisher(pk=1)]}, {"publisher__in": [Tag(pk=1)]}),
        ({"publisher__in": [Publisher(pk=1)] * 2}, {"publisher__in": [Publisher(pk=1), Tag(pk=1)]}),
        ({"pages": 1}, {"pages": SimpleLazyObject(lambda: 1)}),
        ({"publisher": Publisher(pk=1)}, {"publisher": SimpleLazyObject(lambda: 1 / 0)}),
        (
            {"publisher": SimpleLazyObject(lambda: Publisher(pk=1))},
            {"publisher": SimpleLazyObject(lambda: Tag(pk=1))},
        ),
    ],
)
async def test_what_django_refuses_is_refused_by_the_same_call(
    taken: dict[str, Any], refused: dict[str, Any]
) -> None:
    for _ in range(WARM):
        Book.objects.filter(**taken)
    for _ in range(3):
        with pytest.raises(Exception) as found:
            Book.objects.filter(**refused)
        expected = await asyncorm.native(attempt)(
            lambda: QuerySet(Book, Query(Book)).filter(**refused)
        )
        assert (found.type, str(found.value)) == expected


async def test_calls_after_a_slice_are_refused() -> None:
    for v in range(WARM):
        page = Book.objects.filter(pk__gt=v)[:5]
    for call in (
        lambda: page.filter(pk=1),
        lambda: page.order_by("pk"),
        lambda: page.reverse(),
        lambda: page.distinct(),
        lambda: page.last(),
    ):
        with pytest.raises(TypeError, match="slice"):
            call()
    assert str(page[1:3].query).endswith("LIMIT 2 OFFSET 1")
    with pytest.raises(TypeError, match="values"):
        Book.objects.values("pk").only("pk")


async def test_values_are_those_of_the_call() -> None:
    keys = [1, 5]
    publisher = Publisher(pk=1)
    lazy = SimpleLazyObject(lambda: publisher)
    found = []
    for _ in range(WARM):
        publisher.pk = keys[0] = 1
        found.append(
            (
                Book.objects.filter(pk__in=keys),
                Book.objects.filter(publisher=publisher),
                Book.objects.filter(publisher=lazy),
                Book.objects.filter(publisher__in=[publisher, lazy]),
                Book.objects.filter(publisher__in=(publisher, publisher)),
            )
        )
        keys[0] = publisher.pk = 2
    assert [*map(is_recorded, found[-1])] == [True, True, True, False, True]
    for querysets in found:
        wheres = [str(each.query).rpartition("WHERE ")[2] for each in querysets]
        assert wheres == [
            '"shop_book"."id" IN (1, 5)',
            *['"shop_book"."publisher_id" = 1'] * 2,
            *['"shop_book"."publisher_id" IN (1)'] * 2,
        ]


async def test_whoever_asks_finds_a_query() -> None:
    def build(books: Any = Book.objects) -> Any:
        return books.filter(pk__gt=1, in_print=True).order_by("title")[1:4]

    for _ in range(WARM):
        build()
    djangos = build(QuerySet(Book, Query(Book)))
    expected = str(djangos.query)
    for ask in (
        lambda query: query,
        lambda query: copy.copy(query),
        lambda query: copy.deepcopy(query),
        lambda query: pickle.loads(pickle.dumps(query)),
        lambda query: query.clone(),
        lambda query: query.chain(Query),
        lambda query: vars(query) and query,
        lambda query: query.where and query,
        lambda query: dir(query) and query,
        lambda query: repr(query) and query,
        lambda query: query.__reduce_ex__(4) and query,
        lambda query: setattr(query, "explain_info", None) or query,
        lambda query: setattr(query, "__class__", Query) or query,
    ):
        queryset = build()
        assert is_recorded(queryset)
        assert isinstance(queryset._query, Query)
        asked = ask(queryset.query)
        assert str(asked) == expected
        assert type(asked) is Query
        assert asked.__class__ is Query
        assert next(iter(vars(asked))) == "model"
    queryset = build()
    assert queryset.query.__class__(Book).model is Book
    assert [*vars(queryset)] == [*vars(QuerySet(Book))]
    assert [*vars(queryset.query)] == [*vars(build(QuerySet(Book, Query(Book))).query)]
    del queryset.query.low_mark
    assert type(queryset._query) is Query


async def test_a_queryset_is_copied_and_pickled_like_any_other() -> None:
    for _ in range(WARM):
        await Book.objects.filter(pk__lt=3).anative()

    def copies() -> list[Any]:
        queryset = Book.objects.filter(pk__lt=3)
        return [
            pickle.loads(pickle.dumps(queryset)),
            copy.deepcopy(queryset),
            copy.copy(queryset),
            queryset | Book.objects.filter(pk=4),
            Book.objects.filter(pk__in=queryset),
        ]

    found = await asyncorm.native(lambda: [[*map(str, each)] for each in copies()])()
    assert len(found[0]) > 0
    assert found[0] == found[1] == found[2] == found[4]
    assert {*found[0]} < {*found[3]}


DELETES: dict[str, Callable[[Any, int], Any]] = {
    "all": lambda reviews, v: reviews.all(),
    "by a value": lambda reviews, v: reviews.filter(stars=v % 6),
    "by keys": lambda reviews, v: reviews.exclude(pk__in=[1, 2, *range(v)]).order_by("stars"),
    "by a relation": lambda reviews, v: reviews.filter(book__publisher=v % 3),
    "related": lambda reviews, v: reviews.select_related("book").filter(book=Book(pk=v)),
    "none of them": lambda reviews, v: reviews.filter(pk__in=[]),
    "limited": lambda reviews, v: reviews.filter(stars=1)[:v],
    "values": lambda reviews, v: reviews.filter(stars=1).values("pk"),
    "distinct": lambda reviews, v: reviews.filter(stars__gt=v % 5).distinct(),
    "locked": lambda reviews, v: reviews.filter(stars__gt=v % 5).select_for_update(),
    "authors": lambda _, v: Author.objects.filter(name__gt=str(v)),
    "tags": lambda _, v: Tag.objects.filter(pk__gt=v),
}


@pytest.mark.parametrize("way", ["awaited", "in an operation"])
@pytest.mark.parametrize("name", DELETES)
async def test_what_is_deleted_is_as_djangos(name: str, way: str) -> None:
    async def deleted(reviews: Any, v: int) -> Any:
        if way != "awaited" or reviews is not Review.objects:
            return await asyncorm.native(attempt)(lambda: DELETES[name](reviews, v).delete())
        try:
            return await DELETES[name](reviews, v).native_delete()
        except Exception as exc:
            return type(exc), str(exc)

    def rest(reviews: Any) -> Any:
        return [*map(str, reviews.order_by("pk")), *map(str, Tag.objects.order_by("pk"))]

    async def rolled_back(reviews: Any, v: int) -> Any:
        async with asyncorm.atomic():
            found = await deleted(reviews, v)
            there = await asyncorm.native(rest)(reviews)
            asyncorm.set_rollback(True)
        return found, there

    with hits_checked():
        for v in range(WARM):
            expected = await rolled_back(QuerySet(Review, Query(Review)), v)
            assert await rolled_back(Review.objects, v) == expected


async def test_a_delete_needs_no_query() -> None:
    for v in range(WARM):
        before = statements.statement_cache_stats()["recorded"]
        await Review.objects.filter(stars=100 + v).native_delete()
    assert statements.statement_cache_stats()["recorded"] > before


class Shouted(CharField):
    """Prepares what is saved in a way of its own."""

    def get_db_prep_save(self, value: Any, connection: Any) -> Any:
        return None if value == "NOTHING" else str(value).upper()


# What is set to, by some number; and which rows.
SET: dict[str, Callable[[int], dict[str, Any]]] = {
    "an integer": lambda v: {"pages": pick([v, -1, 2**31, 0, 2**70, 7], v)},
    "anything": lambda v: {"pages": pick(ANY, v)},
    "a text": lambda v: {"title": pick([*TEXTS, "\0", 7, None, Book.Language.GERMAN], v)},
    "several": lambda v: {"pages": v, "title": f"title {v}", "in_print": bool(v % 2)},
    "as many, in turn": lambda v: {"title": f"title {v}", "pages": v, "isbn": None},
    "a decimal": lambda v: {"price": pick([Decimal(v), Decimal("1.005"), 1, 2.5, "3", None], v)},
    "a float": lambda v: {"rating": pick([v / 3, v, None, float("nan"), "2"], v)},
    "days": lambda v: {"published": dt.date(2024, 1, 1 + v % 28)},
    "a day or a text": lambda v: {"published": pick([dt.date(2024, 1, 2), "2024-02-30", "x"], v)},
    "times": lambda v: {"created": dt.datetime(2024, 1, 1 + v % 28, tzinfo=UTC)},
    "a key": lambda v: {"publisher_id": 1 + v % 2},
    "a key by the relation's name": lambda v: {"publisher": pick([1, 2, None, "1", "x"], v)},
    "an instance": lambda v: {"publisher": Publisher(pk=pick([1, 2, None], v))},
    "documents": lambda v: {"data": {"a": [v, None]}, "extra": pick([None, [v], "x", 1, True], v)},
    "lists": lambda v: {"keywords": [str(v)], "matrix": pick([None, [[v]], [["x"]]], v)},
    "an expression": lambda v: {"pages": F("pages") + v},
    "twice the same": lambda v: {"publisher": 1, "publisher_id": 2},
    "what is generated": lambda v: {"gross": v, "pages": v},
    "no such field": lambda v: {"nothing": v},
    "a relation of many": lambda v: {"tags": v},
    "nothing": lambda v: {},
    "the primary key": lambda v: {"pk": 1000 + v},
}
UPDATED: dict[str, Callable[[Any, int], Any]] = {
    "one": lambda books, v: books.filter(pk=1 + v % 3),
    "all": lambda books, v: books.all(),
    "listed": lambda books, v: books.order_by("title").exclude(pk__in=[2, 3, *range(v % 4)]),
    "by a relation": lambda books, v: books.filter(publisher__name__gt=str(v)),
    "limited": lambda books, v: books.filter(pages__gt=v)[: 1 + v],
    "distinct": lambda books, v: books.filter(pages__gt=v).distinct(),
    "distinct by a field": lambda books, v: books.distinct("pages"),
    "annotated": lambda books, v: books.annotate(more=F("pages") + v).filter(more__gt=v),
}


@pytest.mark.parametrize("way", ["awaited", "in an operation"])
@pytest.mark.parametrize(
    ("which", "what"), [*((each, "several") for each in UPDATED), *(("one", each) for each in SET)]
)
async def test_what_is_updated_is_as_djangos(which: str, what: str, way: str) -> None:
    async def updated(books: Any, v: int) -> Any:
        try:
            queryset = UPDATED[which](books, v)
            async with asyncorm.atomic():
                if way == "awaited" and books is Book.objects:
                    return await queryset.native_update(**SET[what](v))
                return await asyncorm.native(queryset.update)(**SET[what](v))
        except Exception as exc:
            return type(exc), str(exc)

    async def rolled_back(books: Any, v: int) -> Any:
        async with asyncorm.atomic():
            found = await updated(books, v)
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT b::text FROM shop_book b ORDER BY id")
                rows = await cursor.fetchall()
            asyncorm.set_rollback(True)
        return found, rows

    expected: dict[int, Any] = {}
    with hits_checked():
        for v in [*range(2 * WARM), *range(WARM)]:
            if v not in expected:
                expected[v] = await rolled_back(QuerySet(Book, Query(Book)), v)
            assert await rolled_back(Book.objects, v) == expected[v], v


async def test_an_update_needs_no_query() -> None:
    for v in range(WARM):
        queryset = Review.objects.filter(stars=100 + v)
        before = statements.statement_cache_stats()["recorded"]
        await queryset.native_update(stars=1, body=str(v), customer=None)
        await asyncorm.native(Review.objects.filter(stars=100 + v).update)(stars=1)
    assert type(queryset.query) is recorded.Recorded
    assert statements.statement_cache_stats()["recorded"] == before + 2


@isolate_apps("tests.project.shop")
async def test_what_a_field_prepares_is_asked_for_each_time() -> None:
    class Loud(models.Model):
        title = Shouted(null=True)

        class Meta:
            app_label = "shop"
            db_table = "shop_loud"

    with override_settings(ASYNCORM={"SWAP_MANAGERS": True}):
        async with asyncorm.atomic(), asyncorm.cursor() as cursor:
            await cursor.execute(
                "CREATE TEMPORARY TABLE shop_loud (id bigserial, title text) ON COMMIT DROP"
            )
            loud = await Loud.objects.acreate(title="a")
            for value in ["a", "b", "c", "NOTHING", "d", "NOTHING", None, "e", None]:
                assert await Loud.objects.filter(pk=loud.pk).aupdate(title=value) == 1
                expected = loud._meta.get_field("title").get_db_prep_save(value, None)
                assert await Loud.objects.values_list("title", flat=True).aget() == expected


async def test_what_is_put_in_the_place_of_djangos_preparing_is_used_at_once() -> None:
    async def title(value: str) -> str:
        async with asyncorm.atomic():
            await Book.objects.filter(pk=1).native_update(title=value)
            found = await Book.objects.native_get(pk=1)
            asyncorm.set_rollback(True)
        return found.title

    for value in "abc":
        assert await title(value) == value
    with mock.patch.object(CharField, "get_db_prep_save", return_value="other"):
        assert await title("d") == "other"
    field = Book._meta.get_field("title")
    with mock.patch.object(field, "get_db_prep_save", return_value="its own"):
        assert await title("e") == "its own"
    assert await title("f") == "f"


def test_a_naive_datetime_warns_each_time(run: Callable) -> None:
    async def native() -> None:
        for _ in range(WARM):
            Book.objects.filter(created__gt=dt.datetime(2024, 1, 1, tzinfo=UTC))
            with pytest.warns(RuntimeWarning, match="naive"):
                Book.objects.filter(created__gt=dt.datetime(2024, 1, 1))

    run(native())


class Reversed(Transform):
    lookup_name = "reversed"
    function = "reverse"


class Other(models.lookups.Exact):
    lookup_name = "exact"

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        sql, params = super().as_sql(compiler, connection)
        return f"NOT ({sql})", params


async def test_a_lookup_that_is_registered_is_used_at_once() -> None:
    def sql() -> str:
        return str(Tag.objects.filter(name="x").query)

    async def count() -> int:
        return await Tag.objects.filter(name="x").native_count()

    for _ in range(WARM):
        before, zero = sql(), await count()
    with register_lookup(CharField, Other):
        for _ in range(WARM):
            assert "NOT" in sql()
            assert await count() > zero
    for _ in range(WARM):
        assert sql() == before
        assert await count() == zero
    with register_lookup(CharField, Reversed):
        for _ in range(WARM):
            Tag.objects.filter(name__reversed="x")
    with pytest.raises(Exception, match="Unsupported lookup 'reversed'"):
        Tag.objects.filter(name__reversed="x")


def given(self: Any, name: str) -> Any:
    return Other if name == "exact" else self.get_class_lookups()[name]


class Loose(CharField):
    """Finds another lookup while somebody says so."""

    other = False

    def get_lookup(self, lookup_name: str) -> Any:
        return given(self, lookup_name) if Loose.other else super().get_lookup(lookup_name)


@isolate_apps("tests.project.shop")
def loose() -> Any:
    """A model of the tags' table whose name is such a field."""

    class LooseTag(models.Model):
        name = Loose(max_length=40)

        class Meta:
            app_label = "shop"
            db_table = Tag._meta.db_table

    return LooseTag


def patched(owner: Any, name: str, change: Callable[..., Any]) -> Any:
    """A method that hands what it is given to a function first, for as long as a with."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *change(*args), **kwargs)

    return mock.patch.object(owner, name, method)


def by_another(self: Any) -> Any:
    return "used" if self.rhs == "hardcover" else self.rhs


def everybody(condition: Any, *rest: Any) -> Any:
    return (("name__gt", "") if condition[0] == "name" else condition, *rest)


@contextmanager
def table_of(model: Any, other: Any) -> Iterator[None]:
    """A model has another one's table, as where one is chosen by tenant or month."""
    own = model._meta.db_table
    for table in (other._meta.db_table, own):
        model._meta.db_table = table
        for field in model._meta.concrete_fields:
            vars(field).pop("cached_col", None)
        if table != own:
            yield


# What has Django find another lookup or prepare another value, and the model that it is of.
ELSE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "registered": (lambda: Tag, lambda model: register_lookup(CharField, Other)),
    "patched": (lambda: Tag, lambda model: mock.patch.object(CharField, "get_lookup", given)),
    "patched on the field": (
        lambda: Tag,
        lambda model: mock.patch.object(
            field := model._meta.get_field("name"), "get_lookup", partial(given, field)
        ),
    ),
    "by the field's own": (loose, lambda model: mock.patch.object(Loose, "other", True)),
    "another condition": (lambda: Tag, lambda model: patched(Query, "build_filter", everybody)),
    "another value by the lookup": (
        lambda: Tag,
        lambda model: mock.patch.object(models.Lookup, "get_prep_lookup", by_another),
    ),
    "another value by the field": (
        lambda: Tag,
        lambda model: patched(CharField, "get_prep_value", lambda value: ["used"]),
    ),
    "another table": (lambda: Tag, lambda model: table_of(model, Category)),
}
FETCHES: dict[str, Callable[[Any], Any]] = {
    "list": lambda tags: tags.values_list("name", flat=True).order_by("name").anative(),
    "count": lambda tags: tags.native_count(),
    "exists": lambda tags: tags.native_exists(),
    "another filter": lambda tags: tags.filter(pk__gt=0).native_count(),
    "as a query": lambda tags: at_once(str(tags.query)),
}


async def at_once(value: Any) -> Any:
    return value


@pytest.mark.parametrize("what", ELSE)
async def test_a_lookup_is_that_of_when_the_filter_was_made(what: str) -> None:
    make, change = ELSE[what]
    model = make()

    def some() -> Any:
        return model.objects.filter(name="hardcover")

    for fetch in FETCHES.values():
        for _ in range(WARM):
            before = await fetch(tags := some())
            tags = some()
        with change(model):
            assert await fetch(tags) == before
            for _ in range(WARM):
                changed = await fetch(some())
                tags = some()
        assert await fetch(tags) == changed != before


async def test_a_naive_datetime_is_what_it_was_when_the_filter_was_made() -> None:
    with override_settings(USE_TZ=False):
        for _ in range(WARM):
            books = Book.objects.filter(created__gt=dt.datetime(2024, 1, 1))
            await books.native_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of Django, which makes it aware
        assert "WHERE" in str(books.all().query)


async def test_an_ordering_that_is_changed_is_used_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(WARM):
        names = [tag.name for tag in await Tag.objects.filter(pk__gt=0).anative()]
    monkeypatch.setattr(Tag._meta, "ordering", ["-name"])
    for _ in range(WARM):
        found = [tag.name for tag in await Tag.objects.filter(pk__gt=0).anative()]
        assert found == names[::-1]


async def test_switched_off_nothing_is_recorded() -> None:
    with override_settings(ASYNCORM={"SWAP_MANAGERS": True, "RECORD_QUERYSETS": False}):
        for _ in range(WARM):
            assert type(Book.objects.filter(pk=1)._query) is Query
    assert was_recorded(lambda v: Book.objects.filter(pk=v))


def test_synchronous_code_records_nothing() -> None:
    assert not was_recorded(lambda v: Book.objects.filter(pk=v))


async def test_a_query_class_of_their_own_is_left_alone() -> None:
    class Own(Query):
        pass

    class OwnQuerySet(QuerySet):
        def __init__(self, model: Any = None, query: Any = None, **kwargs: Any) -> None:
            super().__init__(model, query or Own(model), **kwargs)

    for _ in range(WARM):
        assert type(OwnQuerySet(Book).filter(pk=1).order_by("pk")[:5].query) is Own


async def test_names_that_vary_do_not_fill_the_trie() -> None:
    assert was_recorded(lambda v: Review.objects.filter(stars=v))
    root = nodes.root(Review)
    for number in range(nodes.MAX_CHILDREN * 2):
        Review.objects.all()[: number + 1]
        if not number % 50:
            Review.objects.filter(stars=1)
    assert len(root.children) <= nodes.MAX_CHILDREN
    assert type(Review.objects.filter(stars=1)._query) is recorded.Recorded


async def test_expressions_as_arguments_are_not_kept() -> None:
    root = nodes.root(Review)
    before = len(root.children)
    for number in range(5):
        Review.objects.order_by(F("pk") + number)
        Review.objects.filter(pk=F("pk") + number)
    assert len(root.children) <= before + 2  # clear_ordering()


async def test_get_goes_by_what_is_recorded() -> None:
    publisher = await Publisher.objects.native_get(pk=1)
    keys = [book.pk for book in await publisher.books.all().anative()]
    with hits_checked():
        for _ in range(WARM):
            for key in keys:
                assert (await Book.objects.native_get(pk=key)).pk == key
                assert (await Book.objects.native_get(pk=str(key))).pk == key
                book = await publisher.books.native_get(pk=key)
                assert book.publisher is publisher
            with pytest.raises(Book.DoesNotExist, match="Book matching query does not exist"):
                await Book.objects.native_get(pk=0)
            with pytest.raises(Book.DoesNotExist):
                await Book.objects.native_get(pk=2**80)
            with pytest.raises(ValueError, match="expected a number"):
                await Book.objects.native_get(pk="x")
            with pytest.raises(Book.MultipleObjectsReturned, match="returned more than one Book"):
                await Book.objects.native_get(pk__gt=0)
            with pytest.raises(TypeError, match="slice"):
                await Book.objects.all()[:3].native_get(pk=1)
            if django.VERSION >= (5, 2, 8):  # those before take it for the connector
                with pytest.raises(TypeError, match="_connector"):
                    await Book.objects.native_get(_connector="OR", pk=1)
            else:
                book = await Book.objects.native_get(_connector="OR", pk=1, title="NOTHING")
                assert book.pk == 1
            with pytest.raises(Document.DoesNotExist):
                await Document.objects.native_get(key="NOTHING")


async def test_a_related_manager_keeps_its_ways() -> None:
    """Its hints, the instance that it belongs to, its late filter, its sticky one."""
    publisher = await Publisher.objects.native_get(pk=1)
    book = await Book.objects.native_get(pk=1)
    for _ in range(WARM):
        for found in await publisher.books.filter(pk__gt=0).anative():
            assert found.publisher is publisher
        tags = await book.tags.filter(name__gt="").anative()
        assert all([await tag.books.filter(pk=1).native_exists() for tag in tags])
        expected = str(QuerySet(Tag, Query(Tag)).filter(books=1).query)
        assert str(book.tags.all().query) == expected
        # Only the first filter after the manager's own may be about the same rows.
        for queryset, joins in (
            (book.tags.all(), 2),
            (book.tags.all().all(), 3),
            (book.tags.using("default").using("default"), 3),
        ):
            query = queryset.filter(books__title="x").query
            assert str(query).count("JOIN") == joins
    with pytest.raises(ValueError, match="needs to have a primary key"):
        Publisher(name="x").books.filter(pk=1)


def test_threads_see_queries(run: Callable) -> None:
    """A queryset that was recorded on a loop is used in synchronous code."""

    async def native() -> Any:
        for _ in range(WARM):
            queryset = Product.objects.filter(stock__gte=0).order_by("pk")
        return queryset

    queryset = run(native())
    assert is_recorded(queryset)
    derived = queryset.filter(pk__gt=0)[:2]
    expected = list(Product.objects.filter(stock__gte=0, pk__gt=0).order_by("pk")[:2])
    assert list(derived) == expected
    assert is_recorded(queryset)
    assert list(queryset)[:2] == expected
    assert type(queryset._query) is Query


async def test_only_the_first_copy_of_a_related_manager_joins_what_it_has_joined() -> None:
    """`books.all().filter()` is about the same tag, `books.all().all().filter()` is not."""

    def found(again: bool) -> Any:
        books = Tag.objects.get(pk=1).books
        return str((books.all().all() if again else books).filter(tags__pk__gt=1).query)

    for again in (True, False):
        expected = await in_thread(found, again)
        for _ in range(3):
            assert await asyncorm.native(found)(again) == expected
