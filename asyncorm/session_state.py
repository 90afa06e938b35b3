"""Tells what a statement leaves behind in the server session, as far as its text says.

The text is first taken apart as PostgreSQL's lexer does it, in one pass without a way back: what is
in literals, comments and quoted names is not a command. What cannot be known from the text (the
body of a DO block, a procedure) counts as leaving something. What functions hide is not seen here:
`traces()` (_wire/texts.py) names those that may hide something.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Of ASCII what is in no name, for PostgreSQL; beyond it anything may be. (Said so, since `re` takes
# a hundred times as long to compile a class that has all that is beyond.)
OF_NO_NAME = r"\x00-\x23%-/:-@\[-\^`{-\x7f"

# Literals, quoted names, comments. Possessive (*+, ++) where one way to match is the only one, so
# that the time is linear in the length; runs of the commonest at once.
_SPECIAL = re.compile(
    rf"""
    (?P<names>(?:"[\w$]*+"[\s.,=()<>]*+)++)
  | (?P<blanks>(?:--[^\r\n]*+\s*+|/\*[^*/]*+\*/\s*+)++)
  | (?P<literal>'[^']*+(?:''[^']*+)*+'?)
  | (?P<comment>/\*)
  | (?P<dollars>(?<![^{OF_NO_NAME}])\$(?:[^{OF_NO_NAME}0-9$][^{OF_NO_NAME}$]*+)?\$)
  | (?P<escaped>(?<![^{OF_NO_NAME}])[eE]'(?:[^'\\]|\\.|'')*+'?)
  | (?P<name>"[^"]*+(?:""[^"]*+)*+"?)
  | (?P<unknown>(?<![^{OF_NO_NAME}])[uU]&")
    """,
    re.DOTALL | re.VERBOSE,
)
_COMMENT_ENDS = re.compile(r"/\*|\*/")
_NOT_OF_A_NAME = re.compile(r"[^\w$]+")

# All of these look at what `plain()` returns.
_BEGINS = re.compile(
    r"""
    (?:\A|;)\s*+(?:
        set(?!\s+(?:local|transaction|constraints)\b(?!\s*\.))
      | reset | discard | listen | unlisten | load | deallocate | prepare(?!\s+transaction\b)
      | do | call
    )(?![\w$])
    """,
    re.VERBOSE,
)
_VALUE = r"(?:''|%s|%\(\w+\)s|\$\d+)(?:\s*::\s*\w+)?"
_ANYWHERE = re.compile(
    rf"""
    \bset_config\b(?!\s*\(\s*{_VALUE}\s*,\s*{_VALUE}\s*,\s*true\s*\))
  | \bpg_(?:try_)?advisory_lock
  | \b(?:create|into|local|global|replace)\s+temp(?:orary)?\b
  | \bpg_temp
  | \bwith\s+hold\b
    """,
    re.VERBOSE,
)
_SIGNS = ("set_config", "advisory_lock", "temp", "hold")
_MAKES_A_TABLE = re.compile(
    r"""(?:\A|;)\s*+create\b|(?:(?<!\s)(?<!insert)(?<!merge)\s++|[)'"\]])into\b"""
)


def plain(text: str) -> str | None:
    """A statement's text in lower case, its literals empty, its comments blanks, its quoted names
    without what is no letter; None if it cannot be told what is a literal and what is not."""
    if not any(sign in text for sign in ("'", '"', "--", "/*", "$")):
        return text.lower()
    parts: list[str] = []
    at = 0
    while (match := _SPECIAL.search(text, at)) is not None:
        parts.append(text[at : match.start()])
        at = match.end()
        kind = match.lastgroup
        if kind == "names":
            parts.append(match[0])
        elif kind == "literal":
            if "\\'" in match[0]:  # an end with standard_conforming_strings, none without
                return None
            parts.append("''")
        elif kind == "escaped":
            parts.append("''")
        elif kind == "dollars":
            parts.append("''")
            end = text.find(match[0], at)
            at = len(text) if end < 0 else end + len(match[0])
        elif kind == "name":
            parts.append(f'"{_NOT_OF_A_NAME.sub("", match[0])}"')
        elif kind == "unknown":  # any name at all
            return None
        else:
            parts.append(" ")
            if kind == "comment":
                at = _after_comment(text, at)
    parts.append(text[at:])
    return "".join(parts).lower()


def _after_comment(text: str, at: int) -> int:
    """Where a comment ends whose beginning has been read: they nest."""
    depth = 1
    while depth:
        match = _COMMENT_ENDS.search(text, at)
        if match is None:
            return len(text)
        depth += 1 if match[0] == "/*" else -1
        at = match.end()
    return at


def remembered(function: Callable[[str], T]) -> Callable[[str], T]:
    """Keep what a function says of a statement's text; long ones, which seldom come again, would
    fill the memory."""
    kept = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def of(text: str) -> T:
        return kept(text) if len(text) <= 4096 else function(text)

    return of


@remembered
def leaves_state(statement: str) -> bool:
    """Whether a statement changes the session beyond its transaction, or may do so."""
    text = plain(statement)
    if text is None:
        return True
    if _BEGINS.search(text) is not None:
        return True
    if "pg_temp" in statement.lower() or ("pg_settings" in text and "update" in text):
        return True
    return any(sign in text for sign in _SIGNS) and _ANYWHERE.search(text) is not None


@remembered
def makes_a_table(statement: str) -> bool:
    """Whether a statement makes what is temporary where the search path says so."""
    return _MAKES_A_TABLE.search(plain(statement) or "") is not None
