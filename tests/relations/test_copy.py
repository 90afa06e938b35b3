"""COPY: copy_to() writes what the queryset selects, bulk_create(method="copy") the same rows."""

import asyncio
import contextlib
import csv
import decimal
import io
import json
import os
import stat
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import anyio
import pytest
from asgiref.sync import sync_to_async
from django.apps import apps
from django.contrib.postgres.fields import ArrayField
from django.db import (
    DataError,
    IntegrityError,
    NotSupportedError,
    connection,
    models,
)
from django.db.backends.postgresql.psycopg_any import DateTimeTZRange, NumericRange
from django.db.models import F, JSONField, Q, Value
from django.db.models.functions import Now, Upper
from django.test import TestCase
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

import asyncorm
from asyncorm import native
from asyncorm.copying import _check_field
from tests.project.legacy.models import LegacyRecord
from tests.project.myapp.models import Item
from tests.project.shop.models import (
    Author,
    Book,
    Category,
    Event,
    Product,
    Publisher,
    Tag,
    Ticket,
)
from tests.project.shop.sample import moment
from tests.support import all_given_back, backend_pid, database, eventually

pytestmark = pytest.mark.usefixtures("shop_data")

ONE_TABLE = [
    model
    for model in apps.get_app_config("shop").get_models()
    if not model._meta.proxy and not model._meta.parents
]


class RolledBack(Exception):
    pass


@pytest.fixture
def fresh(fresh_shop: Any) -> Any:
    return fresh_shop


async def refill(model: Any, objs: list[Any], **options: Any) -> list[Any]:
    """Replace a table's rows in a transaction that is rolled back; the new rows."""
    rows: list[Any] = []
    try:
        async with asyncorm.atomic():
            await native(model._base_manager.all()._raw_delete)("default")
            await model._base_manager.native_bulk_create(objs, **options)
            rows = await model._base_manager.order_by("pk").values().anative()
            raise RolledBack
    except RolledBack:
        return rows


# bulk_create


@pytest.mark.parametrize("model", ONE_TABLE, ids=lambda model: model.__name__)
@pytest.mark.parametrize("batch_size", [None, 2])
async def test_every_table_of_the_sample(model: Any, batch_size: int | None) -> None:
    before = await model._base_manager.order_by("pk").values().anative()
    objs = await model._base_manager.order_by("pk").anative()
    assert await refill(model, objs, method="copy", batch_size=batch_size) == before


TEXTS = ["", " ", "\\", "\\N", "\\.", "a\tb", "a\nb", "a\r\nb", "\b\f\v", "'\"`", "%s", "Ünï ☃ 𐍈"]


def odd_books() -> list[Book]:
    now = moment(3)
    books = [
        Book(title=text, slug=text, price=decimal.Decimal("12.30"), data={text: [text, None]})
        for text in TEXTS
    ]
    books += [
        Book(title="float", price=0, rating=value)
        for value in (float("inf"), float("-inf"), 1e-300, 0.1 + 0.2)
    ]
    books += [Book(title="array", price=1, keywords=TEXTS, matrix=[[1, 2], [3, 4]])]
    books += [Book(title="empty", price=1, keywords=[], matrix=[])]
    books += [Book(title="string for number", price="7.5", pages="12", sold=True)]
    books += [Book(title="enum", price=1, language=Book.Language.FRENCH)]
    books += [Book(title="date as text", price=1, published="2024-02-29", changed=now)]
    books += [Book(title="json", price=1, data="text", extra=Value(None, JSONField()))]
    books += [Book(title="json", price=1, data=1.5, extra=False)]
    books += [Book(title="file", price=1, sample="samples/x.txt")]
    books += [
        Book(title="lasts", price=1, audio_length=-timezone.timedelta(days=40, microseconds=1))
    ]
    for book in books:
        book.created = now
    return books


