"""Whether a server still has the role that an alias wants: primary or standby, writable or not.

From PostgreSQL 14 on the server tells of a change with the answer to the next statement. Behind a
pooler that does not pass that on, and where it is too late, a refused write does (25006).
"""

from __future__ import annotations

from typing import NamedTuple

from psycopg.pq.abc import PGconn

# Not what the session, its startup options, its role or its database set.
ASK = """
    SELECT pg_catalog.pg_is_in_recovery() OR EXISTS (
        SELECT FROM pg_catalog.pg_settings
        WHERE name = 'default_transaction_read_only' AND setting = 'on'
        AND source IN ('configuration file', 'command line', 'environment variable'))
"""
STANDBY_WANTED = ("standby", "prefer-standby", "read-only")


class Role(NamedTuple):
    """What the server has told of itself; None is what it does not tell."""

    in_recovery: bool | None
    read_only: bool | None

    @classmethod
    def of(cls, pgconn: PGconn) -> Role:
        """That of the server at the other end of a libpq connection, as it last told."""
        return cls(
            *(
                None if (value := pgconn.parameter_status(name)) is None else value == b"on"
                for name in (b"in_hot_standby", b"default_transaction_read_only")
            )
        )


def contradicts(now: Role, began: Role, target: str | None) -> bool:
    """Whether a connection is not (any more) to the kind of server that is wanted.

    Args:
        began: the role when the connection was made.
        target: `target_session_attrs`; None takes the server as it was then for what is wanted.
    """
    promoted = began.in_recovery is True and now.in_recovery is False
    if target == "primary":
        return now.in_recovery is True
    if target == "standby":
        return now.in_recovery is False
    if target == "prefer-standby":
        return promoted
    if target == "read-only":
        return now.in_recovery is False and now.read_only is False
    if target == "any":
        return False
    return (now.in_recovery is True and began.in_recovery is False) or (
        now.read_only is True and began.read_only is False
    )
