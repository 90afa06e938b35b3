"""What is set in a session, of what can be seen without asking the server."""

from __future__ import annotations

import operator

from psycopg.pq.abc import PGconn

# What the server tells of a session when it changes: the settings that change what statements mean,
# and who executes them (SET ROLE is seen in is_superuser only, search_path from PostgreSQL 18 on).
REMEMBERED = b"TimeZone", b"DateStyle", b"IntervalStyle", b"client_encoding"  # by adapters
_REPORTED = (
    *REMEMBERED, b"standard_conforming_strings", b"search_path", b"session_authorization",
    b"is_superuser", b"default_transaction_read_only", b"application_name",
)  # fmt: skip


def reported(pgconn: PGconn) -> tuple[bytes | None, ...]:
    """What the server has told of a session so far, of what changes the meaning of statements."""
    return tuple(map(pgconn.parameter_status, _REPORTED))


# What psycopg keeps of a session.
kept = operator.attrgetter(
    "row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold", "prepared_max",
    "_isolation_level", "_read_only", "_deferrable", "_pipeline", "_adapters", "_adapters.version",
    "_adapters.types.version",
)  # fmt: skip