def odd_events() -> list[Event]:
    now = moment(3)
    events = [
        Event(name="range", seats=seats, slot=slot)
        for seats, slot in (
            (NumericRange(1, 5), DateTimeTZRange(now, None)),
            (NumericRange(empty=True), DateTimeTZRange(None, None)),
            ((None, 3), (now, now + timezone.timedelta(hours=1))),
        )
    ]
    events += [Event(name="bytes", poster=bytes(range(256)))]
    events += [Event(name="view", poster=memoryview(b"\\x00\t"))]
    events += [Event(name="hstore", attributes={"a=>b": 'x"y\\', "none": None})]
    events += [Event(name="net", address=ip) for ip in ("10.0.0.1", "2001:db8::1")]
    return events


@pytest.mark.parametrize("make", [odd_books, odd_events])
async def test_odd_values_are_the_same_as_by_insert(make: Any) -> None:
    model = type(make()[0])
    ours, theirs = make(), make()
    for number, (one, two) in enumerate(zip(ours, theirs, strict=True), 1000):
        key = uuid.UUID(int=number) if model is Event else number
        one.pk = two.pk = key
    expected = await refill(model, theirs)
    assert len(expected) == len(theirs)
    assert await refill(model, ours, method="copy") == expected


async def test_keys_come_from_the_database(fresh: Any) -> None:
    tags = [Tag(name=f"t{n}", weight=n) for n in range(5)]
    returned = await Tag.objects.native_bulk_create(tags, method="copy")
    assert returned == tags and returned is not tags
    assert [tag.pk for tag in tags] == [None] * 5
    assert not any(tag._state.adding for tag in tags)
    keys = await Tag.objects.filter(name__startswith="t").values_list("pk", flat=True).anative()
    assert len(set(keys)) >= 5
    assert await Tag.objects.native_create(name="next")


async def test_keys_given_and_not_given(fresh: Any) -> None:
    await Tag.objects.native_bulk_create(
        [Tag(pk=900, name="a"), Tag(name="b"), Tag(pk=901, name="c")], method="copy"
    )
    found = await Tag.objects.filter(name__in="abc").order_by("name").anative()
    assert [tag.name for tag in found] == ["a", "b", "c"]
    assert (found[0].pk, found[2].pk) == (900, 901)


async def test_defaults_of_the_database(fresh: Any) -> None:
    tickets = [
        Ticket(title="none given"),
        Ticket(title="status", status="shut"),
        Ticket(title="all", status="shut", kind="wish", opened=timezone.now()),
        Ticket(title="none again"),
    ]
    await Ticket.objects.native_bulk_create(tickets, method="copy")
    found = {ticket.title: ticket async for ticket in Ticket.objects.native_iterator()}
    assert [(found[t.title].status, found[t.title].kind) for t in tickets] == [
        ("open", "BUG"),
        ("shut", "BUG"),
        ("shut", "wish"),
        ("open", "BUG"),
    ]
    assert found["status"].label == "STATUS"
    assert found["none given"].opened is not None


async def test_nothing_to_create() -> None:
    assert await Tag.objects.native_bulk_create([], method="copy") == []


async def test_a_model_with_nothing_but_a_key(fresh: Any) -> None:
    class Bare(models.Model):
        class Meta:
            app_label = "shop"

    try:
        await native(lambda: _create_model(Bare))()
        await Bare.objects.native_bulk_create([Bare(), Bare()], method="copy")  # type: ignore[attr-defined]
        assert await Bare.objects.native_count() == 2  # type: ignore[attr-defined]
    finally:
        async with asyncorm.cursor() as cursor:
            await cursor.execute("DROP TABLE IF EXISTS shop_bare")
        del apps.all_models["shop"]["bare"]
        apps.clear_cache()


def _create_model(model: Any) -> None:
    with connection.schema_editor() as editor:
        editor.create_model(model)


async def test_related_managers_and_aliases(fresh: Any) -> None:
    category = await Category.objects.native_first()
    await category.children.native_bulk_create([Category(name="x", parent=category)], method="copy")
    assert await category.children.filter(name="x").native_count() == 1
    await Tag.objects.using("other").native_bulk_create([Tag(name="there")], method="copy")
    assert await Tag.objects.using("other").filter(name="there").native_exists()
    assert not await Tag.objects.filter(name="there").native_exists()


