"""Where an alias's server is, as its native connections say."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

from .. import pools


class Where(NamedTuple):
    """As libpq says it; empty or 0 if there is no connection."""

    database: str = ""
    user: str = ""
    host: str = ""
    port: int = 0


_known: WeakKeyDictionary[pools.Pool, Where] = WeakKeyDictionary()


def where(alias: str) -> Where:
    """Where the running loop's pool of an alias is connected to."""
    pool = pools.find(alias)
    if pool is None or pool.connections is None:
        return Where()
    found = _known.get(pool)
    if found is None:
        conn = next((each for each in pool.connections.live if not each.closed), None)
        if conn is None:
            return Where()
        info = conn.info
        found = _known[pool] = Where(info.dbname, info.user, info.host, info.port)
    return found
