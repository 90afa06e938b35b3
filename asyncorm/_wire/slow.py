"""Which statements took long lately: others do not wait behind them in a pipeline."""

from __future__ import annotations

from asyncio import get_running_loop
from collections import OrderedDict
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..driver import Connection
    from ..pipelines import Pipeline

SLOW = 0.2  # seconds without an answer after which a pipeline's statements count as slow
_REMEMBERED = 1000  # slow statements
_REMEMBERED_FOR = 60.0  # seconds


class _Slow:
    """Texts of statements that took long lately: they go alone."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        seen = self._seen.get(text)
        return seen is not None and monotonic() - seen < _REMEMBERED_FOR

    def add(self, text: str) -> None:
        self._seen[text] = monotonic()
        self._seen.move_to_end(text)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)


slow = _Slow()  # those that have changed the session, too


class Looking:
    """Looks now and then whether a pipeline waits for a slow statement, of these requests."""

    def __init__(self, conn: Connection, pipeline: Pipeline, requests: Sequence[Any]) -> None:
        self._conn = conn
        self._pipeline = pipeline
        self._requests = requests
        self._later()

    def _later(self) -> None:
        self._answered = self._pipeline.answered
        self._handle = get_running_loop().call_later(SLOW, self._look)

    def _look(self) -> None:
        answered = self._pipeline.answered
        # All are answered where some are executed again. If this process was busy with other
        # things, the answer has been there for long.
        waits = answered == self._answered < len(self._requests)
        if waits and self._conn.wire.unanswered:
            slow.add(self._requests[answered].command.text)
        self._later()

    def end(self) -> None:
        """Look no more."""
        self._handle.cancel()
