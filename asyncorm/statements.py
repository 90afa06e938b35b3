"""The statement cache: what a query's shape is compiled to is kept, and used with other values.

A new plan is made with Django's compiler, and not kept unless each of the compiler's parameters is
known to come from a certain one of the shape's (tracing.py). Whatever is not known to be safe is
left to Django's compiler.

A plan's statement is sent without a cursor, its values as parameters of the server where that means
the same as the literals that Django writes into the SQL: all SQL is of Django's own (binding.py),
each value's Python type must be the usual
one for the column's type, and it is sent with the type that PostgreSQL gives to the literal,
strings without one (as a quoted literal has none). A list of keys goes as one array, as PostgreSQL
makes one of IN (...) too: so lists of all lengths have one statement. Otherwise, and where somebody
watches the statements (execute wrappers, DEBUG, CaptureQueriesContext), a cursor of Django's
executes Django's SQL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from copy import copy
from decimal import Decimal
from itertools import accumulate, islice
from math import isfinite
from typing import Any
from uuid import UUID

from django.db import OperationalError
from django.db.models.lookups import Lookup
from psycopg.adapt import PyFormat
from psycopg.pq import Format

from . import _events, conf, grounds, sessions, verifying
from .backends.mixin import has_djangos_cursors
from .binding import in_place_of_expressions, writes_as_django
from .driver import SLICE, Connection, Statement, Unanswered
from .grounds import Ground
from .multiplexing import only_reads
from .pools import Pool
from .rows import RowMaker
from .session_state import leaves_state
from .shapes import AS_DUMPED, INTEGER, NUMBER, Shape, Unfit, plain_orders, shape_of_aggregates
from .tracing import Mark, Trace
from .turns import Turns

MAX_PLANS = 1024
_MAX_PARAMS = 65535  # of the server in one statement; literals have no limit
_TIMESTAMPTZ, _TEXT_FORMAT = 1184, Format.TEXT


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
        ready: for each field of an INSERT, which values need not be prepared (bulk.py).
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
        kept: Any,
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
        self.text = sql if self.query is None else self.query.decode()
        self.leaves_state = leaves_state(sql)

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

    def of_length(self, count: int) -> Plan:
        """The plan for so many keys, if it is one of keys."""
        size = len(self.families)
        if count == size:
            return self
        plan = copy(self)
        first, last = self.sql.index("%s"), self.sql.rindex("%s")
        between = self.sql[first + 2 : self.sql.index("%s", first + 2)]
        plan.sql = self.sql[:first] + between.join(["%s"] * count) + self.sql[last + 2 :]
        plan.lists = [(0, count)]
        plan.families, plan.formats = self.families[:1] * count, self.formats[:1] * count
        return plan

    def bound(self, conn: Connection, params: Any) -> Statement | None:
        """The statement with its parameters, None if not all can be sent as such."""
        query = self.query
        if query is None or not (query.isascii() or conn.transformer.encoding == "utf-8"):
            return None
        if self.lists:
            return self._bound_arrays(conn, params)
        found = _dumped(conn, params, self.families, self.formats)
        return None if found is None else self._statement(*found)

    def _statement(self, values: Any, oids: Any) -> Statement:
        assert self.query is not None
        return Statement(
            self.query, values, tuple(oids), leaves_state=self.leaves_state, text=self.text
        )

    def _bound_arrays(self, conn: Connection, params: Any) -> Statement | None:
        values: list[Any] = []
        oids: list[int] = []
        done = 0
        for start, count in (*self.lists, (len(params), 0)):
            found = _dumped(
                conn, params[done:start], self.families[done:start], self.formats[done:start]
            )
            if found is None:
                return None
            values += found[0]
            oids += found[1]
            done = start + count
            if count:
                array = _array(params[start:done], self.families[start])
                if array is None:
                    return None
                values.append(array[0])
                oids.append(array[1])
        return self._statement(values, oids)


def _dumped(
    conn: Connection, params: Any, families: Any, formats: Any
) -> tuple[Sequence[Any], list[int]] | None:
    """Values as they are sent, and their types' oids; None if one is not of its family."""
    oids: list[int] = []
    dumped = False
    for value, family in zip(params, families, strict=True):
        oid = family.get(type(value))
        if oid is None:
            return None
        if oid == INTEGER:
            oid = _INT4 if -_HALF <= value < _HALF else _of_literal(value)
        elif oid == AS_DUMPED:
            dumped = True
        elif oid == NUMBER:
            oid = _of_literal(value)
        oids.append(oid)
    transformer = conn.transformer
    values = transformer.dump_sequence(params, formats)
    if dumped:
        oids = [
            got if oid == AS_DUMPED else oid
            for oid, got in zip(oids, transformer.types or (), strict=True)
        ]
    return values, oids


