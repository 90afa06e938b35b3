"""The primary fails under load and a standby is promoted: several hosts, HAProxy, PgBouncer."""

import asyncio
import os
from typing import Any

import pytest

import asyncorm
from asyncorm import replicas
from asyncorm.replicas import ReplicaRouter
from tests import availability
from tests.pool.test_standby import ask, reach
from tests.project.myapp.models import Item
from tests.standbys import ids, position_now, read_by, request, trio
from tests.support import database, eventually

pytestmark = pytest.mark.usefixtures("django_db_setup")


@pytest.fixture(autouse=True)
def _unblocked(django_db_blocker: Any) -> Any:
    with django_db_blocker.unblock():
        yield


def _cases() -> Any:
    for setup in availability.SETUPS:
        for fault in availability.FAULTS:
            for retrying in (False, True):
                marks = []
                if (name := availability.missing(setup)) is not None:
                    why = f"{name} is not installed (Debian: apt install {name.lower()})"
                    marks.append(pytest.mark.skip(reason=why))
                if fault == "hung" and not os.path.exists("/proc/1/task/1/children"):
                    marks.append(pytest.mark.skip(reason="needs Linux's /proc"))
                first = (setup, retrying) == ("several hosts", False)
                if fault == "hung" or not (first or (fault == "killed" and not retrying)):
                    marks.append(pytest.mark.slow)
                yield pytest.param(setup, fault, retrying, marks=marks)


@pytest.mark.parametrize(("setup", "fault", "retrying"), list(_cases()))
def test_the_primary_fails(setup: str, fault: str, retrying: bool) -> None:
    async def main() -> availability.Seen:
        async with asyncio.timeout(180):
            return await availability.run(setup, fault, retrying)

    seen = asyncio.run(main())
    print("\n", *availability.cells(seen))
    assert availability.broken(seen, slack=10) == [], seen


async def test_a_replica_becomes_the_primary(settings: Any) -> None:
    """It leaves the replicas; old positions count as none; the other one follows and returns."""
    with trio() as (primary, (one, two)):
        hosts = reach(primary, one, two)
        writing = {**availability.OPTIONS, "target_session_attrs": "read-write"}
        with (
            database("primary", **hosts, OPTIONS=writing),
            database("r1", **reach(one), OPTIONS=availability.OPTIONS),
            database("r2", **reach(two), OPTIONS=availability.OPTIONS),
        ):
            settings.DATABASE_ROUTERS = [router := ReplicaRouter("primary", ["r1", "r2"])]
            await read_by(router, "r1", "r2")
            with request():
                await Item.objects.native_create(remote_id=next(ids))
            before = await position_now()
            text = f"primary:{before.server}:{before.lsn:x}"
            await asyncio.to_thread(_wait_for, before.lsn, one, two)
            with request(primary=before):
                await eventually(lambda: Item.objects.all().db != "primary", 30)

            await asyncio.to_thread(primary.stop, "immediate")
            await eventually(lambda: router.watcher.away, 30)
            with request():
                assert await Item.objects.native_count() == 1, "replicas serve what they had"
            await asyncio.to_thread(ask, one, "SELECT pg_promote()")
            with request():
                item = await Item.objects.native_create(remote_id=next(ids))
                assert item._state.db == "primary"
                assert await Item.objects.filter(pk=item.pk).native_exists()
            known = router.watcher.replicas.values()
            await eventually(lambda: all(each.problem for each in known), 30)
            found = replicas.stats()["primary"]
            assert found["replicas"]["r1"]["problem"] == "it is no standby (any more)"
            assert found["replicas"]["r2"]["problem"] == "it does not follow the primary (yet)"
            assert not found["away"]
            reads = found["reads"]
            async with replicas.after(text):
                assert await Item.objects.native_count() == 2, "an old position is none"
            assert replicas.stats()["primary"]["reads"] > reads

            await asyncio.to_thread(_follow, two, one)
            await read_by(router, "r2", seconds=60)
            async with replicas.after(text):
                assert Item.objects.all().db == "primary", "still"
            with request():
                assert Item.objects.all().db == "r2"
                assert await Item.objects.native_count() == 2
            async with replicas.after():
                await Item.objects.native_create(remote_id=next(ids))
                new = await replicas.position()
            async with replicas.after(new):
                assert await Item.objects.native_count() == 3
                await eventually(lambda: Item.objects.all().db == "r2", 30)
            for alias in ("primary", "r1", "r2"):
                await asyncorm.close_pools(alias)


def _wait_for(lsn: int, *standbys: Any) -> None:
    for standby in standbys:
        asked = "SELECT (pg_last_wal_replay_lsn() - '0/0')::bigint >= %s"
        while not ask(standby, asked, lsn):
            pass


def _follow(standby: Any, primary: Any) -> None:
    """What a cluster manager does with the other standbys."""
    where = f"host={primary.folder} port={primary.settings['PORT']} user=postgres"
    ask(standby, f"ALTER SYSTEM SET primary_conninfo = '{where}'")
    ask(standby, "SELECT pg_reload_conf()")
