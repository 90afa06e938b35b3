"""What both pictures of the timeline share: lanes, symbols and colours."""

from __future__ import annotations

from dataclasses import dataclass

from asyncorm.drawing import PALETTE

from .figures import Comparison, Run, Statement

CROWD = 50  # with more statements than this, single ones can neither be seen nor labelled


@dataclass(frozen=True)
class Mark:
    """How one query is drawn: a symbol and a colour."""

    symbol: str
    colour: str


@dataclass(frozen=True)
class Lane:
    """One connection and the statements that ran on it, by time.

    Those that travel together get further lanes, which have no name.
    """

    name: str
    server_process: int
    statements: tuple[Statement, ...]


def lanes(run: Run, *, crowd: bool = False) -> list[Lane]:
    found = []
    for place, process in enumerate(run.connections, 1):
        statements = sorted(
            (s for s in run.statements if s.connection == process), key=lambda s: s.start
        )
        rows: list[list[Statement]] = [[]]
        for statement in statements:
            fitting = (row for row in rows if not row or row[-1].end <= statement.start)
            row = rows[0] if crowd else next(fitting, None)
            if row is None:
                rows.append(row := [])
            row.append(statement)
        for number, row in enumerate(rows):
            found.append(Lane("" if number else f"connection {place}", process, tuple(row)))
    return found


def marks(comparison: Comparison) -> dict[str, Mark]:
    """A mark for each query, the same in both ways."""
    return {
        query: Mark(str(place + 1), PALETTE[place % len(PALETTE)])
        for place, query in enumerate(comparison.queries)
    }


def crowded(comparison: Comparison) -> bool:
    return max(len(run.statements) for run in comparison.runs) > CROWD


def span(comparison: Comparison) -> float:
    """The time scale of both ways, in seconds."""
    return max(run.seconds for run in comparison.runs)
