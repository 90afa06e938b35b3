"""`Connection.run()`: a statement without a cursor behaves as one with a cursor does."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from django.db import IntegrityError, ProgrammingError, connection, connections, transaction
from django.db.transaction import TransactionManagementError

import asyncorm
from asyncorm._wire.statement import Statement
from tests.support import all_given_back, database

pytestmark = pytest.mark.usefixtures("unblocked")

INT4, TEXT = 23, 25


@pytest.fixture
async def unblocked(django_db_setup: Any, django_db_blocker: Any) -> AsyncIterator[None]:
    with django_db_blocker.unblock():
        yield
        await asyncorm.close_pools()


def prepared(using: str = "default") -> list[str]:
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT statement FROM pg_prepared_statements ORDER BY 1")
        return [statement for (statement,) in cursor.fetchall()]


def run(statement: Statement, using: str = "default") -> list[Any]:
    """As the rest of asyncorm runs it: on the operation's connection, with Django's errors."""
    wrapper = connections[using]
    wrapper.ensure_connection()
    with wrapper.wrap_database_errors:
        result = wrapper.connection.run(statement)
    wrapper.connection.transformer.set_pgresult(result)
    return list(wrapper.connection.transformer.load_rows(0, result.ntuples, tuple))


def plus(number: int) -> Statement:
    return Statement(b"SELECT $1 + 1, now() > 'epoch'", [str(number).encode()], (INT4,))


@asyncorm.native
def repeat(times: int, using: str) -> list[str]:
    for i in range(times):
        assert run(plus(i), using) == [(i + 1, True)]
    return prepared(using)


async def test_rows() -> None:
    assert await asyncorm.native(run)(plus(41)) == [(42, True)]


async def test_prepared_from_the_threshold_on() -> None:
    with database("extra", OPTIONS={"prepare_threshold": 2}):
        assert await repeat(2, "extra") == []
        assert await repeat(2, "extra") == ["SELECT $1 + 1, now() > 'epoch'"]
        await asyncorm.close_pools("extra")


async def test_never_prepared_by_default() -> None:
    assert await repeat(8, "default") == []


async def test_the_number_of_prepared_statements_is_bounded() -> None:
    @asyncorm.native
    def many() -> int:
        connections["extra"].ensure_connection()
        connections["extra"].connection.prepared_max = 5
        for i in range(20):
            for _ in range(2):
                run(Statement(b"SELECT %d, $1" % i, [b"x"], (TEXT,)), "extra")
        return len(prepared("extra"))

    with database("extra", OPTIONS={"prepare_threshold": 0}):
        assert await many() == 5
        await asyncorm.close_pools("extra")


@pytest.mark.parametrize("forget", ["DISCARD ALL", "DEALLOCATE ALL", "rollback", "reset"])
async def test_prepared_statements_are_forgotten(forget: str) -> None:
    @asyncorm.native
    def through_cursor() -> None:
        with connections["extra"].cursor() as cursor:
            cursor.execute(forget)

    @asyncorm.native
    def roll_back() -> None:
        with transaction.atomic(using="extra"):
            run(plus(1), "extra")
            transaction.set_rollback(True, using="extra")

    @asyncorm.native
    def touch() -> None:
        with connections["extra"].cursor() as cursor:
            cursor.execute("SET application_name = 'touched'")  # reset when it is given back

    with database(
        "extra", OPTIONS={"prepare_threshold": 0, "pool": {"min_size": 0, "max_size": 1}}
    ):
        assert await repeat(2, "extra") != []
        await {"rollback": roll_back, "reset": touch}.get(forget, through_cursor)()
        assert await repeat(2, "extra") != []  # an unknown name would raise
        await asyncorm.close_pools("extra")


async def test_a_plan_that_a_change_of_the_table_made_useless() -> None:
    @asyncorm.native
    def alter(sql: str) -> None:
        with connections["default"].cursor() as cursor:  # another session
            cursor.execute(sql)

    @asyncorm.native
    def select(atomic: bool = False) -> list[Any]:
        if not atomic:
            return run(Statement(b"SELECT * FROM plans"), "extra")
        with transaction.atomic(using="extra"):
            return run(Statement(b"SELECT * FROM plans"), "extra")

    with database("extra", OPTIONS={"prepare_threshold": 0}):
        await alter("CREATE TABLE plans AS SELECT 1 AS a")
        try:
            assert await select() == [(1,)]
            await alter("ALTER TABLE plans ADD b int DEFAULT 2")
            assert await select() == [(1, 2)]
            assert await select() == [(1, 2)]
            await alter("ALTER TABLE plans ADD c int DEFAULT 3")
            with pytest.raises(Exception, match="cached plan must not change"):
                await select(atomic=True)  # the transaction is lost, the statement is not
            assert await select() == [(1, 2, 3)]
        finally:
            await alter("DROP TABLE plans")
            await asyncorm.close_pools("extra")


async def test_errors_are_those_of_a_cursor() -> None:
    @asyncorm.native
    def fail(sql: bytes) -> None:
        run(Statement(sql))

    with pytest.raises(ProgrammingError, match="does not exist") as caught:
        await fail(b"SELECT * FROM nowhere")
    assert isinstance(caught.value.__cause__, psycopg.errors.UndefinedTable)
    assert caught.value.__cause__.diag.sqlstate == "42P01"
    with pytest.raises(IntegrityError):
        await fail(b"INSERT INTO django_migrations (id) VALUES (NULL)")
    with pytest.raises(ProgrammingError, match="COPY_OUT"):
        await fail(b"COPY django_migrations TO STDOUT")
    assert await asyncorm.native(run)(plus(1)) == [(2, True)]
    await all_given_back()


async def test_transactions() -> None:
    @asyncorm.native
    def fail() -> None:
        run(Statement(b"SELECT 1/0"))

    @asyncorm.native
    def number() -> Any:
        return run(Statement(b"SELECT txid_current()"))

    async with asyncorm.atomic():
        assert await number() == await number()
    with pytest.raises(TransactionManagementError, match="rolled back"):
        async with asyncorm.atomic():
            with pytest.raises(Exception, match="division by zero"):
                await fail()
            with pytest.raises(Exception, match="current transaction is aborted"):
                await number()
    assert await number() != await number()


async def test_cancellation_cancels_it_on_the_server() -> None:
    task = asyncio.create_task(asyncorm.native(run)(Statement(b"SELECT pg_sleep(60)")))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await all_given_back())["pool_size"] >= 1

    @asyncorm.native
    def running() -> int:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'active'"
                " AND query LIKE 'SELECT pg_sleep%%'"
            )
            return int(cursor.fetchone()[0])

    assert await running() == 0


async def test_what_it_leaves_in_the_session_is_reset() -> None:
    setting = Statement(b"SELECT set_config('application_name', 'left', false)", traces=True)
    with database("extra", OPTIONS={"pool": {"min_size": 0, "max_size": 1}}):
        await asyncorm.native(run)(setting, "extra")
        await all_given_back("extra")
        shown = await asyncorm.native(run)(
            Statement(b"SELECT current_setting('application_name')"), "extra"
        )
        assert shown == [("extra",)]
        await asyncorm.close_pools("extra")


async def test_loaders_registered_later_are_used() -> None:
    from psycopg.types.string import TextLoader

    @asyncorm.native
    def twice() -> list[Any]:
        wrapper = connections["extra"]
        first = run(Statement(b"SELECT 1"), "extra")
        wrapper.connection.adapters.register_loader("int4", TextLoader)
        return first + run(Statement(b"SELECT 1"), "extra")

    with database("extra"):
        assert await twice() == [(1,), ("1",)]
        await asyncorm.close_pools("extra")
