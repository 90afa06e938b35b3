"""The key of a statement is a contract: whatever the statement depends on is in it.

Each attribute of `Query` and of each object in one, as the installed Django's classes have them, is
changed in turn. Then the key is another one, or the query is unfit, or Django's compiler makes the
same statement of it, which verify mode finds out. Every name is listed below, so that a new one of
a new Django is looked at, and with a reason where no change of it makes a difference.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
from django.db import models
from django.db.models import (
    Avg,
    Case,
    CharField,
    Count,
    DecimalField,
    Exists,
    F,
    FilteredRelation,
    Max,
    Min,
    OuterRef,
    Q,
    StdDev,
    Subquery,
    Sum,
    Value,
    Variance,
    When,
)
from django.db.models import functions as f
from django.db.models.expressions import BaseExpression
from django.db.models.sql.datastructures import BaseTable, Join
from django.db.models.sql.query import ExplainInfo, Query
from django.db.models.sql.subqueries import DeleteQuery, UpdateQuery
from django.db.models.sql.where import WhereNode
from django.utils.functional import cached_property

import asyncorm
from asyncorm import expressions, shapes, statements, verifying
from asyncorm._chains.recorded import Recorded
from asyncorm._hooks import switch
from asyncorm._hooks.iterate import compile_tuples
from asyncorm._hooks.write import compile_write
from tests.project.shop.models import Book, Publisher, Review, Tag
from tests.project.shop.sample import moment
from tests.ways import outcome

pytestmark = pytest.mark.usefixtures("shop_data")


def books(*args: Any, **kwargs: Any) -> Any:
    return Book.objects.filter(*args, **kwargs).order_by("pk")


def annotated(*expressions: Any) -> Any:
    return books().annotate(**{f"n{i}": each for i, each in enumerate(expressions)}).query


def updated(queryset: Any, **values: Any) -> Any:
    query = queryset.query.chain(UpdateQuery)
    query.add_update_values(values)
    return query


def reviews() -> Any:
    return Review.objects.filter(book=OuterRef("pk"), stars=1)


LOOKUPS: dict[str, Any] = {
    **{
        f"title__{name}": "x"
        for name in (
            "iexact contains icontains startswith istartswith endswith iendswith regex iregex "
            "exact gt gte lt lte"
        ).split()
    },
    "title__in": ["x", "y"],
    "title__range": ("x", "y"),
    **{f"pages__{name}": 1 for name in ("exact", "gt", "gte", "lt", "lte")},
    "pages__in": [1, 2],
    "price__lt": 1,
    "price__lte": 1,
    "price__gt": 1,
    "price__gte": 1,
    **{f"publisher__{name}": 1 for name in ("exact", "gt", "gte", "lt", "lte")},
    "publisher__in": [1, 2],
    "pages__isnull": True,
    "publisher__isnull": False,
    **{f"created__year__{name}": 2024 for name in ("exact", "gt", "gte", "lt", "lte")},
    "created__date": moment(1).date(),
    "in_print": True,
    "data__format": "x",
}
BASES: dict[str, Callable[[], Any]] = {
    "all": lambda: Book.objects.all().query,
    "page": lambda: books()[2:4].query,
    "start": lambda: books()[:4].query,
    "default order": lambda: Tag.objects.filter(pk=1).query,
    "ordered by a relation": lambda: Review.objects.filter(pk=1).order_by("book", "-pk").query,
    "ordered by expressions": lambda: Book.objects.order_by(
        F("rating").desc(nulls_last=True), f.Length("title").asc(), F("pages").asc(nulls_first=True)
    ).query,
    "filtered relation": lambda: Book.objects.annotate(
        good=FilteredRelation("reviews", condition=Q(reviews__stars__gt=1))
    ).filter(good__pk=1).order_by("pk").query,
    "backwards": lambda: books().reverse().query,
    "or": lambda: books(Q(pk=1) | ~Q(pages=2, title="x")).query,
    "joins": lambda: books(publisher__name="x", tags__name="y").query,
    "related": lambda: books(pk=1).select_related("publisher__country", "product").query,
    "only": lambda: books(pk=1).only("title").query,
    "defer": lambda: books(pk=1).defer("title").query,
    "values": lambda: books(pk=1).values("title", "pages").query,
    "distinct": lambda: Book.objects.filter(pk=1).values("title").distinct().query,
    "distinct on": lambda: books(pk=1).distinct("pk").query,
    "grouped": lambda: books(pk=1).annotate(n=Count("tags")).filter(n__gt=1).query,
    "grouped values": lambda: Book.objects.values("publisher").annotate(n=Avg("pages")).query,
    "filter on annotation": lambda: books().annotate(n=F("pages") + 1).filter(n__gt=2).query,
    "subquery": lambda: books(publisher__in=Publisher.objects.filter(name="x")).query,
    "column": lambda: books(pages__gt=F("sold")).query,
    "extra": lambda: books().extra(select={"n": "1"}).query,
    "locked": lambda: books(pk=1).select_for_update(of=("self",)).query,
    "update": lambda: updated(Book.objects.filter(pk=1), title="x", pages=F("pages") + 1),
    "delete": lambda: Book.objects.filter(pk=1).query.chain(DeleteQuery),
    "aggregates": lambda: annotated(
        Sum("reviews__stars", filter=Q(reviews__stars__gt=1), default=2),
        Avg("price"),
        Max("pk"),
        Min("pk"),
        StdDev("pages"),
        Variance("pages"),
        Count("*"),
    ),
    "texts": lambda: annotated(
        *(cls("title") for cls in (f.Lower, f.Upper, f.Length, f.Trim, f.LTrim, f.RTrim, f.Reverse))
    ),
    "numbers": lambda: annotated(
        *(cls("pages") for cls in (f.Abs, f.Ceil, f.Floor, f.Sign, f.Sqrt)),
        *(cls("pages", 2) for cls in (f.Coalesce, f.Greatest, f.Least, f.NullIf)),
    ),
    "cases": lambda: annotated(
        Case(When(pages__gt=1, then=Value("a")), default=Value("b"), output_field=CharField()),
        f.Cast("pages", DecimalField(max_digits=5, decimal_places=1)),
    ),
    "times": lambda: annotated(f.TruncMonth("created"), f.ExtractYear("created")),
    "subqueries": lambda: books(Exists(reviews())).annotate(
        n=Subquery(reviews().values("stars")[:1])
    ).query,
    **{
        name: functools.partial(lambda lookup: books(**lookup).query, {name: value})
        for name, value in LOOKUPS.items()
    },
}  # fmt: skip

KINDS = (Query, BaseTable, Join, WhereNode, models.Lookup, BaseExpression, models.Field)
_BY_CLASS = (models.Lookup, BaseExpression, models.Field)


def kind_of(obj: Any) -> type | None:
    """What an object of a query is, None for what belongs to a model and for values."""
    if isinstance(obj, models.Field) and hasattr(obj, "model"):
        return None
    return next((kind for kind in KINDS if isinstance(obj, kind)), None)


def objects(obj: Any, seen: set[int]) -> Iterator[Any]:
    """All there is in a query, in an order that is the same for an equal one."""
    if id(obj) in seen:
        return
    seen.add(id(obj))
    if kind_of(obj) is not None:
        yield obj
        obj = {name: value for name, value in vars(obj).items() if name != "_constructor_args"}
    if isinstance(obj, dict):
        obj = list(obj.values())
    if isinstance(obj, list | tuple):
        for each in obj:
            yield from objects(each, seen)


def nth_of(query: Any, n: int) -> Any:
    return next(itertools.islice(objects(query, set()), n, None))


def names_of(obj: Any) -> set[str]:
    """The attributes that say what it is.

    Of expressions, lookups and fields only their own: classes are in the key. What a cached
    property says follows from the rest.
    """
    names = {n for n in vars(obj) if not isinstance(getattr(type(obj), n, 0), cached_property)}
    if kind_of(obj) in _BY_CLASS:
        return names
    return names | {
        name
        for cls in type(obj).__mro__[:-1]
        if cls is not BaseExpression
        for name, value in vars(cls).items()
        if not name.startswith("__") and not callable(value) and not hasattr(type(value), "__get__")
    }


VALUES: dict[str, list[Any]] = {
    "bilateral_transforms": [[f.Lower]],
    "combinator": ["union"],
    "explain_info": [ExplainInfo("text", {})],
    "extra": [{"function": "OTHER"}, {}],
    "extra_tables": [("shop_tag",)],
    "extra_order_by": [("pages",)],
    "order_by": [("title",), ("-pk",), ("?",), (F("title"),), ()],
    "table_map": [{"shop_tag": ["T9"]}],
    "where": [WhereNode()],
}  # fmt: skip


def others(obj: Any, name: str) -> list[Any]:
    """Other values that the attribute could have."""
    value = getattr(obj, name)
    if name in VALUES:
        return VALUES[name]
    match value:
        case None:
            return [True, 1, "pages", ("pages",), {"pages"}]
        case bool():
            return [not value]
        case int():
            return [value + 1]
        case str():
            return [f"{value}x", "", "shop_tag"]
        case tuple():
            return [(*value, "pages"), value[1:]]
        case list():
            return [[*value, *value], value[1:]]
        case dict():
            return [{**value, "pages": 1}, {}]
        case set() | frozenset():
            return [value | {"pages"}, type(value)()]
        case models.Field():
            return [Book._meta.get_field("sold"), models.TextField()]
        case type():
            return [Tag]
    return [None]


class Listed(NamedTuple):
    """The attributes of one kind of object.

    Attributes:
        keyed: what is in the key, or makes the query unfit if it is not as usual.
        harmless: what makes no difference to the statement, and why.
        derived: what follows from the rest and is not changed alone.
    """

    keyed: str
    harmless: dict[str, str] = {}
    derived: dict[str, str] = {}


_GIVEN = "what the constructor was given, which is in other attributes, too"
LISTED: dict[type, Listed] = {
    Query: Listed(
        """
        _db _filtered_relations alias_cols alias_map alias_prefix alias_refcount
        annotation_select_mask annotations combinator combinator_all combined_queries compiler
        contains_subquery default_cols default_ordering deferred_loading distinct distinct_fields
        empty_result_set_value explain_info external_aliases extra extra_order_by extra_select_mask
        extra_tables group_by high_mark low_mark max_depth model order_by related_ids
        related_updates select select_for_no_key_update select_for_update select_for_update_nowait
        select_for_update_of select_for_update_skip_locked select_related selected
        standard_ordering subq_aliases subquery table_map values values_select where
        """,
        {
            "used_aliases": "for filters that are still to come",
            "filter_is_sticky": "for filters that are still to come",
            "_lookup_joins": "while a filter is made",
        },
        {
            "_annotation_select_cache": "made of annotations and their mask",
            "_extra_select_cache": "made of extra and its mask",
            "base_table": "the first of alias_map",
        },
    ),
    BaseTable: Listed(
        "table_alias table_name",
        dict.fromkeys(("filtered_relation", "join_type", "parent_alias"), "only joins have it"),
    ),
    Join: Listed(
        "filtered_relation join_field join_type nullable parent_alias table_alias table_name",
        {},
        {"join_cols": "of the join_field", "join_fields": "of the join_field"},
    ),
    WhereNode: Listed(
        "children connector negated resolved",
        {"conditional": "where it is put", "default": "where it is made"},
    ),
    models.Lookup: Listed("bilateral_transforms lhs rhs", {}, {"_constructor_args": _GIVEN}),
    BaseExpression: Listed(
        """
        alias cases condition connector default descending distinct expression extra filter function
        lhs nulls_first nulls_last order_by query result rhs source_expressions target template
        tzinfo
        """,
        {
            "value": "a parameter",
            "key_name": "a parameter",
            "for_save": "how a parameter is prepared, which is asked each time",
            "is_summary": "for what is still to be resolved",
            "possibly_multivalued": "for the grouping of a query around it",
        },
        {"_constructor_args": _GIVEN},
    ),
    models.Field: Listed(
        "db_collation decimal_places max_digits max_length",
        dict.fromkeys(
            """
            _choices _db_tablespace _error_messages _unique _validators _verbose_name auto_created
            blank creation_counter db_column db_comment db_default db_index default editable
            help_text is_relation null primary_key remote_field serialize unique_for_date
            unique_for_month unique_for_year verbose_name
            """.split(),
            "neither in the SQL of an expression nor where its values are converted",
        ),
        {"name": "with the model"},
    ),
}


class Changes:
    """What changing each attribute of each kind of object came to.

    Attributes:
        names: of the attributes, by kind.
        different: those that changed the key, or made the query unfit.
        wrong: where the key was the same and the statement was not.
        classes: of the objects.
    """

    def __init__(self) -> None:
        self.names: dict[type, set[str]] = {kind: set() for kind in KINDS}
        self.different: dict[type, set[str]] = {kind: set() for kind in KINDS}
        self.wrong: list[str] = []
        self.classes: set[type] = set()

    def make(self) -> "Changes":
        """Change each attribute of all that is in the queries; of expressions and the like, once
        for each class.
        """
        tried: set[Any] = set()
        for title, make in BASES.items():
            statements.clear()
            assert [said(make()) for _ in range(2)] == ["new", "hit"], title
            for n, obj in enumerate(objects(make(), set())):
                self.classes.add(type(obj))
                kind, names = kind_of(obj), names_of(obj)
                assert kind is not None
                self.names[kind] |= names
                for name in sorted(names - {*LISTED[kind].derived}):
                    if kind not in _BY_CLASS or (type(obj), name) not in tried:
                        tried.add((type(obj), name))
                        self.change(title, make, n, kind, name)
        return self

    def change(self, title: str, make: Callable[[], Any], n: int, kind: type, name: str) -> None:
        """Change an attribute of the object with this number, to all its other values."""
        for number, _ in enumerate(others(nth_of(make(), n), name)):
            with mock.patch.object(verifying, "active", False):
                said(make())  # its plan is lost where a field has learnt something meanwhile
            query = make()
            obj = nth_of(query, n)
            value = others(obj, name)[number]
            with changed(obj, name, value):
                try:
                    # That nobody has done anything to a query is in the key, too.
                    if said(query) != "hit" and title != "all":
                        self.different[kind].add(name)
                except Exception as error:
                    self.wrong.append(f"{title}: {type(obj)}.{name} = {value!r}: {error}")


def said(query: Any) -> str:
    """What the cache says to a query: "new", "hit" or "unfit"."""
    wrapper = switch.native_wrapper("default")
    write = isinstance(query, UpdateQuery | DeleteQuery)
    compile = compile_write if write else compile_tuples
    before = statements.statement_cache_stats()["hits"]
    if statements.plan_for(query, wrapper, compile) is None:
        return "unfit"
    return "hit" if statements.statement_cache_stats()["hits"] > before else "new"


@contextmanager
def changed(obj: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object with another value; Django shares some objects."""
    state = dict(vars(obj))
    vars(obj)[name] = value
    try:
        yield
    finally:
        vars(obj).clear()
        vars(obj).update(state)


