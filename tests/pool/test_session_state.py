"""What one task leaves in a server session is not seen by the next holder of the connection."""

import asyncio
import contextlib
import copy
import gc
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import Permission
from django.db import DatabaseError, OperationalError, connection, connections, transaction
from django.db.backends.signals import connection_created
from django.db.models import Func, IntegerField
from django.db.models.signals import post_init
from psycopg import ClientCursor, Cursor, IsolationLevel, RawCursor, ServerCursor
from psycopg.adapt import PyFormat
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from psycopg.types.string import StrDumper, TextLoader

import asyncorm
from asyncorm import pools
from asyncorm._wire.texts import calls_known, is_read, is_single, traces
from asyncorm.session_state import leaves_state, makes_a_table
from tests.support import administrator, eventually

pytestmark = pytest.mark.usefixtures("one_connection")


@pytest.fixture
async def one_connection(django_db_setup: Any, django_db_blocker: Any) -> AsyncIterator[None]:
    """A pool of one connection: what is left in a session meets the next one who asks."""
    database = connections.settings["default"]
    before = copy.copy(database["OPTIONS"])
    database["OPTIONS"] = {**before, "pool": {"min_size": 0, "max_size": 1, "timeout": 2}}
    with django_db_blocker.unblock():
        await asyncorm.close_pools()
        yield
        await asyncorm.close_pools()
    database["OPTIONS"] = before


async def value(sql: str, params: Any = None) -> Any:
    async with asyncorm.cursor() as cursor:
        await cursor.execute(sql, params)
        return (await cursor.fetchone())[0] if cursor.description else None  # type: ignore[index]


async def settled() -> None:
    """Until a connection that is being reset is back."""
    for _ in range(200):
        if asyncorm.pool_stats().get("pool_available") == 1:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(asyncorm.pool_stats())


@pytest.mark.parametrize(
    ("leave", "look", "clean"),
    [
        ("SET work_mem = '77MB'", "SHOW work_mem", "4MB"),
        ("/* note */ SELECT 1; SET work_mem = '77MB'", "SHOW work_mem", "4MB"),
        ("/* a */ -- b\n/* c */ SET work_mem = '77MB'", "SHOW work_mem", "4MB"),
        ("SELECT set_config('work_mem', '77MB', false)", "SHOW work_mem", "4MB"),
        ("SELECT pg_catalog.\"set_config\"('work_mem', '77MB', false)", "SHOW work_mem", "4MB"),
        ("CREATE TEMP TABLE left_behind (a int)", "SELECT to_regclass('left_behind')", None),
        (
            "SELECT pg_advisory_lock(4711)",
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711",
            0,
        ),
        ("LISTEN news", "SELECT count(*) FROM pg_listening_channels()", 0),
        ("PREPARE left_behind AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements", 0),
        ("SET TIME ZONE 'Asia/Tokyo'", "SHOW timezone", "UTC"),
        ("/* a /* b */ c */ SET work_mem = '77MB'", "SHOW work_mem", "4MB"),
        ("DO $$ BEGIN SET work_mem = '77MB'; END $$", "SHOW work_mem", "4MB"),
        ("UPDATE pg_settings SET setting = 79872 WHERE name = 'work_mem'", "SHOW work_mem", "4MB"),
        (
            "SELECT U&\"set!005fconfig\" UESCAPE '!' ('work_mem', '77MB', false)",
            "SHOW work_mem",
            "4MB",
        ),
        ("CREATE TABLE pg_temp.left_behind (a int)", "SELECT to_regclass('left_behind')", None),
        ("SELECT 1 AS a INTO pg_temp.left_behind", "SELECT to_regclass('left_behind')", None),
        (
            "SELECT set_config('search_path', 'PG_TEMP', true); CREATE TABLE left_behind (a int)",
            "SELECT to_regclass('left_behind')",
            None,
        ),
        ("SELECT 1 AS a INTO TEMP left_behind", "SELECT to_regclass('left_behind')", None),
        ("SET/**/LOCAL work_mem = '1MB'; SET/**/work_mem = '77MB'", "SHOW work_mem", "4MB"),
        ("SELECT $a$ $$ $a$; SET work_mem = '77MB'", "SHOW work_mem", "4MB"),
        ("SELECT E'\\''; SET work_mem = '77MB' --'", "SHOW work_mem", "4MB"),
        ("SET local.left_behind = 'x'", "SELECT current_setting('local.left_behind', true)", ""),
        (
            "SELECT set_config('work_mem', '77MB', false), coalesce(NULL, true)",
            "SHOW work_mem",
            "4MB",
        ),
        ("SELECT set_config('work_mem', '77MB', 'a,true)' = '')", "SHOW work_mem", "4MB"),
        ("SELECT 1 AS €$$; SET work_mem = '77MB' --$$", "SHOW work_mem", "4MB"),
        ("SELECT $€$ ' $€$; SET work_mem = '77MB' --'", "SHOW work_mem", "4MB"),
        ("SELECT $٣$ /* $٣$; SET work_mem = '77MB'", "SHOW work_mem", "4MB"),
    ],
)
async def test_state_is_reset_before_the_next_holder(leave: str, look: str, clean: Any) -> None:
    before = await value("SELECT pg_backend_pid()")
    await value(leave)
    await settled()
    assert await value(look) == clean
    assert await value("SELECT pg_backend_pid()") == before, "reset, not replaced"


