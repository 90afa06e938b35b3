"""Random querysets give natively, from the statement cache or not, what they give synchronously.

A shape is drawn and two sets of values for it, so that the second is found in the cache. Each
comparison is `tests.compare`'s: values, types, `_state`, deferred fields, caches.
"""

import datetime as dt
import functools
import math
import os
import types
from collections.abc import Callable
from contextvars import ContextVar
from decimal import Decimal
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import connections, models, transaction
from django.db.models import (
    Avg,
    Case,
    CharField,
    Count,
    DurationField,
    Exists,
    F,
    Func,
    IntegerField,
    Lookup,
    Max,
    Min,
    OuterRef,
    Q,
    Subquery,
    Sum,
    Transform,
    Value,
    When,
)
from django.db.models.expressions import RawSQL
from django.db.models.functions import (
    Abs,
    Cast,
    Coalesce,
    Concat,
    ExtractYear,
    Greatest,
    Left,
    Length,
    Lower,
    NullIf,
    Round,
    TruncDate,
    TruncMonth,
    Upper,
)
from django.db.models.lookups import Exact
from django.test import override_settings
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import asyncorm
from asyncorm import statements
from asyncorm._hooks.aggregate import count_plan, exists_plan
from asyncorm._hooks.iterate import iterating_plan
from asyncorm.verifying import StatementCacheError
from tests.checked import hits_checked
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


Loud.register_lookup(Lower)
Loud.register_lookup(Length)


@Loud.register_lookup
class Bare(Transform):
    """Without blanks, on both sides."""

    lookup_name = "bare"
    function = "TRIM"
    bilateral = True


class Doubled(models.IntegerField):
    """Twice what the database has."""

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        return None if value is None else value * 2

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        value = super().get_db_prep_value(value, connection, prepared)
        return None if value is None else value // 2


@Doubled.register_lookup
class Around(Lookup):
    """Its SQL depends on the value, and so do its parameters."""

    lookup_name = "around"

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        lhs, params = self.process_lhs(compiler, connection)
        if self.rhs < 3:
            return f"{lhs} < %s", (*params, self.rhs)
        return f"{lhs} BETWEEN %s AND {self.rhs % 9}", (*params, 3 - self.rhs)


@Doubled.register_lookup
class Unlike(Exact):
    """The same in what Django's own class would have for its right side."""

    lookup_name = "unlike"

    def get_rhs_op(self, connection: Any, rhs: str) -> str:
        return f"<> {rhs}" if self.rhs % 4 else f"= {rhs}"


class Label(models.Model):
    """The table of tags."""

    name = Loud(max_length=50)
    weight = Doubled()

    class Meta:
        app_label = "not_installed"
        managed = False
        db_table = "shop_tag"


floor: ContextVar[int] = ContextVar("floor", default=0)


class Visible(models.Manager["Mark"]):
    """Only what the context may see, as tenants' managers do."""

    def get_queryset(self) -> Any:
        queryset = super().get_queryset().filter(pk__gt=floor.get())
        return queryset.exclude(weight=0) if floor.get() > 4 else queryset


