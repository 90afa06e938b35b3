"""What both pictures of the timeline share: lanes, symbols and colours."""

from __future__ import annotations

from dataclasses import dataclass

from ..drawing import PALETTE
from .figures import Comparison, Run, Statement

CROWD = 100  # with more statements than this, single ones can neither be seen nor labelled


@dataclass(frozen=True)
class Mark:
    """How one query is drawn: a symbol and a colour."""

    symbol: str
    colour: str


@dataclass(frozen=True)
class Lane:
    """One connection and the statements that ran on it, by time."""

    name: str
    server_process: int
    statements: tuple[Statement, ...]


def lanes(run: Run) -> list[Lane]:
    return [
        Lane(
            f"connection {place}",
            process,
            tuple(
                sorted(
                    (s for s in run.statements if s.connection == process), key=lambda s: s.start
                )
            ),
        )
        for place, process in enumerate(run.connections, 1)
    ]


def marks(comparison: Comparison) -> dict[str, Mark]:
    """A mark for each query, the same in both halves."""
    return {
        query: Mark(str(place + 1), PALETTE[place % len(PALETTE)])
        for place, query in enumerate(comparison.queries)
    }


def crowded(comparison: Comparison) -> bool:
    return len(comparison.django.statements) > CROWD


def span(comparison: Comparison) -> float:
    """The time scale of both halves, in seconds."""
    return max(comparison.django.seconds, comparison.asyncorm.seconds)
