"""Which Python values of a column may be parameters of the server, and with which type."""

from __future__ import annotations

import datetime
import decimal
import functools
import uuid
from typing import Any

from django.db.models import Field, ForeignKey, OneToOneField
from psycopg.types.json import Jsonb
from psycopg.types.numeric import Int2, Int4, Int8

from ..wrappers import Wrapper

# For each column type: the Python types of values that may be parameters of the server, and the oid
# to send them with. It is that of Django's literal, whatever the column is on the server: 0 for a
# quoted one, what psycopg's dumper says for one with a cast; a number's depends on its value.
AS_DUMPED, INTEGER, NUMBER = -1, -2, -3
_INTEGERS: list[type] = [int, Int2, Int4, Int8]  # Django wraps some of them for psycopg
TEXT: dict[type, int] = {str: 0}
_FAMILIES: dict[str, dict[type, int]] = {
    **dict.fromkeys(["smallint", "integer", "bigint"], dict.fromkeys(_INTEGERS, INTEGER)),
    "varchar": TEXT,
    "text": TEXT,
    "boolean": {bool: AS_DUMPED},
    "numeric": {decimal.Decimal: NUMBER},
    "double precision": {float: NUMBER},
    "date": {datetime.date: AS_DUMPED},
    "timestamp with time zone": {datetime.datetime: AS_DUMPED},
    "time": {datetime.time: AS_DUMPED},
    "interval": {datetime.timedelta: AS_DUMPED},
    "uuid": {uuid.UUID: AS_DUMPED},
    "jsonb": {Jsonb: AS_DUMPED},
}
# Strings are of unknown type: in an expression that is not always resolved as for a literal.
LITERALS: dict[type, int] = dict.fromkeys(_INTEGERS, INTEGER) | dict.fromkeys(
    [bool, datetime.date, datetime.datetime, datetime.timedelta, uuid.UUID], AS_DUMPED
)
NULL: dict[type, int] = {type(None): 0}


def family(field: Field[Any, Any], wrapper: Wrapper) -> dict[type, int]:
    """Which values of a field may be parameters of the server."""
    kind = (field.db_type(wrapper) or "").partition("(")[0]
    return _family(kind, bool(wrapper.features.uses_server_side_binding))


@functools.lru_cache(maxsize=256)
def _family(kind: str, by_server: bool) -> dict[type, int]:
    """What values of a type of columns may be; one dict for all plans.

    Args:
        by_server: whether Django has the server bind the values, so that it has no literals.
    """
    kinds = _FAMILIES.get(kind, {})
    if by_server:
        kinds = {each: AS_DUMPED if oid < 0 else oid for each, oid in kinds.items()}
    return kinds | NULL


TO_ONE: Any = (ForeignKey, OneToOneField)


def target_of(field: Field[Any, Any]) -> Any:
    """The field that a foreign key's values are of; itself, if it is none."""
    found: Any = field
    while type(found) in TO_ONE:
        found = found.target_field
    return found
