"""Tells listeners of the commands that sessions execute without a cursor: BEGIN and the like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from . import _events, patches
from ._wire.statement import text_of
from .driver import Connection

_exec_command: Any = psycopg.Connection._exec_command


def _telling(self: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
    """`_exec_command()`, with listeners told of the commands of sessions."""
    with told(self, text_of(command)):
        return (yield from _exec_command(self, command, *args, **kwargs))


@contextmanager
def told(conn: Connection, text: str) -> Iterator[None]:
    """Tell listeners of a command that is executed inside for a session."""
    session = conn.lock
    command = None
    if _events.commands and hasattr(session, "alias"):
        pid = 0 if conn.closed else conn.pgconn.backend_pid
        command = _events.Command(session.alias, text, pid, session.root is not None)
    try:
        yield
    finally:
        if command is not None:
            command.end()


def _arrange() -> None:
    if _events.commands:
        patches.replace(
            psycopg.Connection, "_exec_command", _telling, "somebody listens to commands"
        )
    elif patches.replaced_by_us(psycopg.Connection, "_exec_command"):
        patches.undo(psycopg.Connection, "_exec_command")


_events.changed.append(_arrange)
