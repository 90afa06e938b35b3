"""What a statement leaves behind in the server session, as far as its text tells."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

# Statements that leave something behind in the server session. What SQL functions hide is not seen.
_VALUE = r"(?:'[^']*'|%s|\$\d+)"
_BEGINS = (
    r"(?:\s|/\*.*?\*/|--[^\n]*\n)*"
    r"(?:SET(?!\s+(?:LOCAL|TRANSACTION|CONSTRAINTS)\b)|RESET|LISTEN|UNLISTEN|PREPARE|LOAD)\b"
)
_SETS_STATE = re.compile(_BEGINS, re.IGNORECASE | re.DOTALL)
_LEAVES_STATE = re.compile(
    rf"(?:^|;){_BEGINS}"
    rf"|\bset_config\b(?!\s*\(\s*{_VALUE}\s*,\s*{_VALUE}\s*,\s*true\s*\))"
    r"|\bpg_(?:try_)?advisory_lock"
    r"|\bTEMP(?:ORARY)?\b|\bWITH\s+HOLD\b",
    re.IGNORECASE | re.DOTALL,
)
# Without one of these only the beginning can match; to search a megabyte takes 0.3 s.
_SIGNS = (";", "set_config", "advisory_lock", "temp", "hold")


def contains(text: str, words: tuple[str, ...]) -> bool:
    """Whether one of some words in lower case is in a text."""
    lower = text.lower()
    return any(word in lower for word in words)


def remembered(function: Callable[[str], bool]) -> Callable[[str], bool]:
    """Keep what a function says of a statement's text; long ones, which seldom come again, would
    fill the memory."""
    kept = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def of(text: str) -> bool:
        return kept(text) if len(text) <= 4096 else function(text)

    return of


@remembered
def leaves_state(statement: str) -> bool:
    """Whether a statement changes the session beyond its transaction, as far as its text tells."""
    if contains(statement, _SIGNS):
        return _LEAVES_STATE.search(statement) is not None
    return _SETS_STATE.match(statement) is not None
