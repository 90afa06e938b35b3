"""`timeline()`: which task ran which query when, on which connection, and what it waited for."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from . import _events, drawing
from ._sessions import callsite
from .contexts import EitherWay
from .pages import see

REPEATED = 5  # times one statement of one place in one task is taken to be an N+1 problem
_IN_TURN = 3  # queries in a row in one task that might run at once


@dataclass(frozen=True)
class Span:
    """A query, a wait before one, or a command of a transaction or stream.

    Attributes:
        task: the name of the asyncio task, or of the thread.
        what: the SQL with its placeholders; of a wait, what was waited for.
        alias: the database alias.
        connection: the process id of the server's end; 0 of a wait, or if there was none.
        place: file and line that caused it.
        began, ended: seconds since the recording began.
        in_block: whether it ran in a transaction.
        is_wait: it is a wait for a connection or for a transaction block.
        is_command: it is a BEGIN, COMMIT or ROLLBACK, or a FETCH or CLOSE of a stream.
    """

    task: str
    what: str
    alias: str
    connection: int
    place: str
    began: float
    ended: float
    in_block: bool = False
    is_wait: bool = False
    is_command: bool = False

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


class Timeline(EitherWay["Timeline"], _events.Listener):
    """What `timeline()` records; `print()` shows it.

    Attributes:
        spans: queries, commands and waits, in the order in which they ended.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was recorded, and start the clock."""
        self.spans: list[Span] = []
        self._places: dict[_events.Command, str] = {}
        self._start = monotonic()

    def elapsed(self) -> float:
        """Seconds since the recording began."""
        return monotonic() - self._start

    # Recording

    def statement_ended(self, statement: _events.Statement) -> None:
        """Record a query, from when it had its connection on."""
        self._add(
            statement, statement.sql, statement.sent, callsite.caller(),
            connection=statement.connection, in_block=statement.in_block,
        )  # fmt: skip

    def command_begun(self, command: _events.Command) -> None:
        """Note the place: a shielded COMMIT may end in another task than it began in."""
        self._places[command] = callsite.caller()

    def command_ended(self, command: _events.Command) -> None:
        """Record a command."""
        self._add(
            command, command.text, command.began, self._places.pop(command, ""),
            connection=command.connection, in_block=command.in_block, is_command=True,
        )  # fmt: skip

    def waited(self, wait: _events.Wait) -> None:
        """Record a wait."""
        self._add(wait, wait.what, wait.began, callsite.caller(), is_wait=True)

    def _add(self, event: Any, what: str, began: float, place: str, **facts: Any) -> None:
        facts = {"connection": 0, **facts}
        name = threading.current_thread().name if event.task is None else event.task.get_name()
        began, ended = max(began - self._start, 0.0), event.ended - self._start
        self.spans.append(
            Span(name, what, event.alias, place=place, began=began, ended=ended, **facts)
        )

    def __enter__(self) -> Timeline:
        self.begin()
        _events.listen(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _events.unlisten(self)

    # Reading

    @property
    def queries(self) -> list[Span]:
        """The queries alone."""
        return [span for span in self.spans if not span.is_wait and not span.is_command]

    @property
    def waits(self) -> list[Span]:
        """The waits alone."""
        return [span for span in self.spans if span.is_wait]

    @property
    def commands(self) -> list[Span]:
        """The commands alone: BEGIN, COMMIT, ROLLBACK, and FETCH and CLOSE of streams."""
        return [span for span in self.spans if span.is_command]

    @property
    def by_task(self) -> dict[str, list[Span]]:
        """For each task its spans in order of time."""
        found: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: span.began):
            found.setdefault(span.task, []).append(span)
        return found

    def findings(self) -> list[str]:
        """What looks like N+1 queries and like needless serialisation, in words."""
        return [*self._repeated(), *self._in_turn(), *self._waited()]

    def _repeated(self) -> list[str]:
        groups: dict[tuple[str, str, str], list[Span]] = defaultdict(list)
        for span in self.queries:
            groups[span.task, span.what, span.place].append(span)
        return [
            f"N+1: {len(spans)} times the same query in {task} at {place}, "
            f"{_ms(sum(span.seconds for span in spans))} together: {drawing.shortened(what)} "
            "Would select_related(), prefetch_related() or a filter with __in fetch all at once?"
            for (task, what, place), spans in groups.items()
            if len(spans) >= REPEATED
        ]

    def _in_turn(self) -> list[str]:
        found = []
        for task, spans in self.by_task.items():
            for run in _runs(spans):
                places = list(dict.fromkeys(span.place for span in run))
                if len(places) >= _IN_TURN:
                    found.append(
                        f"In turn: {len(run)} queries of {task} ran one after the other for "
                        f"{_ms(sum(span.seconds for span in run))}, at {', '.join(places)}. If "
                        "they do not need each other's results, gather() or batch() runs them at "
                        "once."
                    )
        return found

    def _waited(self) -> list[str]:
        groups: dict[str, list[Span]] = defaultdict(list)
        for span in self.waits:
            groups[span.what].append(span)
        return [
            f"Waiting: {len({span.task for span in spans})} tasks waited {what}, {len(spans)} "
            f"times, {_ms(sum(span.seconds for span in spans))} together."
            for what, spans in groups.items()
            if len(spans) > 1
        ]

    def __str__(self) -> str:
        return drawing.as_text(self)

    def svg(self) -> str:
        """The timeline as an SVG picture: a row for each task, a colour for each connection."""
        return drawing.as_svg(self)

    def html(self) -> str:
        """A page with the picture, what was found, and every query."""
        return drawing.as_html(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the picture and what was found."""
        return drawing.as_fragment(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture, or with a name in .html the page.

        Raises:
            ValueError: the name ends otherwise than in .svg or .html.
        """
        path = Path(path)
        if path.suffix not in (".svg", ".html"):
            raise ValueError(
                f"A timeline is saved as .svg or .html, not as {path.name!r}."
                + see("deployment#what-ran-when")
            )
        path.write_text(self.svg() if path.suffix == ".svg" else self.html(), encoding="utf-8")


def _runs(spans: list[Span]) -> Iterator[list[Span]]:
    """Different reads of one file that follow each other, outside transactions."""
    run: list[Span] = []
    for span in spans:
        if span.is_wait:
            continue
        read = span.what.lstrip("( ").upper().startswith("SELECT")
        read = read and not span.is_command and not span.in_block
        if run and not (
            read and span.what not in (other.what for other in run) and _file(span) == _file(run[0])
        ):
            yield run
            run = []
        if read:
            run.append(span)
    yield run


def _file(span: Span) -> str:
    return span.place.rpartition(":")[0]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def timeline() -> Timeline:
    """Record the native queries of every task, and what they waited for, while a block runs::

        async with asyncorm.timeline() as seen:
            await view(request)
        print(seen)
        seen.save("request.html")

    `seen.findings()` names queries that are repeated as N+1 problems are, queries that ran one
    after the other though they might run at once, and waits. In a test's transaction synchronous
    queries are recorded, too.
    """
    return Timeline()
