"""What others put into Django's classes, or override, is honoured at once and no longer than that.

Each hook is there when a statement is used first, or later, or is taken away again: what comes is
what Django gives synchronously.
"""

import contextvars
import itertools
import json
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import psycopg
import pytest
from django import VERSION as DJANGO
from django.db import connection, connections, models, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper as PostgreSQL
from django.db.backends.postgresql.features import DatabaseFeatures
from django.db.backends.postgresql.operations import DatabaseOperations
from django.db.models import Aggregate, Count, Expression, F, Func, Q, QuerySet, Value, query
from django.db.models.base import ModelBase
from django.db.models.expressions import Col, OrderBy
from django.db.models.fields.related import ForeignObject
from django.db.models.fields.related_descriptors import ForeignKeyDeferredAttribute
from django.db.models.fields.reverse_related import ForeignObjectRel
from django.db.models.functions import Cast
from django.db.models.lookups import Exact, IsNull
from django.db.models.signals import post_init, post_save, pre_init, pre_save
from django.db.models.sql import compiler
from django.db.models.sql.query import Query
from django.test import SimpleTestCase
from django.test.utils import isolate_apps, register_lookup
from django.utils.functional import cached_property

import asyncorm
from asyncorm import grounds, planned, statements
from asyncorm._cache import looks
from tests.compare import differences
from tests.project.shop.models import Author, Book, Person, Publisher, Tag
from tests.support import in_thread
from tests.ways import outcome

pytestmark = pytest.mark.usefixtures("shop_data")


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    statements.clear()
    yield
    statements.clear()


class Lower(Exact):
    def as_sql(self, compiler: Any, connection: Any) -> Any:
        left, params = self.process_lhs(compiler, connection)
        right, more = self.process_rhs(compiler, connection)
        return f"lower({left}) = lower({right})", (*params, *more)


def read() -> Any:
    return [
        Tag.objects.get(pk=1).name,
        Tag.objects.filter(pk__in=[1, 2]).order_by("pk").values_list("name", flat=True)[1],
        [tag.name for tag in Tag.objects.filter(pk__lt=4).order_by("pk")],
        Tag.objects.filter(name="C").count(),
        Tag.objects.filter(name__startswith="c").exists(),
        Tag.objects.aggregate(n=Count("pk")),
    ]


def counted() -> Any:
    return [
        Tag.objects.count(),
        Tag.objects.values("name").distinct().count(),
        Tag.objects.aggregate(n=Count("name")),
        list(Tag.objects.annotate(n=Count("books")).order_by("pk").values_list("n", flat=True)),
    ]


def named() -> Any:
    return [tag.name for tag in Tag.objects.order_by("-pk")]


def lower_get() -> Any:
    return Tag.objects.get(name=Tag.objects.filter(pk=1).first().name.swapcase()).pk


def prefetch() -> Any:
    publishers = Publisher.objects.order_by("pk").prefetch_related("books")
    books = Book.objects.order_by("pk").prefetch_related("publisher", "tags")
    return [
        [[book.title for book in each.books.all()] for each in publishers],
        [(book.publisher and book.publisher.name, len(book.tags.all())) for book in books],
    ]


seen: list[Any] = []


def write() -> Any:
    seen.clear()
    tag = Tag.objects.create(name="hooked")
    tag.name = "again"
    tag.save()
    Tag.objects.filter(pk=tag.pk).update(name="more")
    tag.delete()
    Tag.objects.bulk_create([Tag(name="b1"), Tag(name="b2")])
    Tag.objects.filter(name__in=["b1", "b2"]).delete()
    return list(seen)


