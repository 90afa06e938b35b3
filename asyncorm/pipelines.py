"""Several statements on one connection in one network round trip: libpq's pipeline mode.

What psycopg does not document of what is used here is in internals.py, with the reasons.
"""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import generators, pq
from psycopg._preparing import Prepare

from . import bridge
from ._wire.cancelling import CANCEL_TIMEOUT, finish
from ._wire.statement import STALE, Statement, checked
from .driver import Connection, Steps
from .wire import CLOSED

_IDLE = pq.TransactionStatus.IDLE
_COMMAND_OK = pq.ExecStatus.COMMAND_OK
_PIPELINE_SYNC = pq.ExecStatus.PIPELINE_SYNC
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_SHOULD = Prepare.SHOULD
_ANSWERED = 0  # what a generator yields instead of what it waits for
_WAIT_RW, _READY_R = psycopg.waiting.WAIT_RW, psycopg.waiting.READY_R

Answer = tuple[int, list[Any]]  # a statement's number, and all results up to its end


class Pipeline:
    """Statements that go out together, and their answers.

    Outside a transaction each is one of its own: one that fails changes nothing for the others.

    Args:
        harmless: whatever is behind the first may be executed outside the transaction, too, if its
            BEGIN fails: so that this may go with the first.

    Attributes:
        sent: how many of them libpq has.
        answered: how many the server has finished with.
    """

    def __init__(
        self, conn: Connection, statements: Sequence[Statement], harmless: bool = False
    ) -> None:
        self._conn = conn
        self._statements = statements
        self._joins = harmless or len(statements) == 1
        self._begins = False  # BEGIN is in the first statement's segment
        self._failed: list[Any] = []  # its result, if it has
        self.sent = 0
        self.answered = 0
        self._most = len(statements)
        self._results: list[Any] = []  # so far, of the statement that is being answered
        self._answer: Answer | None = None
        self._again: list[int] = []
        self._steps = self._run()
        self._state = 0
        self._ended = self._stopping = False

    def __iter__(self) -> Iterator[Answer]:
        """Send them and give each answer when it is complete; waits natively.

        Raises:
            psycopg.Error: the connection broke; the answers that had come were given before.
        """
        runner = bridge.running()
        ready: Any = None
        while True:
            try:
                self._state = self._steps.send(ready)
            except StopIteration:
                self._ended = True
                return
            if self._state == _ANSWERED:
                assert self._answer is not None
                yield self._answer
            else:
                ready = bridge.wait_for(runner, self._conn.wire.ready(self._state))

    def gathered(self, note: Callable[[int, list[Any]], None]) -> Steps:
        """A generator for `Connection.wait()`: send them and tell `note` of each answer at once."""
        ready: Any = None
        while True:
            try:
                state = self._steps.send(ready)
            except StopIteration:
                return
            ready = None
            if state == _ANSWERED:
                assert self._answer is not None
                note(*self._answer)
            else:
                ready = yield state

    async def abort(self) -> None:
        """Have the server stop them; the connection is closed unless it is idle soon."""
        if self._ended:
            return
        self._most = self.sent
        self._stopping = True
        conn = self._conn
        task = get_running_loop().create_task(conn.stop(self._rest))
        if not await finish(task, CANCEL_TIMEOUT) or task.exception() is not None:
            self._steps.close()
            conn.terminate()

    async def _rest(self) -> None:
        wire = self._conn.wire
        with suppress(StopIteration):
            if self._state == _ANSWERED:  # cancelled by who made something of the answer
                self._state = wire.begin(self._steps)
            await wire.drive(self._steps, self._state)

    def _run(self) -> Steps:
        conn = self._conn
        self._begins = self._joins and conn.begins
        if not self._begins:
            yield from conn.started()
        yield from conn.whole_results()
        pgconn = conn.pgconn
        book: Any = conn._prepared
        alone = not self._begins and pgconn.transaction_status == _IDLE
        names: list[bytes] = []
        for statement in self._statements:
            if statement.traces:
                conn.note(statement.traces)
            prepare, name = book.get(statement, statement.prepare)
            if prepare == _SHOULD:
                name = (yield from self._prepare(statement, name)) if alone else b""
            elif statement.prepare is not False:
                book.maybe_add_to_cache(statement, prepare, name)
            names.append(name)
        pgconn.enter_pipeline_mode()
        if self._begins:
            conn.send_begin()
        yield from self._send(names, alone)
        while self.answered < self.sent:
            results = yield from generators.fetch_many(pgconn)
            if not results:  # libpq has noticed that the connection is lost
                checked(self._results, conn.info.encoding)
                raise psycopg.OperationalError(pgconn.get_error_message() or CLOSED)
            for result in results:
                if result.status != _PIPELINE_SYNC:
                    self._results.append(result)
                elif self._ends(names, alone):
                    yield _ANSWERED
        pgconn.exit_pipeline_mode()
        for number in self._again:
            self._statements[number].send(pgconn)
            if self._gives(number, (yield from generators.execute(pgconn))):
                yield _ANSWERED
        if book._to_flush:
            yield from book.maintain_gen(conn)

    def _send(self, names: list[bytes], alone: bool) -> Steps:
        # No more than the way to the server takes is kept in libpq's memory; what the server sends
        # meanwhile is read, since it may wait for that before it reads on.
        pgconn = self._conn.pgconn
        full = False
        while full or self.sent < self._most:
            if not full:
                statement, name = self._statements[self.sent], names[self.sent]
                if name:
                    statement.send_prepared(pgconn, name)
                else:
                    statement.send(pgconn)
                pgconn.pipeline_sync()
                self.sent += 1
            elif (yield _WAIT_RW) & _READY_R:
                pgconn.consume_input()
                ended = False
                while self.answered < self.sent and not pgconn.is_busy():
                    result = pgconn.get_result()
                    if result is not None and result.status != _PIPELINE_SYNC:
                        self._results.append(result)
                    elif result is not None:
                        if self._ends(names, alone):
                            yield _ANSWERED
                    elif ended:
                        break
                    ended = result is None
            full = pgconn.flush() != 0

    def _ends(self, names: list[bytes], alone: bool) -> bool:
        """A statement has ended: whether its answer is to be given now."""
        results = self._results  # more than one where it is COMMIT that fails
        number = self.answered
        self._results = []
        self.answered += 1
        if self._begins and number == 0:
            begun, *results = results
            if begun.status != _COMMAND_OK:
                self._failed = [begun]
        if self._failed:  # what was executed all the same was not in the transaction
            results = self._failed
        if (name := names[number]) and results[-1].error_field(_SQLSTATE) in STALE:
            self._conn.forget(self._statements[number], name)
            if alone:
                self._again.append(number)
                return False
        return self._gives(number, results)

    def _gives(self, number: int, results: list[Any]) -> bool:
        # Before libpq reads on: the session's settings are those that the statement ran with.
        self._answer = number, results
        return not self._stopping

    def _prepare(self, statement: Statement, name: bytes) -> Any:
        """The name under which the statement is prepared now; none if it cannot be."""
        conn = self._conn
        book: Any = conn._prepared
        statement.send_prepare(conn.pgconn, name)
        results = yield from generators.execute(conn.pgconn)
        if results[-1].status != _COMMAND_OK:
            return b""  # executing it will say why
        key = book.maybe_add_to_cache(statement, _SHOULD, name)
        if key is not None:
            book.validate(key, _SHOULD, name, results)
        return name