class Mark(models.Model):
    """The table of tags."""

    name = models.CharField(max_length=50)
    weight = models.SmallIntegerField()
    objects = Visible()

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
    "float": (
        ("exact", "gt", "lte", "in"),
        st.one_of(
            st.floats(-1, 6, width=16),
            st.integers(0, 5),
            st.sampled_from([0.1, 0.0, -0.0, 1e300, 1e-300, 0.1 + 0.2, math.nan, math.inf]),
        ),
    ),
    "bytes": (
        ("exact", "gt", "in"),
        st.sampled_from([b"", b"\0\xff", b"a" * 100, b"a" * 100 + b"b", memoryview(b"a"), b"\\'"]),
    ),
    "doubled": (("around", "unlike"), st.integers(0, 12)),
    "date": (("exact", "gt", "lte"), st.dates(dt.date(1900, 1, 1), dt.date(2030, 1, 1))),
    "time": (
        ("exact", "gt", "lte"),
        st.datetimes(dt.datetime(2023, 1, 1), dt.datetime(2026, 1, 1), timezones=st.just(dt.UTC)),
    ),
    "part": (
        (
            *("year", "month", "week_day", "quarter", "week", "day", "iso_year", "hour__lt"),
            *("year__gt", "year__gte", "year__lt", "year__lte", "iso_year__gte", "iso_year__lt"),
        ),
        st.one_of(st.integers(1, 12), st.integers(2019, 2026)),
    ),
    "day": (
        ("date", "date__gt", "date__lte"),
        st.dates(dt.date(2023, 1, 1), dt.date(2026, 1, 1)),
    ),
    "years": (("year__in", "month__in"), st.lists(st.integers(1, 2025), max_size=3)),
    "clock": (("time__gt", "time__lte"), st.times()),
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
    "path": (
        ("exact", "gt", "lt", "iexact", "icontains", "startswith", "isnull", "in"),
        st.sampled_from(["epub", "x", "1", 1, 2.5, True, {"a": 1}, [1], None, Decimal(3)]),
    ),
    "keys": (("has_key", "contained_by"), st.sampled_from(["a", "format", "0"])),
    "array": (("exact", "contains", "len"), st.sampled_from([[], ["a"], ["sea", "x"]])),
    "list": (("in",), st.lists(st.one_of(st.integers(-1, 20), st.none()), max_size=4)),
    "range": (("range",), st.tuples(st.integers(-2, 20), st.integers(0, 30))),
    "loud": (
        (
            "exact",
            "differs",
            "contains",
            "gt",
            "in",
            "lower",
            "lower__contains",
            "bare__startswith",
        ),
        TEXTS,
    ),
    "length": (("length__gt", "length"), INTEGERS),
    "address": (("exact",), st.sampled_from(["10.0.0.1", "::1", "192.168.0.7"])),
}
OF_ONE_TYPE = {
    "decimal": st.decimals(-5, 60, places=2),
    "float": st.floats(-1, 6),
    "uuid": st.integers(0, 8).map(uid),
    "list": st.lists(st.integers(-1, 20), min_size=2, max_size=4),
}
PLAIN = {
    "integer": ("integer", "list", "range", "null", "none"),
    "text": ("text", "pattern", "null", "none"),
    "json": ("json", "keys", "null", "none"),
    "loud": ("loud", "loud", "length", "null", "none"),
    "doubled": ("doubled", "doubled", "integer", "list"),
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
        "data__a": "path", "data__format": "path", "extra__0": "path", "data__a__b": "path",
        "keywords": "array", "tags__name": "text", "tags": "integer",
        "authors__name": "text", "product__stock": "integer", "product": "integer",
        "reviews__stars": "integer", "sample": "text", "notes": "integer", "notes__text": "text",
    },
    PrintedBook: {"pk": "integer", "title": "text", "created": "time", "publisher__name": "text"},
    Author: {
        "pk": "integer", "id": "integer", "name": "text", "pen_name": "text", "born": "date",
        "mentor": "integer", "mentor__name": "text", "mentor__mentor__pen_name": "text",
        "person_ptr": "integer", "books__title": "text", "starauthor__stars": "integer",
        "notes__object_id": "integer",
    },
    StarAuthor: {"pk": "integer", "stars": "integer", "name": "text", "mentor__name": "text"},
    Product: {
        "pk": "integer", "sku": "uuid", "name": "text", "category__name": "text",
        "category__parent__name": "text", "book": "integer", "book__title": "text",
        "price": "decimal", "stock": "integer", "value": "decimal", "lines__quantity": "integer",
    },
    Event: {
        "pk": "uuid", "id": "uuid", "name": "text", "lasts": "span", "address": "address",
        "host": "integer", "host__name": "text", "poster": "bytes",
    },
    Order: {"pk": "integer", "status": "integer", "placed": "time", "remark": "text",
            "customer__name": "text", "customer__profile__bio": "text"},
    OrderLine: {"order": "integer", "number": "integer", "quantity": "integer", "price": "decimal",
                "product__name": "text"},
    Review: {"pk": "integer", "stars": "integer", "body": "text", "written": "time",
             "book__title": "text", "customer": "integer"},
    Publisher: {"pk": "integer", "name": "text", "country": "text", "founded": "date",
                "books__pages": "integer", "notes": "integer", "notes__object_id": "integer",
                "notes__text": "text"},
    Tag: {"pk": "integer", "name": "text", "weight": "integer"},
    Label: {"pk": "integer", "name": "loud", "weight": "doubled"},
    Mark: {"pk": "integer", "name": "text", "weight": "integer"},
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
    "locked": lambda queryset: rolled_back(queryset, lambda: list(queryset.select_for_update())),
    "locked of": lambda queryset: rolled_back(
        queryset, lambda: list(queryset.select_for_update(of=("self",), no_key=True))
    ),
    "locked nowait": lambda queryset: rolled_back(
        queryset, lambda: list(queryset.select_for_update(nowait=True))
    ),
    "unlocked": lambda queryset: list(queryset.select_for_update(skip_locked=True)),
    "skipped": lambda queryset: rolled_back(
        queryset, lambda: list(queryset.select_for_update(skip_locked=True))
    ),
    "aggregate with values": lambda queryset: queryset.aggregate(
        c=Count("pk", filter=Q(pk__gt=3)), s=Sum(F("pk") + 1), d=Max("pk", default=7)
    ),
    "delete": lambda queryset: rolled_back(queryset, queryset.delete),
}
# What a coroutine may await itself; the others it has done by an operation.
AWAITED: dict[str, Callable[[Any], Any]] = {
    "list": lambda queryset: queryset.anative(),
    "count": lambda queryset: queryset.native_count(),
    "exists": lambda queryset: queryset.native_exists(),
    "first": lambda queryset: queryset.native_first(),
    "last": lambda queryset: queryset.native_last(),
    "get": lambda queryset: queryset.native_get(),
    "aggregate": lambda queryset: queryset.native_aggregate(n=Count("pk"), m=Max("pk")),
    "iterator": lambda queryset: streamed(queryset.native_iterator(chunk_size=2)),
    "in_bulk": lambda queryset: queryset.native_in_bulk(),
    "delete": lambda queryset: awaited_and_rolled_back(queryset, queryset.native_delete),
}
KNOWN_AFTER = 4
COMBINED = ("union", "union", "intersection", "difference")


