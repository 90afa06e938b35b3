"""A child process that was forked has no part in its parent's connections."""

import pytest

from tests.support import run_script

_SETUP = """
import asyncio, gc, os, warnings
import django
django.setup()
import asyncorm
from django.db import connections
from asyncorm import native, pools
from tests.support import backend_pid, value

def in_child(function):
    pid = os.fork()
    if not pid:
        try:
            function()
            os._exit(0)
        except BaseException as exc:
            print(type(exc), exc, flush=True)
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
"""

_CLOSES = """
def close():
    warnings.simplefilter("ignore")
    for pool in held:
        pool.abandon()
        for conn in live:
            conn.wire.park()
            conn.twin.terminate()
            conn.twin.close()
    connections["default"].close_pool()
    connections.close_all()
    gc.collect()

def alone():
    asyncio._set_running_loop(None)
    assert asyncio.run(native(backend_pid)()) not in seen

async def main():
    global seen
    seen = await asyncio.gather(*[native(backend_pid)() for _ in range(2)])
    global held, live
    held = [pools.find("default")]
    live = list(held[0].connections.live)
    pids = [conn.info.backend_pid for conn in live]
    async with asyncorm.atomic():
        inside = await native(backend_pid)()
        waiting = asyncio.create_task(native(value)("SELECT pg_sleep(0.3)"))
        await asyncio.sleep(0.1)
        in_child(close)
        in_child(alone)
        await waiting
        assert await native(backend_pid)() == inside
    assert set(live) <= set(held[0].connections.live)
    there = "SELECT array_agg(pid) FROM pg_stat_activity WHERE pid = ANY(%s)"
    assert sorted(await native(value)(there, [pids])) == sorted(pids)
    await asyncorm.close_pools()

asyncio.run(main())
print("OK")
"""

_WORKS = """
async def pid():
    return await native(backend_pid)()

def work():
    assert asyncio.run(pid()) not in parents

loop = asyncio.new_event_loop()
parents = [loop.run_until_complete(pid())]
in_child(work)
assert loop.run_until_complete(pid()) == parents[0]
loop.run_until_complete(asyncorm.close_pools())
loop.close()
print("OK")
"""

_CELERY = """
async def pid():
    return await native(backend_pid)()

loop = asyncio.new_event_loop()
seen = {loop.run_until_complete(pid()), connections["default"].close_pool()}
seen.add(loop.run_until_complete(pid()))
connections["default"].close_pool()
assert len(seen) == 3
loop.run_until_complete(asyncio.sleep(0))
loop.close()
del loop
gc.collect()
print("OK")
"""


@pytest.mark.parametrize("script", [_CLOSES, _WORKS, _CELERY], ids=["closes", "works", "celery"])
def test_fork_and_close_pool(script: str, django_db_setup: None) -> None:
    done = run_script(_SETUP + script)
    out = f"{done.stdout}{done.stderr}"
    assert done.stdout.endswith("OK\n"), out
    assert "was destroyed" not in out
