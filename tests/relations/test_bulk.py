"""bulk_create() made column by column leaves what Django's leaves: rows, objects and errors."""

import asyncio
import contextlib
import datetime as dt
import enum
import functools
import json
import uuid
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import django
import pytest
from django.apps import apps
from django.core.serializers.json import DjangoJSONEncoder
from django.db import IntegrityError, connection, models, transaction
from django.db.models import F, Value
from django.db.models.functions import Upper
from django.test.utils import CaptureQueriesContext, override_settings
from django.utils.functional import lazystr

import asyncorm
from asyncorm import driver
from tests.compare import differences
from tests.project.shop.models import Category, Country, Note, Tag
from tests.support import all_given_back
from tests.ways import outcome

pytestmark = pytest.mark.usefixtures("shop_data")


class Spaced(json.JSONEncoder):
    """Not the separators of the module json, and more types."""

    item_separator = ",   "

    def default(self, value: Any) -> Any:
        return str(value)


class Loud(json.JSONEncoder):
    def encode(self, value: Any) -> str:
        return super().encode({"said": value})


class Doubled(models.IntegerField):
    def get_db_prep_save(self, value: Any, connection: Any) -> Any:
        return super().get_db_prep_save(value and value * 2, connection)


class Marked(models.CharField):
    def pre_save(self, instance: Any, add: bool) -> Any:
        instance.marked = f"{getattr(instance, self.attname)}!"
        return instance.marked


@pytest.fixture(scope="module")
def all_kinds(django_db_setup: Any, django_db_blocker: Any) -> Iterator[Any]:
    """A model with every field that is made by column, and some that are not."""

    class Kinds(models.Model):
        boolean = models.BooleanField(null=True)
        integer = models.IntegerField(null=True)
        small = models.PositiveSmallIntegerField(null=True)
        big = models.BigIntegerField(null=True)
        real = models.FloatField(null=True)
        number = models.DecimalField(null=True, max_digits=8, decimal_places=3)
        name = models.CharField(null=True, max_length=30)
        text = models.TextField(null=True)
        mail = models.EmailField(null=True)
        day = models.DateField(null=True)
        at = models.DateTimeField(null=True)
        clock = models.TimeField(null=True)
        lasts = models.DurationField(null=True)
        uuid = models.UUIDField(null=True)
        data = models.JSONField(null=True)
        more = models.JSONField(null=True, encoder=DjangoJSONEncoder)
        spaced = models.JSONField(null=True, encoder=Spaced)
        loud = models.JSONField(null=True, encoder=Loud)
        address = models.GenericIPAddressField(null=True)
        doubled = Doubled(null=True)
        tag = models.ForeignKey(Tag, models.CASCADE, null=True, db_constraint=False)
        country = models.ForeignKey(Country, models.CASCADE, null=True, db_constraint=False)
        word = models.CharField(max_length=9, db_default="made up")

        class Meta:
            app_label = "shop"

    yield from _with_table(Kinds, django_db_blocker)


@pytest.fixture(scope="module")
def timed(django_db_setup: Any, django_db_blocker: Any) -> Iterator[Any]:
    class Timed(models.Model):
        name = models.CharField(max_length=30)
        added = models.DateTimeField(auto_now_add=True)
        changed = models.DateField(auto_now=True)

        class Meta:
            app_label = "shop"

    yield from _with_table(Timed, django_db_blocker)


@pytest.fixture(scope="module")
def marked(django_db_setup: Any, django_db_blocker: Any) -> Iterator[Any]:
    class Marks(models.Model):
        name = Marked(max_length=30)

        class Meta:
            app_label = "shop"

    yield from _with_table(Marks, django_db_blocker)


def _with_table(model: Any, django_db_blocker: Any) -> Iterator[Any]:
    with django_db_blocker.unblock():
        with connection.schema_editor() as editor:
            editor.create_model(model)
        try:
            yield model
        finally:
            with connection.schema_editor() as editor:
                editor.delete_model(model)
            del apps.all_models["shop"][model._meta.model_name]
            apps.clear_cache()


class Mood(models.TextChoices):
    GOOD = "good"


class Level(enum.IntEnum):
    HIGH = 7