_INT4, _INT8, _FLOAT8, _NUMERIC = 23, 20, 701, 1700
_HALF = 1 << 31


def _of_literal(value: Any) -> int:
    """The oid of the type that PostgreSQL gives to a number written as a literal."""
    if isinstance(value, float):
        return _NUMERIC if isfinite(value) else _FLOAT8  # 'NaN'::float8
    if isinstance(value, Decimal):
        if value.as_tuple().exponent != 0:  # with a point, or not finite: 'NaN'::numeric
            return _NUMERIC
        value = int(value)
    if -_HALF <= value < _HALF:
        return _INT4
    return _INT8 if -(_HALF << 32) <= value < _HALF << 32 else _NUMERIC


def _array(values: Any, family: dict[type, int]) -> tuple[bytes, int] | None:
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


def _numbered(sql: str, count: int, lists: Any) -> bytes | None:
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


# The cache

plans: dict[tuple[Any, ...], tuple[Any, Ground]] = {}  # None: not to be planned
counts = {"hits": 0, "misses": 0, "unfit": 0, "verified": 0}


def statement_cache_stats() -> dict[str, int]:
    """How the statement cache of this process is doing, as plain numbers.

    `hits` and `misses` count the statements whose SQL was there and those that were compiled for
    it, `unfit` those that were left to Django's compiler; `size` is the number of shapes known.
    With "verify" for the setting, `verified` counts the hits that Django's compiler confirmed,
    `verified_shapes` how many shapes they were of, `different` those that it did not confirm.
    """
    return {
        **counts,
        "size": len(plans),
        "verified_shapes": len(verifying.shapes),
        "different": verifying.different,
    }


def clear() -> None:
    """Forget all plans."""
    plans.clear()
    plain_orders.clear()


def recall(key: tuple[Any, ...]) -> Any:
    """A plan, None where there is to be none, UNPLANNED if the shape is new."""
    if not grounds.are_sound():
        return None
    found = plans.get(key)
    if found is None:
        return UNPLANNED
    plan, ground = found
    if not ground.holds():
        plans.pop(key, None)
        return UNPLANNED
    if len(plans) >= MAX_PLANS:
        plans[key] = plans.pop(key, found)  # those used least recently go first
    return plan


def remember(key: tuple[Any, ...], plan: Any, ground: Ground) -> None:
    while len(plans) >= MAX_PLANS:
        try:
            del plans[next(iter(plans))]
        except (KeyError, RuntimeError, StopIteration):  # another thread was faster
            break
    plans[key] = plan, ground


def learn(
    key: tuple[Any, ...],
    model: Any,
    make: Callable[[], tuple[Any, Ground]],
    *classes: type,
    compiled: Collection[type] = (),
) -> Any:
    """Make, remember and return what is known by a key, None where making it raises.

    Args:
        classes: what that rests on, beside the model.
        compiled: more of them, which are known once it is made.
    """
    known, ground = None, None
    with suppress(Exception):
        known, ground = make()
    remember(key, known, ground or Ground([*classes, *compiled], [model]))
    return known


_OUTCOMES = {"misses": "miss", "unfit": "uncacheable"}


def count(what: str) -> None:
    """Count a statement that is compiled."""
    counts[what] += 1
    if _events.cache:
        _events.cached(_OUTCOMES[what])


def hit(key: Any, plan: Plan, params: Any, offset: int, compile: Callable[[], Compiled]) -> bool:
    """Count a hit; where hits are verified, False if Django's SQL is another one each time.

    Args:
        compile: makes Django's statement, of copies of whatever that changes.

    Raises:
        StatementCacheError: Django's statement is another one.
    """
    if verifying.active:
        sent = (*_djangos(plan, params, offset), plan.maker)
        families = list(plan.families)
        for place, _ in plan.constants:
            families.insert(place, _NO_KIND)
        if not verifying.holds(key, sent, families, compile):
            remember(key, None, Ground(()))
            count("unfit")
            return False
        counts["verified"] += 1
    counts["hits"] += 1
    if _events.cache:
        _events.cached("hit")
    return True


