"""The measured figures: statements with their times, runs, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Statement:
    """One SQL statement: what it was for, where it ran, and when (seconds since the run began)."""

    query: str
    connection: int
    start: float
    end: float


@dataclass(frozen=True)
class Run:
    """A run of one scenario in one of two ways: the fastest of several rounds."""

    seconds: float
    rounds: tuple[float, ...]
    threads: int
    result: str
    statements: tuple[Statement, ...]

    @property
    def connections(self) -> tuple[int, ...]:
        """The server processes that ran statements, in the order of their first one."""
        return tuple(dict.fromkeys(s.connection for s in self.statements))

    @property
    def at_once(self) -> int:
        """The most statements under way at the same time."""
        edges = sorted(
            edge for s in self.statements for edge in ((s.start, 1), (s.end, -1))
        )  # an end sorts before a start at the same moment
        most = now = 0
        for _, change in edges:
            now += change
            most = max(most, now)
        return most

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Run:
        return cls(
            seconds=data["seconds"],
            rounds=tuple(data["rounds"]),
            threads=data["threads"],
            result=data["result"],
            statements=tuple(Statement(**statement) for statement in data["statements"]),
        )


@dataclass(frozen=True)
class Comparison:
    """The same scenario in two ways: both halves, or asyncorm without something and with it.

    Attributes:
        titles: of the two ways.
        keys: of the two ways, in the figures.
    """

    key: str
    title: str
    short: str
    note: str
    before: Run
    after: Run
    titles: tuple[str, str]
    keys: tuple[str, str]

    @property
    def runs(self) -> tuple[Run, Run]:
        return self.before, self.after

    @property
    def factor(self) -> float:
        return self.before.seconds / self.after.seconds

    @property
    def same_result(self) -> bool:
        return self.before.result == self.after.result

    @property
    def queries(self) -> tuple[str, ...]:
        """The names of the queries, in the order in which the first way ran them."""
        statements = (*self.before.statements, *self.after.statements)
        return tuple(dict.fromkeys(s.query for s in statements))

    @property
    def verdict(self) -> str:
        """What the second way gains: time, or connections."""
        if self.factor < 1 and len(self.after.connections) < len(self.before.connections):
            few, many = len(self.after.connections), len(self.before.connections)
            return f"{number(few, 'connection')} instead of {many}"
        return f"{self.factor:.1f}x as fast"

    def figures(self) -> dict[str, Any]:
        def way(run: Run) -> dict[str, Any]:
            return {
                "seconds": run.seconds,
                "rounds": run.rounds,
                "connections": len(run.connections),
                "threads": run.threads,
                "statements_at_once": run.at_once,
                "statements": [[s.query, s.connection, s.start, s.end] for s in run.statements],
            }

        return {
            "title": self.title,
            "factor": self.factor,
            "same_result": self.same_result,
            **{key: way(run) for key, run in zip(self.keys, self.runs, strict=True)},
        }


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    comparisons: tuple[Comparison, ...]
    acts: tuple[Comparison, ...]
    rows: int
    machine: dict[str, str | int]

    def figures(self) -> dict[str, Any]:
        return {
            "summary": summary(self.comparisons),
            "machine": self.machine,
            "rows": self.rows,
            "statement": ["query", "connection", "start", "end"],
            "scenarios": {c.key: c.figures() for c in self.comparisons},
            "acts": {c.key: c.figures() for c in self.acts},
        }


def machine_text(machine: dict[str, str | int]) -> str:
    """In one line what the figures were taken on."""
    names = (name for name in machine if name != "CPUs")
    versions = ", ".join(f"{name} {machine[name]}" for name in names)
    return f"{versions}, {number(int(machine['CPUs']), 'CPU')}"


def number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def milliseconds(seconds: float) -> str:
    """A duration as people read it: whole milliseconds, or two digits of a short one."""
    value = seconds * 1000
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def summary(comparisons: Iterable[Comparison]) -> str:
    """The whole demo in one line."""
    parts: list[str] = []
    for c in comparisons:
        part = f"{c.short} {_seconds(c.after.seconds)} instead of {_seconds(c.before.seconds)}"
        part += f" ({c.factor:.1f}x)"
        if not parts:
            connections = number(len(c.after.connections), "connection")
            part += f" on {connections} and {number(c.after.threads, 'thread')}"
        parts.append(part)
    return f"asyncorm: {'; '.join(parts)}"


def best(runs: Sequence[Run]) -> Run:
    """The fastest run, as the least disturbed by other work on the machine; told of all rounds."""
    return replace(min(runs, key=lambda run: run.seconds), rounds=tuple(r.seconds for r in runs))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds:.3f} s"
