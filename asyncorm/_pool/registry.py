"""Which pool each running loop has for an alias; all pools of the process."""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop, Task, get_running_loop
from collections import Counter
from typing import TYPE_CHECKING, Any

from django.db import DEFAULT_DB_ALIAS

if TYPE_CHECKING:
    from ..pools import Pool

_pools: dict[AbstractEventLoop, dict[str, Pool]] = {}

background: set[Task[None]] = set()  # work that nobody waits for
discarded = 0  # how often `discard_pools()` was called


def find(alias: str) -> Pool | None:
    """The running loop's pool of an alias, if there is one."""
    try:
        return _pools[get_running_loop()][alias]
    except KeyError:
        return None


def add(pool: Pool) -> None:
    """Register a new pool; pools whose loop was closed without telling us are closed first."""
    for loop in list(_pools):
        if loop.is_closed():
            for stale in list(_pools.get(loop, {}).values()):
                stale.abandon()
    _pools.setdefault(pool.loop, {})[pool.alias] = pool


def forget(pool: Pool) -> None:
    """Take a pool out of the registry."""
    pool.current = False
    by_alias = _pools.get(pool.loop, {})
    if by_alias.get(pool.alias) is pool:
        del by_alias[pool.alias]
        if not by_alias:
            _pools.pop(pool.loop, None)


async def close_pools(using: str | None = None) -> None:
    """Close the native pools of the running event loop, of one alias or of all.

    Connections in use are closed too: what runs on them fails with django.db.OperationalError.
    The next native call opens a new pool.

    Args:
        using: a database alias; all of them by default.
    """
    for alias, pool in list(_pools.get(get_running_loop(), {}).items()):
        if using is None or alias == using:
            await pool.close()


def pool_stats(using: str | None = None) -> dict[str, int]:
    """Statistics of one alias's native pool, as plain numbers.

    On an event loop those of its own pool; elsewhere, say in the thread of an exporter of metrics,
    the sums over all loops of the process. The keys are psycopg_pool's (`pool_size`,
    `pool_available`, `requests_waiting`, ...): see its "Pool stats". Empty before the first native
    call.

    Args:
        using: a database alias; the default one by default.
    """
    alias = using or DEFAULT_DB_ALIAS
    try:
        pool = find(alias)
    except RuntimeError:  # no loop runs in this thread
        return total_stats().get(alias, {})
    return {} if pool is None else pool.stats()


def everywhere() -> list[Pool]:
    """The pools of all loops of the process; from any thread."""
    return [pool for by_alias in list(_pools.values()) for pool in list(by_alias.values())]


def total_stats() -> dict[str, dict[str, int]]:
    """Statistics by alias, the sums over all loops of the process; from any thread."""
    totals: dict[str, Counter[str]] = {}
    for pool in everywhere():
        totals.setdefault(pool.alias, Counter()).update(pool.stats())
    return {alias: dict(total) for alias, total in totals.items()}


def discard_pools(alias: str | None = None, *, now: bool = False) -> None:
    """Have new connections made from now on: settings (time zone, name) changed.

    Connections in use are closed when they are given back.

    Args:
        alias: one alias; all of them by default.
        now: close those of loops that do not run at this moment at once.
    """
    global discarded
    discarded += 1
    for by_alias in list(_pools.values()):
        for pool in list(by_alias.values()):
            if alias is None or pool.alias == alias:
                forget(pool)
                if pool.loop.is_closed() or (now and not pool.loop.is_running()):
                    pool.abandon()
                else:
                    pool.loop.call_soon_threadsafe(pool.retire)


_of_parents: list[Any] = []


def _leave_to_parent() -> None:
    """Forget the pools in a child process that was forked: their connections are the parent's.

    They are kept, since what is collected would be closed.
    """
    _of_parents.append((dict(_pools), set(background)))
    _pools.clear()
    background.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
