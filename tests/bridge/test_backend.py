"""The backend: synchronous code gets Django's own, native code a subclass of the same class."""

import asyncio
import threading
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import (
    InterfaceError,
    OperationalError,
    close_old_connections,
    connection,
    connections,
    models,
    transaction,
)
from django.db.backends.postgresql.base import DatabaseWrapper as DjangosWrapper
from django.db.models import Func, TextField, Value
from django.db.utils import load_backend
from django.test import TestCase, TransactionTestCase, override_settings
from django.test.utils import CaptureQueriesContext

import asyncorm
from asyncorm import native, swap
from asyncorm.backends.mixin import NativeBackendMixin
from asyncorm.backends.postgresql import base
from tests.project.shop.models import Tag
from tests.support import backend_pid, database, in_thread, value

pytestmark = pytest.mark.usefixtures("fresh_shop")


def test_it_is_djangos_class_and_little_more() -> None:
    assert issubclass(base.DatabaseWrapper, DjangosWrapper)
    assert load_backend("asyncorm.backends.postgresql").DatabaseWrapper is base.DatabaseWrapper
    assert type(connections["default"]) is base.DatabaseWrapper
    assert connection.vendor == "postgresql"
    assert connection.features.__class__ is DjangosWrapper.features_class
    assert connection.ops.__class__ is DjangosWrapper.ops_class


def test_synchronous_code_has_psycopgs_own_connection() -> None:
    import psycopg

    connection.ensure_connection()
    assert type(connection.connection) is psycopg.Connection
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)


def test_synchronous_transactions() -> None:
    ran: list[int] = []
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        Tag.objects.create(name="lost")
        raise ZeroDivisionError
    with transaction.atomic():
        Tag.objects.create(name="kept")
        transaction.on_commit(lambda: ran.append(1))
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            Tag.objects.create(name="inner")
            raise ZeroDivisionError
    assert ran == [1]
    assert set(Tag.objects.filter(pk__gt=6).values_list("name", flat=True)) == {"kept"}


async def test_a_long_operation_replaces_a_broken_connection() -> None:
    """As Django's: a worker's loop, run natively, calls close_old_connections() now and then."""

    def work() -> int:
        with pytest.raises(OperationalError):
            value("SELECT pg_terminate_backend(pg_backend_pid())")
        close_old_connections()
        return Tag.objects.count()

    assert await native(work)() == 6


async def test_native_code_has_another_class() -> None:
    def look() -> Any:
        return type(connections["default"]), connections["default"].alias

    cls, alias = await native(look)()
    assert cls is not base.DatabaseWrapper
    assert issubclass(cls, base.DatabaseWrapper)
    assert alias == "default"
    # Outside, it is Django's own again.
    assert type(connections["default"]) is base.DatabaseWrapper


async def test_gathered_operations_have_wrappers_of_their_own() -> None:
    def look() -> int:
        first = id(connections["default"])
        backend_pid()
        asyncorm.await_(asyncio.sleep(0.01))
        assert id(connections["default"]) == first
        return first

    assert len(set(await asyncio.gather(*[native(look)() for _ in range(5)]))) == 5


async def test_connections_all_and_close_all() -> None:
    def work() -> int:
        backend_pid()
        connections.close_all()
        assert {each.alias for each in connections.all()} == {"default", "other", "legacy"}
        return backend_pid()

    assert await native(work)()


async def test_closing_the_connection_in_native_code() -> None:
    def work() -> tuple[int, int]:
        first = backend_pid()
        connection.close()
        return first, backend_pid()

    first, second = await native(work)()
    assert first
    assert second
    assert await native(lambda: connection.is_usable() if connection.connection else True)()


# Other backends with the mixin


class Instrumented(DjangosWrapper):
    """Somebody's backend."""

    statements: list[str] = []
    marker = "instrumented"

    def create_cursor(self, name: str | None = None) -> Any:
        self.statements.append(self.alias)
        return super().create_cursor(name)


class DatabaseWrapper(NativeBackendMixin, Instrumented):  # type: ignore[misc]
    """What its native variant looks like: a module of this form is an ENGINE's base."""


