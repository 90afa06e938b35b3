"""A crowded pool: which statements of operations travel together there, and on what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from .. import bridge, conf, limits, pools
from .._wire.slow import slow
from .._wire.texts import calls_known, is_single, may_be_shared
from ..driver import Connection
from ..multiplexing import Queue

if TYPE_CHECKING:
    from .session import Session


def travels(source: limits.Source, text: str) -> bool:
    """Whether a statement may go with those of other operations, outside a block."""
    if source.batching:
        return is_single(text) and calls_known(text)
    return may_be_shared(text) and text not in slow


def is_crowded(source: limits.Source) -> bool:
    """Whether single statements are to travel with others' there now."""
    return source.batching or (not source.has_free and shares())


def shares() -> bool:
    """Whether single statements travel with others' where no connection is free."""
    return bool(conf.get("MULTIPLEXING")) and not conf.get("RESET_ALWAYS")


def queue_of(source: limits.Source, pool: pools.Pool, session: type[Session]) -> Queue:
    """Where such statements wait there.

    Args:
        session: makes the sessions that they run in.
    """
    if source.queue is None:
        source.queue = Queue(PoolSource(source, pool, session))
    return cast(Queue, source.queue)


class PoolSource:
    """The source of connections for statements outside transactions (multiplexing.Source)."""

    awaited = "for a connection"

    in_order = False

    def __init__(self, source: limits.Source, pool: pools.Pool, session: type[Session]) -> None:
        self.source = source
        self.pool = pool
        self.asked = source.asked
        self._session = session

    @property
    def keeps_state(self) -> bool:
        return self.source.keeps_state

    @property
    def size(self) -> int:
        return self.source.size

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        runner = bridge.running()
        session = self._session(self.pool.alias, self.pool, self.source)
        session.pipelining = True
        runner.resources[self.pool.alias] = session
        session.wrapper.ensure_connection()
        with session:
            yield session.wrapper.connection

    def dropped(self, exc: BaseException) -> None:
        """It is of no concern to others."""

    def refusal(self) -> None:
        return None