UTC = dt.UTC
BERLIN = ZoneInfo("Europe/Berlin")
LMT = dt.timezone(dt.timedelta(minutes=53, seconds=28))
TEXTS = [
    "", " ", "\\", '"', "'", ",", "{}", "NULL", "null", "a\tb\nc\rd", "\b\f\v", "%s", "$1", "Ü☃𐍈",
    ",x", 'x"', "\\N", "\\.", "None", "\x01",
]  # fmt: skip
VALUES: dict[str, list[Any]] = {
    "boolean": [True, False, None, 1, "t"],
    "integer": [0, -1, 2**31 - 1, -(2**31), None, True, "12", 3.9, Level.HIGH, lazystr("5")],
    "small": [0, 32767, None],
    "big": [2**63 - 1, -(2**63), None],
    "real": [0.0, -0.0, 0.1 + 0.2, 1e-300, 5e-324, float("inf"), float("-inf"), None, 3, "1.5"],
    "number": [Decimal("12.30"), Decimal("1E+4"), Decimal("-0.0006"), None, 1.5, "2.25", 7],
    "name": [*TEXTS, None, 5, Mood.GOOD, lazystr("lazy"), b"bytes"],
    "text": [*TEXTS, None, "x" * 5000],
    "mail": ["a@b.c", None],
    "day": [dt.date(1, 1, 1), dt.date(9999, 12, 31), None, "2024-02-29", dt.datetime(2024, 5, 6)],
    "at": [
        dt.datetime(2024, 5, 6, 7, 8, 9, 123456, UTC), dt.datetime(2024, 7, 1, tzinfo=BERLIN),
        dt.datetime(1900, 1, 1, tzinfo=LMT), dt.datetime(9999, 12, 31, 23, 59, tzinfo=UTC), None,
        dt.datetime(1, 1, 1, tzinfo=UTC), dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN),
        dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN), dt.datetime.max.replace(tzinfo=UTC),
        dt.datetime(1999, 12, 31, 23, 59, 59, 999999, UTC), "2024-02-29T01:02:03Z",
    ],
    "clock": [dt.time(1, 2, 3, 4), dt.time.max, None, "12:30"],
    "lasts": [dt.timedelta(days=-40, microseconds=1), dt.timedelta(0), None],
    "uuid": [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), None, "0" * 31 + "7"],
    "data": [
        {}, [], "", 'q"u\\o', 0, 1.5, True, False, None, {"a": [1, {"b": None}], "ü": TEXTS},
        2**80, ["a", ", ", "b"], Value(None, models.JSONField()),
    ],
    "more": [{"at": dt.datetime(2024, 5, 6, tzinfo=UTC)}, [Decimal("1.50")], None],
    "spaced": [{"a": 1, "b": Decimal(2)}, [[1, 2], [3]], None],
    "loud": [{"a": 1}, None],
    "address": ["10.0.0.1", "2001:db8::1", None],
    "doubled": [4, 0, None],
    "tag": [Tag(pk=3), Tag(pk=2**40), None],
    "country": [Country(code="fr"), None],
}  # fmt: skip


WRONG: dict[str, Any] = {
    "integer": 2**31, "small": -1, "big": 2**63, "number": Decimal("NaN"), "name": "x" * 31,
    "text": "a\0b", "mail": "\ud800", "day": "no date",
    "real": "x", "at": dt.date(2024, 1, 1), "uuid": "no uuid", "data": {"a": object()},
    "more": "\0", "boolean": "maybe", "word": None, "address": "1.2.3",
}  # fmt: skip


def kinds(model: Any) -> list[Any]:
    objs = [model(**{name: value}) for name, values in VALUES.items() for value in values]
    most = max(map(len, VALUES.values()))
    rows = [{k: v[n % len(v)] for k, v in VALUES.items() if k != "data"} for n in range(most)]
    return [*objs, *(model(**row) for row in rows)]


def rows_of(model: Any) -> list[Any]:
    """What is in the table, as PostgreSQL writes it, keys apart."""
    table = model._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT (to_jsonb(t) - %s)::text FROM "{table}" t ORDER BY id', ["id"])
        return cursor.fetchall()


def created(model: Any, make: Callable[[], list[Any]], **options: Any) -> Any:
    """Create objects; them, the objects returned and the rows of the table. Nothing remains."""
    table = model._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f'TRUNCATE "{table}" RESTART IDENTITY')
    objs = make()
    try:
        returned = model._base_manager.bulk_create(objs, **options)
        return returned, returned is objs, objs, rows_of(model)
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f'TRUNCATE "{table}" RESTART IDENTITY')


