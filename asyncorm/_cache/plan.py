"""Plans: Django's SQL for one shape of query, and its values as parameters of the server.

A plan's statement is sent without a cursor, its values as parameters of the server where that means
the same as the literals that Django writes into the SQL: all SQL is of Django's own (binding.py),
each value's Python type must be the usual one for the column's type, and it is sent with the type
that PostgreSQL gives to the literal, strings without one (as a quoted literal has none). A list of
keys goes as one array, as PostgreSQL makes one of IN (...) too: so lists of all lengths have one
statement.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import copy
from decimal import Decimal
from math import isfinite
from typing import Any
from uuid import UUID

from psycopg.adapt import PyFormat

from .._cache.families import AS_DUMPED, INTEGER, NUMBER
from .._wire.statement import Statement
from .._wire.texts import only_reads, traces
from ..binding import in_place_of_expressions
from ..driver import Connection
from ..rows import RowMaker
from ..shapes import Shape

_MAX_PARAMS = 65535  # of the server in one statement; literals have no limit


class Plan:
    """What is known about all queries of one shape.

    Attributes:
        sql: Django's, with %s for parameters, without the offset.
        families: for each parameter what it may be to be sent as one.
        lists: which parameters are the elements of an array: where each begins and how many.
        maker: makes items of the rows; None where only the rows count.
        constants: where parameters are that are always the same, and what they are.
        skips_null: whether Django writes NULL into the SQL of an UPDATE itself.
        kept: objects whose id() is in the key.
        picked: for each parameter, which of the shape's it is; None: as the shape has them.
        shared: pairs of the shape's places whose parameters are taken to be of one node.
        columns: of the models that are selected beside the query's own, which the key has.
        ready: of an INSERT what gives an object's values, and what prepares them.
        classes: of the nodes that the SQL was compiled of: lookups, expressions.
        only_reads: Django made its whole text, and it may be executed again elsewhere.
    """

    ready: Any = ()
    classes: Any = ()

    def __init__(
        self,
        sql: str,
        families: list[Any],
        maker: RowMaker | None,
        kept: object,
        *,
        constants: Any = (),
        skips_null: bool = False,
        with_offset: bool = False,
        lists: Any = (),
        picked: list[int] | None = None,
        shared: Any = (),
        by_server: bool = True,
    ) -> None:
        self.sql = sql
        self.maker = maker
        self.kept = kept
        self.constants = constants
        self.skips_null = skips_null
        self.picked = picked
        self.shared = shared
        beside = maker.models[1:] if maker is not None else ()
        self.columns = [(model._meta, model._meta.concrete_fields) for model in beside]
        self.families = [*families, {int: 20}] if with_offset else families
        sql = _written_out(sql, dict(constants))
        if with_offset:
            sql = f"{sql} OFFSET %s"
        self.lists = lists
        self.only_reads = by_server and only_reads(sql)
        by_server = by_server and in_place_of_expressions(sql)
        self.query = _numbered(sql, len(self.families), lists) if by_server else None
        if self.query is None and by_server and lists:
            self.lists = ()
            self.query = _numbered(sql, len(self.families), ())
        self.formats = [PyFormat.TEXT] * len(self.families)
        self._sent: dict[tuple[type, ...], _Sent] = {}
        self.text = sql if self.query is None else self.query.decode()
        self.traces = traces(sql)

    @property
    def is_of_keys(self) -> bool:
        """Whether its parameters are the elements of one array: it serves arrays of all lengths."""
        return self.lists == [(0, len(self.families))] and "%%" not in self.sql

    @property
    def is_current(self) -> bool:
        """Whether the models selected beside the query's own still have the same fields."""
        return all(opts.concrete_fields is fields for opts, fields in self.columns)

    def holds(self, shape: Shape) -> bool:
        """Whether what was one node when the statement was compiled is one now."""
        if self.shared:
            nodes = [node for _, _, node in shape.places(skips_null=self.skips_null)]
            if not all(nodes[i] is nodes[j] for i, j in self.shared):
                return False
        return self.is_current

    @property
    def is_of_any_length(self) -> bool:
        """Whether it serves lists of all lengths: each is one array."""
        return bool(
            self.lists
            and self.query is not None
            and self.picked is None
            and "%%" not in self.sql
            and all(place < self.lists[0][0] + len(self.constants) for place, _ in self.constants)
        )

    def of_lists(self, lists: list[tuple[int, int]]) -> Plan:
        """The plan for lists of these lengths, if it is one of lists of any."""
        if lists == self.lists:
            return self
        plan = copy(self)
        parts, families = self.sql.split("%s"), list(self.families)
        changes = zip(reversed(self.lists), reversed(lists), strict=True)
        for (start, count), (_, size) in changes:
            families[start : start + count] = families[start : start + 1] * size
            first = start + len(self.constants) + 1
            parts[first : first + count - 1] = parts[first : first + 1] * (size - 1)
        plan.sql, plan.lists, plan.families = "%s".join(parts), lists, families
        plan.formats = self.formats[:1] * len(families)
        return plan

    def bound(self, conn: Connection, params: Sequence[Any]) -> Statement | None:
        """The statement with its parameters, None if not all can be sent as such."""
        query = self.query
        if query is None or not (query.isascii() or conn.transformer.encoding == "utf-8"):
            return None
        if self.lists:
            return self._bound_arrays(conn, params)
        kinds = tuple(map(type, params))
        sent = self._sent.get(kinds)
        if sent is None:
            if (sent := _sent(kinds, self.families)) is None:
                return None
            if len(self._sent) >= _MOST_KINDS:
                self._sent.clear()
            self._sent[kinds] = sent
        return self._statement(*_dumped(conn, params, sent, self.formats))

    def _statement(self, values: Sequence[Any], oids: Iterable[int]) -> Statement:
        assert self.query is not None
        return Statement(self.query, values, tuple(oids), traces=self.traces, text=self.text)

    def _bound_arrays(self, conn: Connection, params: Sequence[Any]) -> Statement | None:
        values: list[Any] = []
        oids: list[int] = []
        done = 0
        for start, count in (*self.lists, (len(params), 0)):
            part = params[done:start]
            if (sent := _sent(map(type, part), self.families[done:start])) is None:
                return None
            dumped, types = _dumped(conn, part, sent, self.formats[done:start])
            values += dumped
            oids += types
            done = start + count
            if count:
                array = _array(params[start:done], self.families[start])
                if array is None:
                    return None
                values.append(array[0])
                oids.append(array[1])
        return self._statement(values, oids)


