"""What became of a transaction whose COMMIT, or of a statement whose answer, was lost.

A block that settles learns the id of its transaction before it sends COMMIT: together with the
first statement that may write, or else with COMMIT itself, so that no round trip is added. If the
answer of COMMIT is lost, PostgreSQL is asked on another connection what became of that id.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any

import psycopg
from django.db import OperationalError
from django.db.utils import DatabaseErrorWrapper
from psycopg import pq

from . import _events, bridge, pinning, sessions
from ._sessions.session import Session
from ._wire.cancelling import CANCEL_TIMEOUT
from ._wire.statement import Command, Statement, Unanswered
from ._wire.texts import is_read, is_single, only_reads
from .bridge import Runner
from .driver import Connection
from .pages import see
from .pipelines import Pipeline

logger = logging.getLogger("asyncorm")

SETTLE_TIMEOUT = 10.0  # seconds to find out what became of a transaction
_AGAIN = 0.05  # seconds until one that is in progress is asked for again
_IN_TRANSACTION = pq.TransactionStatus.INTRANS


class CommitUnknown(OperationalError):
    """The connection was lost, and nobody knows whether what was written is there.

    Raised for a COMMIT, or for a statement outside a transaction that may have written, whose
    answer was lost. To repeat it may do it twice: `retrying()` does so only if this very class is
    named.
    """


class Committed(CommitUnknown):
    """What a cancellation that arrived during COMMIT, and is delivered after it, comes from.

    Of it, and of the TimeoutError that it becomes, only this tells `retrying()` that what was
    cancelled is there nevertheless.
    """


class Errors(DatabaseErrorWrapper):
    """Django's errors for psycopg's, and CommitUnknown for what may have been done."""

    wrapper: Any

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if exc_type is Unanswered and not only_reads(exc.text):
            self.wrapper.errors_occurred = True  # the connection is not used again
            raise CommitUnknown(
                "The connection was lost before the server had answered this statement: what it "
                "writes may or may not have been done. Look whether it is there before it is "
                f"repeated. {exc.__cause__ or exc}" + see("transactions#a-lost-connection")
            ).with_traceback(traceback) from exc
        if exc_type is not None:
            super().__exit__(exc_type, exc, traceback)


# An id is its server's: of the same cluster on the same timeline, whose processes have not crashed
# or been restarted since. A promoted standby, and a server that lost the end of its log in a crash,
# give an id a second time. (Statistics are reset after a crash that the postmaster survives.)
_SERVER = """concat_ws(' ', (SELECT system_identifier FROM pg_control_system()),
CASE WHEN pg_is_in_recovery() THEN 'standby'
     ELSE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END,
extract(epoch FROM pg_postmaster_start_time()),
extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()))"""
_ID = Statement(f"SELECT pg_current_xact_id_if_assigned()::text, {_SERVER}".encode())
_COMMIT = Statement(b"COMMIT")
_ID.prepare = _COMMIT.prepare = False
_STATUS = f"SELECT {_SERVER}, pg_xact_status(%s::xid8)"

# Seconds that blocks which begin here have for that, 0 if they are not to; set by retrying().
_wanted: ContextVar[float] = ContextVar("asyncorm_settle", default=0.0)


def seconds(settle: bool | float) -> float:
    """What an option `settle` means.

    Raises:
        ValueError: it is no positive number of seconds, nor True or False.
    """
    if settle is True:
        return SETTLE_TIMEOUT
    if settle is False:
        return 0.0
    if not isinstance(settle, int | float) or settle <= 0:
        raise ValueError(
            "settle must be True, False or a positive number of seconds."
            + see("transactions#a-lost-connection")
        )
    return float(settle)


@contextmanager
def settling(limit: float) -> Iterator[None]:
    """Have the blocks that begin inside settle within so many seconds; 0 changes nothing."""
    token = _wanted.set(limit or _wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)


def of(session: Session, limit: float) -> Fate | None:
    """What a transaction that begins now settles by, None if it does not."""
    limit = limit or _wanted.get()
    return Fate(session, limit) if limit else None


class Fate:
    """The id of an open transaction, and how to ask what became of it.

    Attributes:
        served_by: the server process that ran the last statement, as of a Queue.
    """

    served_by = 0

    def __init__(self, session: Session, limit: float) -> None:
        self._session = session
        self._limit = limit
        self._id: str | None = None
        self._server = ""

    def wants(self, text: str) -> bool:
        """Whether a statement is to be run here, to learn the id with it."""
        return self._id is None and not is_read(text) and is_single(text)

    def run(self, command: Command) -> Any:
        """Execute a command in the block, and ask for the id behind it; what it wants of its
        result.

        Raises:
            psycopg.Error: what a cursor would raise.
        """
        runner = bridge.running()
        session = self._session
        with session:
            conn = session.wrapper.connection
            value: Any = None
            error: Exception | None = None
            pipeline = Pipeline(conn, [command.bind(conn), _ID], harmless=True)
            try:
                for number, results in pipeline:
                    try:
                        if number == 0:
                            value = command.read(conn, conn.checked(results))
                        elif error is None:
                            self._note(conn, results)
                    except Exception as exc:
                        error = exc
            except CancelledError:
                bridge.wait_for(runner, pipeline.abort())
                raise
            except BaseException:
                conn.terminate()
                raise
            self.served_by = conn.pgconn.backend_pid
            if error is not None:
                raise error
            return value

    def _note(self, conn: Connection, results: list[Any]) -> None:
        result = conn.checked(results)
        found, server = result.get_value(0, 0), result.get_value(0, 1)
        if found is not None:
            self._id, self._server = found.decode(), server.decode()

    def commit(self, conn: Connection) -> None:
        """COMMIT, and ask for the id before it in the same round trip, if it is not known yet.

        Raises:
            psycopg.Error: what psycopg's `commit()` would raise.
        """
        if self._id is not None or conn.pgconn.transaction_status != _IN_TRANSACTION:
            conn.commit()
            return
        errors: list[Exception] = []

        def note(number: int, results: list[Any]) -> None:
            try:
                if number == 0:
                    self._note(conn, results)
                else:
                    conn.checked(results)
            except psycopg.Error as exc:
                errors.append(exc)

        with conn.lock, _events.command(conn, "COMMIT"):
            conn.wait(Pipeline(conn, [_ID, _COMMIT]).gathered(note))
        if errors:
            raise errors[0]

    def settle(self, runner: Runner, unknown: CommitUnknown) -> bool | None:
        """Whether the transaction whose COMMIT was lost was committed; None: nobody knows.

        Raises:
            asyncio.CancelledError: the task was cancelled meanwhile.
        """
        if self._id is None:
            return None
        # Somebody who was cancelled does not wait for long.
        limit = self._limit if runner.cancelled is None else min(self._limit, CANCEL_TIMEOUT)
        try:
            return bridge.wait_for(runner, pinning.detached_task(self._ask(limit)))
        except CancelledError as exc:
            raise exc from unknown

    async def _ask(self, limit: float) -> bool | None:
        deadline = monotonic() + limit
        status = "in progress"
        try:
            async with asyncio.timeout(limit):
                while status == "in progress" and monotonic() < deadline:
                    server, status = await bridge.run(self._look)
                    if server != self._server:
                        status = "of another server"
                    elif status == "in progress":
                        await asyncio.sleep(_AGAIN)
        except Exception as exc:
            logger.info("What became of transaction %s cannot be asked: %s", self._id, exc)
            return None
        return {"committed": True, "aborted": False}.get(status)

    def _look(self) -> tuple[str, str]:
        with sessions.require(self._session.alias).wrapper.cursor() as cursor:
            cursor.execute(_STATUS, [self._id])
            return cursor.fetchone()  # type: ignore[no-any-return]
