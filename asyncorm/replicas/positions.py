"""What a piece of work has written, as positions in the log of the primary (WAL).

A `Need` belongs to a context: a request, what is inside `after()`, or else the whole process. A
statement that may have written marks it; from then on only a replica that has replayed as much
serves its reads.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple, Self

from .. import _events, written
from .._wire.texts import only_reads
from ..roles import ASK

# Seconds for which a position is asked for, at least.
MAX_AGE = 60.0

# One row: whether the server is a standby or was made read-only, as one that is replaced is; its
# cluster and timeline; up to where its log is written by the program and on disk. A position says
# nothing on another cluster or timeline.
ASK_PRIMARY = f"""
    SELECT CASE WHEN current_setting('transaction_read_only')::bool THEN ({ASK}) ELSE false END,
        concat(system_identifier, '.', CASE WHEN NOT pg_is_in_recovery()
        THEN ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END),
    CASE WHEN NOT pg_is_in_recovery() THEN (pg_current_wal_insert_lsn() - '0/0')::bigint END,
    CASE WHEN NOT pg_is_in_recovery() THEN (pg_current_wal_flush_lsn() - '0/0')::bigint END
    FROM pg_control_system()
"""


class Position(NamedTuple):
    """A place in the log.

    Attributes:
        server: the cluster's identifier and its timeline.
        lsn: bytes from the beginning.
    """

    server: str
    lsn: int


UNKNOWN = Position("unknown", 0)  # of no server: the primary serves until it expires


def dump(positions: dict[str, Position]) -> str:
    """One string for the positions of several primaries."""
    return ",".join(f"{alias}:{server}:{lsn:x}" for alias, (server, lsn) in positions.items())


def load(text: str | None) -> dict[str, Position]:
    """The positions in such a string; in anything else, one that has the primary serve."""
    found = {}
    try:
        for part in text.split(",") if text else ():
            alias, server, lsn = part.split(":")
            found[alias] = Position(server, int(lsn, 16))
    except (ValueError, TypeError, AttributeError):  # no text at all, too
        return dict.fromkeys(_primaries, UNKNOWN)
    return found


class Kept(NamedTuple):
    """A position that has to be replayed.

    Attributes:
        covers: what was written until then (`monotonic()`) is before it.
        until: when it may be forgotten.
    """

    position: Position
    covers: float
    until: float


@dataclass(slots=True)
class Need:
    """What reads in one context have to see, for each alias of a primary.

    Attributes:
        kept: positions.
        wrote: when something was last written (`monotonic()`).
        replica: for each primary, the replica that has served it.
        parent: the context around, which is marked, too.
    """

    kept: dict[str, Kept] = field(default_factory=dict)
    wrote: dict[str, float] = field(default_factory=dict)
    replica: dict[str, str] | None = None
    parent: Need | None = None

    @classmethod
    def of(cls, positions: dict[str, Position]) -> Self:
        """A context of its own, whose reads see at least these positions."""
        need = cls(replica={})
        for alias, position in positions.items():
            need.keep(alias, position, 0.0)
        return need

    def keep(self, alias: str, position: Position, covers: float) -> Position:
        """Have reads see at least this position; the highest one that they are to see."""
        old = self.kept.get(alias)
        if (
            old is not None
            and old.position.server == position.server
            and old.position.lsn > position.lsn
        ):
            position = old.position
        self.kept[alias] = Kept(position, covers, monotonic() + max_age())
        return position

    def current(self, alias: str) -> Position | None:
        """The position to be seen; None if there is none (any more)."""
        kept = self.kept.get(alias)
        return None if kept is None or kept.until < monotonic() else kept.position

    def covered(self, alias: str) -> bool:
        """Whether the position that is kept is behind all that was written."""
        wrote = self.wrote.get(alias)
        kept = self.kept.get(alias)
        return wrote is None or (kept is not None and kept.covers > wrote)


# Outside of requests and `after()`, all see what any of them has written.
_process = Need()
_need: ContextVar[Need] = ContextVar("asyncorm_replicas", default=_process)


def now() -> Need:
    """That of the current context."""
    return _need.get()


def enter(need: Need) -> Need:
    """Have the current context, and what it starts, another one; which it had."""
    before = _need.get()
    _need.set(need)
    return before


def inner(positions: dict[str, Position]) -> Need:
    """One for a part of the current context, which sees what that has to see."""
    outer = _need.get()
    need = Need.of(positions)
    need.parent = outer
    if outer is not _process:
        need.wrote.update(outer.wrote)
        for alias, kept in outer.kept.items():
            if alias not in need.kept:
                need.kept[alias] = kept
            elif outer.current(alias) is not None:
                same = need.kept[alias].position.server == kept.position.server
                need.keep(alias, kept.position if same else UNKNOWN, 0.0)
    return need


_primaries: set[str] = set()
_most_lag = 0.0


def max_age() -> float:
    """Seconds for which a position is asked for; what is older every replica has that is read."""
    return max(MAX_AGE, 2 * _most_lag)


def _executed(alias: str, text: str | None) -> None:
    if alias not in _primaries or (text is not None and (text == ASK_PRIMARY or only_reads(text))):
        return
    need: Need | None = _need.get()
    while need is not None:
        if text is not None or alias in need.wrote:  # COMMIT alone writes nothing
            need.wrote[alias] = monotonic()
        need = need.parent


class _Writes(_events.Listener):
    def statement_ended(self, statement: _events.Statement) -> None:
        _executed(statement.alias, statement.sql)


_writes = _Writes()


def follow(primary: str, max_lag: float) -> None:
    """Notice from now on what is written through an alias, whose replicas may lag so long."""
    global _most_lag
    _primaries.add(primary)
    _most_lag = max(_most_lag, max_lag)
    _events.listen(_writes)
    if _executed not in written.listeners:
        written.listeners.append(_executed)