def djangos(plan: Plan, params: list[Any], offset: int) -> tuple[str, tuple[Any, ...]]:
    """The SQL and the parameters that Django would have a cursor execute."""
    for place, value in plan.constants:
        params = [*params[:place], value, *params[place:]]
    return f"{plan.sql} OFFSET {offset}" if offset else plan.sql, tuple(params)


# The oids of values of certain types, and the places of those which the value says, or psycopg.
_Sent = tuple[list[int], list[int], list[int], list[int]]
_MOST_KINDS = 64  # combinations of types kept for a plan


def _sent(kinds: Iterable[type], families: Sequence[Any]) -> _Sent | None:
    """How values of these types are sent; None if one is not of its family."""
    oids = [family.get(kind) for kind, family in zip(kinds, families, strict=True)]
    if None in oids:
        return None
    return oids, *(
        [place for place, oid in enumerate(oids) if oid == said]
        for said in (INTEGER, NUMBER, AS_DUMPED)
    )  # type: ignore[return-value]


def _dumped(
    conn: Connection, params: Sequence[Any], sent: _Sent, formats: Sequence[Any]
) -> tuple[Sequence[Any], list[int]]:
    """Values as they are sent, and their types' oids."""
    oids, integers, numbers, dumped = sent
    oids = oids.copy()
    for place in integers:
        oids[place] = _INT4 if -_HALF <= params[place] < _HALF else _of_literal(params[place])
    for place in numbers:
        oids[place] = _of_literal(params[place])
    transformer = conn.transformer
    values = transformer.dump_sequence(params, formats)
    if dumped:
        types = transformer.types
        for place in dumped:
            oids[place] = types[place]
    return values, oids