async def test_a_change_is_in_the_key_or_makes_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verifying, "active", True)
    monkeypatch.setattr(verifying, "different", 0)
    async with asyncorm.atomic():  # without a transaction there are no locks
        made = await asyncorm.native(Changes().make)()
    assert made.wrong == []
    known = shapes.LOOKUPS | shapes.NULLS | shapes._YEARS | {Exists}
    assert known | expressions._EXPRESSIONS <= made.classes
    for kind, listed in LISTED.items():
        keyed = set(listed.keyed.split())
        new = made.names[kind] - keyed - {*listed.harmless, *listed.derived}
        assert not new, f"Look at these attributes of {kind.__name__}: are they in the key? {new}"
        assert keyed & made.names[kind] <= made.different[kind]
        assert not made.different[kind] & {*listed.harmless}


CHAINS: dict[str, Callable[[Any], Any]] = {
    "new": lambda books: books.all(),
    "filtered": lambda books: books.filter(pk__gt=1, in_print=True).order_by("title"),
    "joined": lambda books: books.filter(publisher__name="x").select_related("publisher"),
    "sliced": lambda books: books.exclude(pages=1).order_by("pk").only("title")[1:4],
    "values": lambda books: books.filter(pk__in=[1, 2]).values("title"),
}


@pytest.mark.parametrize("title", CHAINS)
async def test_what_is_done_to_a_recorded_query_is_done_to_djangos_or_recorded(title: str) -> None:
    build = CHAINS[title]
    for _ in range(6):  # each time one more call is recorded
        build(models.QuerySet(Book))

    def both() -> tuple[Any, Any]:
        recorded = build(models.QuerySet(Book)).query
        assert type(recorded) is Recorded
        return recorded, build(models.QuerySet(Book, Query(Book))).query

    names = {*dir(Query), *vars(both()[1])}
    for name in sorted(each for each in names if not each.startswith("__")):
        query, djangos = both()
        if not callable(value := outcome(getattr, djangos, name)):
            found = outcome(getattr, query, name)
            assert found == value or shown(found) == shown(value), name
        for number, _ in enumerate(others(djangos, name) if name in vars(djangos) else ()):
            query, djangos = both()
            node, value = query.chain_node, others(djangos, name)[number]
            setattr(query, name, value)
            setattr(djangos, name, value)
            assert type(query) is not Recorded or query.chain_node is not node, name
            query.where  # noqa: B018 (makes it one of Django's)
            verifying.compare_queries(query, djangos)


def shown(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
