"""A primary with two standbys that may lag, their aliases, and a router over them."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, NamedTuple

import asyncorm
from asyncorm.demo.postgres import Server, postgres_server
from asyncorm.replicas import ReplicaRouter, positions
from tests.pool.test_standby import ask, reach
from tests.support import CREATE_ITEM, database, eventually

ids = count(1)
POOL = {"options": None, "pool": {"min_size": 0, "max_size": 5}}
REPLICAS = ("r1", "r2")


class Servers(NamedTuple):
    primary: Server
    standbys: tuple[Server, Server]

    def delay(self, milliseconds: int) -> None:
        """Have both standbys replay each commit so much later."""
        for standby in self.standbys:
            ask(standby, f"ALTER SYSTEM SET recovery_min_apply_delay = {milliseconds}")
            ask(standby, "SELECT pg_reload_conf()")
            deadline = time.monotonic() + 30
            while ask(standby, SHOWN) != str(milliseconds):
                assert time.monotonic() < deadline
                time.sleep(0.02)


SHOWN = "SELECT setting FROM pg_settings WHERE name = 'recovery_min_apply_delay'"


@contextmanager
def trio() -> Iterator[Servers]:
    """The servers, with a table for items and a function that adds one."""
    with ExitStack() as stack:
        primary = stack.enter_context(postgres_server(own=True))
        ask(primary, CREATE_ITEM)
        ask(
            primary,
            "CREATE FUNCTION add(number int) RETURNS int LANGUAGE sql AS"
            " 'INSERT INTO myapp_item (remote_id) VALUES (number) RETURNING remote_id'",
        )
        standbys = [stack.enter_context(postgres_server(standby_of=primary)) for _ in REPLICAS]
        yield Servers(primary, (standbys[0], standbys[1]))


@contextmanager
def reached(servers: Servers) -> Iterator[None]:
    """The aliases `primary`, `r1` and `r2`; no items."""
    ask(servers.primary, "TRUNCATE myapp_item")
    with ExitStack() as stack:
        stack.enter_context(database("primary", **reach(servers.primary), OPTIONS=POOL))
        for alias, standby in zip(REPLICAS, servers.standbys, strict=True):
            stack.enter_context(database(alias, **reach(standby), OPTIONS=POOL))
        try:
            yield
        finally:
            servers.delay(0)


@contextmanager
def routed(settings: Any, **options: Any) -> Iterator[ReplicaRouter]:
    router = ReplicaRouter("primary", REPLICAS, **options)
    settings.DATABASE_ROUTERS = [router]
    yield router
    settings.DATABASE_ROUTERS = []


@contextmanager
def request(**kept: positions.Position) -> Iterator[positions.Need]:
    """What the middleware does for a request."""
    before = positions.enter(need := positions.Need.of(kept))
    try:
        yield need
    finally:
        positions.enter(before)


def readable(router: ReplicaRouter) -> set[str]:
    """The replicas that somebody who has written nothing may read now."""
    router.watch()
    with request() as need:
        needed = router.watcher.needed(need)
    replicas = router.watcher.replicas.items()
    return {
        alias
        for alias, replica in replicas
        if needed is not None and router.watcher.fits(replica, needed)
    }


async def read_by(router: ReplicaRouter, *aliases: str, seconds: float = 20) -> None:
    """Wait until reads go to these servers and to no others."""
    await eventually(lambda: readable(router) == set(aliases), seconds)


async def position_now() -> positions.Position:
    """That of the primary."""
    async with asyncorm.cursor("primary") as cursor:
        await cursor.execute(positions.ASK_PRIMARY)
        _, server, lsn, _ = await cursor.fetchone()
    return positions.Position(server, lsn)