def same(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Compare Django's synchronous way and the native one; what the first gave."""
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        expected = outcome(functools.partial(created, *args, **options))
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        actual = outcome(run, asyncorm.native(created)(*args, **options))
    assert differences(expected, actual) == []
    assert {str(w.message) for w in theirs} == {str(w.message) for w in ours}
    return expected


@pytest.mark.parametrize("name", VALUES)
def test_every_kind_of_value_one_by_one(run: Any, all_kinds: Any, name: str) -> None:
    given = [{name: value, "word": "w"} for value in [None, None, *VALUES[name]]]

    def save() -> list[Any]:
        objs = [all_kinds(**each) for each in given]
        with transaction.atomic():
            for obj in objs:
                obj.save()
            rows = rows_of(all_kinds)
            for obj in objs:
                obj.save()
            assert rows_of(all_kinds) == rows
            transaction.set_rollback(True)
        return [rows, [{**vars(obj), "id": None} for obj in objs]]

    expected = outcome(save)
    assert isinstance(expected, list)
    hits = asyncorm.statement_cache_stats()["hits"]
    assert differences(expected, outcome(run, asyncorm.native(save)())) == []
    assert asyncorm.statement_cache_stats()["hits"] > hits + 2


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_one_by_one(run: Any, all_kinds: Any, name: str) -> None:
    def save() -> None:
        with transaction.atomic():
            for _ in range(2):
                all_kinds(word="w").save()
            all_kinds(**{"word": "w", name: WRONG[name]}).save()

    def change() -> None:
        with transaction.atomic():
            obj = all_kinds.objects.create(word="w")
            obj.save()
            setattr(obj, name, WRONG[name])
            obj.save()

    for write in (save, change):
        expected, actual = outcome(write), outcome(run, asyncorm.native(write)())
        assert type(actual) is type(expected) and isinstance(actual, Exception)
        assert str(actual).partition("\n")[0] == str(expected).partition("\n")[0]


def by_column() -> int:
    stats = asyncorm.statement_cache_stats()
    return stats["hits"] + stats["misses"]


@pytest.mark.parametrize("name", VALUES)
def test_every_kind_of_value(run: Any, all_kinds: Any, name: str) -> None:
    one_by_one = [value for value in VALUES[name] if not hasattr(value, "resolve_expression")]
    expected = same(run, all_kinds, lambda: [all_kinds(**{name: value}) for value in VALUES[name]])
    assert len(expected[-1]) == len(VALUES[name])
    before = by_column()
    # Those of one type, so that nothing has to be prepared.
    for cls in {type(value) for value in one_by_one if value is not None}:
        some = [value for value in one_by_one if type(value) is cls]
        for given in (some, [*some, None], [None, None]):
            objs = [{name: value, "word": "w"} for value in given]
            expected = same(run, all_kinds, lambda objs=objs: [all_kinds(**obj) for obj in objs])
            assert len(expected[-1]) == len(given) or len(given) == 1
    assert by_column() > before


def test_all_of_them_at_once(run: Any, all_kinds: Any) -> None:
    make = functools.partial(kinds, all_kinds)
    assert len(same(run, all_kinds, make)[-1]) > 150
    same(run, all_kinds, make, batch_size=7)
    with override_settings(USE_TZ=False):
        same(run, all_kinds, make)


def many(model: Any) -> list[Any]:
    return [model(integer=n, name=f"n {n}", word="w") for n in range(2500)]


def test_more_than_a_slice(run: Any, all_kinds: Any) -> None:
    expected = same(run, all_kinds, lambda: many(all_kinds))
    assert [json.loads(row)["integer"] for (row,) in expected[-1]] == list(range(2500))


# Django 5.2.0 cuts what is too long, silently.
CUTS = django.VERSION < (5, 2, 1)


@pytest.mark.parametrize("name", [name for name in WRONG if not (CUTS and name == "name")])
def test_what_is_refused(run: Any, all_kinds: Any, name: str) -> None:
    def make() -> list[Any]:
        good = {"word": "w"}
        return [all_kinds(**good), all_kinds(**{**good, name: WRONG[name]})]

    expected = outcome(created, all_kinds, make)
    actual = outcome(run, asyncorm.native(created)(all_kinds, make))
    assert type(actual) is type(expected) and isinstance(actual, Exception)
    # What follows says where it was, in the SQL or in a parameter.
    assert str(actual).partition("\n")[0] == str(expected).partition("\n")[0]


def test_a_time_with_a_zone(run: Any, all_kinds: Any) -> None:
    for clock in (None, dt.time(2)):
        same(run, all_kinds, lambda clock=clock: [all_kinds(clock=c) for c in (ZONED, clock)])


ZONED = dt.time(1, tzinfo=UTC)


def test_naive_times_are_warned_of(run: Any, all_kinds: Any) -> None:
    naive = dt.datetime(2024, 5, 6, 7)
    with override_settings(TIME_ZONE="Asia/Tokyo"):
        same(run, all_kinds, lambda: [all_kinds(word="w", at=at) for at in (naive, None, naive)])


@pytest.mark.parametrize("value", [F("text"), Upper(Value("x")), Value("y")])
def test_expressions(run: Any, all_kinds: Any, value: Any) -> None:
    same(run, all_kinds, lambda: [all_kinds(name=value), all_kinds(name="z")])


def test_keys_given_and_not_given(run: Any, all_kinds: Any) -> None:
    keys = [None, 7, None, 8]
    same(run, all_kinds, lambda: [all_kinds(pk=key, word="w") for key in keys])
    same(run, all_kinds, lambda: [all_kinds(pk=key, word="w") for key in (5, 6)])
    same(run, all_kinds, lambda: [all_kinds(pk=key, word="w") for key in (5, 5)])
    same(run, all_kinds, lambda: [all_kinds(pk=[key], word="w") for key in (5, 5)])
    same(run, all_kinds, lambda: (all_kinds(word="w"), all_kinds(word="w")))
    same(run, all_kinds, lambda: [all_kinds(word="w"), Tag(name="another model")])
    same(run, all_kinds, list)
    for size in (1, 2, None):  # before 6.1 Django leaves the keys as they were given
        same(run, all_kinds, lambda: [all_kinds(pk=k, word="w") for k in "567"], batch_size=size)


def test_times_that_are_set(run: Any, timed: Any) -> None:
    def create() -> Any:
        objs = [timed(name=f"t {n}") for n in range(1500)]
        with transaction.atomic():
            timed.objects.bulk_create(objs)
            there = list(timed.objects.order_by("pk"))
            transaction.set_rollback(True)
        return objs, there

    for _ in range(2):
        objs, there = run(asyncorm.native(create)())
        assert [(o.pk, o.added, o.changed) for o in objs] == [
            (o.pk, o.added, o.changed) for o in there
        ]
        assert len({obj.added for obj in objs}) > 100


def test_a_field_with_a_pre_save_of_its_own(run: Any, marked: Any) -> None:
    objs, rows = same(run, marked, lambda: [marked(name="a"), marked(name="b")])[2:]
    assert [obj.marked for obj in objs] == ["a!", "b!"] and "a!" in rows[0][0]


def test_subclasses_that_prepare_otherwise(run: Any, all_kinds: Any) -> None:
    class Proxy(all_kinds):  # type: ignore[misc]
        class Meta:
            proxy = True
            app_label = "shop"

        def _prepare_related_fields_for_save(self, *args: Any, **kwargs: Any) -> None:
            self.name = "prepared"

    try:
        rows = same(run, Proxy, lambda: [Proxy(word="w"), Proxy(word="w")])[-1]
        assert all("prepared" in row for (row,) in rows)
    finally:
        del apps.all_models["shop"]["proxy"]
        apps.clear_cache()


def rolled_back(make: Callable[[], list[Any]]) -> Any:
    objs = make()
    with transaction.atomic():
        try:
            type(objs[0]).objects.bulk_create(objs)
        finally:
            transaction.set_rollback(True)
    for obj in objs:
        obj.pk = None  # sequences go on
    return objs


def related() -> list[Any]:
    parent = Category.objects.get(pk=1)
    later = Category(name="later")
    found = [Category(name="a", parent=parent), Category(name="b"), Category(name="c")]
    found[1].parent_id = 2
    found[2].parent = later
    later.pk = 3
    return found


def test_related_instances(run: Any) -> None:
    for make in (
        related,
        lambda: [Category(name="a", parent=Category(name="unsaved")) for _ in range(2)],
        lambda: [Note(text="t", target=Tag.objects.get(pk=1)) for _ in range(2)],
        lambda: [Note(text="t", target=Tag(name="unsaved")) for _ in range(2)],
        lambda: [Tag(name="a"), Tag(name="b")],
    ):
        expected = outcome(rolled_back, make)
        actual = outcome(run, asyncorm.native(rolled_back)(make))
        assert differences(expected, actual) == []


def test_statements_are_djangos(run: Any, all_kinds: Any) -> None:
    def statements(objs: int, **options: Any) -> list[str]:
        with CaptureQueriesContext(connection) as seen:
            created(all_kinds, lambda: [all_kinds(word="w") for _ in range(objs)], **options)
        return [query["sql"] for query in seen]

    for options in ({}, {"batch_size": 2}):
        expected = statements(5, **options)
        assert run(asyncorm.native(statements)(5, **options)) == expected
        assert any("UNNEST" in sql for sql in expected)


async def test_an_error_inside_a_block(all_kinds: Any) -> None:
    with contextlib.suppress(Undone):
        async with asyncorm.atomic():
            with pytest.raises(IntegrityError):
                async with asyncorm.atomic():
                    await all_kinds.objects.native_bulk_create(
                        [all_kinds(word="w"), all_kinds(word=None)]
                    )
            await all_kinds.objects.native_bulk_create(many(all_kinds))
            assert await all_kinds.objects.native_count() == 2500
            raise Undone
    assert await all_kinds.objects.native_count() == 0


class Undone(Exception):
    pass


async def test_a_cancelled_one_leaves_nothing(all_kinds: Any) -> None:
    for delay in (0.001, 0.005, 0.01, 0.02):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                async with asyncorm.atomic():
                    await all_kinds.objects.native_bulk_create(many(all_kinds))
                    await asyncio.sleep(1)
        assert await all_kinds.objects.native_count() == 0
    await all_given_back()


@pytest.fixture
def statements(all_kinds: Any) -> Iterator[Callable[[], int]]:
    """How many statements have inserted rows."""
    table = all_kinds._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE SEQUENCE statements; CREATE FUNCTION count_statement() RETURNS trigger"
            " LANGUAGE plpgsql AS $$ BEGIN PERFORM nextval('statements'); RETURN NULL; END $$;"
            f" CREATE TRIGGER counted AFTER INSERT ON {table} EXECUTE FUNCTION count_statement()"
        )

    def count() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT nextval('statements') - 1")
            (found,) = cursor.fetchone()
            cursor.execute("SELECT setval('statements', 1, false)")
            return int(found)

    yield count
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TRIGGER counted ON {table}; DROP FUNCTION count_statement()")
        cursor.execute("DROP SEQUENCE statements")


