"""Random querysets give natively, from the statement cache or not, what they give synchronously.

A shape is drawn and two sets of values for it, so that the second is found in the cache. Each
comparison is `tests.compare`'s: values, types, `_state`, deferred fields, caches.
"""

import datetime as dt
import os
import types
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from django.db import models
from django.db.models import (
    Avg,
    CharField,
    Count,
    Exists,
    F,
    IntegerField,
    Lookup,
    Max,
    Min,
    OuterRef,
    Q,
    Subquery,
    Sum,
    Value,
)
from django.db.models.functions import Abs, Coalesce, Greatest, Length, Lower, TruncMonth, Upper
from django.db.models.lookups import Exact
from django.test import override_settings
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import asyncorm
from asyncorm import statements
from tests.compare import differences
from tests.project.shop.models import (
    Author,
    Book,
    Event,
    Order,
    OrderLine,
    PrintedBook,
    Product,
    Publisher,
    Review,
    StarAuthor,
    Tag,
    Ticket,
)
from tests.project.shop.sample import uid
from tests.ways import outcome

SOAK = os.environ.get("ASYNCORM_MODEL_PROFILE") == "soak"
SEED = int(os.environ.get("ASYNCORM_MODEL_SEED", "0"))
EXAMPLES = 20_000 if SOAK else 500

# A model of fields, lookups and conversions of its own


class Loud(models.CharField):
    """Small letters in the database, capitals in Python."""

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        return None if value is None else value.upper()

    def get_prep_value(self, value: Any) -> Any:
        value = super().get_prep_value(value)
        return value.lower() if isinstance(value, str) else value


@Loud.register_lookup
class Differs(Lookup):
    lookup_name = "differs"

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        lhs, lhs_params = self.process_lhs(compiler, connection)
        rhs, rhs_params = self.process_rhs(compiler, connection)
        return f"{lhs} <> {rhs}", (*lhs_params, *rhs_params)


@Loud.register_lookup
class Same(Exact):
    def as_sql(self, compiler: Any, connection: Any) -> Any:
        lhs, lhs_params = self.process_lhs(compiler, connection)
        rhs, rhs_params = self.process_rhs(compiler, connection)
        return f"lower({lhs}) = {rhs}", (*lhs_params, *rhs_params)


class Doubled(models.IntegerField):
    """Twice what the database has."""

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        return None if value is None else value * 2

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        value = super().get_db_prep_value(value, connection, prepared)
        return None if value is None else value // 2


class Label(models.Model):
    """The table of tags."""

    name = Loud(max_length=50)
    weight = Doubled()

    class Meta:
        app_label = "not_installed"
        managed = False
        db_table = "shop_tag"


# Values by kind

INTEGERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**15, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 2**70]),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "Sea", "sea", "Öl", "100% Pure", "%", "_", "a", "Quote's", "Back\\slash", "de", "AT"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=4),
)
KINDS: dict[str, tuple[tuple[str, ...], st.SearchStrategy[Any]]] = {
    "integer": (("exact", "gt", "gte", "lt", "lte"), INTEGERS),
    "text": (
        (
            *("exact", "iexact", "contains", "icontains", "startswith", "istartswith"),
            *("endswith", "iendswith", "gt", "lte"),
        ),
        TEXTS,
    ),
    "pattern": (("regex", "iregex"), st.sampled_from(["^S", "[aeiou]$", "e+", "x?", "a|b"])),
    "decimal": (
        ("exact", "gt", "lte"),
        st.one_of(
            st.decimals(-5, 60, places=2), st.sampled_from([Decimal("1E+1"), 5, 7.5, "9.99"])
        ),
    ),
    "float": (("exact", "gt", "lte"), st.one_of(st.floats(-1, 6, width=16), st.integers(0, 5))),
    "date": (("exact", "gt", "lte"), st.dates(dt.date(1900, 1, 1), dt.date(2030, 1, 1))),
    "time": (
        ("exact", "gt", "lte"),
        st.datetimes(dt.datetime(2023, 1, 1), dt.datetime(2026, 1, 1), timezones=st.just(dt.UTC)),
    ),
    "part": (("year", "month", "week_day", "year__gte"), st.integers(1, 2030)),
    "truth": (("exact",), st.booleans()),
    "span": (("exact", "gt"), st.timedeltas(dt.timedelta(0), dt.timedelta(days=2))),
    "null": (("isnull",), st.booleans()),
    "none": (("exact",), st.none()),
    "uuid": (
        ("exact",),
        st.one_of(st.integers(0, 8).map(uid), st.integers(0, 8).map(lambda n: str(uid(n)))),
    ),
    "json": (
        ("exact", "contains"),
        st.sampled_from([{}, [], {"a": 1}, {"a": {"b": [1]}}, None, "x", 1]),
    ),
    "array": (("exact", "contains", "len"), st.sampled_from([[], ["a"], ["sea", "x"]])),
    "list": (("in",), st.lists(st.one_of(st.integers(-1, 20), st.none()), max_size=4)),
    "range": (("range",), st.tuples(st.integers(-2, 20), st.integers(0, 30))),
    "loud": (("exact", "differs", "contains", "gt", "in"), TEXTS),
    "address": (("exact",), st.sampled_from(["10.0.0.1", "::1", "192.168.0.7"])),
}
PLAIN = {
    "integer": ("integer", "list", "range", "null", "none"),
    "text": ("text", "pattern", "null", "none"),
}