Compiled = tuple[str, Any, RowMaker | None]  # SQL, parameters, maker


def plan_for(
    query: Any,
    wrapper: Any,
    compile: Callable[[Any, Any], Compiled],
    *kind: Any,
    expressions: Any = None,
) -> tuple[Plan, list[Any], int] | None:
    """A query's plan, its parameters and its offset; None: leave it to Django."""
    try:
        if expressions is None:
            shape = Shape(query, wrapper, *kind)
        else:
            shape = shape_of_aggregates(query, wrapper, kind, expressions)
        key = tuple(shape.key)
        plan = recall(key)
    except Exception:  # whatever is wrong with the query, Django will say
        count("unfit")
        return None
    known = plan is not UNPLANNED and (plan is None or plan.holds(shape))
    if not known:
        plan = _made(key, query, shape, compile)
        count("misses")
    if plan is None:
        count("unfit")
        return None
    params = shape.bind(skips_null=plan.skips_null)
    if plan.picked is not None:
        params = [params[i] for i in plan.picked]
    if known and not hit(key, plan, params, shape.offset, lambda: compile(query.clone(), wrapper)):
        return None
    return plan, params, shape.offset


def _made(
    key: tuple[Any, ...],
    query: Any,
    shape: Shape,
    compile: Callable[[Any, Any], Compiled],
) -> Plan | None:
    """A new plan, remembered; None if there is to be none."""
    wrapper = shape.wrapper
    lookups = [type(leaf) for leaf, *_ in shape.leaves if isinstance(leaf, Lookup)]

    trace = Trace()

    def make() -> tuple[Plan, Ground]:
        plan = _plan(shape, compile, query, wrapper, trace)
        return plan, grounds.of_query(
            shape.query, shape.kept, plan.maker, wrapper, lookups, *plan.classes
        )

    return learn(key, query.model, make, *lookups, compiled=trace.classes)  # type: ignore[no-any-return]


UNPLANNED: Any = object()
_NO_KIND: dict[type, int] = {}


def _plan(
    shape: Shape,
    compile: Callable[[Any, Any], Compiled],
    query: Any,
    wrapper: Any,
    trace: Trace,
) -> Plan:
    places = shape.places(skips_null=False)
    params = iter(shape.bind(skips_null=False))
    for place, (_, count, node) in enumerate(places):
        own = list(islice(params, count))
        if own and node is not None:
            trace.mark(node, place, own)
    trace.named = shape.named
    with trace.running(wrapper):
        sql, compiled, maker = compile(query, wrapper)
    if not all(map(grounds.is_as_made, trace.classes)):
        raise Unfit
    plain = [param for param in compiled if type(param) is not Mark]
    skips_null = len(plain) - len(trace.constants) != sum(node is None for _, _, node in places)
    picked: list[int] | None
    picked, constants = _sources(shape, trace, compiled, skips_null=skips_null)
    if shape.offset:
        end = f" OFFSET {shape.offset}"
        if not sql.endswith(end):
            raise Unfit
        sql = sql.removesuffix(end)
    families = shape.families(skips_null=skips_null)
    lists = shape.lists(skips_null=skips_null)
    if picked == [*range(len(families))]:
        picked = None
    else:
        lists = [
            (picked.index(at), count)
            for at, count in lists
            if at in picked and picked[picked.index(at) :][:count] == [*range(at, at + count)]
        ]
        # What is there twice has to stay the same to PostgreSQL, which compares no parameters.
        families = [families[i] if picked.count(i) == 1 else _NO_KIND for i in picked]
    plan = Plan(
        sql,
        families,
        maker,
        shape.kept,
        constants=constants,
        skips_null=skips_null,
        with_offset=shape.offset > 0,
        lists=lists,
        picked=picked,
        shared=trace.shared,
        by_server=trace.is_djangos and writes_as_django(wrapper),
    )
    plan.classes = trace.classes
    return plan