async def test_connection_keeps_state_and_resets_at_the_end() -> None:
    async with asyncorm.connection():
        await value("SET work_mem = '77MB'")
        assert await value("SHOW work_mem") == "77MB"
        async with asyncorm.atomic():
            assert await value("SHOW work_mem") == "77MB"
    await settled()
    assert await value("SHOW work_mem") == "4MB"


async def test_state_of_a_transaction_is_not_reset_for_nothing() -> None:
    async with asyncorm.atomic():
        await value("SET LOCAL work_mem = '77MB'")
        await value("SET TRANSACTION READ ONLY")
    assert asyncorm.pool_stats()["pool_available"] == 1, "given back at once"
    assert await value("SHOW work_mem") == "4MB"


@pytest.mark.parametrize(
    "create", ["CREATE TABLE left_behind (a int)", "SELECT 1 AS a INTO left_behind"]
)
async def test_what_is_temporary_by_the_search_path_is_reset(create: str) -> None:
    async with asyncorm.atomic():
        await value("SELECT set_config('search_path', %s, true)", ["pg_temp"])
        await value(create)
    await settled()
    assert await value("SELECT to_regclass('left_behind')") is None


async def test_what_functions_hide_is_reset() -> None:
    async with function("SET work_mem = 99999") as hidden:
        assert not leaves_state(hidden)
        await value(hidden)
        await settled()
        assert await value("SHOW work_mem") == "4MB"
        async with asyncorm.atomic():
            await asyncio.gather(*(value(hidden) for _ in range(3)))
        await settled()
        assert await value("SHOW work_mem") == "4MB"


async def test_what_queries_of_functions_hide_is_reset() -> None:
    name = Func(function="it_hides", output_field=IntegerField())
    async with function("SET work_mem = 99999"):
        await Permission.objects.annotate(name_=name).native_first()
        await settled()
        assert await value("SHOW work_mem") == "4MB"