# Paths of each model, with the kind of what is there
MODELS: dict[Any, dict[str, str]] = {
    Book: {
        "pk": "integer", "id": "integer", "title": "text", "isbn": "text", "slug": "text",
        "language": "text", "publisher": "integer", "publisher_id": "integer",
        "publisher__name": "text", "publisher__country__code": "text", "publisher__founded": "date",
        "price": "decimal", "gross": "decimal", "pages": "integer", "rating": "float",
        "sold": "integer", "published": "date", "created": "time", "changed": "time",
        "in_print": "truth", "audio_length": "span", "data": "json", "extra": "json",
        "data__a": "json", "keywords": "array", "tags__name": "text", "tags": "integer",
        "authors__name": "text", "product__stock": "integer", "product": "integer",
        "reviews__stars": "integer", "sample": "text",
    },
    PrintedBook: {"pk": "integer", "title": "text", "created": "time", "publisher__name": "text"},
    Author: {
        "pk": "integer", "id": "integer", "name": "text", "pen_name": "text", "born": "date",
        "mentor": "integer", "mentor__name": "text", "mentor__mentor__pen_name": "text",
        "person_ptr": "integer", "books__title": "text", "starauthor__stars": "integer",
    },
    StarAuthor: {"pk": "integer", "stars": "integer", "name": "text", "mentor__name": "text"},
    Product: {
        "pk": "integer", "sku": "uuid", "name": "text", "category__name": "text",
        "category__parent__name": "text", "book": "integer", "book__title": "text",
        "price": "decimal", "stock": "integer", "value": "decimal", "lines__quantity": "integer",
    },
    Event: {
        "pk": "uuid", "id": "uuid", "name": "text", "lasts": "span", "address": "address",
        "host": "integer", "host__name": "text",
    },
    Order: {"pk": "integer", "status": "integer", "placed": "time", "remark": "text",
            "customer__name": "text", "customer__profile__bio": "text"},
    OrderLine: {"order": "integer", "number": "integer", "quantity": "integer", "price": "decimal",
                "product__name": "text"},
    Review: {"pk": "integer", "stars": "integer", "body": "text", "written": "time",
             "book__title": "text", "customer": "integer"},
    Publisher: {"pk": "integer", "name": "text", "country": "text", "founded": "date",
                "books__pages": "integer"},
    Tag: {"pk": "integer", "name": "text", "weight": "integer"},
    Label: {"pk": "integer", "name": "loud", "weight": "integer"},
    Ticket: {"pk": "integer", "title": "text", "status": "text", "label": "text", "opened": "time"},
}  # fmt: skip
RELATED = {
    Book: ["publisher", "publisher__country", "product", "product__category"],
    PrintedBook: ["publisher"],
    Author: ["mentor", "mentor__mentor", "starauthor"],
    StarAuthor: ["mentor", "author_ptr"],
    Product: ["category__parent", "book__publisher"],
    Event: ["host"],
    Order: ["customer__profile", "customer__user"],
    OrderLine: ["order__customer", "product__book"],
    Review: ["book", "customer"],
    Publisher: ["country"],
}
PREFETCHES = {
    Book: ["tags", "authors", "reviews__customer", "notes"],
    Publisher: ["books__tags", "books"],
    Author: ["books", "pupils"],
    Order: ["lines__product"],
    Product: ["fans"],
}
CALLS = {
    "list": list,
    "count": lambda queryset: queryset.count(),
    "exists": lambda queryset: queryset.exists(),
    "first": lambda queryset: queryset.first(),
    "last": lambda queryset: queryset.last(),
    "get": lambda queryset: queryset.get(),
    "aggregate": lambda queryset: queryset.aggregate(n=Count("pk"), m=Max("pk")),
    "aggregates": lambda queryset: queryset.aggregate(
        Avg("pk"), c=Count("*"), d=Count("pk", distinct=True), e=Min(F("pk") + F("pk"))
    ),
    "iterator": lambda queryset: list(queryset.iterator(chunk_size=2)),
    "in_bulk": lambda queryset: queryset.in_bulk(),
}

