"""Verify mode: what the statement cache gives is compared with what Django makes of the query.

`ASYNCORM = {"STATEMENT_CACHE": "verify"}`, for tests and staging: for each hit Django compiles as
well, and its statement has to be the one that is about to be sent: the SQL, each parameter, what
makes the items. It costs what the cache saves, and more.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import starmap, zip_longest
from typing import TYPE_CHECKING, Any

from django.db.models.sql.query import Query
from psycopg.types.json import Jsonb
from psycopg.types.numeric import Int2, Int4, Int8

from .pages import see

if TYPE_CHECKING:
    from .rows import RowMaker


active = False  # follows the setting (planned.py)
different = 0  # statements; the errors may be caught by somebody
shapes: set[int] = set()  # hashes of the keys that were verified

Compiled = tuple[str, Any, Any]  # SQL, parameters, maker


class StatementCacheError(AssertionError):
    """The statement cache gave something else than Django's compiler: a fault of asyncorm."""


def holds(
    key: Hashable, sent: Compiled, families: Sequence[Any], compile: Callable[[], Compiled]
) -> bool:
    """Whether Django makes this statement; False if it makes another one each time.

    Args:
        families: of the parameters (_cache/plan.py), the first ones.
        compile: makes Django's, of copies of whatever that changes.

    Raises:
        StatementCacheError: it is another one.
    """
    expected = compile()
    if not (found := _difference(expected, sent, families)):
        shapes.add(hash(key))
        return True
    if _difference(expected, compile(), families):
        return False
    raise difference_error(
        f"The statement cache gave another statement than Django's compiler ({found})",
        f"Django's: {_shown(expected)}\nthe cache's: {_shown(sent)}",
    )


def compare_queries(made: Query, djangos: Query) -> None:
    """Compare the query that is made of what was recorded with the one that Django made.

    Raises:
        StatementCacheError: it is another one.
    """
    state, expected = vars(made), vars(djangos)
    for name in (state.keys() | expected.keys()) - _OF_USE:
        a, b = state.get(name), expected.get(name)
        if a != b and _without_places(a) != _without_places(b):  # subqueries are equal to none
            raise difference_error(
                f"A recorded query is another one than Django's (its {name})",
                f"Django's: {expected.get(name)!r}\nthe recorded one: {state.get(name)!r}",
            )


def _without_places(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


_OF_USE = {"base_table", "_annotation_select_cache"}  # which queries keep once they are asked


def difference_error(what: str, details: str) -> StatementCacheError:
    """What is to be raised for a difference; it is counted."""
    global different
    different += 1
    return StatementCacheError(
        f"{what}. Please report this to asyncorm; ASYNCORM = {{'STATEMENT_CACHE': False}} avoids "
        f"it.\n{details}\n{see('speed#the-statement-cache')}"
    )


def _shown(statement: Compiled) -> str:
    return f"{statement[0]}\n    with {list(statement[1])!r}"


def _difference(expected: Compiled, sent: Compiled, families: Sequence[Any]) -> str:
    """What differs, in words; nothing if the statements are equal."""
    if expected[0] != sent[0]:
        return "its SQL"
    params: list[Any] = list(zip_longest(expected[1], sent[1], families, fillvalue={}))
    if len(expected[1]) != len(sent[1]) or not all(starmap(_sent_alike, params[: len(sent[1])])):
        return "its parameters"
    if _described(expected[2]) != _described(sent[2]):
        return "what is made of its rows"
    return ""


_INTEGERS = {int, Int2, Int4, Int8}


def _sent_alike(a: Any, b: Any, family: Mapping[type, object]) -> bool:
    """Whether two parameters are equal; of integers, whether they are sent with the same type.

    Django marks an integer for psycopg with its column's type; as literals they are the same.
    """
    if {type(a), type(b)} <= _INTEGERS:
        oids = {family.get(type(a), type(a)), family.get(type(b), type(b))}
        return int(a) == int(b) and len(oids) == 1
    return equal(a, b)


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same to PostgreSQL and Python: down to types and bits."""
    kind: Any = type(a)
    if kind is not type(b):
        return False
    if kind is float:
        return struct.pack("d", a) == struct.pack("d", b)
    if kind in (list, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if kind is dict:
        return equal(list(a.items()), list(b.items()))
    if kind is Jsonb:
        return a.dumps == b.dumps and equal(a.obj, b.obj)
    if kind in (memoryview, bytearray, bytes):
        return bytes(a) == bytes(b)
    if getattr(kind, "__eq__") is object.__eq__ and hasattr(a, "__dict__"):  # noqa: B009
        return a is b or equal(vars(a), vars(b))
    # Their repr() tells what == forgives: a Decimal's scale, a datetime's zone.
    return bool(a == b) and (kind.__module__ not in ("decimal", "datetime") or repr(a) == repr(b))


def _described(maker: RowMaker) -> Any:
    """How a maker makes its items, as far as that can be compared."""
    return maker and (
        maker.item,
        maker.width,
        maker.body,
        maker.models,
        maker.names_of_columns,
        {
            i: ([conv.__qualname__ for conv in convs], type(expression.output_field))
            for i, (convs, expression) in maker.converters.items()
        },
        [str(value) for value in maker.names.values() if isinstance(value, type)],
    )