async def test_insert_is_still_the_default(fresh: Any) -> None:
    (tag,) = await Tag.objects.native_bulk_create([Tag(name="i")])
    assert tag.pk
    again = await Tag.objects.native_bulk_create(
        [Tag(name="i", weight=5)], 1, update_conflicts=True, update_fields=["weight"],
        unique_fields=["name"],
    )  # fmt: skip
    assert again[0].pk == tag.pk


# What is refused


async def test_what_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="'paste'"):
        await Tag.objects.native_bulk_create([Tag()], method="paste")
    for options in (
        {"ignore_conflicts": True},
        {"update_conflicts": True, "update_fields": ["weight"], "unique_fields": ["name"]},
    ):
        with pytest.raises(NotSupportedError, match="conflicts"):
            await Tag.objects.native_bulk_create([Tag()], method="copy", **options)
    with pytest.raises(TypeError):
        await Tag.objects.native_bulk_create([Tag()], method="copy", size=3)
    with pytest.raises(ValueError, match="multi-table"):
        await Author.objects.native_bulk_create([Author(name="x")], method="copy")
    with pytest.raises(ValueError, match="positive"):
        await Tag.objects.native_bulk_create([Tag()], method="copy", batch_size=0)
    with pytest.raises(ValueError, match="unsaved related object"):
        await Category.objects.native_bulk_create(
            [Category(name="x", parent=Category(name="y"))], method="copy"
        )
    with pytest.raises(NotSupportedError, match="ENGINE"):
        await LegacyRecord.objects.native_bulk_create([LegacyRecord()], method="copy")


@pytest.mark.parametrize("value", [Upper(Value("x")), Now(), F("name"), Value("x")])
async def test_expressions_are_refused(value: Any) -> None:
    with CaptureQueriesContext(connection) as seen:
        with pytest.raises(NotSupportedError, match=r"shop\.Tag\.name.*expression"):
            await Tag.objects.native_bulk_create([Tag(name="a"), Tag(name=value)], method="copy")
    assert not [query for query in seen if "COPY" in query["sql"]]
    assert await Tag.objects.native_count() == 6


async def test_fields_that_need_an_expression_are_refused() -> None:
    class Reversed(models.CharField):
        def get_placeholder(self, value: Any, compiler: Any, connection: Any) -> str:
            return "reverse(%s)"

        get_placeholder_sql = get_placeholder

    field = Reversed(max_length=5)
    with pytest.raises(NotSupportedError, match="Reversed puts its value"):
        _check_field(field)
    _check_field(ArrayField(models.IntegerField()))