async def streamed(items: Any) -> list[Any]:
    return [item async for item in items]


def in_some_order(rows: list[Any]) -> list[Any]:
    """Rows that the server gives in any order."""
    return sorted(
        rows,
        key=lambda row: repr(
            [each for each in vars(row).items() if each[0] != "_state"]
            if isinstance(row, models.Model)
            else row
        ),
    )


def rolled_back(queryset: Any, function: Callable[[], Any]) -> Any:
    """The result of a function and, if that is a number, what it has written."""
    with transaction.atomic(using=queryset.db):
        result = function()
        written = None
        if type(result) is not list:
            written = list(rows_of(queryset))
        transaction.set_rollback(True, using=queryset.db)
        return result, written


async def awaited_and_rolled_back(queryset: Any, function: Callable[[], Any]) -> Any:
    """The same, of what a coroutine awaits."""
    async with asyncorm.atomic(using=queryset.db):
        result = await function()
        written = await rows_of(queryset).anative()
        asyncorm.set_rollback(True, using=queryset.db)
        return result, written


def rows_of(queryset: Any) -> Any:
    return queryset.model.objects.using(queryset.db).order_by("pk").values()


UPDATES: dict[Any, dict[str, Callable[[int], Any]]] = {
    Book: {
        "pages": lambda v: F("pages") + v,
        "sold": lambda v: F("pages") * 2 - v,
        "title": lambda v: Concat(F("title"), Value(f" {v}")),
        "rating": lambda v: Case(When(pages__gt=v, then=Value(1.5)), default=F("rating")),
        "changed": lambda v: F("created") + dt.timedelta(days=v),
        "isbn": lambda v: Value([None, "1", "2"][v]),
        "price": lambda v: Subquery(
            Product.objects.filter(book=OuterRef("pk"), stock__gt=v).values("price")[:1]
        ),
        "language": lambda v: Value(Book.Language.GERMAN),
        "extra": lambda v: Value({"a": v}, models.JSONField()),
        "published": lambda v: TruncDate("created"),
    },
    Tag: {"weight": lambda v: F("weight") + v, "name": lambda v: Lower("name")},
    Order: {
        "status": lambda v: F("status") + v,
        "remark": lambda v: Coalesce("remark", Value("x")),
    },
}

Step = Callable[[Any, Any], Any]  # a queryset and the values that are left


