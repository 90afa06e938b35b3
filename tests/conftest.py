"""Starts PostgreSQL for the session, creates the test databases, and offers the sample data.

With ASYNCORM_TEST_LOOP=uvloop in the environment the tests run on that event loop; with
ASYNCORM_TEST_CACHE=verify each hit of the statement cache is compared with Django's compiler.
"""

import asyncio
import gc
import json
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

SESSION = ExitStack()
collect_ignore = ["example"]  # run by test_testing.py and test_asgi.py
if "ASYNCORM_TEST_OTHERS" not in os.environ:  # they connect receivers and the like: test_others.py
    collect_ignore.append("requests/test_other_middleware.py")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    from asyncorm.demo.postgres import postgres_server

    if os.environ.get("ASYNCORM_TEST_LOOP") == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    if cache := os.environ.get("ASYNCORM_TEST_CACHE"):
        from asyncorm import conf

        conf.DEFAULTS["STATEMENT_CACHE"] = cache  # also where a test has settings of its own
    server = SESSION.enter_context(postgres_server())
    # For this process and for those that tests start.
    os.environ["ASYNCORM_TEST_DATABASE"] = json.dumps(server.settings)
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.project.settings"

    import django
    from django.conf import settings

    from tests.project.settings import databases

    # pytest-django may have read the settings before there was a server.
    for alias, database in databases().items():
        settings.DATABASES[alias].update(database)
    django.setup()
    if cache:  # where Django was set up before, what was the default has been taken already
        from django.test.signals import setting_changed

        setting_changed.send(sender=None, setting="ASYNCORM", value=None, enter=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Modules and tests stay: a full collection, which some tests ask for, need not look at them.
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from asyncorm import statement_cache_stats

    stats = statement_cache_stats()
    if stats["verified"]:
        terminalreporter.write_line(
            f"{stats['verified']:,} hits of {stats['verified_shapes']:,} shapes were verified, "
            f"{stats['different']} different"
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    SESSION.close()


@pytest.fixture(scope="session")
def django_db_setup(django_test_environment: None, django_db_blocker: Any) -> Iterator[Any]:
    """Create all test databases; unlike pytest-django's own, fail if one cannot be dropped.

    A connection that anything left open is what keeps a database from being dropped.
    """
    from django.test import TransactionTestCase
    from django.test.utils import setup_databases, teardown_databases

    from tests.stock import Stock

    with django_db_blocker.unblock():
        databases = setup_databases(verbosity=0, interactive=False)
        # Here, because later a test's transaction may be open.
        stock = Stock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransactionTestCase, "_fixture_teardown", lambda case: stock.flush(case))
        yield stock
    stock.close()
    _close_djangos_own()
    with django_db_blocker.unblock():
        teardown_databases(databases, verbosity=0)


def _close_djangos_own() -> None:
    """Close synchronous connections that a context keeps, such as that of a loop's fixtures.

    Django closes those of the main context only. Native ones must be closed already. Its pools go
    first: they would replace what is closed without them.
    """
    from django.db.backends.postgresql.base import DatabaseWrapper

    for pool in DatabaseWrapper._connection_pools.values():
        pool.close()
    for connection in gc.get_objects():
        if type(connection) is psycopg.Connection:
            connection.close()


@pytest.fixture(scope="session")
def stock(django_db_setup: Any) -> Any:
    return django_db_setup


@pytest.fixture
def shop_data(stock: Any, request: pytest.FixtureRequest, django_db_blocker: Any) -> Iterator[None]:
    """The sample (project/shop/sample.py), committed on `default` and `other`, for reading only.

    Needs no `django_db` mark. A test that writes takes `fresh_shop`.
    """
    if stock.holds != "sample":
        stock.fill("sample")
    with django_db_blocker.unblock():
        yield
    if request.node.get_closest_marker("django_db"):
        stock.holds = "unknown"  # with transaction=True the tables are flushed


@pytest.fixture
def fresh_shop(stock: Any, django_db_blocker: Any) -> Iterator[Callable[[], None]]:
    """The sample, committed and free to be changed; a call puts it back as it was."""

    def again() -> None:
        stock.fill("sample")
        stock.holds = "unknown"

    again()
    with django_db_blocker.unblock():
        yield again


@pytest.fixture(autouse=True)
def _none_slow() -> Iterator[None]:
    """No statement goes alone because it was slow in the test before."""
    from asyncorm._wire.slow import slow

    yield
    slow._seen.clear()


@pytest.fixture(autouse=True)
def _no_sample(request: pytest.FixtureRequest) -> None:
    """Tests that do not ask for the sample find the tables empty, in whichever order tests run."""
    if {"shop_data", "fresh_shop"} & set(request.fixturenames):
        return
    if _is_test_case(request.cls):
        return  # its transaction is open already
    if "django_db_setup" in request.fixturenames or request.node.get_closest_marker("django_db"):
        stock = request.getfixturevalue("stock")
        if stock.holds != "empty":
            stock.fill("empty")


@pytest.fixture(autouse=True, scope="class")
def _no_sample_for_class(request: pytest.FixtureRequest) -> None:
    """The same for Django's TestCase classes, before setUpTestData()."""
    if _is_test_case(request.cls):
        stock = request.getfixturevalue("stock")
        if stock.holds != "empty":
            stock.fill("empty")


def _is_test_case(cls: type | None) -> bool:
    from django.test import TestCase

    return cls is not None and issubclass(cls, TestCase)


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run a coroutine on a loop that the module's tests share; between calls no loop is running."""
    with asyncio.Runner() as runner:

        def run(work: Coroutine[Any, Any, Any]) -> Any:
            async def keep() -> None:
                # Not as the task's result: Python 3.11's runner takes the task's repr(), and the
                # repr() of a model instance may load its deferred fields.
                results.append(await work)

            results: list[Any] = []
            runner.run(keep())
            return results[0]

        yield run


@pytest.fixture(params=["native", pytest.param("swapped", marks=pytest.mark.slow)], scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[Any]:
    """How operations are called (see operations.py): natively by either set of names."""
    from asgiref.sync import SyncToAsync
    from django.test import override_settings

    from tests.operations import Native, Swapped

    async def refuse(self: SyncToAsync, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{self.func} was sent to a thread")

    swap = request.param == "swapped"
    with pytest.MonkeyPatch.context() as patch, override_settings(ASYNCORM={"SWAP_MANAGERS": swap}):
        # What falls back to Django's own way would pass for equal.
        patch.setattr(SyncToAsync, "__call__", refuse)
        yield Swapped() if swap else Native()
