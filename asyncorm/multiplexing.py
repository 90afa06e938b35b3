"""Statements of several operations on one connection, in one network round trip.

An operation that needs no session of its own, only the result of a single statement, does not have
to wait until it has a connection to itself. Its statement joins a `Queue`; when a connection comes
free, several of those that wait are sent on it as one pipeline. Each keeps its own result, its own
error and, outside a transaction block, its own implicit transaction.
"""

from __future__ import annotations

from asyncio import CancelledError, Future, Lock, Task, current_task, get_running_loop, sleep
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context
from copy import copy
from functools import partial
from time import monotonic
from typing import Any, Protocol

import psycopg
from psycopg import pq

from . import _events, bridge
from ._wire.cancelling import CANCEL_TIMEOUT, finish
from ._wire.settings import reported
from ._wire.slow import Looking, slow
from ._wire.statement import Command, Statement, Unanswered, Unsent
from ._wire.texts import is_read as is_read  # others look for these here
from ._wire.texts import is_single as is_single
from ._wire.texts import only_reads
from .bridge import Runner
from .driver import Connection
from .pipelines import Pipeline

MOST = 64  # statements in one pipeline

_FATAL_ERROR = pq.ExecStatus.FATAL_ERROR
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_ABORTED = b"25P02"  # a statement in a transaction in which one has failed


class Source(Protocol):
    """Where a pipeline gets its connection: a pool, a part of one, or a transaction block."""

    @property
    def pool(self) -> Any:
        """The pool, which keeps statistics."""

    @property
    def awaited(self) -> str:
        """What its statements wait for, in words."""

    @property
    def in_order(self) -> bool:
        """Whether one statement's operation has to go on before the next one's begins."""

    @property
    def keeps_state(self) -> bool:
        """Whether what one statement sets in the session is meant for those behind it."""

    @property
    def size(self) -> int:
        """How many pipelines may wait for a connection at once."""

    def connection(self) -> AbstractContextManager[Connection]:
        """Wait for a connection and have it to oneself inside; called natively."""

    def asked(self) -> AbstractContextManager[Any]:
        """The current task waits inside for its statement; may refuse it, or give what to await
        first.
        """

    def dropped(self, exc: BaseException) -> None:
        """A statement goes on although the operation that wanted it was cancelled."""

    def refusal(self) -> BaseException | None:
        """Why a statement after one that failed is refused, if it is not the server that says."""


class _Request:
    """One operation's statement.

    Attributes:
        travelling: with those that it was sent with, once it is.
        waits: neither taken by a pipeline nor given up.
        failed: it has aborted its transaction, if it was in one.
    """

    __slots__ = ("command", "failed", "future", "pid", "sent", "since", "travelling", "waits")

    def __init__(self, command: Command) -> None:
        self.command = command
        self.future: Future[Any] = get_running_loop().create_future()
        self.since = monotonic()
        self.pid = 0
        self.sent = self.since
        self.travelling: _Travelling | None = None
        self.waits = True
        self.failed = False


class _Travelling:
    """Statements under way together, and the task that waits for their results.

    Attributes:
        told: what the server had reported when their values were bound; None if that is kept.
        bound: those whose values can be sent.
    """

    def __init__(self, requests: list[_Request], told: Any) -> None:
        self.requests = requests
        self.told = told
        self.bound: dict[_Request, Statement] = {}
        self.task = current_task()
        for request in requests:
            request.travelling = self

    def end(self) -> None:
        """They are under way no more; each of them would keep all others, and they each other."""
        self.task = None
        self.requests, self.bound = [], {}


class _Segment:
    """Statements that wait, nobody else between them, and how many pipelines are to take
    them."""

    def __init__(self) -> None:
        self.waiting: deque[_Request] = deque()
        self.pipelines = 0


