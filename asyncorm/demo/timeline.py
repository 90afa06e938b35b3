"""What both pictures of the timeline share: lanes, symbols, colours and the ticks of the axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .figures import Comparison, Run, Statement

PALETTE = (
    "#2f6fb5", "#c9700f", "#2e9e5b", "#c9413f", "#7d5bb5",
    "#96643c", "#d65f9e", "#5f6b7a", "#7f7f12", "#128796",
)  # fmt: skip
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


def ticks(seconds: float, most: int = 12) -> list[int]:
    """Round numbers of milliseconds from 0 to the end of the scale."""
    total = max(seconds * 1000, 1)
    power = 10 ** math.floor(math.log10(total / most)) if total > most else 1
    step = next(power * n for n in (1, 2, 5, 10) if power * n * most >= total)
    return list(range(0, math.floor(total) + 1, int(step)))
