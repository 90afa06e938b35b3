"""The isolation level, the time limit and the like of one block; what it changes it puts back."""

from __future__ import annotations

import warnings
from typing import Any

from django.db.transaction import TransactionManagementError

from .._sessions.blocks import Block
from .._sessions.session import Session
from ..pages import see


class Characteristics:
    """What is set for one block.

    Args:
        statement_timeout: in seconds.
        options: psycopg's attributes of a transaction, by their names; those that are None are left
            as they are.
    """

    def __init__(
        self, session: Session, statement_timeout: float | None, **options: object
    ) -> None:
        self.session = session
        self.transaction = {name: value for name, value in options.items() if value is not None}
        self.statement_timeout = statement_timeout
        self.saved: dict[str, Any] = {}
        self.saved_timeout: str | None = None

    def check(self, parent: Block | None) -> None:
        if parent is not None and parent.of_test_case and self.transaction:
            warnings.warn(
                f"{', '.join(self.transaction)} is ignored in a test's transaction.", stacklevel=2
            )
            self.transaction = {}
        if parent is not None and parent.is_transaction and self.transaction:
            raise TransactionManagementError(
                f"{', '.join(self.transaction)} can be set for the outermost block only; this "
                f"one is inside the block that began at {parent.origin}."
                + see("transactions#isolation-time-limits-retries")
            )

    def before(self) -> None:
        """Before the outermost block: psycopg makes BEGIN from these."""
        if self.transaction:
            wrapper = self.session.wrapper
            wrapper.ensure_connection()
            conn = wrapper.connection
            self.saved = {name: getattr(conn, name) for name in self.transaction}
            with wrapper.wrap_database_errors:
                for name, value in self.transaction.items():
                    setattr(conn, name, value)

    def after(self, block: Block) -> None:
        """In the block: the time limit of its statements."""
        if self.statement_timeout is not None:
            milliseconds = f"{max(1, round(self.statement_timeout * 1000))}ms"
            with self.session.wrapper.cursor() as cursor:
                cursor.execute(
                    "SELECT current_setting('statement_timeout'),"
                    " set_config('statement_timeout', %s, true)",
                    [milliseconds],
                )
                before = cursor.fetchone()[0]
            if not block.outermost:  # else the end of the transaction puts it back
                self.saved_timeout = before

    def restore(self) -> None:
        """At the end of a nested block; a rollback puts it back by itself."""
        if self.saved_timeout is not None:
            with self.session.wrapper.cursor() as cursor:
                cursor.execute(
                    "SELECT set_config('statement_timeout', %s, true)", [self.saved_timeout]
                )

    def forget(self) -> None:
        """After the outermost block, however it ended."""
        if self.saved and (conn := self.session.wrapper.connection) is not None:
            # Read by psycopg at the next BEGIN only; the setters would refuse inside a transaction.
            for name, value in self.saved.items():
                setattr(conn, f"_{name}", value)
            conn._begin_statement = b""