@pytest.mark.parametrize(
    ("harmless", "call"),
    [
        (True, "SELECT pg_relation_filenode('pg_class')"),  # stable, in C
        (True, "SELECT uuid_send(gen_random_uuid())"),
        (True, "WITH once(a) AS (SELECT 1) SELECT a FROM once"),  # no function at all
        (True, "SELECT quiet_one()"),
        (False, "SELECT quiet_two()"),
        (False, 'SELECT "quiet_one"()'),  # any name
        (False, "SELECT setseed(0.5)"),
    ],
)
async def test_a_session_is_kept_where_the_functions_called_can_leave_nothing(
    harmless: bool, call: str
) -> None:
    set_config = "set_config('work_mem', '77MB', false)"
    await value("CREATE FUNCTION quiet_one() RETURNS int STABLE LANGUAGE sql AS 'SELECT 1'")
    await value(f"CREATE FUNCTION quiet_two() RETURNS text STABLE RETURN {set_config}")
    try:
        process = await value("SELECT pg_backend_pid()")
        with administrator() as ask:
            for _ in range(2):  # the first time the server is asked
                await value(call)
                await settled()
            last = ask("SELECT query FROM pg_stat_activity WHERE pid = %s", process)
        assert last == (call if harmless else "DISCARD ALL")
        assert await value("SHOW work_mem") == "4MB"
    finally:
        await value("DROP FUNCTION quiet_one, quiet_two")


async def test_what_functions_hide_is_seen_if_the_server_tells_of_it() -> None:
    """So it does of times and of who one is."""
    zone, style = await value("SHOW timezone"), await value("SHOW datestyle")
    async with function("SET TIME ZONE 'Asia/Tokyo'; SET datestyle = 'German'") as hidden:
        assert not leaves_state(hidden)
        await value(hidden)
        await settled()
        assert (await value("SHOW timezone"), await value("SHOW datestyle")) == (zone, style)


QUIET = """
    CREATE FUNCTION it_sets() RETURNS text LANGUAGE sql AS
        $$ SELECT set_config('work_mem', '77MB', false) $$;
    CREATE FUNCTION it_calls() RETURNS text STABLE LANGUAGE sql AS 'SELECT it_sets()';
    CREATE FUNCTION it_calls_that() RETURNS text STABLE RETURN it_calls();
    CREATE FUNCTION it_is_dynamic() RETURNS int STABLE LANGUAGE plpgsql AS
        $$ BEGIN EXECUTE 'SELECT it_' || 'sets()'; RETURN 1; END $$;
    CREATE FUNCTION it_adds(int, int) RETURNS int LANGUAGE sql AS 'SELECT length(it_sets())';
    CREATE FUNCTION "it€s"() RETURNS text LANGUAGE sql AS 'SELECT it_sets()';
    CREATE OPERATOR @#@ (leftarg = int, rightarg = int, function = it_adds);
    CREATE AGGREGATE it_aggregates(int) (sfunc = it_adds, stype = int, initcond = '0');
"""


@pytest.mark.parametrize(
    "call",
    [
        "SELECT it_calls()",
        "SELECT it_calls_that()",
        "SELECT it_is_dynamic()",
        "SELECT it€s()",
        "SELECT 1 @#@ 2",
        "SELECT it_aggregates(1)",
        "SELECT * FROM ts_stat('SELECT it_sets()::tsvector')",
        "SELECT ts_rewrite('a', $$SELECT 'a'::tsquery, 'b'::tsquery WHERE it_sets() > ''$$)",
        "SELECT query_to_xml('SELECT it_sets()', true, true, '')",
    ],
)
async def test_what_functions_reach_through_others_is_reset(call: str) -> None:
    await value(QUIET)
    try:
        for _ in range(2):
            with contextlib.suppress(DatabaseError):  # a server may have been built without XML
                await value(call)
            await settled()
            assert await value("SHOW work_mem") == "4MB"
    finally:
        await value("DROP FUNCTION it_sets, it_calls, it_adds CASCADE")
        await value('DROP FUNCTION IF EXISTS it_calls_that, it_is_dynamic, "it€s"')


async def test_a_function_that_is_replaced_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncorm._pool.pool._HARMLESS_FOR", 0.01)
    create = "CREATE OR REPLACE FUNCTION it_changes() RETURNS text LANGUAGE sql"
    await value(f"{create} STABLE AS $$ SELECT '1' $$")
    try:
        await value("SELECT it_changes()")
        await settled()
        await value(f"{create} VOLATILE AS $$ SELECT set_config('work_mem', '77MB', false) $$")
        pool = pools.find("default")
        await eventually(lambda: "it_changes" not in pool.connections.harmless)  # type: ignore[union-attr]
        await value("SELECT it_changes()")
        await settled()
        assert await value("SHOW work_mem") == "4MB"
    finally:
        await value("DROP FUNCTION it_changes")


