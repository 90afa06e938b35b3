"""One stream of what happens: statements, commands, waits, check-outs, the cache, blocks.

Who does one of these asks first whether anybody listens to its kind (`if _events.statements:`):
listening costs, and nobody else pays. A listener sees and does not change anything: a statement
takes the same way as without it, and an error of the listener's is logged.

This module knows neither Django nor psycopg. Times are those of `time.monotonic()`.
"""

from __future__ import annotations

import logging
from asyncio import Task, current_task
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import ref

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from .driver import Connection


logger = logging.getLogger("asyncorm")

# Whether anybody listens to events of a kind; set by listen() and unlisten().
statements = commands = waits = checkouts = cache = blocks = False


class _Event:
    """What a task does. It does not keep the task, whose error's frames may have the event."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self._task = _task()
        self.began = monotonic()

    @property
    def task(self) -> Task[Any] | None:
        """The asyncio task that it is of, while there is one; None in synchronous code."""
        return None if self._task is None else self._task()

    @property
    def is_of_current_task(self) -> bool:
        """Whether the code that runs now is of that task."""
        return self._task is _task()  # of a task there is one such reference


class Statement(_Event):
    """An SQL statement, from before it waits for a connection until its result is there.

    Attributes:
        alias: the database alias.
        sql: its text, with placeholders.
        params: its parameters, as they were given; None if there are none.
        task: the asyncio task that runs it, while there is one; None in synchronous code.
        native: native code runs it; otherwise synchronous code in a test's transaction.
        pooled: on a connection of a native pool, not on a synchronous one that is lent.
        by_cursor: a cursor of Django's executes it: who has replaced a method of that one knows it.
        cache: "hit", "miss" or "uncacheable"; None of SQL that the ORM did not make.
        pipelined: it went to the server together with statements of others.
        connection: the process id of the server's end; 0 if there was none.
        in_block: a transaction was open.
        rows: how many it returned or changed; -1 if that is not known.
        error: what it raised, while listeners are told of its end: the frames of that have this.
        known: its listeners have been told that it has begun.
        waited: seconds for a connection, or for the transaction block.
        began, sent, ended: when; `sent` when there was a connection, the same as `began` until
            then.
    """

    native = pooled = True
    by_cursor = pipelined = False
    connection = 0
    rows = -1
    error: BaseException | None = None
    waited = ended = 0.0
    known = False
    _outer: ref[Statement] | None = None

    def __init__(
        self, alias: str, sql: str, params: object, in_block: bool, cache: str | None
    ) -> None:
        super().__init__(alias)
        self.sql = sql
        self.params = params
        self.in_block = in_block
        self.cache = cache
        if (outcome := _outcome.get()) is not None:
            self.cache = outcome
            _outcome.set(None)
        self.sent = self.began

    def __enter__(self) -> Statement:
        if (outer := _running.get()) is not None:
            self._outer = outer
        _running.set(ref(self))
        if _heard["statement_begun"] and not self.known:
            self.known = True
            _tell("statement_begun", self)
        return self

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        _running.set(self._outer)
        if exc is not None:
            if isinstance(exc, Unserved):
                _unserved.set(self)
                return
            self.error = exc
        self.ended = monotonic()
        _tell("statement_ended", self)
        self.error = None

    @property
    def seconds(self) -> float:
        """How long the server and the way to it took."""
        return self.ended - self.sent


class Unserved(Exception):
    """A statement is not sent in this way after all; the task's next one stands for it."""


class Command(_Event):
    """What is sent beside statements: BEGIN, COMMIT, ROLLBACK, FETCH and CLOSE of a stream.

    Attributes: as those of `Statement`.
    """

    def __init__(self, alias: str, text: str, connection: int, in_block: bool) -> None:
        super().__init__(alias)
        self.text = text
        self.connection = connection
        self.in_block = in_block
        self._statement = _under_way()
        self.ended = 0.0
        _tell("command_begun", self)

    def end(self) -> None:
        """It has been answered, possibly in another task, if this one was cancelled; or, a BEGIN
        that goes with its statement, sent.
        """
        self.ended = monotonic()
        if self._statement is not None and self.text.startswith("BEGIN"):
            self._statement.sent = self.ended
        _tell("command_ended", self)


