"""`manage.py asyncorm sizing`: what the settings will open, and what real servers allow."""

import asyncio
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError

import asyncorm
from asyncorm import sizing
from asyncorm.demo.postgres import Server, postgres_server
from asyncorm.replicas import ReplicaRouter
from asyncorm.testing import native_only
from tests.support import database, free_port, value

pytestmark = pytest.mark.usefixtures("django_db_setup")

RESERVED = {"superuser_reserved_connections": "2"}


@contextmanager
def administrator(server: Server) -> Iterator[psycopg.Connection[Any]]:
    settings = server.settings
    with psycopg.connect(
        host=settings["HOST"], port=settings["PORT"], user="postgres", dbname="postgres",
        password=settings["PASSWORD"], autocommit=True,
    ) as admin:  # fmt: skip
        yield admin


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    """One with a role and a database that have limits, and its standby."""
    settings = {"max_connections": "60", **RESERVED}
    with postgres_server(own=True, tcp=True, settings=settings) as primary:
        with administrator(primary) as admin:
            password = primary.settings["PASSWORD"]
            admin.execute(f"CREATE ROLE shop LOGIN CONNECTION LIMIT 50 PASSWORD '{password}'")
            admin.execute("CREATE DATABASE shop CONNECTION LIMIT 40")
        with postgres_server(standby_of=primary, settings=settings) as standby:
            yield primary, standby


@pytest.fixture(autouse=True)
def _unblocked(django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield


def shown(*args: str) -> str:
    out = io.StringIO()
    call_command("asyncorm", "sizing", *args, stdout=out)
    return out.getvalue()


def of(name: str, workers: int) -> sizing.Server:
    """The server that an alias reaches."""
    (found,) = (
        server
        for server in sizing.report(workers)
        if name in [demand.alias for demand in server.demands]
    )
    return found


def as_shop(server: Server) -> dict[str, Any]:
    return {**server.settings, "USER": "shop", "NAME": "shop"}


def test_two_aliases_of_one_server_and_a_standby(servers: tuple[Server, Server]) -> None:
    primary, standby = servers
    pool = {"pool": {"min_size": 1, "max_size": 3}}
    plain = {"pool": None}
    with (
        database("one", **as_shop(primary), OPTIONS=pool),
        database("two", **as_shop(primary), OPTIONS=plain),
        database("away", **as_shop(standby), OPTIONS=pool),
    ):
        found = of("one", 2)
        assert found is not of("away", 2)
        assert [(d.alias, d.native, d.synchronous) for d in found.demands] == [
            ("one", 3, 3),
            ("two", 10, 1),
        ]
        assert (found.most, found.reserved, found.standby) == (60, 2, False)
        assert found.limits == {"role shop": 50, "database shop": 40}
        assert found.wanted(2) == 34
        assert list(found.problems(2)) == []
        assert of("away", 1).standby
        text = shown("--workers", "4")
        assert "one: native 3 + synchronous 3 for each process, 24 for 4" in text
        assert "two: native 10 + synchronous 1 for each process, 44 for 4" in text
        assert "TOO MANY: 68 are more than max_connections (60) leaves: 58." in text
        assert "68 are more than the CONNECTION LIMIT of role shop allows: 50." in text
        assert "68 are more than the CONNECTION LIMIT of database shop allows: 40." in text


def test_one_server_by_two_ways(servers: tuple[Server, Server]) -> None:
    """By its socket and by its address: what both open counts against the same limits."""
    primary = servers[0]
    pool = {"pool": {"min_size": 1, "max_size": 3}}
    near = {**as_shop(primary), "HOST": str(primary.folder)}
    with (
        database("one", **as_shop(primary), OPTIONS=pool),
        database("near", **near, OPTIONS=pool),
    ):
        found = of("one", 2)
        assert [demand.alias for demand in found.demands] == ["one", "near"]
        assert "84 are more than max_connections (60)" in next(iter(found.problems(7)))


async def test_in_native_code_the_loop_goes_on(servers: tuple[Server, Server]) -> None:
    with database("one", **as_shop(servers[0]), OPTIONS={"pool": None}) as alias:
        expected = await asyncio.to_thread(sizing.ask, [alias])
        with native_only(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(psycopg, "connect", None)
            assert await asyncorm.native(sizing.ask)([alias]) == expected
        await asyncorm.close_pools(alias)


def test_threads_and_watchers(servers: tuple[Server, Server], settings: Any) -> None:
    """Each further thread keeps one between its loops; a watcher has one to each server."""
    primary, standby = servers
    pool = {"pool": {"min_size": 1, "max_size": 3}}
    with (
        database("one", **as_shop(primary), OPTIONS={"pool": None}),
        database("away", **as_shop(standby), OPTIONS=pool),
    ):
        settings.DATABASE_ROUTERS = [ReplicaRouter("one", ["away"])]
        text = shown("--workers", "2", "--threads", "4")
        one = "one: native 10 + synchronous 4 + kept by threads 3 + watching 1"
        assert f"{one} for each process, 36 for 2" in text
        away = "away: native 3 + synchronous 3 + kept by threads 3 + watching 1"
        assert f"{away} for each process, 20 for 2" in text
        assert "CONNECTION LIMIT" not in text
        text = shown("--workers", "4", "--threads", "4")  # 40 / 4 - 4 - 3 - 1 = 2
        assert "CONNECTION LIMIT of database shop allows: 40. With OPTIONS['pool']" in text
        assert "'max_size'] 2 for each alias" in text
        settings.DATABASE_ROUTERS = []
        assert "watching" not in shown()


def test_its_advice_fits(servers: tuple[Server, Server]) -> None:
    with database("one", **servers[0].settings, OPTIONS={"pool": {"min_size": 1, "max_size": 20}}):
        (problem,) = of("one", 8).problems(8)
        assert "'max_size'] 3 for each alias" in problem  # 8 * (3 + 3) = 48 of 58
    with database("one", **servers[0].settings, OPTIONS={"pool": {"min_size": 1, "max_size": 3}}):
        assert list(of("one", 8).problems(8)) == []
        assert "a pooler" in next(iter(of("one", 40).problems(40)))


def test_a_server_that_cannot_be_asked() -> None:
    with database("nowhere", HOST="127.0.0.1", PORT=str(free_port())):
        text = shown("--workers", "2")
    assert "could not be asked: " in text
    assert "refused" in text


async def test_hosts_that_libpq_is_told_by_the_environment(monkeypatch: Any) -> None:
    """Named where they cannot be reached; and where there are several, another may take over."""
    monkeypatch.setenv("PGHOST", "/nowhere,/neither")
    with database("nowhere", HOST="", PORT="", OPTIONS={"pool": {"timeout": 0.2}}):
        with pytest.raises(OperationalError, match=r"'/nowhere,/neither'.* for 0\.2 s: "):
            await asyncorm.native(value)("SELECT 1", using="nowhere")
        await asyncorm.close_pools("nowhere")


def test_nothing_runs_natively() -> None:
    assert list(sizing.lines([], 1)) == [
        "No database runs natively: none has an ENGINE of asyncorm."
    ]


def test_arguments() -> None:
    assert "for 1" in shown()
    with pytest.raises((CommandError, SystemExit)):
        shown("--workers", "0")
    with pytest.raises(ValueError, match="at least 1"):
        sizing.report(0)
