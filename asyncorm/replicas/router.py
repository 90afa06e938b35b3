"""Decides where to read: on a replica that has what the context has written, or on the primary."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections, router
from django.db.models import Model
from psycopg import pq

from .. import bridge, conf, pools, sessions
from .._sessions.scopes import find_scope
from ..pages import see
from . import again, positions
from .again import avoided, chosen
from .watching import Replica, Watcher

_OPEN = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)


class ReplicaRouter:
    """Reads go to a replica that is up, has replayed what was written here, and does not lag.

    All else goes to the primary: writes, what is read inside a transaction there, and what no
    replica is fit for. What is related to an object is read where that was, or on the primary.
    Statements are not delayed, and nothing is asked for a decision: a watcher asks each server
    several times a second.

        DATABASE_ROUTERS = [ReplicaRouter(replicas=["replica1", "replica2"])]
    """

    def __init__(
        self, primary: str = DEFAULT_DB_ALIAS, replicas: Iterable[str] = (), max_lag: float = 5.0
    ) -> None:
        """Say which aliases these are.

        Args:
            primary: the alias of the primary, by whichever of its hosts is the primary.
            replicas: the aliases of its standbys; each names one server.
            max_lag: seconds; a replica that may lack what was committed that long ago is not read.

        Raises:
            django.core.exceptions.ImproperlyConfigured: `max_lag` is no positive number, or the
                primary is among the replicas.
        """
        replicas = [replicas] if isinstance(replicas, str) else list(replicas)
        if not max_lag > 0:
            raise ImproperlyConfigured(
                "ReplicaRouter's max_lag must be a positive number." + see("replicas#settings")
            )
        if primary in replicas:
            raise ImproperlyConfigured(
                f"ReplicaRouter: {primary!r} is the primary, no replica." + see("replicas#settings")
            )
        self.primary = primary
        self.replicas = replicas
        self.watcher = Watcher(primary, replicas, max_lag)
        self._ours = {primary, *replicas}
        positions.follow(primary, max_lag)
        again.follow(self.watcher)

    # What Django asks

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        """Where to read."""
        alias = self._db_for_read(model, hints)
        chosen.set(alias)
        return alias

    def _db_for_read(self, model: type[Model], hints: dict[str, Any]) -> str | None:
        instance = hints.get("instance")
        stands = None if instance is None else instance._state.db
        if stands is not None and stands not in self._ours:
            return None
        watcher = self.watcher
        if (
            stands == self.primary
            or self.in_block()
            or not self.watch()
            or (conf.get("REPLICA_POSITION") == "session" and _is_session(model))
        ):
            watcher.reads += 1
            return self.primary
        need = positions.now()
        replica = self._choose(need, stands)
        if replica is None:
            watcher.reads += 1
            return self.primary
        replica.reads += 1
        if need.replica is not None:
            need.replica[self.primary] = replica.alias
        return replica.alias

    def db_for_write(self, model: type[Model], **hints: Any) -> str | None:
        """The primary; nothing for an object of another database."""
        instance = hints.get("instance")
        stands = None if instance is None else instance._state.db
        return self.primary if stands is None or stands in self._ours else None

    def allow_relation(self, obj1: Model, obj2: Model, **hints: Any) -> bool | None:
        """Between all objects of the primary and of its replicas."""
        ours = obj1._state.db in self._ours and obj2._state.db in self._ours
        return True if ours else None

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """On the primary only; nothing for other databases."""
        return db == self.primary if db in self._ours else None

    # How it decides

    @cached_property
    def mirrors(self) -> bool:
        """Whether this is a test whose replicas are the primary (TEST: MIRROR): nothing lags."""
        testing = hasattr(sys.modules.get("django.core.mail"), "outbox")
        return testing and all(
            connections.settings[alias]["TEST"].get("MIRROR") for alias in self.replicas
        )

    def watch(self) -> bool:
        """Have the watcher run; False where there is nothing to be watched."""
        if self.mirrors:
            return False
        self.watcher.ensure()
        return True

    def in_block(self) -> bool:
        """Whether a transaction on the primary is open here."""
        alias = self.primary
        if bridge.in_native_code() or bridge.loop_runs():
            if alias in sessions.test_sessions:
                return True
            scope = find_scope(alias)
            if scope is not None and scope.block is not None:
                return scope.block.is_transaction
            runner = bridge.current()
            held = {} if runner is None else runner.resources
            session = held.get(alias) if scope is None else scope.session
            return session is not None and _in_transaction(session.wrapper)
        wrapper = connections[alias]
        return wrapper.in_atomic_block or _in_transaction(wrapper)

    def _choose(self, need: positions.Need, stands: str | None) -> Replica | None:
        watcher = self.watcher
        needed = watcher.needed(need)
        if needed is None:
            return None
        known, avoid = watcher.replicas, avoided.get()
        before = stands or (need.replica or {}).get(self.primary)
        if before is not None and (replica := known.get(before)) is not None:
            fits = watcher.fits(replica, needed) and before not in avoid
            return replica if fits and not _refuses(before) else None
        fit = [
            each
            for alias, each in known.items()
            if watcher.fits(each, needed) and alias not in avoid
        ]
        while fit:
            replica = fit.pop(random.randrange(len(fit)))
            if not _refuses(replica.alias):
                return replica
        return None


def _in_transaction(wrapper: Any) -> bool:
    """Whether one is open that is no block: without autocommit, or by BEGIN."""
    conn = None if wrapper is None else wrapper.connection
    if conn is None or conn.closed:
        return False
    deferred = getattr(conn, "deferred", False)
    return not wrapper.autocommit or (not deferred and conn.pgconn.transaction_status in _OPEN)


def _refuses(alias: str) -> bool:
    """Whether it has just refused a connection to this loop's pool, which waits before the next."""
    if not bridge.loop_runs():
        return False
    pool = pools.find(alias)
    connections = None if pool is None else pool.connections
    return connections is not None and connections.rest > 0


def _is_session(model: type[Model]) -> bool:
    sessions = sys.modules.get("django.contrib.sessions.base_session")
    return sessions is not None and issubclass(model, sessions.AbstractBaseSession)


def routers() -> list[ReplicaRouter]:
    """Those of the project."""
    return [each for each in router.routers if isinstance(each, ReplicaRouter)]