def test_how_many_statements(run: Any, all_kinds: Any, statements: Callable[[], int]) -> None:
    for options, expected in (
        ({}, 3),
        ({"batch_size": 600}, 5),
        ({"batch_size": 2500}, 1),
        ({"batch_size": 2499}, 2),
    ):
        run(asyncorm.native(created)(all_kinds, lambda: many(all_kinds), **options))
        assert statements() == expected


@pytest.mark.parametrize("at", [5, 1500, 2400])
@pytest.mark.parametrize(
    "wrong", [{"word": None}, {"integer": "x"}, {"small": -1}, {"data": object()}]
)
def test_one_of_many_is_refused(run: Any, all_kinds: Any, at: int, wrong: dict[str, Any]) -> None:
    made: list[Any] = []

    def make() -> list[Any]:
        made[:] = many(all_kinds)
        for name, value in wrong.items():
            setattr(made[at], name, value)
        return made

    def insert() -> Any:
        error = outcome(all_kinds._base_manager.bulk_create, make())
        return type(error), str(error).partition("\n")[0], rows_of(all_kinds), made

    expected = outcome(insert)
    assert expected[2] == [] and {obj.pk for obj in made} == {None}
    assert differences(expected, outcome(run, asyncorm.native(insert)())) == []


@pytest.mark.parametrize("at", [5, 1500, 2400])
def test_an_expression_among_many(run: Any, all_kinds: Any, at: int) -> None:
    def make() -> list[Any]:
        made = many(all_kinds)
        made[at].name = Upper(Value("up"))
        return made

    rows = same(run, all_kinds, make)[-1]
    assert json.loads(rows[at][0])["name"] == "UP" and len(rows) == 2500


async def test_cancelled_outside_a_block(all_kinds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_BUSY", 0.0)  # it can be cancelled wherever it may give turns
    await all_kinds.objects.native_bulk_create(many(all_kinds))
    await all_kinds.objects.all().native_delete()
    lost = asyncorm.pool_stats().get("connections_lost", 0)
    found = []
    for turns in range(50):
        task = asyncio.create_task(all_kinds.objects.native_bulk_create(many(all_kinds)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        found.append(await all_kinds.objects.native_count())
        await all_kinds.objects.all().native_delete()
    assert set(found) <= {0, 2500}  # all of them if it was cancelled in its COMMIT
    assert found.count(0) > 5
    assert (await all_given_back()).get("connections_lost", 0) == lost


async def test_other_tasks_get_their_turn(all_kinds: Any) -> None:
    turns = 0

    async def watch() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    objs = [all_kinds(name=f"n {n}", data={"n": n}, word="w") for n in range(10_000)]
    with contextlib.suppress(Undone):
        async with asyncorm.atomic():
            await all_kinds.objects.native_bulk_create(objs[:2])
            watcher = asyncio.create_task(watch())
            await all_kinds.objects.native_bulk_create(objs[2:])
            watcher.cancel()
            raise Undone
    assert turns > 5
