"""Statements of several operations on one connection, in one network round trip.

An operation that needs no session of its own, only the result of a single statement, does not have
to wait until it has a connection to itself. Its statement joins a `Queue`; when a connection comes
free, a *flight* takes several of those that wait and sends them as one pipeline. Each keeps its own
result, its own error and, outside a transaction block, its own implicit transaction.
"""

from __future__ import annotations

import functools
import re
from asyncio import CancelledError, Future, Task, current_task, get_running_loop, sleep
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import Context
from copy import copy
from time import monotonic
from typing import Any, Protocol

from psycopg import pq

from . import bridge
from .bridge import Runner
from .driver import CANCEL_TIMEOUT, Connection, Statement, finish, leaves_state

MOST = 64  # statements that travel together
SLOW = 0.2  # seconds without an answer after which a flight's statements are taken to be slow ones
_REMEMBERED = 1000  # slow statements
_REMEMBERED_FOR = 60.0  # seconds

_FATAL_ERROR = pq.ExecStatus.FATAL_ERROR

_READS = re.compile(r"\s*\(*\s*(?:SELECT|VALUES|TABLE)\b", re.IGNORECASE)
_COMMANDS = re.compile(
    r"\s*\(*\s*(?:SELECT|VALUES|TABLE|WITH|INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE
)
# What may wait for another transaction, or for time: nothing is put behind it.
_WAITS = re.compile(
    r"\bFOR\s+(?:NO\s+KEY\s+)?UPDATE\b|\bFOR\s+(?:KEY\s+)?SHARE\b|\bpg_sleep|(?:\b|_)lock",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=4096)
def is_read(text: str) -> bool:
    """Whether a statement only reads, and so waits for nobody, as far as its text tells."""
    return _READS.match(text) is not None and is_single(text) and _WAITS.search(text) is None


@functools.lru_cache(maxsize=4096)
def is_single(text: str) -> bool:
    """Whether a statement may travel with others: one command, no session state, no COPY."""
    return (
        ";" not in text.rstrip("; \n\t")
        and not leaves_state(text)
        and _COMMANDS.match(text) is not None
    )