async def test_a_manager_that_overrides_bulk_create() -> None:
    class Careful(models.Manager):
        def bulk_create(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    manager = Careful()
    manager.model = Tag
    with pytest.raises(NotSupportedError, match="Careful overrides"):
        await manager.native_bulk_create([Tag()], method="copy")  # type: ignore[attr-defined]


async def test_overridden_methods_of_querysets_are_called(fresh: Any) -> None:
    class Loud(models.QuerySet):
        def bulk_create(self, objs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().bulk_create([Tag(name=o.name.upper()) for o in objs], *args, **kwargs)

    with CaptureQueriesContext(connection) as seen:
        await Loud(Tag).native_bulk_create([Tag(name="quiet")], method="copy")  # type: ignore[attr-defined]
    assert [query["sql"][:4] for query in seen if "shop_tag" in query["sql"]] == ["COPY"]
    assert await Tag.objects.filter(name="QUIET").native_exists()


# Errors and transactions


async def test_a_duplicate_leaves_nothing(fresh: Any) -> None:
    tags = [*(Tag(name=f"n{n}") for n in range(1000)), Tag(name="n5")]
    with pytest.raises(IntegrityError, match="unique"):
        await Tag.objects.native_bulk_create(tags, method="copy")
    with pytest.raises(IntegrityError):
        await Tag.objects.native_bulk_create(tags, method="copy", batch_size=10)
    assert await Tag.objects.native_count() == 6
    await all_given_back()


async def test_a_duplicate_inside_a_block(fresh: Any) -> None:
    async with asyncorm.atomic():
        with pytest.raises(IntegrityError):
            async with asyncorm.atomic():
                await Tag.objects.native_bulk_create([Tag(name="a"), Tag(name="a")], method="copy")
        await Tag.objects.native_bulk_create([Tag(name="b")], method="copy")
    assert await Tag.objects.filter(name__in="ab").native_count() == 1


async def test_values_that_the_server_refuses() -> None:
    with pytest.raises(DataError):
        await Tag.objects.native_bulk_create([Tag(name="x" * 51)], method="copy")
    with pytest.raises((DataError, ValueError)):
        await Tag.objects.native_bulk_create([Tag(name="nul \0")], method="copy")
    with pytest.raises(ValueError, match="expected a number"):
        await Tag.objects.native_bulk_create([Tag(name="x", weight="much")], method="copy")


async def test_statements_of_siblings_take_turns(fresh: Any) -> None:
    async with asyncorm.atomic():
        pid = await native(backend_pid)()

        async def create(n: int) -> None:
            await Tag.objects.native_bulk_create(
                [Tag(name=f"{n} {m}") for m in range(300)], method="copy"
            )

        async def count() -> int:
            file = io.BytesIO()
            return await asyncorm.copy_to(Tag.objects.all(), file)

        async with asyncio.TaskGroup() as group:
            for n in range(4):
                group.create_task(create(n))
            counts = [group.create_task(count()) for _ in range(4)]
            pids = [group.create_task(native(backend_pid)()) for _ in range(4)]
        assert {task.result() for task in pids} == {pid}
        assert {task.result() for task in counts} <= {6 + 300 * n for n in range(5)}
    assert await Tag.objects.native_count() == 1206


async def test_the_query_log_and_wrappers_see_it(fresh: Any) -> None:
    seen = []

    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(wrapper), CaptureQueriesContext(connection) as queries:
        await Tag.objects.native_bulk_create([Tag(name="a")], method="copy")
        await asyncorm.copy_to(Tag.objects.filter(name="100%"), io.BytesIO())
    copies = [sql for sql in seen if sql.startswith("COPY")]
    assert copies[0] == 'COPY "shop_tag" ("name", "weight") FROM STDIN'
    assert "'100%'" in copies[1]
    assert [q["sql"] for q in queries if q["sql"].startswith("COPY")] == copies


async def test_faster_than_insert(fresh: Any) -> None:
    def books() -> list[Book]:
        return [
            Book(title=f"b{n}", price=n, data={"n": n}, keywords=["a", "b"]) for n in range(2000)
        ]

    seconds = {"insert": 99.0, "copy": 99.0}
    for _ in range(2):
        for method in seconds:
            objs = books()
            began = time.perf_counter()
            await Book.objects.native_bulk_create(objs, method=method)
            seconds[method] = min(seconds[method], time.perf_counter() - began)
    assert seconds["copy"] * 2 < seconds["insert"]  # five times and more on an idle machine


async def test_other_tasks_get_their_turn(fresh: Any) -> None:
    gaps = []
    done = False

    async def watch() -> None:
        while not done:
            began = time.perf_counter()
            await asyncio.sleep(0)
            gaps.append(time.perf_counter() - began)

    watching = asyncio.create_task(watch())
    began = time.perf_counter()
    await Item.objects.native_bulk_create(
        [Item(remote_id=-n, name="x" * 40) for n in range(1, 30_000)], method="copy"
    )
    seconds = time.perf_counter() - began
    done = True
    await watching
    assert max(gaps) < seconds * 0.8
    await Item.objects.all().native_delete()


# copy_to


QUERYSETS = {
    "model": lambda: Tag.objects.order_by("pk"),
    "values": lambda: Book.objects.order_by("pk").values("title", "publisher__name"),
    "values_list": lambda: Book.objects.order_by("pk").values_list("pk", "price", "created"),
    "flat": lambda: Tag.objects.order_by("pk").values_list("name", flat=True),
    "annotation": lambda: Tag.objects.order_by("pk").annotate(books_=models.Count("books")),
    "parameters": lambda: Tag.objects.filter(
        Q(name__contains="%") | Q(name__gt="a'b\\") | ~Q(name="x;--")
    ).order_by("pk"),
    "slice": lambda: Book.objects.order_by("-price", "pk")[2:7],
    "union": lambda: Tag.objects.filter(pk=1).union(Tag.objects.filter(pk=2)).order_by("pk"),
    "none": lambda: Tag.objects.none(),
    "empty in": lambda: Tag.objects.filter(pk__in=[]),
    "inheritance": lambda: Author.objects.order_by("pk"),
    "select_related": lambda: Book.objects.select_related("publisher").order_by("pk"),
    "defer": lambda: Book.objects.defer("data").only("title").order_by("pk"),
    "extra": lambda: Tag.objects.extra(select={"x": "weight + 1"}).order_by("pk"),
    "raw where": lambda: Tag.objects.extra(where=["name <> %s"], params=["%"]).order_by("pk"),
    "group": lambda: Book.objects.values("language").annotate(n=models.Count("*")).order_by("n"),
    "events": lambda: Event.objects.order_by("pk"),
    "manager": lambda: Publisher.objects,
    "distinct": lambda: Product.objects.order_by("category").distinct("category"),
}


@pytest.mark.parametrize("shape", QUERYSETS)
async def test_rows_of(shape: str) -> None:
    queryset = QUERYSETS[shape]()
    rows = await queryset.all().anative()
    file = io.StringIO(newline="")
    assert await asyncorm.copy_to(queryset, file, header=True) == len(rows)
    header, *lines = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert len(lines) == len(rows)
    assert len(set(header)) == len(header)
    for line, row in zip(lines, rows, strict=True):
        assert len(line) == len(header)
        for name, text in zip(header, line, strict=True):
            if isinstance(row, dict):
                value = row[name]
            elif isinstance(row, models.Model):
                value = row.__dict__[name]
            else:
                value = dict(zip(header, row, strict=True))[name] if len(header) > 1 else row
                value = value[0] if isinstance(value, tuple) else value
            if name in ("data", "extra"):
                assert not text or json.loads(text) == value
            elif isinstance(value, int | str) and not isinstance(value, bool):
                assert text == str(value)
            elif value is None:
                assert text == ""


@pytest.mark.parametrize("format", ["csv", "text", "binary"])
async def test_formats(format: str) -> None:
    file = io.BytesIO()
    rows = await asyncorm.copy_to(
        Event.objects.order_by("pk").values_list("id", "name", "poster", "slot"), file, format
    )
    assert rows == await Event.objects.native_count()

    def expected() -> bytes:
        with connection.cursor() as cursor:
            with cursor.copy(
                "COPY (SELECT id, name, poster, slot FROM shop_event ORDER BY id) TO STDOUT"
                f" (FORMAT {format})"
            ) as copy:
                return b"".join(copy)

    assert file.getvalue() == await native(expected)()


async def test_a_header_in_text_format() -> None:
    file = io.BytesIO()
    await asyncorm.copy_to(Tag.objects.filter(pk=1), file, "text", header=True)
    assert file.getvalue().split(b"\n")[0] == b"id\tname\tweight"


class Slow:
    """An asynchronous writer, as aiofiles and anyio have."""

    def __init__(self) -> None:
        self.data = b""
        self.fail_after = 10**9

    async def write(self, data: bytes) -> None:
        await asyncio.sleep(0.001)
        self.data += data
        if len(self.data) > self.fail_after:
            raise ZeroDivisionError


def many(rows: int = 50_000) -> Any:
    number = models.Func(Value(1), Value(rows), function="generate_series")
    return Tag.objects.filter(pk=1).annotate(n=number, x=Value("x" * 50)).values_list("n", "x")


async def test_an_asynchronous_writer() -> None:
    writer = Slow()
    assert await asyncorm.copy_to(many(), writer, "text") == 50_000
    assert writer.data.count(b"\n") == 50_000
    assert writer.data.startswith(b"1\txxx") and b"\n50000\t" in writer.data


async def test_a_stream_writer() -> None:
    received = asyncio.get_running_loop().create_future()

    async def serve(reader: Any, writer: Any) -> None:
        received.set_result(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await asyncorm.copy_to(many(), writer)
        writer.close()
        assert (await received).count(b"\n") == 50_000


async def test_a_file_of_anyio(tmp_path: Path) -> None:
    async with await anyio.open_file(tmp_path / "tags", "w", encoding="utf-8") as file:
        assert await asyncorm.copy_to(Tag.objects.order_by("pk"), file) == 6
    assert len((tmp_path / "tags").read_text().splitlines()) == 6


async def test_a_path_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    assert await asyncorm.copy_to(many(), path) == 50_000
    assert len(path.read_text().splitlines()) == 50_000
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    path.write_text("old")
    path.chmod(0o640)
    failing = Tag.objects.extra(select={"x": "1 / (4 - id)"}).order_by("pk")
    with pytest.raises(DataError):
        await asyncorm.copy_to(failing, str(path))
    assert path.read_text() == "old"
    await asyncorm.copy_to(Tag.objects.filter(pk=1).values_list("pk"), path)
    assert path.read_text() == "1\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["numbers.csv"]
    with pytest.raises(FileNotFoundError):
        await asyncorm.copy_to(Tag.objects.all(), tmp_path / "absent" / "x")
    with pytest.raises(IsADirectoryError):
        await asyncorm.copy_to(Tag.objects.all(), tmp_path)
    assert await asyncorm.copy_to(Tag.objects.all(), "/dev/null") == 6
    await all_given_back()


async def test_a_cancelled_copy_to_a_path(tmp_path: Path) -> None:
    for milliseconds in (0, 1, 2, 4, 8, 16, 32, 64):
        task = asyncio.create_task(asyncorm.copy_to(many(1_000_000), tmp_path / "x"))
        await asyncio.sleep(milliseconds / 1000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # A file that a thread was still opening is removed by that thread.
        await eventually(lambda: os.listdir(tmp_path) == [])
    await all_given_back()


async def test_wrong_arguments() -> None:
    for wrong in (Tag, [Tag()], "shop_tag", Tag.objects.raw("SELECT 1")):
        with pytest.raises(TypeError, match="copy_to"):
            await asyncorm.copy_to(wrong, io.BytesIO())
    with pytest.raises(ValueError, match="'xml'"):
        await asyncorm.copy_to(Tag.objects.all(), io.BytesIO(), "xml")
    with pytest.raises(ValueError, match="header"):
        await asyncorm.copy_to(Tag.objects.all(), io.BytesIO(), "binary", header=True)
    with pytest.raises(TypeError, match="text file"):
        await asyncorm.copy_to(Tag.objects.all(), io.StringIO(), "binary")
    for wrong in (5, None, object()):
        with pytest.raises(TypeError, match="destination"):
            await asyncorm.copy_to(Tag.objects.all(), wrong)
    with pytest.raises(NotSupportedError, match="ENGINE"):
        await asyncorm.copy_to(LegacyRecord.objects.all(), io.BytesIO())


async def test_a_writer_that_fails() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:
        pid = await native(backend_pid)(alias)
        writer = Slow()
        writer.fail_after = 100_000
        with pytest.raises(ZeroDivisionError):
            await asyncorm.copy_to(many().using(alias), writer)
        # The very connection is in order again.
        assert await native(backend_pid)(alias) == pid
        assert await Tag.objects.using(alias).native_count() == 6
        await asyncorm.close_pools(alias)


async def test_a_writer_that_fails_inside_a_block() -> None:
    writer = Slow()
    writer.fail_after = 100_000
    async with asyncorm.atomic():
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic():
                await asyncorm.copy_to(many(), writer)
        assert await Tag.objects.native_count() == 6
    await all_given_back()


async def test_inside_a_block_its_rows_are_seen() -> None:
    async with asyncorm.atomic():
        await Tag.objects.native_create(name="inside")
        file = io.BytesIO()
        assert await asyncorm.copy_to(Tag.objects.all(), file) == 7
        assert b"inside" in file.getvalue()
        asyncorm.set_rollback(True)


async def test_outside_a_block_the_writer_may_query() -> None:
    class Counting:
        counts: list[int] = []

        async def write(self, data: bytes) -> None:
            self.counts.append(await Tag.objects.native_count())

    writer = Counting()
    await asyncorm.copy_to(many(5_000), writer)
    assert set(writer.counts) == {6}


@pytest.mark.parametrize("inside", [False, True])
async def test_a_cancelled_copy_to(inside: bool) -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias:

        async def export(delay: float) -> None:
            writer = Slow()
            async with asyncio.timeout(delay):
                if inside:
                    async with asyncorm.atomic(alias):
                        await asyncorm.copy_to(many(1_000_000).using(alias), writer)
                else:
                    await asyncorm.copy_to(many(1_000_000).using(alias), writer)

        pids = set()
        for n in range(6):
            with pytest.raises(TimeoutError):
                await export(0.01 * n)
            pids.add(await native(backend_pid)(alias))
        assert len(pids) == 1  # the connection was put in order, not replaced
        await asyncorm.close_pools(alias)


async def test_a_cancelled_bulk_create(fresh: Any) -> None:
    items = [Item(remote_id=-n, name="x" * 50) for n in range(1, 5_000)]
    for n in range(8):
        task = asyncio.create_task(Item.objects.native_bulk_create(items, method="copy"))
        await asyncio.sleep(0.01 * n)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):  # it may have been quicker
            await task
        count = await Item.objects.native_count()
        assert count in (0, len(items))
        await Item.objects.all().native_delete()
    await all_given_back()


async def test_when_every_connection_is_in_use(fresh: Any) -> None:
    """Other statements that wait travel together then; a COPY has a connection to itself."""
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 2}}) as alias:
        files = [io.BytesIO() for _ in range(20)]

        async def create(n: int) -> None:
            tags = [Tag(name=f"{n} {m}") for m in range(50)]
            await Tag.objects.using(alias).native_bulk_create(tags, method="copy")

        rows = await asyncio.gather(
            *(asyncorm.copy_to(Book.objects.using(alias), file) for file in files),
            *(Book.objects.using(alias).native_count() for _ in range(20)),
            *(create(n) for n in range(5)),
        )
        assert rows[:40] == [30] * 40
        assert len({file.getvalue() for file in files}) == 1
        assert await Tag.objects.using(alias).native_count() == 256
        await asyncorm.close_pools(alias)