@pytest.fixture
def instrumented(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "instrumented_backend"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("from tests.bridge.test_backend import DatabaseWrapper\n")
    monkeypatch.syspath_prepend(tmp_path)
    Instrumented.statements.clear()
    return "instrumented_backend"


async def test_a_backend_with_the_mixin_is_native(instrumented: str) -> None:
    with database(ENGINE=instrumented) as alias:
        assert await Tag.objects.using(alias).native_count() == 6
        assert await native(lambda: connections[alias].marker)() == "instrumented"
        assert isinstance(connections[alias], Instrumented)
        async with asyncorm.atomic(using=alias):
            await Tag.objects.using(alias).native_create(name="new")
        assert Instrumented.statements == ["extra"] * len(Instrumented.statements) != []
        assert await in_thread(Tag.objects.using(alias).count) == 7


class OfTenant(DjangosWrapper):
    """A backend that keeps on the wrapper what its cursors set in the session."""

    tenant = "nobody"

    def _cursor(self, name: str | None = None) -> Any:
        cursor = super()._cursor(name)
        self.connection.execute("SELECT set_config('app.tenant', %s, false)", [self.tenant])
        return cursor


class TenantWrapper(NativeBackendMixin, OfTenant):  # type: ignore[misc]
    pass


def with_tenant(alias: str) -> Any:
    setting = Func(Value("app.tenant"), function="current_setting", output_field=TextField())
    return Tag.objects.using(alias).annotate(tenant=setting)


async def test_what_a_backend_keeps_on_the_wrapper_is_for_one_operation(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tenant_backend"
    package.mkdir()
    (package / "__init__.py").write_text("")
    source = "from tests.bridge.test_backend import TenantWrapper as DatabaseWrapper\n"
    (package / "base.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(swap, "_foreign", None)  # read once, before this alias was there
    with database("tenants", ENGINE="tenant_backend") as alias:

        def read() -> str:
            return str(with_tenant(alias).get(pk=1).tenant)

        def keep(tenant: str) -> None:
            connections[alias].tenant = tenant

        def work(tenant: str) -> str:
            keep(tenant)
            return read()

        names = ["a", "b"] * 4
        for _ in range(2):
            assert await asyncio.gather(*(native(work)(name) for name in names)) == names
            assert await asyncio.gather(*(native(read)() for _ in names)) == ["nobody"] * 8
        # Under the swap a middleware's connection is that of the thread.
        with override_settings(ASYNCORM={"SWAP_MANAGERS": True}):
            for tenant in ("a", "b"):
                await sync_to_async(
                    lambda name=tenant: setattr(connections[alias], "tenant", name)
                )()
                assert (await with_tenant(alias).aget(pk=1)).tenant == tenant
            await sync_to_async(lambda: connections[alias].close())()


# What reads a connection's log or counts its queries


async def test_assert_num_queries_sees_native_statements() -> None:
    case = TransactionTestCase()
    with case.assertNumQueries(2):
        await Tag.objects.native_count()
        await Tag.objects.native_get(pk=1)
    with pytest.raises(AssertionError), case.assertNumQueries(1):
        await Tag.objects.native_count()
        await Tag.objects.native_count()


async def test_captured_queries_of_gathered_operations() -> None:
    with CaptureQueriesContext(connection) as captured:
        await asyncio.gather(*[Tag.objects.native_get(pk=n) for n in range(1, 5)])
    assert len(captured) == 4
    assert sorted(query["sql"][-12:] for query in captured)
    await Tag.objects.native_count()
    assert len(captured) == 4


async def test_connection_queries_in_debug_mode() -> None:
    from django.db import reset_queries

    with override_settings(DEBUG=True):
        reset_queries()
        await Tag.objects.native_count()
        assert len(connection.queries) == 1
        assert "COUNT" in connection.queries[0]["sql"]
        assert float(connection.queries[0]["time"]) >= 0


async def test_nothing_is_logged_without_being_asked() -> None:
    with override_settings(DEBUG=False):
        before = len(connection.queries_log)
        await Tag.objects.native_count()
        assert len(connection.queries_log) == before


# Threads and tasks


def test_synchronous_threads_have_connections_of_their_own() -> None:
    found: list[int] = []

    def work() -> None:
        try:
            found.append(backend_pid())
        finally:
            connections.close_all()

    mine = backend_pid()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert mine not in found


async def test_a_native_connection_is_of_no_use_in_a_thread() -> None:
    def use(wrapper: Any) -> int:
        connections["default"] = wrapper
        try:
            wrapper.inc_thread_sharing()
            with pytest.raises(InterfaceError, match="outside native code"):
                Tag.objects.count()
            return len(wrapper.queries_log)  # what request_started clears
        finally:
            del connections["default"]

    def hand_over() -> int:
        Tag.objects.count()
        return asyncorm.await_(asyncio.to_thread(use, connections["default"]))

    assert await native(hand_over)() == 0


async def test_sync_to_async_works_beside_native_code() -> None:
    async def both(n: int) -> tuple[int, int]:
        return await in_thread(Tag.objects.count), await Tag.objects.native_count()

    assert await asyncio.gather(*map(both, range(5))) == [(6, 6)] * 5


async def test_native_code_in_a_view_called_by_async_to_sync() -> None:
    """A synchronous view in a thread that calls a coroutine: it runs on the main loop again."""
    from asgiref.sync import async_to_sync

    async def inner() -> tuple[int, int]:
        return await Tag.objects.native_count(), threading.get_ident()

    found = await sync_to_async(async_to_sync(inner))()
    assert found == (6, threading.get_ident())


def test_native_code_called_by_async_to_sync_without_a_loop() -> None:
    from asgiref.sync import async_to_sync

    async def inner() -> int:
        return await Tag.objects.native_count()

    assert async_to_sync(inner)() == 6


# What Django's backend offers beyond queries


async def test_introspection_and_schema_editor() -> None:
    def work() -> list[str]:
        with connection.schema_editor() as editor:

            class Temporary(models.Model):
                name = models.CharField(max_length=10)

                class Meta:
                    app_label = "temporary"

            editor.create_model(Temporary)
        try:
            Temporary.objects.create(name="x")
            with connection.cursor() as cursor:
                return list(connection.introspection.table_names(cursor))
        finally:
            with connection.schema_editor() as editor:
                editor.delete_model(Temporary)

    from django.apps import apps

    try:
        assert "temporary_temporary" in await native(work)()
    finally:
        apps.all_models.pop("temporary", None)
        apps.clear_cache()


async def test_constraint_checks_and_sequences() -> None:
    def work() -> None:
        with transaction.atomic():
            with connection.constraint_checks_disabled():
                Tag.objects.create(name="x")
            connection.check_constraints()

    await native(work)()


async def test_copy_through_the_cursor() -> None:
    def work() -> tuple[int, list[Any]]:
        with transaction.atomic(), connection.cursor() as cursor:
            with cursor.copy("COPY shop_tag (name, weight) FROM STDIN") as copy:
                for n in range(100):
                    copy.write_row((f"copied {n}", n))
            with cursor.copy("COPY (SELECT count(*) FROM shop_tag) TO STDOUT") as copy:
                rows = list(copy.rows())
        return Tag.objects.count(), rows

    count, rows = await native(work)()
    assert count == 106
    assert rows == [("106",)]


async def test_a_pipeline_of_psycopg() -> None:
    def work() -> list[Any]:
        connection.ensure_connection()
        with connection.connection.pipeline():
            cursors = [connection.connection.execute("SELECT %s::int", [n]) for n in range(20)]
        return [cursor.fetchone()[0] for cursor in cursors]

    assert await native(work)() == list(range(20))


async def test_notifications() -> None:
    def work() -> list[str]:
        with connection.cursor() as cursor:
            cursor.execute("LISTEN channel")
            cursor.execute("NOTIFY channel, 'hello'")
        found = connection.connection.notifies(timeout=5, stop_after=1)
        return [each.payload for each in found]

    assert await native(work)() == ["hello"]


async def test_large_results_and_parameters() -> None:
    text = "ü" * 5_000_000

    def work() -> bool:
        return bool(value("SELECT %s", [text]) == text)

    assert await native(work)()
    assert await native(value)("SELECT length(repeat('x', 20000000))") == 20_000_000


class DjangosCase(TestCase):
    """Django's own test case, synchronous, on this backend."""

    databases = {"default"}

    def test_rolls_back(self) -> None:
        Tag.objects.create(name="only here")
        assert Tag.objects.filter(name="only here").count() == 1

    def test_rolled_back(self) -> None:
        assert not Tag.objects.filter(name="only here").exists()


def test_what_django_sets_is_no_state(settings: Any) -> None:
    """A time zone by settings that change, of which native connections hear, is no state."""
    with database() as alias:
        left = connections[alias]
        left.ensure_connection()
        settings.TIME_ZONE = "Asia/Tokyo"
        settings.USE_TZ = False
        assert value("SHOW TimeZone", using=alias) == "Asia/Tokyo"
        assert not left.has_server_state
        with left.cursor() as cursor:
            cursor.execute("SET app.tenant = 'acme'")
        settings.USE_TZ = True
        assert left.has_server_state