@pytest.mark.parametrize("cursor_class", [Cursor, ClientCursor, RawCursor])
async def test_what_cursors_of_psycopgs_own_leave_is_reset(cursor_class: Any) -> None:
    def leave() -> None:
        connection.ensure_connection()
        with cursor_class(connection.connection) as cursor:
            cursor.execute("SET work_mem = '77MB'")

    await asyncorm.native(leave)()
    await settled()
    assert await value("SHOW work_mem") == "4MB"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_what_named_cursors_leave_is_reset() -> None:
    def leave(query: str, **options: Any) -> None:
        connection.ensure_connection()
        with transaction.atomic():
            cursor = connection.connection.cursor("left_behind", **options)
            cursor.execute(query)
            assert cursor.fetchone() is not None
            if not options:
                cursor.close()

    await asyncorm.native(leave)("SELECT set_config('work_mem', '77MB', false)")
    await settled()
    assert await value("SHOW work_mem") == "4MB"
    await asyncorm.native(leave)("SELECT generate_series(1, 100)", withhold=True)
    gc.collect()
    await settled()
    assert await value("SELECT count(*) FROM pg_cursors WHERE is_holdable") == 0


async def test_an_operation_has_what_sequences_gave_it_while_the_pool_is_crowded() -> None:
    def draw() -> None:
        number = execute("SELECT nextval('it_counts')")
        execute("SELECT 1")
        assert execute("SELECT currval('it_counts')") == number
        process = execute("SELECT pg_backend_pid()")
        execute("SELECT 1")
        assert execute("SELECT pg_backend_pid()") == process

    await value("CREATE SEQUENCE it_counts")
    try:
        await asyncio.gather(*(asyncorm.native(draw)() for _ in range(50)))
        await asyncorm.batch(*[draw] * 10)
    finally:
        await value("DROP SEQUENCE it_counts")


@contextlib.asynccontextmanager
async def function(body: str) -> AsyncIterator[str]:
    """A function that executes some SQL; the statement that calls it."""
    await value(
        "CREATE FUNCTION it_hides() RETURNS int LANGUAGE plpgsql AS "
        f"$$ BEGIN {body}; RETURN 1; END $$"
    )
    try:
        yield "SELECT it_hides()"
    finally:
        await value("DROP FUNCTION it_hides()")


@pytest.mark.parametrize(
    "leave",
    [
        "DISCARD ALL",
        "RESET ROLE",
        "DO $$ BEGIN RESET ROLE; END $$",
        "SET SESSION AUTHORIZATION DEFAULT",
    ],
)
async def test_the_next_holder_has_what_the_options_say(leave: str) -> None:
    await value("CREATE ROLE it_is_assumed")
    connections.settings["default"]["OPTIONS"]["assume_role"] = "it_is_assumed"
    try:
        await asyncorm.close_pools()
        session = "SELECT current_user || ' ' || current_setting('TimeZone')"
        before = await value(session)
        assert before.startswith("it_is_assumed ")
        for _ in range(2):
            await value(leave)
            await settled()
            assert await value(session) == before
    finally:
        del connections.settings["default"]["OPTIONS"]["assume_role"]
        await asyncorm.close_pools()
        await value("DROP ROLE it_is_assumed")