def _sources(
    shape: Shape, trace: Trace, compiled: Any, *, skips_null: bool
) -> tuple[list[int], list[tuple[int, Any]]]:
    """Which of the shape's parameters each of a statement's is, and which are constants.

    Raises:
        Unfit: one has no source.
    """
    places = shape.places(skips_null=skips_null)
    starts = [*accumulate((count for _, count, _ in places), initial=0)]
    # Values of an UPDATE have no marks: Django writes them first, one for each field.
    written = [
        i for i, (_, count, node) in zip(starts, places, strict=False) if count and node is None
    ]
    params = shape.bind(skips_null=skips_null)
    picked: list[int] = []
    constants = []
    for number, param in enumerate(compiled):
        if type(param) is Mark:
            picked.append(starts[param.place] + param.number)
        elif any(param is constant for constant in trace.constants):
            constants.append((number, param))
        elif len(picked) in written and verifying.equal(param, params[len(picked)]):
            picked.append(len(picked))
        else:
            raise Unfit
    return picked, constants


def direct(wrapper: Any) -> Connection | None:
    """The connection, if nobody would notice that a statement is sent without Django's cursor."""
    conn = None if wrapper.watched else _connection(wrapper)
    return conn if conn is not None and serves(conn, wrapper) else None


def _connection(wrapper: Any) -> Connection | None:
    wrapper.ensure_connection()
    conn = wrapper.connection
    return conn if isinstance(conn, Connection) else None


def serves(conn: Connection, wrapper: Any) -> bool:
    """Whether a statement means the same there as in a cursor of the wrapper."""
    return has_djangos_cursors(type(wrapper), conn.cursor_factory) and (  # type: ignore[arg-type]
        conn.unsettled or _same_zone(conn, wrapper)  # the one that runs it is looked at, too
    )


def stand_in(alias: str) -> tuple[Pool, Any] | None:
    """The pool, and a wrapper for a statement that travels without an operation.

    None: the current task has or gets a connection, or somebody would notice.

    Raises:
        TransactionManagementError: the task has outlived its block.
    """
    pool = sessions.crowded(alias)
    if pool is None or pool.start is None:
        return None
    wrapper = pool.stand_in()
    factory = pool.start.cursor_factory
    known = has_djangos_cursors(type(wrapper), factory)  # type: ignore[arg-type]
    return (pool, wrapper) if known and not wrapper.watched else None


class NotServed(_events.Unserved):
    """A connection's cursors are not like those that the wrapper would have: use one."""


class Planned:
    """A plan's statement for whichever connection runs it (a `Command`).

    It gives the loaded rows, or how many there were where the plan has no maker.
    """

    def __init__(self, plan: Plan, params: Any, offset: int, wrapper: Any) -> None:
        self.plan = plan
        self.text = plan.text
        self.params = params
        self.offset = offset
        self.wrapper = wrapper

    def bind(self, conn: Connection) -> Statement:
        plan, params, offset = self.plan, self.params, self.offset
        if not serves(conn, self.wrapper):
            raise NotServed
        statement = plan.bound(conn, [*params, offset] if offset else params)
        return statement or conn.bound(*_djangos(plan, params, offset))

    def read(self, conn: Connection, result: Any) -> Any:
        maker = self.plan.maker
        return int(result.command_tuples or 0) if maker is None else maker.load(result, conn)


def _run(plan: Plan, params: list[Any], offset: int, wrapper: Any) -> tuple[Any, Any]:
    """What `Planned` gives, or else None and Django's cursor; a second time if the connection was
    lost with a statement that only reads."""
    try:
        return _run_once(plan, params, offset, wrapper)
    except OperationalError as exc:
        session = wrapper.session
        if not may_repeat(plan, exc) or session is None or not session.give_up_lost():
            raise
    return _run_once(plan, params, offset, wrapper)


def may_repeat(plan: Plan, exc: Exception) -> bool:
    """Whether a statement that failed so is executed again: outside a block, its answer lost."""
    lost = type(exc) is Unanswered or type(exc.__cause__) is Unanswered
    return lost and plan.only_reads and bool(conf.get("RETRY_READS"))