class Program:
    """A queryset's shape: steps that take values out of an iterator."""

    def __init__(
        self, model: Any, steps: list[tuple[str, Step]], call: Any, alias: str, zone: Any
    ) -> None:
        self.model, self.steps, self.call, self.alias = model, steps, call, alias
        self.zone = zone  # the settings of time zones

    def queryset(self, values: list[Any]) -> Any:
        if self.model is Mark:
            floor.set(values[0])
        queryset = self.model.objects.using(self.alias)
        for _, step in self.steps:
            queryset = step(queryset, values)
        return queryset

    def fields(self, values: list[Any]) -> dict[str, Any]:
        """What is updated."""
        last = values[-len(self.call) :]
        return {
            name: UPDATES[self.model][name](value)
            for name, value in zip(self.call, last, strict=True)
        }

    def run(self, values: list[Any], others: list[Any]) -> Any:
        queryset = self.queryset(values)
        if type(self.call) is tuple:
            return rolled_back(queryset, lambda: queryset.update(**self.fields(values)))
        if self.call in COMBINED:
            return in_some_order(list(getattr(queryset, self.call)(self.queryset(others))))
        return CALLS[self.call](queryset)

    async def awaited(self, values: list[Any], others: list[Any]) -> Any:
        """The same by a coroutine, which needs no operation where a statement is known."""
        try:
            queryset = self.queryset(values)
            if type(self.call) is tuple:
                update = functools.partial(queryset.native_update, **self.fields(values))
                return await awaited_and_rolled_back(queryset, update)
            if self.call in COMBINED:
                combined = getattr(queryset, self.call)(self.queryset(others))
                return in_some_order(await combined.anative())
            if self.call in AWAITED:
                return await AWAITED[self.call](queryset)
            return await asyncorm.native(CALLS[self.call])(queryset)
        except Exception as error:
            return error

    def __repr__(self) -> str:
        steps = "".join(f".{text}" for text, _ in self.steps)
        return f"{self.model.__name__}@{self.alias}{steps}.{self.call}() {self.zone or ''}"


@st.composite
def conditions(
    draw: Any, model: Any, values: list[list[Any]], plain: bool, depth: int = 2
) -> tuple[str, Callable[[Any], Q]]:
    """A Q tree as text and as a function of the values left.

    Plain ones have values of one type each, of fields of Django's: these are recorded.
    """
    kinds = ["leaf", "leaf", "leaf", "and", "or", "not", "xor"]
    kind = draw(st.sampled_from(kinds)) if depth else "leaf"
    if kind == "leaf":
        path = draw(st.sampled_from(sorted(MODELS[model])))
        what = MODELS[model][path]
        what = draw(st.sampled_from([*PLAIN.get(what, (what, "null", "none"))]))
        if MODELS[model][path] == "time" and not plain and draw(st.booleans()):
            what = draw(st.sampled_from(["part", "part", "day", "years", "clock"]))
        if MODELS[model][path] == "date" and not plain and draw(st.booleans()):
            what = draw(st.sampled_from(["part", "years"]))
        if what == "list" and path in ("tags", "book"):
            what = "integer"
        names, strategy = KINDS[what]
        name = draw(st.sampled_from(names))
        if name == "len":
            strategy = st.integers(0, 3)
        if name == "isnull" and what != "null":
            strategy = st.booleans()
        if plain:
            strategy = OF_ONE_TYPE.get(what, strategy)
        if name == "in" and what != "list":
            strategy = st.lists(strategy, max_size=3)
        for each in values:
            each.append(draw(strategy))
        lookup = f"{path}__{name}" if name != "exact" or draw(st.booleans()) else path
        at = len(values[0]) - 1
        return f"{lookup}=?", lambda left: Q(**{lookup: left[at]})
    one, first = draw(conditions(model, values, plain, depth - 1))
    if kind == "not":
        return f"~({one})", lambda left: ~first(left)
    two, second = draw(conditions(model, values, plain, depth - 1))
    if kind == "and":
        return f"({one} & {two})", lambda left: first(left) & second(left)
    if kind == "or":
        return f"({one} | {two})", lambda left: first(left) | second(left)
    return f"({one} ^ {two})", lambda left: first(left) ^ second(left)