class _Slow:
    """Texts of statements that took long lately: they travel alone."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        seen = self._seen.get(text)
        return seen is not None and monotonic() - seen < _REMEMBERED_FOR

    def add(self, text: str) -> None:
        self._seen[text] = monotonic()
        self._seen.move_to_end(text)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)


slow = _Slow()


# Told of waits (timeline.py): the alias, for what, from when to when (time.monotonic()).
waits: list[Callable[[str, str, float, float], None]] = []


def waited(alias: str, what: str, since: float, until: float | None = None) -> None:
    """The current task has waited for a connection or a block."""
    for tell in waits:
        tell(alias, what, since, monotonic() if until is None else until)


class Source(Protocol):
    """Where a flight gets its connection: a pool, a part of one, or a transaction block."""

    @property
    def pool(self) -> Any:
        """The pool, which keeps statistics."""

    @property
    def awaited(self) -> str:
        """What its statements wait for, in words."""

    @property
    def size(self) -> int:
        """How many flights may wait for a connection at once."""

    def flight(self) -> AbstractContextManager[Connection]:
        """Wait for a connection and have it to oneself inside; called natively."""

    def asked(self) -> AbstractContextManager[None]:
        """The current task waits inside for its statement; may refuse it."""

    def dropped(self, exc: BaseException) -> None:
        """A statement goes on although the operation that wanted it was cancelled."""

    def refusal(self) -> BaseException | None:
        """Why a statement after one that failed is refused, if it is not the server that says."""


class _Passenger:
    """One operation's statement.

    Attributes:
        flight: those that it travels with, from take-off on.
    """

    __slots__ = ("flight", "future", "pid", "sent", "since", "statement", "text")

    def __init__(self, statement: Statement, text: str) -> None:
        self.statement = statement
        self.text = text
        self.future: Future[list[Any]] = get_running_loop().create_future()
        self.since = monotonic()
        self.pid = 0
        self.sent = self.since
        self.flight: _Flight | None = None


class _Flight:
    """Statements under way together, and the task that waits for their results."""

    def __init__(self, passengers: list[_Passenger]) -> None:
        self.passengers = passengers
        self.task = current_task()
        for passenger in passengers:
            passenger.flight = self


class _Segment:
    """Statements that wait, nobody else between them, and how many flights are to take them."""

    def __init__(self) -> None:
        self.waiting: deque[_Passenger] = deque()
        self.flights = 0


class Queue:
    """Statements that wait for a connection of one source, in order of arrival.

    Attributes:
        waiting: how many wait now.
        pending: how many flights wait for a connection.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: _Segment | None = None
        self._tasks: set[Task[None]] = set()
        self.waiting = 0
        self.pending = 0

    def seal(self) -> None:
        """Somebody waits for a connection to himself: what comes later stands behind him."""
        self._open = None

    @property
    def announced(self) -> bool:
        """Whether flights are under way or about to wait for their connection."""
        return bool(self._tasks)

    def run(self, statement: Statement, text: str) -> list[Any]:
        """Have a statement of the running operation executed; its results.

        Raises:
            psycopg.Error: there was no connection to be had, or it broke.
        """
        runner = bridge.current()
        assert runner is not None
        bridge.deliver(runner)
        with self._source.asked():
            passenger = _Passenger(statement, text)
            self._join(passenger)
            try:
                results = bridge.wait_for(runner, passenger.future)
                self.served_by = passenger.pid
                if waits and passenger.sent - passenger.since > 0.001:
                    source = self._source
                    waited(source.pool.alias, source.awaited, passenger.since, passenger.sent)
                return results
            except CancelledError as exc:
                self._drop(runner, passenger, exc)
                raise

    def _join(self, passenger: _Passenger) -> None:
        segment = self._open
        if segment is None:
            segment = self._open = _Segment()
        segment.waiting.append(passenger)
        self.waiting += 1
        if segment.flights < min(len(segment.waiting), self._source.size):
            self._announce(segment)

    def _announce(self, segment: _Segment) -> None:
        segment.flights += 1
        self.pending += 1
        task = get_running_loop().create_task(
            bridge.run(self._fly, segment, monotonic()), context=Context()
        )
        self._tasks.add(task)
        task.add_done_callback(self._landed)

    def _landed(self, task: Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the passengers have been told

    def _drop(self, runner: Runner, passenger: _Passenger, exc: BaseException) -> None:
        flight = passenger.flight
        if flight is None or (task := flight.task) is None:
            return  # it will not board, or has landed
        self._source.dropped(exc)
        if all(other.future.done() for other in flight.passengers):
            # Nobody else's statement is under way: the server stops before the caller goes on.
            task.cancel()
            bridge.wait_for(runner, finish(task, 2 * CANCEL_TIMEOUT))

    def _fly(self, segment: _Segment, announced: float) -> None:
        runner = bridge.current()
        assert runner is not None
        passengers: list[_Passenger] | None = None
        try:
            with self._source.flight() as conn:
                while passengers := self._board(segment, first=passengers is None):
                    self._send(runner, conn, passengers)
                    if self._source.size > 1:
                        break
        except BaseException as exc:
            if passengers is None:
                passengers = self._stranded(segment, announced)
            for passenger in passengers:
                _fail(passenger.future, exc)
            if not isinstance(exc, Exception):
                raise

    def _board(self, segment: _Segment, first: bool) -> list[_Passenger]:
        share = -(-len(segment.waiting) // max(segment.flights, 1))
        if first:
            segment.flights -= 1
            self.pending -= 1
        passengers: list[_Passenger] = []
        while segment.waiting and len(passengers) < min(share, MOST):
            passenger = segment.waiting.popleft()
            self.waiting -= 1
            if not passenger.future.done():
                passengers.append(passenger)
        if segment.waiting and not segment.flights and self._source.size > 1:
            self._announce(segment)
        return passengers

    def _stranded(self, segment: _Segment, announced: float) -> list[_Passenger]:
        """Those who waited for a flight in vain; who came much later gets another one."""
        segment.flights -= 1
        self.pending -= 1
        waited = monotonic() - announced
        stranded: list[_Passenger] = []
        while segment.waiting and monotonic() - segment.waiting[0].since >= 0.9 * waited:
            stranded.append(segment.waiting.popleft())
            self.waiting -= 1
        if segment.waiting and not segment.flights:
            self._announce(segment)
        return stranded

    def _send(self, runner: Runner, conn: Connection, passengers: list[_Passenger]) -> None:
        def look() -> None:
            if conn.waiting:
                for passenger in passengers:
                    slow.add(passenger.text)

        flight = _Flight(passengers)
        for passenger in passengers:
            passenger.pid = conn.pgconn.backend_pid
            passenger.sent = monotonic()
        handle = get_running_loop().call_later(SLOW, look)
        try:
            results = bridge.wait_for(
                runner, conn.run_together([passenger.statement for passenger in passengers])
            )
        finally:
            handle.cancel()
            flight.task = None
        if len(passengers) > 1:
            self._source.pool.pipelines += 1
            self._source.pool.statements_pipelined += len(passengers)
        broken = False  # a statement before this one failed, or its operation was cancelled
        for number, (passenger, result) in enumerate(zip(passengers, results, strict=True), 1):
            if broken and (exc := self._source.refusal()) is not None:
                _fail(passenger.future, exc)
            elif not passenger.future.done():
                passenger.future.set_result(result)
            if not broken and number < len(passengers):
                broken = passenger.future.cancelled() or result[0].status == _FATAL_ERROR
                if broken:  # whose operation hears of it first: Django's code may mark the block
                    bridge.wait_for(runner, sleep(0))


def _fail(future: Future[Any], exc: BaseException) -> None:
    """Tell one of several of an error: an exception is raised in one place only."""
    if future.done():
        return
    if not isinstance(exc, Exception):
        future.cancel()
        return
    own = copy(exc)
    own.__cause__ = exc.__cause__ or exc
    future.set_exception(own)