class InATestsTransaction(TestCase):
    async def test_rows_are_seen_and_rolled_back(self) -> None:
        await Tag.objects.native_bulk_create([Tag(name="x"), Tag(name="y")], method="copy")
        assert await sync_to_async(Tag.objects.filter(name__in="xy").count)() == 2
        file = io.StringIO()
        assert await asyncorm.copy_to(Tag.objects.filter(name__in="xy").values("name"), file) == 2
        assert sorted(file.getvalue().split()) == ["x", "y"]
        with pytest.raises(IntegrityError):
            async with asyncorm.atomic():
                await Tag.objects.native_bulk_create([Tag(name="x")], method="copy")
        writer = Slow()
        writer.fail_after = 10
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic():
                await asyncorm.copy_to(many(), writer)
        assert await Tag.objects.filter(name__in="xy").native_count() == 2


async def test_cancelled_while_a_thread_opens_the_file(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tags.csv"
    path.write_text("before")
    began, go_on = threading.Event(), threading.Event()
    isfile = os.path.isfile

    def slow(name: Any) -> bool:
        if name == str(path):
            began.set()
            go_on.wait(10)
        return isfile(name)

    monkeypatch.setattr(os.path, "isfile", slow)
    task = asyncio.create_task(asyncorm.copy_to(Tag.objects.all(), path))
    await eventually(began.is_set)
    task.cancel()
    await asyncio.wait([task], timeout=0.1)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: os.listdir(tmp_path) == ["tags.csv"])
    assert path.read_text() == "before"