@st.composite
def programs(draw: Any) -> tuple[Program, Program, list[list[Any]], bool]:
    model = draw(st.sampled_from(sorted(MODELS, key=lambda model: model.__name__)))
    columns = [path for path in MODELS[model] if "__" not in path]
    annotated = False
    plain = draw(st.booleans())
    fields = [f.name for f in model._meta.concrete_fields]
    values: list[list[Any]] = [[], []]
    steps: list[tuple[str, Step]] = []

    def add(text: str, step: Step) -> None:
        steps.append((text, step))

    if model is Mark:
        for each in values:
            each.append(draw(st.integers(0, 6)))
    for _ in range(draw(st.integers(0, 3))):
        text, condition = draw(conditions(model, values, plain))
        if draw(st.booleans()):
            add(f"filter({text})", lambda qs, left, c=condition: qs.filter(c(left)))
        else:
            add(f"exclude({text})", lambda qs, left, c=condition: qs.exclude(c(left)))
    if not plain and draw(st.integers(0, 7)) == 0:
        name = draw(st.sampled_from(sorted(EXTRAS)))
        extra, at = EXTRAS[name], len(values[0])
        for each in values:
            each.append(draw(st.integers(0, 9)))
        table = model._meta.db_table if not model._meta.parents else None
        if table and (model._meta.pk.column == "id"):
            add(
                f"extra({name})",
                lambda qs, left, at=at: qs.extra(**extra(f'"{table}"."id"', left[at])),
            )
    if not plain and draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(sorted(COMPARED)))
        compared = COMPARED[name]
        if name not in BOOK_ONLY or model in (Book, PrintedBook):
            at = len(values[0])
            for each in values:
                each.append(draw(st.integers(0, 9)))
            exclude = "exclude" if draw(st.booleans()) else "filter"
            add(
                f"{exclude}({name})",
                lambda qs, left, at=at: getattr(qs, exclude)(compared(qs, left[at])),
            )
    new_columns = st.sampled_from([(), (), ("extra_value",), ("extra_value", "other_value")])
    for column in () if plain else draw(new_columns):
        name = draw(st.sampled_from(sorted(ANNOTATIONS)))
        how = draw(st.sampled_from(["annotate", "annotate", "alias"]))
        if name not in BOOK_ONLY or model in (Book, PrintedBook):
            at = len(values[0])
            for each in values:
                each.append(draw(st.integers(0, 2)))
            add(
                f"{how}({column}={name})",
                lambda qs, left, at=at, how=how, column=column, name=name: getattr(qs, how)(
                    **{column: ANNOTATIONS[name](left[at])}
                ),
            )
            if draw(st.booleans()):
                add(
                    f"filter({column})",
                    lambda qs, left, column=column: qs.exclude(**{column: None}),
                )
            if name in COMPARABLE and draw(st.booleans()):
                lookup = draw(st.sampled_from([column, f"{column}__gt", f"{column}__in"]))
                at = len(values[0])
                for each in values:
                    wanted = draw(st.integers(0, 9))
                    each.append([wanted, 1] if lookup.endswith("in") else wanted)
                add(
                    f"filter({lookup}=?)",
                    lambda qs, left, at=at, lookup=lookup: qs.filter(**{lookup: left[at]}),
                )
            if draw(st.booleans()) and column == "extra_value":
                annotated = True
    if not plain and draw(st.integers(0, 6)) == 0:
        column = draw(st.sampled_from(columns))
        name = draw(st.sampled_from(sorted(GROUPED)))
        at = len(values[0])
        for each in values:
            each.append(draw(st.integers(0, 3)))
        add(
            f"values({column}).annotate({name})",
            lambda qs, left, at=at: qs.values(column).annotate(
                **{f"n_{name}": GROUPED[name](left[at])}
            ),
        )
        if draw(st.booleans()):
            at = len(values[0])
            for each in values:
                each.append(draw(st.integers(0, 3)))
            add(
                f"filter(n_{name}>?)",
                lambda qs, left, at=at: qs.filter(**{f"n_{name}__gt": left[at]}),
            )
    if model in RELATED and draw(st.integers(0, 3)) == 0:
        names = draw(st.lists(st.sampled_from(RELATED[model]), min_size=1, max_size=2, unique=True))
        add(f"select_related({names})", lambda qs, left: qs.select_related(*names))
    if model in PREFETCHES and draw(st.integers(0, 5)) == 0:
        path = draw(st.sampled_from(PREFETCHES[model]))
        add(f"prefetch_related({path})", lambda qs, left: qs.prefetch_related(path))
    form = draw(st.sampled_from(["", "", "", "only", "defer", "values", "list", "flat", "named"]))
    chosen = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique=True))
    if model is Book and form in ("values", "list"):
        chosen += draw(st.sampled_from([[], ["data__a"], ["created__month", "extra__0"]]))
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
    if not plain and draw(st.integers(0, 5)) == 0:
        add("distinct()", lambda qs, left: qs.distinct())
    order = draw(st.lists(st.sampled_from(columns), max_size=2, unique=True))
    order = [("-" if draw(st.booleans()) else "") + name for name in order if name != "data"]
    if annotated:
        order.insert(0, draw(st.sampled_from(["extra_value", "-extra_value"])))
    if model in RELATED and draw(st.integers(0, 3)) == 0:
        order.insert(0, draw(st.sampled_from(["", "-"])) + draw(st.sampled_from(RELATED[model])))
    if order and not plain and draw(st.integers(0, 3)) == 0:
        order[-1] = F(order[-1].removeprefix("-")).desc(
            nulls_last=draw(st.sampled_from([None, True]))
        )
    add(f"order_by({order})", lambda qs, left: qs.order_by(*order, "pk"))
    if draw(st.integers(0, 3)) == 0:
        low = draw(st.integers(0, 3))
        high = draw(st.one_of(st.none(), st.integers(low, low + 4)))
        add(f"[{low}:{high}]", lambda qs, left: qs[low:high])
    call: Any = draw(st.sampled_from(["list", "list", "list", *sorted(CALLS), *COMBINED]))
    if model in UPDATES and draw(st.integers(0, 3)) == 0:
        names = st.lists(
            st.sampled_from(sorted(UPDATES[model])), min_size=1, max_size=2, unique=True
        )
        call = tuple(draw(names))
        at = len(values[0])
        for each in values:
            each += [draw(st.integers(0, 2)) for _ in call]
    if type(call) is tuple or call == "delete":
        steps = [step for step in steps if not step[0].startswith("[")]
    alias = draw(st.sampled_from(["default", "default", "other"]))
    zone = draw(st.sampled_from(ZONES)) if draw(st.integers(0, 9)) == 0 else {}
    if "USE_TZ" in zone:  # the other one has a zone of its own, which is refused then
        alias = "default"
    program = Program(model, steps, call, alias, zone)
    # Without one of its steps it is another shape, near enough to be taken for this one.
    optional = [step for step in steps if not step[0].startswith(("filter", "exclude"))]
    left_out = draw(st.sampled_from(optional))
    near = Program(model, [step for step in steps if step is not left_out], call, alias, zone)
    return program, near, values, draw(st.booleans())


