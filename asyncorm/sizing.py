"""How many connections the settings may open in all, against what the servers allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
from django.db import Error, connections
from psycopg.rows import tuple_row

from . import bridge, elsewhere, pools
from ._sessions import engines
from .pages import see

# A server is known by when it has started: it may be reached by several addresses and a socket.
# What is reserved for superusers and, from PostgreSQL 16 on, for pg_use_reserved_connections.
_LIMITS = """
    SELECT concat_ws(' ', extract(epoch FROM pg_postmaster_start_time()), current_setting('port')),
        pg_backend_pid(), pg_is_in_recovery(),
        current_setting('max_connections')::int,
        current_setting('superuser_reserved_connections')::int
            + coalesce(nullif(current_setting('reserved_connections', true), ''), '0')::int,
        (SELECT rolconnlimit FROM pg_roles WHERE rolname = session_user), session_user::text,
        (SELECT datconnlimit FROM pg_database WHERE datname = current_database()),
        current_database()::text,
        (SELECT count(*) FROM pg_stat_activity
         WHERE backend_type = 'client backend' AND pid <> pg_backend_pid())
"""


@dataclass
class Demand:
    """What one process may open for an alias.

    Attributes:
        alias: the database alias.
        native: connections of the native pool.
        synchronous: connections of Django's own for synchronous code: its pool, or one for each
            thread.
        pooled: whether that is a pool.
        kept: of further threads that wait for event loops of their own (`async_to_sync()`), one
            each, which they keep between loops. The first one's is among `native`.
        watching: of watchers of replicas (ReplicaRouter).
        role, database: as whom and where, as the server says; empty where it was not asked.
    """

    alias: str
    native: int
    synchronous: int
    pooled: bool = False
    kept: int = 0
    watching: int = 0
    role: str = ""
    database: str = ""

    @property
    def each(self) -> int:
        """Connections of one process."""
        return self.native + self.synchronous + self.kept + self.watching

    def __str__(self) -> str:
        text = f"{self.alias}: native {self.native} + synchronous {self.synchronous}"
        text += f" + kept by threads {self.kept}" if self.kept else ""
        return text + (f" + watching {self.watching}" if self.watching else "")


@dataclass
class Server:
    """A server, and what aliases demand of it.

    Attributes:
        name: where it is, as the settings say.
        demands: of the aliases that reach it.
        most: `max_connections`; 0 if the server could not be asked.
        reserved: those of them that are for superusers.
        limits: CONNECTION LIMITs by "role NAME" or "database NAME".
        present: connections that clients have now.
        standby: whether it is one.
        pooled: whether a pooler is before it, whose own limits count.
        error: why it could not be asked.
    """

    name: str
    demands: list[Demand] = field(default_factory=list)
    most: int = 0
    reserved: int = 0
    limits: dict[str, int] = field(default_factory=dict)
    present: int = 0
    standby: bool = False
    pooled: bool = False
    error: str = ""

    @property
    def room(self) -> int:
        """Connections for ordinary users."""
        return self.most - self.reserved

    def wanted(self, workers: int, of: str = "") -> int:
        """Connections that so many processes may open, of all or of a role or database."""
        return workers * sum(
            demand.each
            for demand in self.demands
            if of in ("", f"role {demand.role}", f"database {demand.database}")
        )

    def problems(self, workers: int) -> Iterator[str]:
        """What is less than wanted, in words for the user."""
        if not self.most:
            return
        if (wanted := self.wanted(workers)) > self.room:
            yield (
                f"{wanted} are more than max_connections ({self.most}) leaves: {self.room}. "
                + self._advice(workers, self.room)
            )
        for of, limit in self.limits.items():
            if (wanted := self.wanted(workers, of)) > limit:
                yield (
                    f"{wanted} are more than the CONNECTION LIMIT of {of} allows: {limit}. "
                    + self._advice(workers, limit)
                )

    def _advice(self, workers: int, limit: int) -> str:
        pools = sum(1 + demand.pooled for demand in self.demands)
        others = sum(
            demand.kept + demand.watching + (0 if demand.pooled else demand.synchronous)
            for demand in self.demands
        )
        size = (limit // workers - others) // pools
        if size < 1:
            return "Fewer workers, a larger limit, or a pooler (docs/pgbouncer.md) are needed."
        return f"With OPTIONS['pool']['max_size'] {size} for each alias they fit."


def report(workers: int, threads: int = 1) -> list[Server]:
    """Ask each server that a native alias names for its limits, and put the demands beside them.

    For synchronous code: it uses Django's own connections, one for each alias.

    Args:
        workers: how many processes there will be, each with one event loop.
        threads: of each that run synchronous code; under WSGI, or in Celery, each may wait for
            event loops of its own.

    Raises:
        ValueError: workers or threads is not positive.
    """
    if workers < 1 or threads < 1:
        raise ValueError("workers and threads must be at least 1." + see("deployment#pools"))
    return ask(connections, threads)


def ask(aliases: Iterable[str], threads: int = 1) -> list[Server]:
    """The servers of those of the aliases that are native, asked; see `report()`."""
    servers: dict[str, Server] = {}
    for alias in aliases:
        if engines.native_class(alias) is not None:
            _ask(_demand(alias, threads), servers)
    return list(servers.values())


def _demand(alias: str, threads: int) -> Demand:
    settings = connections.settings[alias]
    size = pools.pool_options(alias, settings)["max_size"]
    pooled = bool(settings["OPTIONS"].get("pool"))
    return Demand(
        alias, size, size if pooled else threads, pooled, threads - 1, _watchers().count(alias)
    )


def _watchers() -> list[str]:
    """The aliases that watchers of replicas ask, once for each."""
    watching = [each for each in elsewhere.routers() if not each.mirrors]
    return [alias for each in watching for alias in (each.primary, *each.replicas)]


def _ask(demand: Demand, servers: dict[str, Server]) -> None:
    alias = demand.alias
    settings = connections.settings[alias]
    host = pools.host_of(settings) or "local socket"
    name = f"{host}, port {settings['PORT'] or 'default'}"
    try:
        served_by, (key, pid, *found) = _limits(alias)
    except (psycopg.Error, Error) as exc:
        server = servers.setdefault(name, Server(name, error=str(exc).strip().partition("\n")[0]))
    else:
        standby, most, reserved, of_role, role, of_database, database, present = found
        demand.role, demand.database = role, database
        server = servers.setdefault(key, Server(name))
        server.most, server.reserved, server.standby = most, reserved, standby
        server.present, server.pooled = present, server.pooled or pid != served_by
        for of, limit in ((f"role {role}", of_role), (f"database {database}", of_database)):
            if limit >= 0:
                server.limits[of] = limit
    server.demands.append(demand)


def _limits(alias: str) -> tuple[int, tuple[Any, ...]]:
    """What the server answers, and which of its processes the connection was told."""
    if bridge.in_native_code():  # which does not block the loop
        with connections[alias].cursor() as cursor:
            cursor.execute(_LIMITS)
            return connections[alias].connection.info.backend_pid, cursor.fetchone()
    # Not Django's connection: its pool would wait for 30 s and hide why there is none; and what is
    # open when a test runner forks its processes, those would share.
    with psycopg.connect(**connections[alias].get_connection_params()) as conn:
        row = conn.cursor(row_factory=tuple_row).execute(_LIMITS).fetchone()
        return conn.info.backend_pid, row or ()


def lines(servers: list[Server], workers: int) -> Iterator[str]:
    """A report as text."""
    if not servers:
        yield "No database runs natively: none has an ENGINE of asyncorm."
    for server in servers:
        role = "standby" if server.standby else "primary"
        yield f"{server.name}" + ("" if server.error else f" ({role})")
        for demand in server.demands:
            yield (f"  {demand} for each process, {demand.each * workers} for {workers}")
        yield f"  in all {server.wanted(workers)}; twice that while a deployment replaces workers"
        if server.error:
            yield f"  could not be asked: {server.error}"
            continue
        limits = "".join(f", {of} {limit}" for of, limit in server.limits.items())
        yield (
            f"  the server: max_connections {server.most}, {server.reserved} of them reserved"
            f"{limits}; {server.present} in use now"
        )
        if server.pooled:
            yield "  a pooler is before it: its pool sizes limit what reaches the server"
        for problem in server.problems(workers):
            yield f"  TOO MANY: {problem}"
