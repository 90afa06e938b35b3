"""Whether the code that runs now is served by plans: native code, while the cache is on."""

from __future__ import annotations

from typing import Any

from greenlet import getcurrent

from .. import sessions
from ..bridge import Runner

is_on = True  # follows the setting (planned.py)


# Instances that are asked what saving them would execute, by id(): their wrappers.
asking: dict[int, Any] = {}
# Operations that save an instance whose UPDATE was executed already, and found no row.
missed: dict[Any, Any] = {}


class Asked(BaseException):
    """Carries the statement that an instance would execute, in place of executing it.

    Attributes:
        found: its plan, parameters and offset; None if it has to be an operation.
        fields: those that an INSERT returns; None for an UPDATE.
    """

    def __init__(self, found: Any, fields: tuple[Any, ...] | None = None) -> None:
        self.found = found
        self.fields = fields


def native_wrapper(using: str) -> Any:
    """The running operation's wrapper of an alias of ours; None outside native code, and where
    something on the wrapper itself makes other SQL."""
    if is_on and type(runner := getcurrent()) is Runner:
        session = sessions.session_for(using, runner)
        if session is not None and not session.wrapper.is_altered:
            return session.wrapper
    return None