def notice(message: Any) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize(
    "leave",
    [
        lambda conn: setattr(conn, "read_only", True),
        lambda conn: setattr(conn, "isolation_level", IsolationLevel.SERIALIZABLE),
        lambda conn: setattr(conn, "deferrable", True),
        lambda conn: setattr(conn, "row_factory", dict_row),
        lambda conn: setattr(conn, "cursor_factory", RawCursor),
        lambda conn: setattr(conn, "server_cursor_factory", ServerCursor),
        lambda conn: setattr(conn, "prepare_threshold", 1),
        lambda conn: setattr(conn, "prepared_max", 1),
        lambda conn: conn.add_notice_handler(notice),
        lambda conn: conn.add_notify_handler(notice),
        lambda conn: conn.adapters.register_loader("int4", TextLoader),
        lambda conn: conn.adapters.register_dumper(int, StrDumper),
        lambda conn: conn.adapters.types.add(TypeInfo("made_up", 123456, 123457)),
        lambda conn: setattr(conn, "autocommit", False),
    ],
)
async def test_what_is_set_on_psycopgs_connection_does_not_stay(leave: Any) -> None:
    def look() -> Any:
        connection = connections["default"]
        connection.ensure_connection()
        conn = connection.connection
        with connection.cursor() as cursor:
            cursor.execute("DO $$ BEGIN RAISE WARNING 'for whom?'; END $$")
            cursor.execute("SELECT 1::int4")
            row = cursor.fetchone()
        return (
            row, conn.read_only, conn.isolation_level, conn.deferrable, conn.row_factory,
            conn.cursor_factory, conn.server_cursor_factory, conn.prepare_threshold,
            conn.prepared_max, conn.autocommit, conn.adapters.types.get("made_up"),
            conn.adapters.get_dumper(int, PyFormat.TEXT), list(conn._notify_handlers),
        )  # fmt: skip

    def set_it() -> None:
        connections["default"].ensure_connection()
        leave(connections["default"].connection)

    before = await asyncorm.native(look)()
    await settled()
    await asyncorm.native(set_it)()
    await settled()
    assert await asyncorm.native(look)() == before


async def test_what_connection_created_receivers_set_is_there_after_a_reset() -> None:
    def receive(connection: Any, **kwargs: Any) -> None:
        connection.connection.row_factory = dict_row

    def row() -> Any:
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT 1 AS a")
            return cursor.fetchone()

    connection_created.connect(receive)
    try:
        await asyncorm.close_pools()
        assert await asyncorm.native(row)() == {"a": 1}
        assert asyncorm.pool_stats()["pool_available"] == 1, "it is what new connections have"
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SET work_mem = '77MB'")
        await settled()
        assert await asyncorm.native(row)() == {"a": 1}
    finally:
        connection_created.disconnect(receive)


@pytest.mark.parametrize(
    "statement",
    [
        'SELECT "shop_book"."id" FROM "shop_book" WHERE "shop_book"."title" = %s LIMIT 21',
        'UPDATE "a" SET "b" = %s WHERE "a"."id" IN (%s)',
        'INSERT INTO "a" ("b") VALUES (%s) RETURNING "a"."id"',
        "SAVEPOINT s1",
        "SET CONSTRAINTS ALL IMMEDIATE",
        "SET LOCAL statement_timeout = 5",
        "SELECT set_config('statement_timeout', %s, true)",
        "SELECT pg_advisory_xact_lock(1)",
        "UPDATE a SET b = 1 /* traceparent='00-SET-01' */",
        "SELECT set_config('a.b', 'c d', true), set_config(%s, %s, true)",
        "SELECT set_config('a'::text, %(b)s, TRUE)",
        "SELECT ';SET x = 1', $$;SET x = 1$$, $a$;$$;SET x = 1$a$, E'\\';SET x = 1'",
        'SELECT 1 AS ";SET x = 1", 2 AS "a"";SET x = 1"',
        "-- ; SET\nSELECT 1 /* ; SET /* ; RESET */ ; RESET ALL */",
        "SELECT temp, a$b$c FROM weather WHERE d$b$e = ';SET x = 1'",
        "INSERT INTO a VALUES (%s) ON CONFLICT DO NOTHING",
        "WITH a AS (SELECT 1) INSERT/**/INTO b SELECT * FROM a",
        "MERGE\n  INTO a USING b ON a.id = b.id WHEN MATCHED THEN DELETE",
        "SET TRANSACTION READ ONLY",
        "PREPARE TRANSACTION 'a'",
    ],
)
def test_ordinary_statements_leave_nothing(statement: str) -> None:
    assert not leaves_state(statement) and not makes_a_table(statement)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("SELECT", "; SET work_mem = '77MB'"),
        ("SELECT", "set_CONFIG('a.b', 'c', false)"),
        ("SELECT", "PG_try_advisory_lock(1)"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT", ""),
        ("CREATE Temp TABLE a AS SELECT", ""),
        ("set a.b =", ""),
        ("  -- first\nPREPARE a AS SELECT", ""),
    ],
)
def test_long_statements_are_looked_at_too(begin: str, end: str) -> None:
    for numbers in ("1", ", ".join(["1"] * 5000)):
        assert leaves_state(f"{begin} {numbers}, {end}")
        assert not leaves_state(f"SELECT {numbers}, 'reset' AS setting, prepared FROM listen")