ZONES: list[dict[str, Any]] = [
    {"TIME_ZONE": "Europe/Vienna"},
    {"TIME_ZONE": "Asia/Kathmandu"},
    {"TIME_ZONE": "America/New_York", "USE_TZ": False},
    {"USE_TZ": False},
]
GROUPED: dict[str, Callable[[int], Any]] = {
    "count": lambda v: Count("pk"),
    "distinct": lambda v: Count("pk", distinct=True),
    "max": lambda v: Max("pk"),
    "filtered": lambda v: Count("pk", filter=Q(pk__gt=v)),
    "sum": lambda v: Sum(F("pk") + v),
    "default": lambda v: Sum("pk", filter=Q(pk__lt=v), default=v),
    "when": lambda v: Sum(Case(When(pk__gt=v, then=1), default=0)),
}
COMPARED: dict[str, Callable[[Any, int], Any]] = {
    "column": lambda qs, n: Q(pk__gte=F("pk")),
    "plus": lambda qs, n: Q(pk__gte=F("pk") * n - 1),
    "value": lambda qs, n: Q(pk__gt=Value(n)),
    "text or number": lambda qs, n: Q(pk__gt=Value([n, str(n), float(n), True][n % 4])),
    "case": lambda qs, n: Q(pk__gt=Case(When(pk__lt=n, then=Value(n)), default=F("pk") - n)),
    "pages": lambda qs, n: Q(pages__gt=F("sold") - n) | Q(pages=n),
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
    "first": lambda qs, n: Q(pk__in=qs.model.objects.order_by("-pk")[: n + 1]),
    "exists": lambda qs, n: Exists(Review.objects.filter(book=OuterRef("pk"), stars__gt=n)),
    "not exists": lambda qs, n: ~Exists(
        qs.model.objects.filter(pk=OuterRef("pk")).annotate(m=F("pk") + 1).filter(m__gt=n)
    ),
    "any review": lambda qs, n: Q(
        pages__gt=Subquery(
            Review.objects.filter(book=OuterRef("pk"), stars__lt=n)
            .order_by("pk")
            .values("stars")[:1]
        )
    ),
    "reviews": lambda qs, n: Q(reviews__stars__gt=n, reviews__body__contains=n),
    "tags": lambda qs, n: Q(tags__weight__lt=n) | Q(authors__name__contains=n),
}  # fmt: skip
BOOK_ONLY = {
    "columns", "lowered", "subquery of another", "nested", "any review", "reviews",
    "pages", "count", "average", "month", "title", "subquery", "exists", "lower", "both", "length",
    "greatest", "tags", "gross", "text", "when", "whens", "filtered", "concat", "left",
    "key in json", "notes",
    "year", "date", "round", "null if", "zone", "cast", "wide cast", "duration", "total", "newest",
}  # fmt: skip
COMPARABLE = {
    "lower", "length", "key", "abs", "greatest", "pages", "count", "filtered", "both", "when",
    "sum", "year", "coalesced", "left", "total", "case", "value", "average", "subquery",
}  # fmt: skip
ANNOTATIONS: dict[str, Callable[[int], Any]] = {
    "pages": lambda v: F("pages") + v,
    "count": lambda v: Count("tags"),
    "average": lambda v: Avg("reviews__stars"),
    "month": lambda v: TruncMonth("created"),
    "zone": lambda v: TruncMonth("created", tzinfo=ZONE_INFOS[v]),
    "year": lambda v: ExtractYear("created"),
    "date": lambda v: TruncDate("created"),
    "title": lambda v: Coalesce(Lower("isbn"), Upper("title"), output_field=CharField()),
    "subquery": lambda v: Subquery(
        Review.objects.filter(book=OuterRef("pk"), stars__gt=v).order_by("pk").values("stars")[:1]
    ),
    "newest": lambda v: Subquery(
        Review.objects.filter(book=OuterRef("pk")).order_by("-pk").values("written")[:1]
    ),
    "exists": lambda v: Exists(Review.objects.filter(book=OuterRef("pk"), stars__gt=v)),
    "value": lambda v: Value(v, output_field=IntegerField()),
    "values": lambda v: Value([1, "text", 2.5][v]),
    "nothing": lambda v: Value([None, 1, 2][v], output_field=IntegerField()),
    "sum": lambda v: Sum("pk"),
    "lower": lambda v: Lower("publisher__name"),
    "both": lambda v: F("pages") + F("sold"),
    "length": lambda v: Length("title"),
    "greatest": lambda v: Greatest("pages", "sold", v),
    "tags": lambda v: Count("tags", distinct=True),
    "gross": lambda v: Sum("price"),
    "key": lambda v: F("pk"),
    "user's interval": lambda v: Func(
        Value(v), template="interval '%(expressions)s days'", output_field=DurationField()
    ),
    "user's text": lambda v: Func(
        Value(f"it's {v}"),
        template="concat(%(expressions)s, ' it''s $1 -- ', E'\\'', $x$'$x$)",
        output_field=CharField(),
    ),
    "user's length": lambda v: Func(
        Value(v * 1.1),
        function="numeric",
        template="CAST(%(expressions)s AS %(function)s(9, " + str(v) + "))",
        output_field=models.DecimalField(),
    ),
    "raw": lambda v: RawSQL("interval '%s hours' * %s", (v, v), output_field=DurationField()),
    "raw number": lambda v: RawSQL("%s + 1", (v,), output_field=IntegerField()),
    "float": lambda v: Value([0.1, -0.0, 1e300][v], output_field=models.FloatField()),
    "notes": lambda v: Count("notes", filter=~Q(notes__object_id=v)),
    "abs": lambda v: Abs(F("pk") - v),
    "coalesced": lambda v: Coalesce("pk", Value(v)),
    "text": lambda v: Coalesce("isbn", Value(f"none {v}")),
    "case": lambda v: Case(When(pk__gt=v, then=Value(1)), default=Value(v)),
    "when": lambda v: Case(When(pages__gt=100 * v, then="pages"), When(pk=v, then=v), default=None),
    "whens": lambda v: Case(
        When(Q(title__contains=v) | Q(tags__weight__gt=v), then=Value("a")), default=Value(f"b{v}")
    ),
    "filtered": lambda v: Count("tags", filter=Q(tags__weight__gt=v)),
    "total": lambda v: Sum(F("reviews__stars") * v, filter=~Q(reviews__stars=v), default=v),
    "concat": lambda v: Concat("title", Value(f" {v} "), "slug"),
    "left": lambda v: Left("title", v + 1),
    "key in json": lambda v: F("data__format"),
    "round": lambda v: Round("price", v),
    "null if": lambda v: NullIf("pages", Value(v)),
    "cast": lambda v: Cast("pages", CharField(max_length=v + 1)),
    "wide cast": lambda v: Cast("price", models.DecimalField(max_digits=9, decimal_places=v)),
    "duration": lambda v: F("created") - dt.timedelta(days=v),
}  # fmt: skip
# Text of the user's in a statement: keywords of `extra()`, with the table's column of keys.
EXTRAS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "where": lambda column, v: {"where": [f"{column} > %s"], "params": [v]},
    "interval": lambda column, v: {
        "where": [f"interval '1 day' * {column} > interval '%s days'"],
        "params": [v],
    },
    "quotes": lambda column, v: {
        "where": [f"{column} <> length('$1 ''%%s') + %s /* ' %s */"],
        "params": [v, v],
    },
    "select": lambda column, v: {
        "select": {"extra_text": "'%s $1 it''s'"},
        "select_params": [v],
    },
    "order": lambda column, v: {"select": {"extra_key": f"{column} %% 3"}},
}