Step = Callable[[Any, Any], Any]  # a queryset and the values that are left


class Program:
    """A queryset's shape: steps that take values out of an iterator."""

    def __init__(
        self, model: Any, steps: list[tuple[str, Step]], call: str, alias: str, zone: Any
    ) -> None:
        self.model, self.steps, self.call, self.alias = model, steps, call, alias
        self.zone = zone  # the settings of time zones

    def run(self, values: list[Any]) -> Any:
        left = iter(values)
        queryset = self.model.objects.using(self.alias)
        for _, step in self.steps:
            queryset = step(queryset, left)
        return CALLS[self.call](queryset)

    def __repr__(self) -> str:
        steps = "".join(f".{text}" for text, _ in self.steps)
        return f"{self.model.__name__}@{self.alias}{steps}.{self.call}() {self.zone or ''}"


@st.composite
def conditions(
    draw: Any, model: Any, values: list[list[Any]], depth: int = 2
) -> tuple[str, Callable[[Any], Q]]:
    """A Q tree as text and as a function of the values left."""
    kinds = ["leaf", "leaf", "leaf", "and", "or", "not", "xor"]
    kind = draw(st.sampled_from(kinds)) if depth else "leaf"
    if kind == "leaf":
        path = draw(st.sampled_from(sorted(MODELS[model])))
        what = MODELS[model][path]
        what = draw(st.sampled_from([*PLAIN.get(what, (what, "null", "none"))]))
        if MODELS[model][path] == "time" and draw(st.integers(0, 3)) == 0:
            what = "part"
        if what == "list" and path in ("tags", "book"):
            what = "integer"
        names, strategy = KINDS[what]
        name = draw(st.sampled_from(names))
        if name == "len":
            strategy = st.integers(0, 3)
        if name == "in" and what != "list":
            strategy = st.lists(strategy, max_size=3)
        for each in values:
            each.append(draw(strategy))
        lookup = f"{path}__{name}" if name != "exact" or draw(st.booleans()) else path
        return f"{lookup}=?", lambda left: Q(**{lookup: next(left)})
    one, first = draw(conditions(model, values, depth - 1))
    if kind == "not":
        return f"~({one})", lambda left: ~first(left)
    two, second = draw(conditions(model, values, depth - 1))
    if kind == "and":
        return f"({one} & {two})", lambda left: first(left) & second(left)
    if kind == "or":
        return f"({one} | {two})", lambda left: first(left) | second(left)
    return f"({one} ^ {two})", lambda left: first(left) ^ second(left)