_INT4, _INT8, _FLOAT8, _NUMERIC = 23, 20, 701, 1700
_HALF = 1 << 31
_ONE = Decimal(1)


def _of_literal(value: Any) -> int:
    """The oid of the type that PostgreSQL gives to a number written as a literal."""
    if isinstance(value, float):
        return _NUMERIC if isfinite(value) else _FLOAT8  # 'NaN'::float8
    if isinstance(value, Decimal):
        if not value.same_quantum(_ONE):  # with a point, or not finite: 'NaN'::numeric
            return _NUMERIC
        value = int(value)
    if -_HALF <= value < _HALF:
        return _INT4
    return _INT8 if -(_HALF << 32) <= value < _HALF << 32 else _NUMERIC


def _array(values: Sequence[Any], family: dict[type, int]) -> tuple[bytes, int] | None:
    """Keys as an array in PostgreSQL's form and its type's oid; None if not all are of a family."""
    kinds = set(map(type, values))
    if not kinds <= family.keys() or type(None) in kinds:
        return None
    if kinds == {UUID}:
        return f"{{{','.join(map(str, values))}}}".encode(), _UUIDS
    oid = _ARRAYS.get(max(_of_literal(min(values)), _of_literal(max(values)), key=_WIDTHS.index))
    return None if oid is None else (f"{{{','.join(map(int.__repr__, values))}}}".encode(), oid)


# A list of literals has the type of its widest.
_WIDTHS = [_INT4, _INT8, _NUMERIC]
_ARRAYS, _UUIDS = {_INT4: 1007, _INT8: 1016}, 2951


def _written_out(sql: str, constants: dict[int, Any]) -> str:
    """The SQL with constants in the places of some parameters."""
    parts = re.split(r"(%.)", sql, flags=re.DOTALL) if constants else [sql]
    places = [i for i, part in enumerate(parts) if part == "%s"]
    for place, value in constants.items():
        parts[places[place]] = f"{value:d}"
    return "".join(parts)


def _numbered(sql: str, count: int, lists: Sequence[Any]) -> bytes | None:
    """The SQL with $1, $2, ... for %s; None if it is not as simple as that."""
    parts = re.split(r"%(.)", sql, flags=re.DOTALL)
    begins = dict(lists)
    made = [parts[0]]
    number = skipped = 0
    rest = iter(zip(parts[1::2], parts[2::2], strict=True))
    for sign, text in rest:
        if sign == "%":
            made += (sign, text)
        elif sign != "s":
            return None
        elif (size := begins.get(number + skipped)) is None:
            number += 1
            made += (f"${number}", text)
        else:
            # IN (%s, %s) or, of a tuple's only column, IN ((%s), (%s))
            brackets = 2 if made[-1].endswith("((") else 1
            between, end = "), (" if brackets == 2 else ", ", ")" * brackets
            for _ in range(size - 1):
                if (sign, text) != ("s", between):
                    return None
                sign, text = next(rest, ("", ""))
            begin = f" IN {'(' * brackets}"
            if sign != "s" or not text.startswith(end) or not made[-1].endswith(begin):
                return None
            number += 1
            skipped += size - 1
            made[-1] = f"{made[-1].removesuffix(begin)} = ANY(${number}"
            made.append(text[brackets - 1 :])
    fits = number + skipped == count and number <= _MAX_PARAMS
    return "".join(made).encode() if fits else None