ZONE_INFOS = [ZoneInfo("Europe/Vienna"), ZoneInfo("Asia/Kathmandu"), None]


def copied(test: Any) -> Any:
    return types.FunctionType(test.__code__, test.__globals__, test.__name__)


def random_querysets(drawn: Any, run: Callable) -> None:
    program, near, (one, other), by_coroutine = drawn
    calls = [
        (program, one, other),
        (program, other, one),
        (near, one, other),
        (program, one, other),
    ]

    async def native() -> list[Any]:
        for _ in range(KNOWN_AFTER):  # each time one more call of a chain is recorded
            for each, values, _ in calls:
                outcome(each.queryset, values)
        if by_coroutine:
            return [await each.awaited(*given) for each, *given in calls]
        run = asyncorm.native(outcome)
        return [await run(each.run, *given) for each, *given in calls]

    with override_settings(**program.zone), hits_checked():
        expected = [outcome(each.run, *given) for each, *given in calls[:3]]
        found = run(native())
    for wanted, got in zip([*expected, expected[0]], found, strict=True):
        assert differences(wanted, got) == []


def with_and_without_the_cache(drawn: Any, run: Callable) -> None:
    program, _, values, by_coroutine = drawn
    native = program.awaited if by_coroutine else asyncorm.native(program.run)
    both = values, values[::-1]
    with override_settings(**program.zone):
        with override_settings(ASYNCORM={"STATEMENT_CACHE": False}):
            expected = [outcome(run, native(*each)) for each in both]
        for each, one in zip(both, expected, strict=True):
            assert differences(one, outcome(run, native(*each))) == []


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
    drawn = examples(copied(random_querysets), part, EXAMPLES // PARTS)
    globals()[f"test_random_querysets_{part}"] = pytest.mark.slow(drawn) if part % 2 else drawn
    globals()[f"test_with_and_without_the_cache_{part}"] = pytest.mark.slow(
        examples(copied(with_and_without_the_cache), part, EXAMPLES // PARTS // 5)
    )


HITS = int(os.environ.get("ASYNCORM_VERIFIED_HITS", "300"))
FOUND: dict[str, Callable[[Any], Any]] = {
    "list": lambda queryset: queryset,
    "first": lambda queryset: queryset.order_by("pk")[:1],
    "slice": lambda queryset: queryset.order_by("-pk")[2:5],
    "rows": lambda queryset: queryset.values_list("pk"),
    "dicts": lambda queryset: queryset.values(),
    "only": lambda queryset: queryset.only("pk"),
    "distinct": lambda queryset: queryset.distinct().order_by("pk"),
}
COUNTED = {"count": count_plan, "exists": exists_plan}


def one_shape(pick: Random, model: Any, pools: dict[str, list[Any]], wrapper: Any) -> None:
    """Have the plans of a shape found for many values; some are of another kind."""
    asked = []
    for _ in range(pick.choice((1, 1, 2))):
        path = pick.choice(sorted(MODELS[model]))
        kind = pick.choice(PLAIN.get(MODELS[model][path], (MODELS[model][path],)))
        asked.append((f"{path}__{pick.choice(KINDS[kind][0])}", kind))
    how = pick.choice(("filter", "filter", "exclude"))
    call = pick.choice([*FOUND, *COUNTED])

    def find(values: dict[str, Any]) -> Any:
        queryset = getattr(model.objects, how)(**values)
        if call in COUNTED:
            return COUNTED[call](queryset.query, wrapper)
        return iterating_plan(FOUND[call](queryset), wrapper)

    for _ in range(40):
        values = {
            name: pick.choice(pools[kind if pick.random() < 0.9 else pick.choice([*pools])])
            for name, kind in asked
        }
        found = outcome(find, values)
        assert not isinstance(found, StatementCacheError), found


@pytest.mark.usefixtures("shop_data")
@seed(SEED)
@settings(
    max_examples=max(HITS // 20_000, 1),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(
    pools=st.fixed_dictionaries(
        {kind: st.lists(values, min_size=9, max_size=9) for kind, (_, values) in KINDS.items()}
    ),
    number=st.integers(),
)
def test_hits_of_many_values_are_verified(pools: Any, number: int, run: Callable) -> None:
    """Without executing them, so that `make soak-cache` can ask for a million."""
    pick = Random(number)

    def native() -> None:
        wanted = statements.counts["hits"] + min(HITS, 20_000)
        while statements.counts["hits"] < wanted:
            model = pick.choice(sorted(MODELS, key=lambda model: model.__name__))
            one_shape(pick, model, pools, connections["default"])

    async def go() -> None:
        await asyncorm.native(native)()

    with hits_checked():
        run(go())


def test_the_cache_was_used() -> None:
    stats = statements.statement_cache_stats()
    print(stats)
    assert stats["hits"] > 100
    assert stats["recorded"] > 20