class Queue:
    """Statements that wait for a connection of one source, in order of arrival.

    Attributes:
        waiting: how many wait now.
        pending: how many pipelines wait for a connection.
        starting: those of them that have not got into line yet.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: _Segment | None = None
        self._tasks: set[Task[None]] = set()
        self._taking = Lock()
        self.waiting = 0
        self.pending = 0
        self.starting: dict[object, _Segment] = {}

    def seal(self) -> None:
        """Somebody waits for a connection to himself: what comes later stands behind him."""
        self._open = None

    @property
    def active(self) -> bool:
        """Whether pipelines are under way or about to wait for their connection."""
        return bool(self._tasks)

    def run(self, command: Command) -> Any:
        """`submit()` for the running operation."""
        runner = bridge.running()
        bridge.deliver(runner)
        return bridge.wait_for(runner, self.submit(command))

    async def submit(self, command: Command) -> Any:
        """Have a command of the current task executed; what it wants of its result.

        Raises:
            psycopg.Error: there was no connection to be had, or it broke.
        """
        with self._source.asked() as suspicion:
            if suspicion is not None:
                await suspicion()
            request = _Request(command)
            self._join(request)
            try:
                value = await request.future
            except CancelledError as exc:
                await self._drop(request, exc)
                raise
            except BaseException:
                del request  # it has the error, whose traceback has this
                raise
        self.served_by = request.pid
        if _events.waits and request.sent - request.since > 0.001:
            source = self._source
            _events.waited(source.pool.alias, source.awaited, request.since, request.sent)
        return value

    def _join(self, request: _Request) -> None:
        segment = self._open
        if segment is None:
            segment = self._open = _Segment()
        segment.waiting.append(request)
        self.waiting += 1
        if segment.pipelines < min(len(segment.waiting), self._source.size):
            self._start(segment)

    def _start(self, segment: _Segment) -> None:
        segment.pipelines += 1
        self.pending += 1
        self.starting[token := object()] = segment
        # Not by the loop's factory: where tasks begin at once it would take the first one alone.
        pipeline = bridge.run(self._run_pipeline, segment, token, monotonic())
        task = Task(pipeline, loop=get_running_loop(), context=Context())
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, token))

    def _ended(self, token: object, task: Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the requests have been told
        elif (segment := self.starting.pop(token, None)) is not None:  # it has not begun
            segment.pipelines -= 1
            self.pending -= 1
            if not all(request.future.done() for request in segment.waiting):
                self._start(segment)

    def _leave(self, request: _Request) -> None:
        if request.waits:
            request.waits = False
            self.waiting -= 1

    async def _drop(self, request: _Request, exc: BaseException) -> None:
        travelling = request.travelling
        self._leave(request)
        if travelling is not None and (task := travelling.task) is not None:
            self._source.dropped(exc)
            if all(other.future.done() for other in travelling.requests):
                # Nobody else's statement is under way: the server stops before the caller goes on.
                task.cancel()
                await finish(task, 2 * CANCEL_TIMEOUT)
        elif request.failed:  # and its operation hears of the cancellation alone
            self._source.dropped(exc)

    def _run_pipeline(self, segment: _Segment, token: object, started: float) -> None:
        runner = bridge.running()
        self.starting.pop(token, None)
        requests: list[_Request] | None = None
        try:
            with self._source.connection() as conn:
                with self._taking_turns(runner):
                    conn.give_turn()  # before any is taken
                    requests = self._take(segment, first=True)
                    travelling = self._bind(conn, requests)
                while requests:
                    self._send(runner, conn, travelling)
                    if self._source.size > 1 or (
                        conn.session_dirty and not self._source.keeps_state
                    ):
                        break
                    if requests := self._take(segment, first=False):
                        travelling = self._bind(conn, requests)
            if segment.waiting and not segment.pipelines:
                self._start(segment)
        except BaseException as exc:
            if requests is None:
                requests = self._unserved(segment, started)
            _fail_all(requests, exc)
            del requests  # they have the error, whose traceback has this
            if not isinstance(exc, Exception):
                raise

    @contextmanager
    def _taking_turns(self, runner: Runner) -> Iterator[None]:
        """What one connection takes is bound before another one takes more: the statements are sent
        in the order in which they came, though other tasks have turns while they are bound."""
        bridge.wait_for(runner, self._taking.acquire())
        try:
            yield
        finally:
            self._taking.release()

    def _take(self, segment: _Segment, first: bool) -> list[_Request]:
        share = -(-len(segment.waiting) // max(segment.pipelines, 1))
        if first:
            segment.pipelines -= 1
            self.pending -= 1
        requests: list[_Request] = []
        while segment.waiting and len(requests) < min(share, MOST):
            request = segment.waiting.popleft()
            self._leave(request)
            if not request.future.done():
                requests.append(request)
        if segment.waiting and not segment.pipelines and self._source.size > 1:
            self._start(segment)
        return requests

    def _unserved(self, segment: _Segment, started: float) -> list[_Request]:
        """Those that waited in vain; what came much later gets another pipeline."""
        segment.pipelines -= 1
        self.pending -= 1
        waited = monotonic() - started
        unserved: list[_Request] = []
        while segment.waiting and monotonic() - segment.waiting[0].since >= 0.9 * waited:
            unserved.append(segment.waiting.popleft())
            self._leave(unserved[-1])
        if segment.waiting and not segment.pipelines:
            self._start(segment)
        return unserved

    def _send(self, runner: Runner, conn: Connection, travelling: _Travelling) -> None:
        before, requests = travelling.told, list(travelling.bound)
        if _events.statements and len(requests) > 1:
            _events.pipelined(request.command for request in requests)
        harmless = conn.begins and all(only_reads(each.command.text) for each in requests[1:])
        pipeline = Pipeline(conn, list(travelling.bound.values()), harmless)
        pid, now = conn.pgconn.backend_pid, monotonic()
        for request in requests:
            request.pid, request.sent = pid, now
        looking = Looking(conn, pipeline, requests)
        setter: _Request | None = None  # what has changed the session for those behind it
        # One connection only: they go on together, so that what they send next can travel together.
        together: list[_Answer] = []
        at_once = self._source.size > 1
        try:
            for number, results in pipeline:
                request = requests[number]
                if setter is not None:
                    self._refuse(request, setter, results)
                    continue
                told = None if before is None else reported(conn.pgconn)
                changed = told != before
                conn.told = told if changed else before  # what was made for the same is found fast
                try:
                    answer = _Answer(request, results, conn)
                finally:
                    conn.told = None
                if changed:
                    setter = request
                    slow.add(setter.command.text)
                if at_once:
                    answer.give()
                else:
                    together.append(answer)
        except CancelledError:
            bridge.wait_for(runner, pipeline.abort())
            raise
        except BaseException as exc:
            conn.terminate()
            if isinstance(exc, psycopg.Error):
                self._give_all(runner, together)
                for request in requests[: pipeline.sent]:
                    _fail(request.future, self._in_doubt(exc, conn, request.command.text))
            if isinstance(exc, psycopg.OperationalError) and not self._source.in_order:
                raise Unsent.of(exc, conn.wire.opened) from exc
            raise
        finally:
            looking.end()
            travelling.end()
        self._give_all(runner, together)
        if len(requests) > 1:
            self._source.pool.pipelines += 1
            self._source.pool.statements_pipelined += len(requests)
        if self._source.in_order:
            # Who waited goes on before the connection is given to anybody else.
            bridge.wait_for(runner, sleep(0))

    def _refuse(self, request: _Request, setter: _Request, results: list[Any]) -> None:
        """Not serve a statement that ran with what another one has set in the session.

        A view, a trigger, a type may hide that. What only reads, or failed, is executed again.
        """
        if is_read(request.command.text) or results[-1].status == _FATAL_ERROR:
            request.travelling = None
            if not request.future.done():
                self._join(request)
            return
        _fail(
            request.future,
            psycopg.OperationalError(
                "This statement was executed, in one round trip behind another operation's that "
                "changed the settings of the server session, and so with those: "
                f"{setter.command.text[:200]!r}. Execute that one outside of batch()."
            ),
        )

    def _in_doubt(self, exc: psycopg.Error, conn: Connection, text: str) -> psycopg.Error:
        # In a block it is rolled back, whatever the server has done.
        return exc if self._source.in_order else Unanswered.of(exc, text, conn.wire.opened)

    def _bind(self, conn: Connection, requests: list[_Request]) -> _Travelling:
        """Bind the values of those whose values can be sent; the others are told why not."""
        told = None if self._source.keeps_state else reported(conn.pgconn)
        travelling = _Travelling(requests, told)
        conn.told = told
        try:
            for request in requests:
                try:
                    travelling.bound[request] = request.command.bind(conn)
                except Exception as exc:
                    if not request.future.done():
                        request.future.set_exception(exc)
                conn.give_turn()
        finally:
            conn.told = None
        return travelling

    def _give_all(self, runner: Runner, answers: list[_Answer]) -> None:
        broken = False  # a statement before this one failed, or its operation was cancelled
        for answer in answers:
            future = answer.request.future
            if (broken or answer.aborted) and (exc := self._source.refusal()) is not None:
                _fail(future, exc)
            else:
                answer.give()
            if not broken:
                broken = future.cancelled() or answer.failed
                if broken:  # whose operation hears of it first: Django's code may mark the block
                    bridge.wait_for(runner, sleep(0))


class _Answer:
    """What the server says to one operation's statement, read on the connection that ran it."""

    def __init__(self, request: _Request, results: list[Any], conn: Connection) -> None:
        self.request = request
        self.failed = results[-1].status == _FATAL_ERROR
        self.aborted = self.failed and results[0].error_field(_SQLSTATE) == _ABORTED
        request.failed = self.failed and not self.aborted
        self.value: Any = None
        self.error: BaseException | None = None
        if not request.future.done():
            try:
                self.value = request.command.read(conn, conn.checked(results))
            except Exception as exc:
                self.error = conn.told_why(exc)

    def give(self) -> None:
        """Have the operation go on."""
        future = self.request.future
        if future.done():
            return
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(self.value)


def _fail_all(requests: list[_Request], exc: BaseException) -> None:
    for request in requests:
        _fail(request.future, exc)


def _fail(future: Future[Any], exc: BaseException) -> None:
    """Tell one of several of an error: an exception is raised in one place only."""
    if not isinstance(exc, Exception):
        future.cancel()
    elif not future.done():
        own = copy(exc)
        own.__cause__ = exc.__cause__ or exc
        future.set_exception(own)
