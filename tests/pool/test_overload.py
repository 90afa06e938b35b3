"""Many more tasks than connections: all are served in order of arrival, or refused at once."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from time import monotonic, thread_time
from typing import Any

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.db import DatabaseError, DataError, OperationalError, connections, transaction
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path
from psycopg.types.json import Jsonb

import asyncorm
from asyncorm.multiplexing import MOST
from tests.chaos import crowd, quantiles
from tests.support import administrator, all_given_back


@pytest.fixture
async def pool(django_db_setup: Any, django_db_blocker: Any) -> AsyncIterator[Callable[..., None]]:
    """Set OPTIONS["pool"] of the default database."""
    database = connections.settings["default"]
    before = database["OPTIONS"]

    def options(**pool: Any) -> None:
        database["OPTIONS"] = {**before, "pool": {"min_size": 0, **pool}}

    with django_db_blocker.unblock():
        await asyncorm.close_pools()
        yield options
        await asyncorm.close_pools()
    database["OPTIONS"] = before


async def value(sql: str, params: Any = None) -> Any:
    async with asyncorm.cursor() as cursor:
        await cursor.execute(sql, params)
        return (await cursor.fetchone())[0]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("multiplexing", [True, False])
async def test_ten_thousand_tasks_on_twenty_connections(
    pool: Callable[..., None], multiplexing: bool
) -> None:
    pool(max_size=20, timeout=300)
    while asyncorm.pool_stats().get("pool_size", 0) < 20:
        await asyncio.gather(*[value("SELECT pg_sleep(0.1)") for _ in range(20)])
    window = 20 * MOST if multiplexing else 200
    with override_settings(ASYNCORM={"MULTIPLEXING": multiplexing}):
        served, waited = await crowd("default", 10_000)
    assert sorted(served) == list(range(10_000))
    # Within a window of the pool's size (and its workers) the server decides who is done first.
    late = max(abs(place - number) for place, number in enumerate(served))
    assert late < window, late
    print(quantiles(waited))
    stats = await all_given_back()
    assert stats["pool_size"] == 20
    assert stats["requests_waiting"] == 0


async def test_none_is_overtaken_on_its_way_to_the_server(pool: Callable[..., None]) -> None:
    """However long values take: what one connection has taken is sent before others take more."""
    pool(max_size=4, timeout=60)
    while asyncorm.pool_stats().get("pool_size", 0) < 4:
        await asyncio.gather(*[value("SELECT pg_sleep(0.1)") for _ in range(4)])
    dumped: list[int] = []

    def dumps(number: int) -> str:
        dumped.append(number)
        until = thread_time() + 0.002
        while thread_time() < until:
            pass
        return str(number)

    pauses = [value("SELECT pg_sleep(0.2), 4") for _ in range(4)]  # they hold all
    asked = [value("SELECT %s::text", [Jsonb(n, dumps)]) for n in range(40)]
    assert (await asyncio.gather(*pauses, *asked))[4:] == [str(n) for n in range(40)]
    assert list(dict.fromkeys(dumped)) == list(range(40))
    await all_given_back()


async def test_bounded_queue_refuses_at_once(pool: Callable[..., None]) -> None:
    pool(max_size=2, max_waiting=3, timeout=30)
    await asyncio.gather(value("SELECT pg_sleep(0.1)"), value("SELECT pg_sleep(0.1)"))  # grown
    began = monotonic()
    busy = [asyncio.create_task(value("SELECT pg_sleep(20), 7")) for _ in range(5)]
    await asyncio.sleep(0.2)
    with pytest.raises(OperationalError, match="max_waiting"):
        await value("SELECT 1")
    assert monotonic() - began < 15
    for task in busy:
        task.cancel()
    await asyncio.wait(busy)
    assert await value("SELECT 1") == 1


async def test_bounded_queue_counts_all_kinds_of_waiting_at_once(pool: Callable[..., None]) -> None:
    pool(max_size=1, max_waiting=4, timeout=30)

    async def block() -> None:
        async with asyncorm.atomic():
            await value("SELECT 1")

    async with asyncorm.connection():
        await value("SELECT 1")
        async with asyncio.timeout(20):
            # Blocks wait for a connection, as batches do; single statements for a pipeline.
            tasks = [
                asyncio.create_task(coro)
                for _ in range(4)
                for coro in (block(), value("SELECT 1"), asyncorm.batch(value("SELECT 1")))
            ]
            await asyncio.wait(tasks, timeout=0.3)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [each for each in results if "max_waiting" in str(each)]
    assert len(refused) == 8, results


async def test_client_that_disconnects_frees_its_connection(pool: Callable[..., None]) -> None:
    pool(max_size=1, timeout=10)
    began = asyncio.Event()

    async def view(request: HttpRequest) -> HttpResponse:
        async with asyncorm.atomic():
            pid = await value("SELECT pg_backend_pid()")
            request_pids.append(pid)
            began.set()
            await value("SELECT pg_sleep(60)")
        return HttpResponse("never")

    request_pids: list[int] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/slow/",
        "query_string": b"",
        "headers": [],
    }
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    class Urls:
        urlpatterns = [path("slow/", view)]

    with override_settings(ROOT_URLCONF=Urls, MIDDLEWARE=[]):
        request = asyncio.create_task(ASGIHandler()(scope, messages.get, send))
        await asyncio.wait_for(began.wait(), 20)
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(request, 20)
    assert sent == []
    with administrator() as ask:
        state = ask("SELECT state FROM pg_stat_activity WHERE pid = %s", *request_pids)
    assert state in ("idle", None), "the statement was cancelled on the server"
    assert await asyncio.wait_for(value("SELECT 1"), 10) == 1, "the pool's one connection is free"


async def test_values_are_never_sql(pool: Callable[..., None]) -> None:
    pool(max_size=2)
    for evil in ("'; DROP TABLE x; --", "\\'; SELECT 1", "%s", "$1", "\u02bc' OR 1=1", 'a"b'):
        assert await value("SELECT %s::text", [evil]) == evil
        async with asyncorm.atomic():
            assert await value("SELECT %(v)s::text", {"v": evil}) == evil


@pytest.mark.parametrize("name", ["it's", "a b\\", "x' options='-c work_mem=77MB", "'; --"])
async def test_options_of_the_connection_are_escaped(pool: Callable[..., None], name: str) -> None:
    pool(max_size=1)
    options = connections.settings["default"]["OPTIONS"]
    options["application_name"] = name
    assert await value("SHOW application_name") == name
    assert await value("SHOW work_mem") == "4MB"


@pytest.mark.parametrize("evil", ['x"; DROP TABLE a; --', "x'; DROP TABLE a; --", "%s"])
async def test_names_of_savepoints_and_cursors_are_quoted(
    pool: Callable[..., None], evil: str
) -> None:
    pool(max_size=2)

    def work() -> None:
        with connections["default"].cursor() as cursor:
            cursor.execute("CREATE TEMP TABLE a (n int)")
        with pytest.raises(DatabaseError), transaction.atomic():
            transaction.savepoint_rollback(evil)
        with connections["default"].create_cursor(name=evil) as cursor:
            cursor.execute("SELECT 7")
            assert cursor.fetchone() == (7,)
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT count(*) FROM a")

    async with asyncorm.atomic():
        await asyncorm.native(work)()


async def test_parameters_stay_out_of_logs(
    pool: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    pool(max_size=1, timeout=1)
    secret = "do-not-log-me"
    with caplog.at_level(logging.INFO):
        await value("SELECT %s::text", [secret])
        with pytest.raises(DataError):
            await value("SELECT 1/0 WHERE %s::text <> ''", [secret])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await value("SELECT pg_sleep(10) WHERE %s::text <> ''", [secret])
    assert secret not in caplog.text