class Wait(_Event):
    """A task has waited for a connection or a transaction block.

    Attributes: as those of `Statement`, and
        what: for what, in words.
    """

    def __init__(self, alias: str, what: str, began: float, ended: float) -> None:
        super().__init__(alias)
        self.what = what
        self.began = began
        self.ended = ended


class CheckOut(_Event):
    """Somebody has a connection.

    Attributes: as those of `Statement`, and
        holder: says by `str()` who has it now.
    """

    def __init__(self, alias: str, connection: int, holder: object) -> None:
        super().__init__(alias)
        self.connection = connection
        self.holder = holder
        self.ended = 0.0


class Block(_Event):
    """A transaction or a savepoint.

    Attributes: as those of `Statement`, and
        origin: file and line where it was entered.
        outermost: it is a transaction, no savepoint.
        rolled_back: it ended by a rollback.
    """

    def __init__(self, alias: str, origin: str, outermost: bool) -> None:
        super().__init__(alias)
        self.origin = origin
        self.outermost = outermost
        self.rolled_back = False
        self.ended = 0.0
        _tell("block_begun", self)

    def end(self, rolled_back: bool) -> None:
        """It was left; told once."""
        if not self.ended:
            self.ended = monotonic()
            self.rolled_back = rolled_back
            _tell("block_ended", self)


class Listener:
    """Hears what it has a method for; these do nothing and cost nothing.

    They are called in the task that the event is of, and must not wait.
    """

    def statement_begun(self, statement: Statement) -> None:
        """Before it waits for a connection."""

    def statement_ended(self, statement: Statement) -> None:
        """Its result is there, or its error."""

    def command_begun(self, command: Command) -> None:
        """It is about to be sent."""

    def command_ended(self, command: Command) -> None:
        """It was answered."""

    def waited(self, wait: Wait) -> None:
        """A wait is over."""

    def checked_out(self, checkout: CheckOut) -> None:
        """A connection has left the pool."""

    def checked_in(self, checkout: CheckOut) -> None:
        """It is back."""

    def cached(self, outcome: str) -> None:
        """The statement cache was asked: "hit", "miss" or "uncacheable"."""

    def block_begun(self, block: Block) -> None:
        """BEGIN or SAVEPOINT was executed."""

    def block_ended(self, block: Block) -> None:
        """It was committed, released or rolled back."""


_listeners: list[Listener] = []
# The methods of listeners that hear of something, by their name.
_heard: dict[str, list[Callable[[Any], None]]] = {
    name: [] for name in vars(Listener) if not name.startswith("_")
}

# Called when somebody begins or ceases to listen: who has something to put in place for that.
changed: list[Callable[[], None]] = []


def listen(listener: Listener) -> None:
    """Tell `listener` of what happens from now on, in all tasks; once, however often it is said."""
    if listener not in _listeners:
        _listeners.append(listener)
        _arrange()


def unlisten(listener: Listener) -> None:
    """Tell it no more."""
    if listener in _listeners:
        _listeners.remove(listener)
        _arrange()


def _arrange() -> None:
    global statements, commands, waits, checkouts, cache, blocks
    for name in _heard:
        nothing = getattr(Listener, name)
        heard = [each for each in _listeners if getattr(type(each), name) is not nothing]
        _heard[name] = [getattr(each, name) for each in heard]
    statements = bool(_heard["statement_begun"] or _heard["statement_ended"])
    commands = bool(_heard["command_begun"] or _heard["command_ended"])
    waits = statements or bool(_heard["waited"])
    checkouts = bool(_heard["checked_out"] or _heard["checked_in"])
    cache = statements or bool(_heard["cached"])
    blocks = bool(_heard["block_begun"] or _heard["block_ended"])
    if not checkouts:
        _out.clear()
    for tell in changed:
        tell()


_failed: set[Any] = set()


def _tell(what: str, event: object) -> None:
    for function in _heard[what]:
        try:
            function(event)
        except Exception:
            cls = type(getattr(function, "__self__", function))
            if cls not in _failed:  # a line for each statement would make it worse
                _failed.add(cls)
                logger.exception("%s raised an error. Later ones are not logged.", function)


