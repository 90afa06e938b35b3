"""In place while somebody listens: an execute wrapper that tells of the statements of Django's
cursors, and a method of psycopg's that tells of what is executed without one, BEGIN and the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psycopg

from . import _events, bridge, patches, sessions
from ._wire.statement import text_of


def tell(execute: Any, sql: Any, params: Sequence[Any], many: bool, context: dict[str, Any]) -> Any:
    """Run a statement, and have listeners told of it."""
    wrapper = context["connection"]
    text = sql if type(sql) is str else text_of(sql)
    statement = _events.statement(wrapper.alias, text, params)
    statement.by_cursor, statement.native = True, bridge.in_native_code()
    session = getattr(wrapper, "session", None)
    statement.pooled = session is not None and not session.synchronous
    with statement:
        statement.connection = _served_by(wrapper.connection)
        try:
            return execute(sql, params, many, context)
        finally:
            statement.connection = _served_by(wrapper.connection) or statement.connection
            statement.in_block = wrapper.in_atomic_block
            statement.rows = getattr(context["cursor"].cursor, "rowcount", -1)


def _served_by(conn: Any) -> int:
    if conn is None:
        return 0
    if getattr(conn, "deferred", False):  # not psycopg's own connection
        return int(conn.served_by)
    return 0 if conn.closed else int(conn.pgconn.backend_pid)


_exec_command: Any = psycopg.Connection._exec_command


def _telling(self: Any, command: object, *args: Any, **kwargs: Any) -> Any:
    """`_exec_command()`, with listeners told of the commands of sessions."""
    with _events.command(self, text_of(command)):
        return (yield from _exec_command(self, command, *args, **kwargs))


def _arrange() -> None:
    if _events.commands:
        why = "somebody listens to commands"
        patches.replace(psycopg.Connection, "_exec_command", _telling, why)
    elif patches.replaced_by_us(psycopg.Connection, "_exec_command"):
        patches.undo(psycopg.Connection, "_exec_command")
    if _events.statements == (tell in sessions.everywhere):
        return
    lists = [sessions.everywhere]
    # Not as what this thread installs: it may be called in any.
    lists += [session.wrapper.execute_wrappers for session in list(sessions.sharing)]
    for wrappers in lists:
        if _events.statements:
            list.insert(wrappers, 0, tell)
        else:
            with suppress(ValueError):
                list.remove(wrappers, tell)


def install() -> None:
    """Be in place whenever somebody listens; done once."""
    if _arrange not in _events.changed:
        _events.changed.append(_arrange)
        _arrange()