@st.composite
def programs(draw: Any) -> tuple[Program, Program, list[list[Any]]]:
    model = draw(st.sampled_from(sorted(MODELS, key=lambda model: model.__name__)))
    columns = [path for path in MODELS[model] if "__" not in path]
    annotated = False
    fields = [f.name for f in model._meta.concrete_fields]
    values: list[list[Any]] = [[], []]
    steps: list[tuple[str, Step]] = []

    def add(text: str, step: Step) -> None:
        steps.append((text, step))

    for _ in range(draw(st.integers(0, 3))):
        text, condition = draw(conditions(model, values))
        if draw(st.booleans()):
            add(f"filter({text})", lambda qs, left, c=condition: qs.filter(c(left)))
        else:
            add(f"exclude({text})", lambda qs, left, c=condition: qs.exclude(c(left)))
    if draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(sorted(COMPARED)))
        compared = COMPARED[name]
        if name not in BOOK_ONLY or model in (Book, PrintedBook):
            inside = draw(st.integers(0, 9))
            add(f"filter({name})", lambda qs, left: qs.filter(compared(qs, inside)))
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(sorted(ANNOTATIONS)))
        if name not in BOOK_ONLY or model in (Book, PrintedBook):
            add(f"annotate({name})", lambda qs, left: qs.annotate(extra_value=ANNOTATIONS[name]()))
            if draw(st.booleans()):
                add("filter(extra_value)", lambda qs, left: qs.exclude(extra_value=None))
            if name in ("lower", "length", "key", "abs", "greatest") and draw(st.booleans()):
                wanted = draw(st.integers(0, 9))
                add(f"extra_value={wanted}", lambda qs, left: qs.filter(extra_value=wanted))
            if draw(st.booleans()):
                annotated = True
    if draw(st.integers(0, 6)) == 0:
        column = draw(st.sampled_from(columns))
        name = draw(st.sampled_from(sorted(GROUPED)))
        add(
            f"values({column}).annotate({name})",
            lambda qs, left: qs.values(column).annotate(**{f"n_{name}": GROUPED[name]()}),
        )
    if model in RELATED and draw(st.integers(0, 3)) == 0:
        names = draw(st.lists(st.sampled_from(RELATED[model]), min_size=1, max_size=2, unique=True))
        add(f"select_related({names})", lambda qs, left: qs.select_related(*names))
    if model in PREFETCHES and draw(st.integers(0, 5)) == 0:
        path = draw(st.sampled_from(PREFETCHES[model]))
        add(f"prefetch_related({path})", lambda qs, left: qs.prefetch_related(path))
    form = draw(st.sampled_from(["", "", "", "only", "defer", "values", "list", "flat", "named"]))
    chosen = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique=True))
    if form in ("only", "defer"):
        add(f"{form}({chosen})", lambda qs, left: getattr(qs, form)(*chosen))
    elif form == "values":
        chosen = chosen if draw(st.booleans()) else []
        add(f"values({chosen})", lambda qs, left: qs.values(*chosen))
    elif form == "flat":
        add(f"flat({chosen[0]})", lambda qs, left: qs.values_list(chosen[0], flat=True))
    elif form:
        named = form == "named"
        add(f"values_list({chosen})", lambda qs, left: qs.values_list(*chosen, named=named))
    if draw(st.integers(0, 5)) == 0:
        add("distinct()", lambda qs, left: qs.distinct())
    order = draw(st.lists(st.sampled_from(columns), max_size=2, unique=True))
    order = [("-" if draw(st.booleans()) else "") + name for name in order if name != "data"]
    if annotated:
        order.insert(0, draw(st.sampled_from(["extra_value", "-extra_value"])))
    add(f"order_by({order})", lambda qs, left: qs.order_by(*order, "pk"))
    if draw(st.integers(0, 3)) == 0:
        low = draw(st.integers(0, 3))
        high = draw(st.one_of(st.none(), st.integers(low, low + 4)))
        add(f"[{low}:{high}]", lambda qs, left: qs[low:high])
    call = draw(st.sampled_from(["list", "list", "list", *sorted(CALLS)]))
    alias = draw(st.sampled_from(["default", "default", "other"]))
    zone = draw(st.sampled_from(ZONES)) if draw(st.integers(0, 9)) == 0 else {}
    if "USE_TZ" in zone:  # the other one has a zone of its own, which is refused then
        alias = "default"
    program = Program(model, steps, call, alias, zone)
    # Without one of its steps it is another shape, near enough to be taken for this one.
    optional = [step for step in steps if not step[0].startswith(("filter", "exclude"))]
    left_out = draw(st.sampled_from(optional))
    near = Program(model, [step for step in steps if step is not left_out], call, alias, zone)
    return program, near, values