# The statement under way in the current task; one that it is to send otherwise; what the cache said
# of the next one. Tasks may share a Context, so each is asked whose it is; a Context that is copied
# meanwhile may live for long.
_running: ContextVar[ref[Statement] | None] = ContextVar("asyncorm_statement", default=None)
_unserved: ContextVar[Statement | None] = ContextVar("asyncorm_unserved", default=None)
_outcome: ContextVar[str | None] = ContextVar("asyncorm_outcome", default=None)


def _task() -> ref[Task[Any]] | None:
    try:
        task = current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
    return None if task is None else ref(task)


def _under_way() -> Statement | None:
    running = _running.get()
    statement = None if running is None else running()
    return statement if statement is not None and statement.is_of_current_task else None


# What the places that tell something call


def statement(
    alias: str, sql: str, params: object, in_block: bool = False, cache: str | None = None
) -> Statement:
    """The statement that the current task is about to run: inside `with` it is under way.

    Args:
        cache: what it says of the cache if that said nothing else.
    """
    again = _unserved.get()
    if again is not None:  # listeners know of it
        _unserved.set(None)
        if again.alias == alias and again.is_of_current_task:
            return again
    return Statement(alias, sql, params, in_block, cache)


class _Followed:
    """A command that tells the statement it is for what becomes of it (driver.Command)."""

    __slots__ = ("_command", "statement", "text")

    def __init__(self, command: Any, statement: Statement) -> None:
        self._command = command
        self.statement = statement
        self.text = command.text

    def bind(self, conn: Connection) -> Any:
        bound = self._command.bind(conn)
        statement = self.statement
        statement.connection = conn.pgconn.backend_pid
        statement.sent = monotonic()
        return bound

    def read(self, conn: Connection, result: PGresult) -> Any:
        self.statement.rows = result.ntuples or int(result.command_tuples or 0)
        return self._command.read(conn, result)


def followed(command: Any, statement: Statement | None = None) -> Any:
    """The command; it tells a statement, or that of the current task, where it was executed."""
    if statement is None and statements:
        statement = _under_way()
    return command if statement is None else _Followed(command, statement)


def pipelined(commands: Iterable[Any]) -> None:
    """These are sent together."""
    for command in commands:
        if type(command) is _Followed:
            command.statement.pipelined = True


def command(conn: Connection, text: str) -> AbstractContextManager[None]:
    """A command is executed inside; told if that is for a session (driver.Connection.lock)."""
    session = conn.lock
    if not (commands and hasattr(session, "alias")):
        return _NOBODY
    pid = 0 if conn.closed else conn.pgconn.backend_pid
    return _telling(Command(session.alias, text, pid, session.root is not None))


_NOBODY = nullcontext()


@contextmanager
def _telling(event: Command) -> Iterator[None]:
    try:
        yield
    finally:
        event.end()


def waited(alias: str, what: str, began: float, ended: float | None = None) -> None:
    """The current task has waited for a connection or a block."""
    if not waits:
        return
    if ended is None:
        ended = monotonic()
    if (statement := _under_way()) is not None:
        statement.waited += ended - began
        statement.sent = ended
    if _heard["waited"]:
        _tell("waited", Wait(alias, what, began, ended))


_out: dict[int, CheckOut] = {}


def checked_out(alias: str, conn: Connection, holder: object) -> None:
    """A connection has left its pool."""
    event = _out[id(conn.pgconn)] = CheckOut(alias, conn.pgconn.backend_pid, holder)
    _tell("checked_out", event)


def checked_in(conn: Connection) -> None:
    """It is back."""
    event = _out.pop(id(conn.pgconn), None)
    if event is not None:
        event.ended = monotonic()
        _tell("checked_in", event)


def cached(outcome: str) -> None:
    """The statement cache was asked for the current task's next statement.

    That it had it needs no note: its statements say so themselves.
    """
    if outcome != "hit":
        _outcome.set(outcome)
    if _heard["cached"]:
        _tell("cached", outcome)