def execute(sql: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone() if cursor.description else None


STATES = [
    ("SELECT pg_advisory_lock(4711)", "SELECT pg_advisory_unlock(4711)", True),
    ("SET my.tenant = '7'", "SELECT current_setting('my.tenant', true)", "7"),
    ("SELECT set_config('my.tenant', '7', false)", "SELECT current_setting('my.tenant')", "7"),
    ("CREATE TEMPORARY TABLE mine AS SELECT 7 AS a", "SELECT a FROM mine", 7),
]


async def receive(sender: Any, instance: Permission, **kwargs: Any) -> None:
    await asyncio.sleep(0)
    if instance.name == "counted":
        instance.count = await Permission.objects.filter(pk__gte=0).native_count()  # type: ignore[attr-defined]


@pytest.fixture
def received() -> Iterator[None]:
    post_init.connect(receive, sender=Permission)
    yield
    post_init.disconnect(receive, sender=Permission)


@pytest.mark.parametrize(("leave", "look", "seen"), STATES)
@pytest.mark.parametrize("how", ["await_", "receiver", "receiver with a query"])
async def test_an_operation_keeps_its_session_state(
    leave: str, look: str, seen: Any, how: str, received: None
) -> None:
    def work() -> Any:
        execute(leave)
        if how == "await_":
            asyncorm.await_(asyncio.sleep(0.01))
        else:
            Permission(name="counted" if how == "receiver with a query" else "")
        return execute(look)

    assert await asyncorm.native(work)() == (seen,)
    await settled()


async def test_what_an_operation_with_session_state_awaits_has_the_state() -> None:
    async def read() -> Any:
        async with asyncorm.atomic():  # a transaction of its own
            await value("SET LOCAL work_mem = '77MB'")
            assert await value("SHOW work_mem") == "77MB"
        async with asyncorm.connection():
            assert await value("SHOW work_mem") == "4MB"
        return await value("SELECT current_setting('my.tenant')")

    async def awaited() -> Any:
        return [await read(), *(await asyncio.gather(read(), read()))]  # child tasks take turns

    def work() -> Any:
        execute("SET my.tenant = '7'")
        return asyncorm.await_(awaited()), execute("SELECT current_setting('my.tenant')")

    assert await asyncorm.native(work)() == (["7"] * 3, ("7",))
    await settled()
    async with asyncorm.connection():
        await value("SET my.tenant = '8'")
        assert await asyncorm.native(lambda: asyncorm.await_(awaited()))() == ["8"] * 3


async def test_mutual_exclusion_by_an_advisory_lock() -> None:
    database = connections.settings["default"]
    await asyncorm.close_pools()
    database["OPTIONS"] = {**database["OPTIONS"], "pool": {"max_size": 4, "min_size": 0}}
    inside: list[int] = []

    def critical() -> None:
        execute("SELECT pg_advisory_lock(4711)")
        inside.append(1)
        asyncorm.await_(asyncio.sleep(0.02))
        assert len(inside) == 1
        inside.clear()
        execute("SELECT pg_advisory_unlock(4711)")

    await asyncio.gather(*(asyncorm.native(critical)() for _ in range(4)))


@pytest.mark.parametrize("how", ["begin", "failed", "autocommit", "begun", "copy"])
async def test_a_kept_connection_is_left_in_the_midst_of_something(how: str) -> None:
    """As on Django's backend, where the connection is closed: what is not committed is undone."""

    def leave() -> None:
        if how in ("autocommit", "begun"):
            connection.set_autocommit(False)
        for sql in {
            "begin": ["BEGIN", "SET LOCAL my.tenant = '9'"],
            "failed": ["BEGIN", "SELECT 1 / 0"],
            "begun": ["SELECT 1"],
            "copy": ["COPY (SELECT 1) TO STDOUT"],
        }.get(how, []):
            with contextlib.suppress(DatabaseError):
                execute(sql)

    async with asyncorm.connection():
        await value("SET my.tenant = '8'")
        await asyncorm.native(leave)()
    await settled()
    assert not await value("SELECT current_setting('my.tenant', true)")
    async with asyncorm.atomic():
        await value("SELECT 1")


async def test_an_open_cursor_and_autocommit_keep_the_connection() -> None:
    def with_cursor() -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            (before,) = cursor.fetchone()
            assert asyncorm.await_(value("SELECT pg_backend_pid()")) == before
            cursor.execute("SELECT pg_backend_pid()")
            return before, cursor.fetchone()[0]

    before, after = await asyncorm.native(with_cursor)()
    assert before == after

    def without_autocommit() -> Any:
        connection.set_autocommit(False)
        execute("SET LOCAL my.tenant = '7'")
        seen = asyncorm.await_(value("SELECT current_setting('my.tenant')"))
        connection.rollback()
        connection.set_autocommit(True)
        return seen

    assert await asyncorm.native(without_autocommit)() == "7"


async def test_an_operation_that_left_nothing_holds_nothing_while_it_awaits() -> None:
    def work() -> Any:
        execute("SELECT 1")
        return asyncorm.await_(taken())

    async def taken() -> int:
        return asyncorm.pool_stats()["pool_available"]

    assert await asyncorm.native(work)() == 1


async def test_a_task_that_outlives_the_operation_has_a_connection_of_its_own() -> None:
    tasks: list[asyncio.Task[Any]] = []
    gone_on = asyncio.Event()

    async def later() -> Any:
        await gone_on.wait()
        return await value("SELECT current_setting('my.tenant', true)")

    async def start() -> None:
        tasks.append(asyncio.create_task(later()))
        tasks.append(asyncio.create_task(value("SELECT pg_sleep(0.1), 1")))  # under way at the end
        await asyncio.sleep(0.02)

    def work() -> Any:
        execute("SET my.tenant = '7'")
        asyncorm.await_(start())
        return execute("SELECT current_setting('my.tenant')")

    assert await asyncorm.native(work)() == ("7",)
    gone_on.set()
    assert await tasks[0] in (None, "")
    await tasks[1]


async def test_cancelled_while_it_awaits_with_session_state() -> None:
    started = asyncio.Event()

    async def never() -> None:
        started.set()
        await asyncio.gather(value("SELECT pg_sleep(60)"), value("SELECT pg_sleep(60)"))

    def work() -> None:
        execute("SET my.tenant = '7'")
        asyncorm.await_(never())

    task = asyncio.create_task(asyncorm.native(work)())
    await started.wait()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled()
    assert await value("SELECT current_setting('my.tenant', true)") in (None, "")


async def test_a_second_connection_for_what_is_awaited_names_the_holder() -> None:
    async def outside() -> Any:
        async with asyncorm.detached():
            return await value("SELECT 1")

    def work() -> Any:
        execute("SET my.tenant = '7'")
        return asyncorm.await_(outside())

    with pytest.raises(OperationalError, match=r"Deadlock.*synchronous code at .*keeps"):
        await asyncorm.native(work)()


@pytest.mark.parametrize(
    "statement",
    [
        "CALL a_procedure()",
        "DISCARD TEMP",
        "DEALLOCATE ALL",
        "SELECT set_config('a.b', 'c', %s)",
        "SELECT 'a\\'; SET x = 1; --'",  # with standard_conforming_strings off it is one literal
        "CREATE OR REPLACE TEMPORARY VIEW a AS SELECT 1",
        "DECLARE a CURSOR WITH/**/HOLD FOR SELECT 1",
        "SELECT 'it''s' -- it's\n; SET x = 1",
        'SELECT 1 AS "a""b"; SET x = 1',
        "SET ROLE a",
        ";;RESET ALL",
    ],
)
def test_what_may_leave_something_counts(statement: str) -> None:
    assert leaves_state(statement)
    assert not is_single(statement)
    assert not is_read(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE a (b int)",
        "SELECT 1; create VIEW a AS SELECT 1",
        "SELECT (1)INTO a",
        "WITH a AS (SELECT 1) SELECT * /**/ INTO b FROM a",
    ],
)
def test_what_may_be_temporary_counts(statement: str) -> None:
    assert traces(statement) is True
    assert not leaves_state(statement), "a thread's connection has nothing left of a migration"
    assert not is_single(statement)


