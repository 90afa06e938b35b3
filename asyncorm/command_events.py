"""Tells listeners of the commands that sessions execute without a cursor: BEGIN and the like."""

from __future__ import annotations

from typing import Any

import psycopg

from . import _events, patches
from ._wire.statement import text_of

_exec_command: Any = psycopg.Connection._exec_command


def _telling(self: Any, command: object, *args: Any, **kwargs: Any) -> Any:
    """`_exec_command()`, with listeners told of the commands of sessions."""
    with _events.command(self, text_of(command)):
        return (yield from _exec_command(self, command, *args, **kwargs))


def _arrange() -> None:
    if _events.commands:
        patches.replace(
            psycopg.Connection, "_exec_command", _telling, "somebody listens to commands"
        )
    elif patches.replaced_by_us(psycopg.Connection, "_exec_command"):
        patches.undo(psycopg.Connection, "_exec_command")


def install() -> None:
    """Have that done as soon as somebody listens."""
    if _arrange not in _events.changed:
        _events.changed.append(_arrange)
        _arrange()