def _run_once(plan: Plan, params: list[Any], offset: int, wrapper: Any) -> tuple[Any, Any]:
    if not wrapper.watched:
        with suppress(NotServed):
            if not _events.statements:
                return _sent(plan, params, offset, wrapper), None
            with told(plan, params, offset, wrapper) as statement:
                return _sent(plan, params, offset, wrapper, statement), None
    cursor = wrapper.cursor()
    try:
        cursor.execute(*_djangos(plan, params, offset))
    except BaseException:
        cursor.close()
        raise
    return None, cursor


def _sent(
    plan: Plan,
    params: list[Any],
    offset: int,
    wrapper: Any,
    statement: _events.Statement | None = None,
) -> Any:
    """What `Planned` gives.

    Raises:
        NotServed: it needs a cursor.
    """
    session = wrapper.session
    queue = None if session is None else session.shared(plan.text)
    runs: Any = queue if queue is not None else _connection(wrapper)
    if runs is None:
        raise NotServed
    wrapper.validate_no_broken_transaction()
    planned: Any = Planned(plan, params, offset, wrapper)
    if statement is not None:
        planned = _events.followed(planned, statement)
    with wrapper.wrap_database_errors:
        return runs.run(planned)


def told(plan: Plan, params: list[Any], offset: int, wrapper: Any) -> _events.Statement:
    """A plan's statement for those who listen."""
    sql, values = _djangos(plan, params, offset)
    return _events.statement(wrapper.alias, sql, values, wrapper.in_atomic_block, "hit")


def _djangos(plan: Plan, params: list[Any], offset: int) -> tuple[str, tuple[Any, ...]]:
    """The SQL and the parameters that Django would have a cursor execute."""
    for place, value in plan.constants:
        params = [*params[:place], value, *params[place:]]
    return f"{plan.sql} OFFSET {offset}" if offset else plan.sql, tuple(params)


def _same_zone(conn: Connection, wrapper: Any) -> bool:
    """Whether the connection loads timestamps in the zone that Django now wants them in."""
    loader = conn.adapters.get_loader(_TIMESTAMPTZ, _TEXT_FORMAT)
    return bool(getattr(loader, "timezone", UNPLANNED) == wrapper.timezone)


def items(plan: Plan, params: list[Any], offset: int, wrapper: Any, mode: Any = None) -> list[Any]:
    """Execute a plan and return what its maker makes of the rows.

    Raises:
        django.db.Error: as Django's cursor does.
    """
    maker = plan.maker
    assert maker is not None
    loaded, cursor = _run(plan, params, offset, wrapper)
    if cursor is None:
        with wrapper.wrap_database_errors:
            if loaded.size <= SLICE:
                return maker.make_part(loaded, next(loaded.parts), wrapper.alias, wrapper, mode)
            conn = wrapper.connection
            alone = isinstance(conn, Connection) and not conn.unsettled
            turn = conn.give_turn if alone else Turns().give
            return maker.made(loaded, turn, wrapper.alias, wrapper, mode)
    made: list[Any] = []
    with cursor:
        while True:
            loaded = cursor.fetchmany(SLICE)
            made += maker.make_loaded(loaded, wrapper.alias, wrapper, mode)
            if len(loaded) < SLICE:
                return made


def chunks(
    plan: Plan, params: list[Any], offset: int, wrapper: Any, mode: Any, size: int
) -> Iterator[list[Any]]:
    """The same from a server-side cursor of Django's, `size` rows at a time."""
    maker = plan.maker
    assert maker is not None
    cursor = wrapper.chunked_cursor()
    try:
        cursor.execute(*_djangos(plan, params, offset))
    except BaseException:
        cursor.close()
        raise
    try:
        while True:
            conn = direct(wrapper)
            if conn is None or conn is not cursor.cursor.connection:
                loaded = cursor.fetchmany(size)
                made = maker.make_loaded(loaded, wrapper.alias, wrapper, mode)
            else:
                with wrapper.wrap_database_errors:
                    with conn.lock:
                        rows = maker.load(conn.fetch(cursor.cursor.name, size), conn)
                    made = maker.made(rows, conn.give_turn, wrapper.alias, wrapper, mode)
            if not made:
                return
            yield made
    finally:
        cursor.close()


def count_of(plan: Plan, params: list[Any], offset: int, wrapper: Any) -> int:
    """Execute a plan and return how many rows were found or changed."""
    count, cursor = _run(plan, params, offset, wrapper)
    if cursor is None:
        return int(count)
    with cursor:
        return int(cursor.rowcount)