@pytest.mark.parametrize(
    "piece",
    [
        "/**/", "/*", "--\n", "-", "'", '"', '"a".', "e'", "$a", " $a$", "u&", " ", "; ", "(", "a",
        "set ", "create ", "create" + " " * 500, "set_config('a', ", "for ", "'a', ",
    ],
)  # fmt: skip
@pytest.mark.parametrize("around", ["{} SELECT 1", "SELECT ';{}'", "SET {}", "SELECT 1; {}"])
def test_long_statements_are_looked_at_in_linear_time(piece: str, around: str) -> None:
    text = around.format(piece * (1_000_000 // len(piece)))
    began = time.process_time()
    for look in (leaves_state, makes_a_table, is_single, is_read, calls_known):
        look(text)
    assert time.process_time() - began < 5, "0.3 s are usual; a quadratic way takes hours"


async def test_deadlock_on_the_pool_is_told_at_once() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncorm.atomic():
        await value("SELECT 1")
        async with asyncorm.detached():
            with pytest.raises(OperationalError, match="Deadlock on the native pool") as caught:
                await value("SELECT 1")
        assert "1 x the transaction block that began at " in str(caught.value)
        assert __file__ in str(caught.value)
        assert await value("SELECT 2") == 2, "the block goes on"
    assert loop.time() - began < settings.DATABASES["default"]["OPTIONS"]["pool"]["timeout"]


async def test_streams_that_need_a_second_connection_are_told_who_holds_them() -> None:
    """One fails and gives its connection to the other."""
    pool = connections.settings["default"]["OPTIONS"]["pool"]
    pool.update(max_size=2, timeout=20)
    both = asyncio.Barrier(2)

    async def stream() -> int:
        rows = Permission.objects.native_iterator(chunk_size=1)
        async with contextlib.aclosing(rows):  # type: ignore[type-var]
            async for _ in rows:
                await both.wait()
                return await value("SELECT 7")  # type: ignore[no-any-return]
        raise AssertionError

    async with asyncio.timeout(10):
        results = await asyncio.gather(stream(), stream(), return_exceptions=True)
    failed = [result for result in results if result != 7]
    assert len(failed) == 1
    assert isinstance(failed[0], OperationalError)
    assert "2 x a stream or connection() that began at" in str(failed[0])
    assert __file__ in str(failed[0])


async def test_exhausted_pool_names_the_holders() -> None:
    async def hold(entered: asyncio.Event) -> None:
        async with asyncorm.connection():
            await value("SELECT 1")
            entered.set()
            await asyncio.sleep(60)

    entered = asyncio.Event()
    holder = asyncio.create_task(hold(entered))
    await entered.wait()
    with pytest.raises(OperationalError, match=r"max_size") as caught:
        await value("SELECT 1")
    assert f"connection() that began at {__file__}" in str(caught.value)
    holder.cancel()
    await asyncio.wait([holder])
    await settled()
    assert await value("SELECT 1") == 1
