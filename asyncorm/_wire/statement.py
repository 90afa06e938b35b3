"""SQL statements that need no cursor: as they are sent, and what is wanted of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
from psycopg import pq
from psycopg.pq.abc import PGconn, PGresult

from ..growth import has_no_server
from .texts import traces

if TYPE_CHECKING:
    from ..driver import Connection

_TUPLES_OK = pq.ExecStatus.TUPLES_OK
_COMMAND_OK = pq.ExecStatus.COMMAND_OK
_EMPTY_QUERY = pq.ExecStatus.EMPTY_QUERY
# A prepared statement cannot be executed any more: "cached plan must not change result type" and
# "prepared statement does not exist".
STALE = (b"0A000", b"26000")


class LostConnection(psycopg.OperationalError):
    """The connection was lost with a statement.

    Attributes:
        opened: when the connection was (time.monotonic()).
    """

    opened = 0.0


class Unanswered(LostConnection):
    """The connection was lost after a statement outside a transaction had been sent, and before it
    was answered: whether the server has executed it is not known.

    Attributes:
        text: the statement.
    """

    def __init__(self, message: str = "", text: str = "") -> None:
        super().__init__(message)
        self.text = text

    @classmethod
    def of(cls, exc: BaseException, text: str, opened: float) -> psycopg.OperationalError:
        """What to raise for an error of a connection that is lost; `Unsent` if it had no server."""
        if has_no_server(exc):
            return Unsent.of(exc, opened)
        lost = "The connection was lost before the server had answered this statement."
        unanswered = cls(f"{lost} {exc}", text)
        unanswered.__cause__, unanswered.opened = exc, opened
        return unanswered


class Unsent(LostConnection):
    """The connection was lost before a statement was sent, or had reached a server: none has
    executed it."""

    @classmethod
    def of(cls, exc: BaseException, opened: float) -> Unsent:
        """What to raise for an error of a connection that is lost."""
        unsent = cls(f"The connection was lost before this statement had reached a server. {exc}")
        unsent.__cause__, unsent.opened = exc, opened
        return unsent


def text_of(query: Any) -> str:
    """The SQL of what psycopg takes for a query."""
    if isinstance(query, str):
        return query
    return query.decode("utf-8", "replace") if isinstance(query, bytes) else str(query.as_string())


class Command(Protocol):
    """A statement that is not bound yet: for whichever connection will run it."""

    @property
    def text(self) -> str:
        """The SQL, with or without its values."""

    def bind(self, conn: Connection) -> Statement:
        """The statement with its values, as it has to be for a connection's settings now."""

    def read(self, conn: Connection, result: PGresult) -> Any:
        """What is wanted of its result, which the connection has just given.

        Nobody has used the connection since, and nothing is read from it later.
        """


class Statement:
    """One SQL statement with its parameters as they go over the wire: needs no cursor.

    `Connection.run()` sends it and returns its result: it is a `Command` that is bound. The parts
    of that are separate, for several in one pipeline (pipelines.py): `send()` or `send_prepare()`
    and `send_prepared()`, then `checked()`.

    Attributes:
        query: the SQL in the connection's encoding, with $1, $2, ... for the parameters.
        params: their values in PostgreSQL's form, None for NULL.
        types: their types' oids; 0 leaves it to the server. With `query` they tell one prepared
            statement from another.
        formats: text or binary, for each; None when all are text.
        result_format: in which the values of the result shall come.
        text: the query as text.
        traces: what it leaves in the server session (`traces()`).
        prepare: False to leave it unprepared, however often it comes.
    """

    __slots__ = (
        "formats", "params", "prepare", "query", "result_format", "text", "traces", "types",
    )  # fmt: skip

    def __init__(
        self,
        query: bytes,
        params: Sequence[Any] | None = None,
        types: tuple[int, ...] = (),
        formats: Sequence[int] | None = None,
        result_format: int = pq.Format.TEXT,
        traces: bool | frozenset[str] = False,
        text: str | None = None,
    ) -> None:
        self.query = query
        self.text = query.decode() if text is None else text
        self.params = params
        self.types = types
        self.formats = formats
        self.result_format = result_format
        self.traces = traces
        self.prepare: bool | None = None

    def bind(self, conn: Connection) -> Statement:
        """It is bound."""
        return self

    def read(self, conn: Connection, result: PGresult) -> Any:
        """The result as it is."""
        return result

    def send(self, pgconn: PGconn) -> None:
        """Have libpq send it, unprepared."""
        pgconn.send_query_params(
            self.query, self.params, self.types, self.formats, self.result_format
        )

    def send_prepare(self, pgconn: PGconn, name: bytes) -> None:
        """Have libpq send the order to prepare it under a name."""
        pgconn.send_prepare(name, self.query, self.types)

    def send_prepared(self, pgconn: PGconn, name: bytes) -> None:
        """Have libpq send the order to execute it, prepared before."""
        pgconn.send_query_prepared(name, self.params, self.formats, self.result_format)


def sent(query: Any, text: str) -> Statement:
    """The statement that a psycopg query object stands for once it has its parameters."""
    statement = Statement(query.query, text=text, traces=traces(text))
    if query.types:
        statement.params, statement.types = query.params, query.types
        statement.formats = query.formats
    else:  # none, or bound on the client: the text has their values
        statement.prepare = False
    return statement


class Reading:
    """A bound statement of whose result something is wanted (a `Command`).

    Args:
        load: called with the result and the connection.
    """

    def __init__(self, statement: Statement, load: Callable[[Any, Connection], Any]) -> None:
        self.statement = statement
        self.text = statement.text
        self.load = load

    def bind(self, conn: Connection) -> Statement:
        """It is bound."""
        return self.statement

    def read(self, conn: Connection, result: PGresult) -> Any:
        """What `load` makes of the result."""
        return self.load(result, conn)


def checked(results: Sequence[Any], encoding: str) -> Any:
    """The result of a statement.

    Raises:
        psycopg.Error: what a cursor would raise.
    """
    for result in results:
        if (status := result.status) in (_TUPLES_OK, _COMMAND_OK, _EMPTY_QUERY):
            continue
        if status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, encoding=encoding)
        if status == pq.ExecStatus.PIPELINE_ABORTED:
            raise psycopg.errors.PipelineAborted("pipeline aborted")
        raise psycopg.ProgrammingError(
            f"A statement without a cursor gave {pq.ExecStatus(status).name}."
        )
    if not results:
        raise psycopg.InternalError("The server gave no result.")
    return results[0]