def noting(owner: Any, name: str) -> Any:
    """A patch that notes that the original is called."""
    original = getattr(owner, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return original(*args, **kwargs)

    return mock.patch.object(owner, name, function)


def changed(owner: Any, name: str, function: Any) -> Any:
    return lambda: mock.patch.object(owner, name, function, create=True)


def other_table() -> Any:
    return mock.patch.object(Tag._meta, "db_table", "shop_publisher")


def column(**names: str) -> Any:
    return mock.patch.multiple(Tag._meta.get_field("name"), **names)


_from_db = models.Model.from_db.__func__  # type: ignore[attr-defined]
_filter, _as_sql = QuerySet.filter, compiler.SQLCompiler.as_sql
_clone: Any = QuerySet._clone  # type: ignore[attr-defined]


def _emptied(queryset: Any) -> Any:
    queryset.query.set_empty()
    return queryset


_set = ForeignKeyDeferredAttribute.__set__
_count, _init = Query.get_count, models.Model.__init__
_q, _lookup = Q.__init__, models.Lookup.__init__


def from_db(cls: Any, *args: Any) -> Any:
    obj = _from_db(cls, *args)
    obj.name = f"patched {obj.name}"
    return obj


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    self.name = "by __init__"


def init_of_book(self: Any, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    self.title = "by __init__"


def as_sql(self: Any, *args: Any, **kwargs: Any) -> Any:
    sql, params = _as_sql(self, *args, **kwargs)
    return sql.replace('"shop_tag"."name"', 'upper("shop_tag"."name")', 1), params


def init_of_q(self: Any, *args: Any, **kwargs: Any) -> None:
    _q(self, *args, **{name: 3 if name == "pk" else value for name, value in kwargs.items()})


def init_of_lookup(self: Any, lhs: Any, rhs: Any) -> None:
    _lookup(self, lhs, [rhs[0]] if isinstance(rhs, list) else rhs)


def by_pk() -> Any:
    publishers = list(Publisher.objects.order_by("id").prefetch_related("books"))
    return [(each.pk, [book.title for book in each.books.all()]) for each in publishers]


class Constant(json.JSONDecoder):
    def decode(self, *args: Any) -> Any:
        return "decoded"


def patched(self: Any, value: Any, *args: Any) -> Any:
    return f"patched {value}"


HOOKS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "from_db_value of a class": (changed(models.CharField, "from_db_value", patched), read),
    "from_db_value of a field": (
        changed(Tag._meta.get_field("name"), "from_db_value", lambda v, e, c: f"f {v}"), read,
    ),
    "get_prep_value": (changed(models.CharField, "get_prep_value", lambda s, v: "classic"), read),
    "get_lookup": (changed(models.CharField, "get_lookup", lambda s, n: Lower), lower_get),
    "register_lookup": (lambda: register_lookup(models.CharField, Lower), lower_get),
    "register_lookup on a field": (
        lambda: register_lookup(Tag._meta.get_field("name"), Lower), lower_get,
    ),
    "select_format": (
        changed(models.CharField, "select_format", lambda s, c, sql, p: (f"upper({sql})", p)), read,
    ),
    "from_db": (changed(Tag, "from_db", classmethod(from_db)), read),
    "from_db of Model": (changed(models.Model, "from_db", classmethod(from_db)), read),
    "__init__": (changed(Tag, "__init__", init), read),
    "__init__ of Model": (changed(models.Model, "__init__", init), read),
    "__init__, prefetched": (changed(Book, "__init__", init_of_book), prefetch),
    "_clone": (changed(QuerySet, "_clone", lambda s: _emptied(_clone(s))), read),
    "filter": (
        changed(QuerySet, "filter", lambda s, *a, **k: _filter(s, *a, **k).none()), read,
    ),
    "as_sql": (changed(compiler.SQLCompiler, "as_sql", as_sql), read),
    "as_sql of a lookup": (changed(Exact, "as_sql", Lower.as_sql), lower_get),
    "as_sql of a column": (
        changed(Col, "as_sql", lambda s, c, x: ("'column'", [])),
        lambda: Tag.objects.values_list("name", flat=True)[0],
    ),
    **{
        f"{name} of {cls.__name__}": (changed(cls, name, function), counted)
        for cls in (Expression, Func, Aggregate, Count)
        for name, function in (
            ("as_postgresql", lambda s, c, x: ("42", [])),
            ("get_db_converters", lambda s, x: [lambda value, e, c: 42]),
            ("template", "(42 + COUNT(*))"),
        )
        if name != "template" or cls is Count
    },
    "as_sql of an aggregate": (changed(Aggregate, "as_sql", lambda s, *a: ("42", [])), counted),
    "as_sql of ORDER BY": (changed(OrderBy, "as_sql", lambda s, *a: ("name", [])), named),
    "resolve_expression": (changed(F, "resolve_expression", lambda s, *a, **k: Value(42)), counted),
    "get_count": (changed(Query, "get_count", lambda s, using: 100 + _count(s, using)), read),
    "db_table": (other_table, lambda: Tag.objects.count()),
    "concrete_model": (
        lambda: mock.patch.object(Person._meta, "concrete_model", Author),
        lambda: [author.name for author in Author.objects.order_by("pk")],
    ),
    "proxy": (
        lambda: mock.patch.multiple(Tag._meta, proxy=True, concrete_model=Publisher),
        lambda: [Tag(pk=1, name="classic").save(), Tag(pk=1, name="classic").save()],
    ),
    "managed": (lambda: mock.patch.object(Tag._meta, "managed", False), read),
    "column": (lambda: column(column="id"), lambda: Tag.objects.values_list("name").first()),
    "decoder": (
        lambda: mock.patch.object(Book._meta.get_field("data"), "decoder", Constant),
        lambda: [Book.objects.get(pk=1).data, Book.objects.values_list("data").order_by("pk")[0]],
    ),
    "an iterable": (
        changed(query.ModelIterable, "__iter__", lambda s: iter([Tag(name="x")])), named,
    ),
    "a manager": (
        changed(models.Manager, "get_queryset", lambda s: QuerySet(s.model)[:1]), prefetch,
    ),
    **{
        f"execute_sql of {cls.__name__}": (lambda cls=cls: noting(cls, "execute_sql"), write)
        for cls in (
            compiler.SQLInsertCompiler, compiler.SQLUpdateCompiler, compiler.SQLDeleteCompiler,
        )
    },
    "_insert": (lambda: noting(QuerySet, "_insert"), write),
    "_insert of Manager": (lambda: noting(models.Manager, "_insert"), write),
    "_prepare_cursor": (lambda: noting(BaseDatabaseWrapper, "_prepare_cursor"), write),
    "_update": (lambda: noting(QuerySet, "_update"), write),
    "pre_save": (lambda: noting(models.CharField, "pre_save"), write),
    "get_db_prep_save": (
        lambda: noting(models.CharField, "get_db_prep_save"), lambda: set(write()),
    ),
    "add_filter": (lambda: noting(Query, "add_filter"), write),
    "__init__ of Q": (changed(Q, "__init__", init_of_q), read),
    "__init__ of Lookup, prefetched": (
        changed(models.Lookup, "__init__", init_of_lookup), prefetch,
    ),
    "get_related_populators": (
        changed(query, "get_related_populators", lambda *a: []),
        lambda: [book.__dict__ for book in Book.objects.select_related("publisher")],
    ),
    "operators": (
        changed(PostgreSQL, "operators", PostgreSQL.operators | {"exact": "<> %s"}),
        lambda: Tag.objects.filter(name="C").count(),
    ),
    "data_types": (
        changed(PostgreSQL, "data_types", PostgreSQL.data_types | {"TextField": "varchar(1)"}),
        lambda: list(Tag.objects.annotate(t=Cast("name", models.TextField())).values_list("t")),
    ),
    "features": (
        changed(DatabaseFeatures, "supports_over_clause", False),
        lambda: list(Tag.objects.annotate(n=models.Window(Count("pk"))).values_list("n")),
    ),
    "operators, in place": (
        lambda: mock.patch.dict(PostgreSQL.operators, exact="<> %s"),
        lambda: Tag.objects.filter(name="C").count(),
    ),
    "data_types, in place": (
        lambda: mock.patch.dict(PostgreSQL.data_types, TextField="varchar(1)"),
        lambda: list(Tag.objects.annotate(t=Cast("name", models.TextField())).values_list("t")),
    ),
    "__set__ of a foreign key": (
        changed(ForeignKeyDeferredAttribute, "__set__", lambda s, obj, v: _set(s, obj, None)),
        lambda: [book.publisher_id for book in Book.objects.order_by("pk")],
    ),
    "get_local_related_value": (
        changed(ForeignObject, "get_local_related_value", lambda s, obj: (1,)), prefetch,
    ),
    "get_foreign_related_value": (
        changed(ForeignObject, "get_foreign_related_value", lambda s, obj: (1,)), prefetch,
    ),
    "fetchmany": (changed(psycopg.Cursor, "fetchmany", lambda s, size=0: []), read),
    "populate": (
        changed(query.RelatedPopulator, "populate", lambda s, row, obj: None),
        lambda: [
            "publisher" in book._state.fields_cache
            for book in Book.objects.select_related("publisher")
        ],
    ),
    "get_extra_restriction": (
        changed(
            ForeignObjectRel, "get_extra_restriction",
            lambda s, alias, related: IsNull(Book.tags.through._meta.pk.get_col(alias), True),
        ),
        lambda: [book.pk for book in Tag(pk=1).books.order_by("pk")],
    ),
    "pk": (changed(Publisher, "pk", property(lambda self: 7 - self.id)), by_pk),
}  # fmt: skip


@pytest.mark.parametrize("name", HOOKS)
async def test_a_hook(name: str) -> None:
    hook, function = HOOKS[name]
    plain = await in_thread(outcome, function)
    with hook():
        hooked = await in_thread(outcome, function)
    if name != "managed":
        assert differences(plain, hooked) != []
    native = asyncorm.native(outcome)
    for _ in range(2):
        with hook():
            for _ in range(2):  # there first, and used again
                assert differences(hooked, await native(function)) == []
        for _ in range(2):  # taken away
            assert differences(plain, await native(function)) == []
    before = statements.counts["hits"]
    await native(function)
    assert statements.counts["hits"] > before
    statements.clear()
    for _ in range(2):
        assert differences(plain, await native(function)) == []
    with hook():  # there later
        assert differences(hooked, await native(function)) == []


def of_wrapper(name: str, value: Any) -> Any:
    """A patch of the connection itself, or of what it has."""
    *path, name = name.split(".")
    return mock.patch.object(
        operator.attrgetter(*path)(connection) if path else connection, name, value
    )


ON_THE_CONNECTION: dict[str, tuple[Any, Callable[[], Any]]] = {
    "operators": (PostgreSQL.operators | {"exact": "<> %s"}, lambda: HOOKS["operators"][1]()),
    "data_types": (
        PostgreSQL.data_types | {"TextField": "varchar(1)"}, lambda: HOOKS["data_types"][1](),
    ),
    "ops.quote_name": (str.upper, named),
    "create_cursor": (lambda name=None: 1 / 0, named),
    "chunked_cursor": (lambda: 1 / 0, lambda: list(Tag.objects.iterator())),
    "ops.bulk_insert_sql": (lambda fields, rows: "nothing", write),
    "features.supports_over_clause": (False, lambda: HOOKS["features"][1]()),
    "features.uses_server_side_binding": (True, read),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_CONNECTION)
async def test_what_is_put_on_the_connection_itself(name: str) -> None:
    value, function = ON_THE_CONNECTION[name]

    def hooked() -> Any:
        with of_wrapper(name, value):
            return outcome(function)

    plain, there = await in_thread(outcome, function), await in_thread(hooked)
    native = asyncorm.native(lambda call: call())
    for _ in range(2):
        assert differences(plain, await native(lambda: outcome(function))) == []
        assert differences(there, await native(hooked)) == []
    before = statements.counts["hits"]
    assert differences(plain, await native(lambda: outcome(function))) == []
    assert statements.counts["hits"] > before


async def test_what_a_backend_has_asked_once_is_not_asked_again(monkeypatch: Any) -> None:
    """As PostGIS its version: it is not taken for something that was put there."""
    asked = []
    version = cached_property(lambda ops: asked.append(ops))
    version.__set_name__(DatabaseOperations, "version")
    monkeypatch.setattr(DatabaseOperations, "version", version, raising=False)

    def read() -> int:
        before = statements.counts["hits"]
        assert connection.ops.version is None  # type: ignore[attr-defined]
        for _ in range(3):
            Tag.objects.count()
        return statements.counts["hits"] - before

    for _ in range(2):
        hits = await asyncorm.native(read)()
    assert hits == 3
    assert len(asked) == len({id(ops.connection) for ops in asked}), "once for each"


def test_what_a_test_of_djangos_leaves_on_the_connection_is_nothing() -> None:
    """It has refused the database: its own methods are put back on the connection itself."""

    class Refusing(SimpleTestCase):
        pass

    wrapper: Any = connections["default"]
    assert not wrapper.is_altered
    Refusing.setUpClass()
    assert wrapper.is_altered
    Refusing.doClassCleanups()
    assert "chunked_cursor" in vars(wrapper) and not wrapper.is_altered


async def test_what_is_put_on_the_connection_of_a_block() -> None:
    async with asyncorm.atomic():
        for _ in range(2):
            assert await Tag.objects.filter(name="C").native_count() == 0
            with of_wrapper("operators", PostgreSQL.operators | {"exact": "<> %s"}):
                assert await Tag.objects.filter(name="C").native_count() > 0


@pytest.mark.parametrize("signal", [pre_init, post_init, pre_save, post_save])
@pytest.mark.parametrize("owner", ["the signal", "Signal"])
async def test_what_stands_for_a_signal_is_called(signal: Any, owner: str) -> None:
    """As by tests that ask whether a signal is sent, without a receiver."""

    numbers = itertools.count()

    async def work() -> None:
        tag = await Tag.objects.native_create(name=f"sent {next(numbers)}")
        tag.name = f"again {next(numbers)}"
        await tag.native_save()
        await Tag.objects.native_get(pk=tag.pk)
        assert await Tag.objects.filter(pk=tag.pk).anative()

    for _ in range(2):
        await work()
    with mock.patch.object(signal if owner == "the signal" else type(signal), "send") as send:
        await work()
    times = 3 if signal in (pre_init, post_init) else 2
    assert send.call_count == (times if owner == "the signal" else 10)
    await Tag.objects.filter(name__startswith="again").native_delete()


async def test_a_transaction_that_is_replaced_is_entered() -> None:
    """As by tests that ask whether there is one."""

    async def work() -> None:
        tag, made = await Tag.objects.native_get_or_create(name="in a transaction")
        assert made
        deleted = await Tag.objects.filter(pk=tag.pk).native_delete()
        assert deleted[0] == 1

    for _ in range(3):
        await work()
    with mock.patch.object(transaction, "atomic", wraps=transaction.atomic) as atomic:
        await work()
    assert atomic.call_count == 2
    entered: list[str | None] = []

    class Atomic(transaction.Atomic):
        def __init__(self, using: str | None = None, savepoint: bool = True) -> None:
            super().__init__(using, savepoint, durable=False)

        def __enter__(self) -> None:
            entered.append(self.using)
            super().__enter__()

    with mock.patch.object(transaction, "atomic", Atomic):
        await work()
    assert len(entered) == 2


async def test_an_iterable_that_is_replaced_later() -> None:
    def tags() -> Any:
        return Tag.objects.filter(pk__lt=4).order_by("pk")

    def items(iterable: Any) -> Any:
        yield "patched"

    for _ in range(3):
        assert len(await tags().anative()) == 3
    with mock.patch.object(query.ModelIterable, "__iter__", items):
        assert await tags().anative() == ["patched"]
        assert await tags().native_first() == "patched"
    assert len(await tags().anative()) == 3


tenant = contextvars.ContextVar("tenant", default="a")


class Shown(models.CharField):
    def select_format(self, compiler: Any, sql: str, params: Any) -> Any:
        return f"{sql} || '-{tenant.get()}'", params


class CtxCol(Col):
    def as_sql(self, compiler: Any, connection: Any) -> Any:
        sql, params = super().as_sql(compiler, connection)
        return f"({sql} || '+{tenant.get()}')", params


class Decrypted(models.CharField):
    def get_col(self, alias: str, output_field: Any = None) -> Any:
        return CtxCol(alias, self, output_field or self)

    @property
    def cached_col(self) -> Any:
        return CtxCol(self.model._meta.db_table, self)


class Loose(models.CharField):
    def get_lookup(self, lookup: str) -> Any:
        return Lower if tenant.get() == "b" else super().get_lookup(lookup)


class Prefixed(models.CharField):
    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        return value if tenant.get() == "a" else f"other {value}"


@pytest.mark.parametrize("kind", [Shown, Decrypted, Loose, Prefixed])
async def test_a_field_that_makes_sql_by_what_is_around_it(kind: Any) -> None:
    with isolate_apps("tests.project.shop"):

        class Other(models.Model):
            name = kind(max_length=50)

            class Meta:
                app_label = "shop"
                managed = False
                db_table = "shop_tag"

    name = await Tag.objects.values_list("name", flat=True).native_get(pk=1)

    def read() -> Any:
        return [
            outcome(lambda: Other.objects.get(name=name.swapcase()).pk),  # type: ignore[attr-defined]
            outcome(lambda: Other.objects.get(name=name).pk),  # type: ignore[attr-defined]
            [each.name for each in Other.objects.order_by("pk")],  # type: ignore[attr-defined]
            list(Other.objects.order_by("pk").values_list("name")),  # type: ignore[attr-defined]
        ]

    for value in ("a", "b", "a", "b"):
        tenant.set(value)
        expected = await in_thread(read)
        assert differences(expected, await asyncorm.native(read)()) == []


async def test_a_metaclass_that_makes_instances() -> None:
    class Shared(ModelBase):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            obj = super().__call__(*args, **kwargs)
            return known.setdefault(obj.pk, obj)

    known: dict[Any, Any] = {}
    with isolate_apps("tests.project.shop"):

        class One(models.Model, metaclass=Shared):
            class Meta:
                app_label = "shop"
                managed = False
                db_table = "shop_tag"

    first = await One.objects.native_get(pk=1)  # type: ignore[attr-defined]
    assert await One.objects.native_get(pk=1) is first  # type: ignore[attr-defined]


def test_one_look_notices_any_change() -> None:
    for cls in (QuerySet, Query, models.Field, models.CharField, compiler.SQLCompiler, Exact, Col):
        ground = grounds.Ground([cls], [Tag])
        assert ground.holds()
        with mock.patch.object(cls, "new_name", None, create=True):
            assert not ground.holds()
        assert ground.holds()
    models.CharField()  # counts itself in its class
    assert ground.holds()


def test_helpers_of_others_do_no_harm() -> None:
    def to_table(self: Any) -> None:
        """A new name is nothing that Django would call."""

    with mock.patch.object(QuerySet, "to_table", to_table, create=True):
        assert grounds.are_sound()
    with mock.patch.object(QuerySet, "filter", to_table):
        assert not grounds.are_sound()
    assert grounds.are_sound()


def test_one_look_notices_any_change_of_a_model() -> None:
    class Mixin:
        pass

    with isolate_apps("tests.project.shop"):

        class Base(models.Model):
            class Meta:
                app_label = "shop"
                abstract = True

        class One(Mixin, Base):
            objects = models.Manager.from_queryset(type("Some", (QuerySet,), {}))()

            class Meta:
                app_label = "shop"

    some = type(One.objects.all())
    ground = grounds.Ground([some], [One])
    for cls in (One, Base, Mixin, models.Model, ModelBase, some):
        assert ground.holds()
        with mock.patch.object(cls, "new_name", None, create=True):
            assert not ground.holds()
        assert ground.holds()
    with mock.patch.object(One, "objects", None), register_lookup(models.CharField, Lower):
        assert not ground.holds()
    assert ground.holds()
    assert One.__subclasses__() == []


def test_a_model_without_a_name_to_look_at() -> None:
    with mock.patch.object(looks, "_free", []), isolate_apps("tests.project.shop"):

        class Late(models.Model):
            class Meta:
                app_label = "shop"

        ground = grounds.Ground([], [Late])
        for cls in (Late, models.Model):
            assert ground.holds()
            with mock.patch.object(cls, "new_name", None, create=True):
                assert not ground.holds()
        assert ground.holds()


def test_what_python_forgets_for_another_class_is_remembered_elsewhere() -> None:
    names = [looks.Name(f"_asyncorm_of_a_test_{number}") for number in range(2)]
    for each in names:
        setattr(looks.Last, each, None)
    with mock.patch.object(looks, "_free", names), isolate_apps("tests.project.shop"):

        class Moved(models.Model):
            class Meta:
                app_label = "shop"

        ground = grounds.Ground([], [Moved])
        look = looks._looks[Moved]
        name = look.name
        for _ in range(200):
            if look.name is not name:
                break
            name.looks += 1  # as if it had been looked for
            assert ground.holds()
        assert look.name is not name
        assert look.name.looks > name.looks


@pytest.mark.skipif(DJANGO < (6, 1), reason="Django 6.1 warns so")
def test_djangos_warnings_name_the_line_of_the_caller() -> None:
    """Through each replaced method on the way to a statement's SQL."""
    ways: dict[str, Callable[[QuerySet[Book]], Any]] = {
        "list": list,
        "first": QuerySet.first,
        "count": QuerySet.count,
        "exists": QuerySet.exists,
        "aggregate": lambda books: books.aggregate(Count("pk")),
        "update": lambda books: books.update(title="x"),
        "delete": QuerySet.delete,
    }
    for name, way in ways.items():
        with warnings.catch_warnings(record=True, action="always") as warned:
            way(Book.objects.filter(pk=0, data=None))
        assert {each.filename for each in warned} == {__file__}, name
    with mock.patch.dict(sys.modules, {"never_to_be_imported": None}):
        assert {name for _, name, _, _ in planned._skipped_in_warnings()}