ZONES: list[dict[str, Any]] = [
    {"TIME_ZONE": "Europe/Vienna"},
    {"TIME_ZONE": "Asia/Kathmandu"},
    {"TIME_ZONE": "America/New_York", "USE_TZ": False},
    {"USE_TZ": False},
]
GROUPED: dict[str, Callable[[], Any]] = {
    "count": lambda: Count("pk"),
    "distinct": lambda: Count("pk", distinct=True),
    "max": lambda: Max("pk"),
    "filtered": lambda: Count("pk", filter=Q(pk__gt=3)),
}
COMPARED: dict[str, Callable[[Any, int], Q]] = {
    "column": lambda qs, n: Q(pk__gte=F("pk")),
    "columns": lambda qs, n: Q(pages__gt=F("sold")),
    "sum": lambda qs, n: Q(pages__gt=F("sold") + F("pages")),
    "lowered": lambda qs, n: Q(title=Lower("title")),
    "subquery": lambda qs, n: Q(pk__in=qs.model.objects.filter(pk__gt=n)),
    "subquery of another": lambda qs, n: Q(
        publisher__in=Publisher.objects.filter(pk__lt=n).filter(name__contains="e")
    ),
    "not in": lambda qs, n: ~Q(pk__in=qs.model.objects.filter(pk__lt=n).values("pk")),
    "nested": lambda qs, n: Q(
        publisher__in=Publisher.objects.filter(books__in=Book.objects.filter(pk__gt=n))
    ),
    "slice": lambda qs, n: Q(pk__in=qs.model.objects.order_by("pk")[n : n + 3]),
}
BOOK_ONLY = {
    "columns", "sum", "lowered", "subquery of another", "nested",
    "pages", "count", "average", "month", "title", "subquery", "exists", "lower", "both", "length",
    "greatest", "tags", "gross",
}  # fmt: skip
ANNOTATIONS: dict[str, Callable[[], Any]] = {
    "pages": lambda: F("pages") + 1,
    "count": lambda: Count("tags"),
    "average": lambda: Avg("reviews__stars"),
    "month": lambda: TruncMonth("created"),
    "title": lambda: Coalesce(Lower("isbn"), Upper("title"), output_field=CharField()),
    "subquery": lambda: Subquery(
        Review.objects.filter(book=OuterRef("pk")).order_by("pk").values("stars")[:1]
    ),
    "exists": lambda: Exists(Review.objects.filter(book=OuterRef("pk"), stars__gt=2)),
    "value": lambda: Value(7, output_field=IntegerField()),
    "sum": lambda: Sum("pk"),
    "lower": lambda: Lower("publisher__name"),
    "both": lambda: F("pages") + F("sold"),
    "length": lambda: Length("title"),
    "greatest": lambda: Greatest("pages", "sold"),
    "tags": lambda: Count("tags", distinct=True),
    "gross": lambda: Sum("price"),
    "key": lambda: F("pk"),
    "abs": lambda: Abs("pk"),
}


def copied(test: Any) -> Any:
    return types.FunctionType(test.__code__, test.__globals__, test.__name__)


def random_querysets(drawn: Any, run: Callable) -> None:
    program, near, values = drawn
    calls = [(program, values[0]), (program, values[1]), (near, values[0]), (program, values[0])]

    async def native() -> list[Any]:
        run = asyncorm.native(outcome)
        return [await run(each.run, given) for each, given in calls]

    with override_settings(**program.zone):
        expected = [outcome(each.run, given) for each, given in calls[:3]]
        found = run(native())
    for one, other in zip([*expected, expected[0]], found, strict=True):
        assert differences(one, other) == []


def with_and_without_the_cache(drawn: Any, run: Callable) -> None:
    program, _, values = drawn
    with override_settings(**program.zone):
        with override_settings(ASYNCORM={"STATEMENT_CACHE": False}):
            expected = [outcome(run, asyncorm.native(program.run)(each)) for each in values]
        for value, one in zip(values, expected, strict=True):
            assert differences(one, outcome(run, asyncorm.native(program.run)(value))) == []


def examples(test: Callable[..., None], part: int, count: int) -> Any:
    """A part of the examples as a test of its own, so that none of them takes long."""
    test = given(drawn=programs())(test)
    test = settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )(test)
    return pytest.mark.usefixtures("shop_data")(seed(SEED * PARTS + part)(test))


PARTS = 10
for part in range(PARTS):
    globals()[f"test_random_querysets_{part}"] = examples(
        copied(random_querysets), part, EXAMPLES // PARTS
    )
    globals()[f"test_with_and_without_the_cache_{part}"] = pytest.mark.slow(
        examples(copied(with_and_without_the_cache), part, EXAMPLES // PARTS // 5)
    )


def test_the_cache_was_used() -> None:
    assert statements.statement_cache_stats()["hits"] > 100
