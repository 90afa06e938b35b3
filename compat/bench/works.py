"""The works of the benchmark: what is measured, with which arguments, and how a result is checked.

An adapter has one method for each work; `WORKS` says how to call it. A result is made plain (tuples
of Python values, no instances), so that every contestant's can be compared with the raw driver's
before anything is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

BOOK = ("id", "author_id", "title", "pages", "price", "published", "updated", "meta")
DRAFT = ("title", "pages", "price", "published", "updated", "meta", "active")
SLEEP = 0.1
_START = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


@dataclass(frozen=True)
class Sizes:
    """How much data there is and how long to measure; one instance for `--quick`, one for full."""

    books: int
    events: int
    bulk: int
    stall: int
    rounds: int
    slice: float  # seconds for one contestant's turn with one work
    http: float  # seconds of HTTP load
    heavy: int  # rounds for works that take seconds


FULL = Sizes(100_000, 1_000_000, 10_000, 100_000, rounds=7, slice=0.3, http=3.0, heavy=3)
QUICK = Sizes(20_000, 20_000, 2_000, 10_000, rounds=3, slice=0.03, http=0.3, heavy=1)
TINY = Sizes(4_000, 5_000, 200, 2_000, rounds=1, slice=0.005, http=0.2, heavy=1)


def draft(title: str, number: int = 0) -> dict[str, Any]:
    """The values of a draft, by column."""
    return {
        "title": title,
        "pages": 100 + number % 900,
        "price": Decimal(number % 10000) / 100,
        "published": _START + timedelta(minutes=number),
        "updated": _START + timedelta(seconds=number),
        "meta": {"isbn": f"978-{number}", "tags": ["a", "b"], "stock": number % 50, "sold": True},
        "active": number % 2 == 0,
    }


@dataclass
class Work:
    """One thing to measure.

    Attributes:
        name: the adapter's method.
        title: for people.
        kind: "read", "write" or "special" (worker.py knows how).
        calls: the arguments of `n` calls, given the worker's context.
        plain: the result of a call as plain data.
        check: what the database holds afterwards, as plain data (writes).
        each: how many operations one call makes (the time is divided by it).
        sync_alone: synchronous code cannot do it at once and does it one after another.
        most: the most calls in one turn.
        method: the adapter's, if it has another name.
    """

    name: str
    title: str
    kind: str
    calls: Callable[[Any, int], Iterable[tuple[Any, ...]]]
    plain: Callable[[Any, Any], Any]
    check: Callable[[Any, tuple[Any, ...]], Any] | None = None
    each: int = 1
    most: int = 2000
    heavy: bool = False
    unit: str = "us"
    core: bool = False  # measured for variants of a contestant too
    only: tuple[str, ...] = ()  # contestants that it makes sense for; all by default
    method: str = ""


def _books(ctx: Any, n: int, span: int) -> list[int]:
    """First ids of `n` ranges of `span` books all over the table; the same for everybody."""
    room = ctx.sizes.books - span
    return [1 + (7919 * (ctx.turn * 1009 + i)) % room for i in range(n)]


def _ids(ctx: Any, n: int) -> list[tuple[int]]:
    return [(pk,) for pk in _books(ctx, n, 1)]


def _ranges(span: int, per: int = 1) -> Callable[[Any, int], list[tuple[int, int]]]:
    """Arguments (first, last + 1) of ranges of `span` ids; `per` books for each id."""

    def calls(ctx: Any, n: int) -> list[tuple[int, int]]:
        firsts = [(first - 1) // per + 1 for first in _books(ctx, n, span * per)]
        return [(first, first + span) for first in firsts]

    return calls


def _rows(adapter: Any, result: Any) -> Any:
    return [adapter.row(book) for book in result]


def _draft_row(ctx: Any, title: str) -> Any:
    rows = ctx.sql(f"SELECT {', '.join(DRAFT)} FROM bench_draft WHERE title = %s", (title,))
    return rows


def _new_drafts(ctx: Any, n: int) -> list[tuple[Any, ...]]:
    return [(draft(ctx.title(i), i),) for i in range(n)]


def _stored(ctx: Any, n: int) -> list[int]:
    """The keys of `n` drafts made beforehand."""
    values = [draft(ctx.title(i), i) for i in range(n)]
    return ctx.store(values)


def _loaded(ctx: Any, n: int) -> list[tuple[Any, ...]]:
    keys = _stored(ctx, n)
    return [(obj, 1000 + i) for i, obj in enumerate(ctx.wait(ctx.adapter.drafts, keys))]


def _half_stored(ctx: Any, n: int) -> list[tuple[Any, ...]]:
    values = [draft(ctx.title(i), i) for i in range(n)]
    ctx.store(values[::2])
    return [(value,) for value in values]


def _bulk(ctx: Any, n: int) -> list[tuple[Any, ...]]:
    size = ctx.sizes.bulk
    return [([draft(ctx.title(k * size + i), i) for i in range(size)],) for k in range(n)]


def _check_bulk(ctx: Any, args: tuple[Any, ...]) -> Any:
    return ctx.sql(
        "SELECT count(*), sum(pages), sum(price), min(published), max(updated),"
        " sum((meta->>'stock')::int) FROM bench_draft"
    )


WORKS = [
    Work(
        "empty",
        "empty native() call",
        "read",
        lambda ctx, n: [()] * n,
        lambda a, r: None,
        most=5000,
        only=("psycopg", "native"),
    ),
    Work("get", "get by pk, one task", "read", _ids, lambda a, r: a.row(r), core=True),
    Work(
        "get_100",
        "get by pk, 100 gathered (each)",
        "read",
        lambda ctx, n: [(tuple(pk for (pk,) in _ids(ctx, 100)),)] * n,
        _rows,
        each=100,
        most=100,
        core=True,
    ),
    *(
        Work(
            f"get_{count}",
            f"get by pk, {count:,} gathered (each)",
            "read",
            lambda ctx, n, count=count: [(tuple(pk for (pk,) in _ids(ctx, count)),)] * n,
            _rows,
            each=count,
            most=10_000 // count,
            heavy=count == 10_000,
            only=("psycopg", "native", "swap", "django-threads", "yara"),
            method="get_100",
        )
        for count in (10, 1_000, 10_000)
    ),
    Work("page", "filtered list of 20", "read", _ranges(10, 2), _rows, core=True),
    Work("rows", "list of 1,000 (8 columns)", "read", _ranges(1000), _rows, most=200, core=True),
    Work(
        "related",
        "100 with select_related, two levels",
        "read",
        _ranges(100),
        lambda a, r: [a.related_row(book) for book in r],
        most=500,
    ),
    Work(
        "prefetch",
        "100 with prefetch_related, two levels",
        "read",
        _ranges(100, 10),
        lambda a, r: [a.prefetched_row(publisher) for publisher in r],
        most=200,
    ),
    Work(
        "values",
        "values_list of 1,000 (3 columns)",
        "read",
        _ranges(1000),
        lambda a, r: a.values_rows(r),
        most=300,
    ),
    Work("count", "count()", "read", _ranges(50, 2), lambda a, r: r),
    Work("exists", "exists()", "read", _ids, lambda a, r: r),
    Work("aggregate", "aggregate(Sum, Max)", "read", _ranges(50, 2), lambda a, r: tuple(r)),
    Work(
        "create",
        "create()",
        "write",
        _new_drafts,
        lambda a, r: None,
        lambda ctx, args: _draft_row(ctx, args[0]["title"]),
        core=True,
    ),
    Work(
        "save",
        "save() of a changed instance",
        "write",
        _loaded,
        lambda a, r: None,
        lambda ctx, args: _draft_row(ctx, ctx.title(0)),
        core=True,
    ),
    Work(
        "bulk_create",
        "bulk_create() of {bulk:,}",
        "write",
        _bulk,
        lambda a, r: r is None or len(set(r)) == len(r),
        _check_bulk,
        most=5,
        heavy=True,
    ),
    Work(
        "update",
        "filter(pk=).update()",
        "write",
        lambda ctx, n: [(pk, 1000 + i) for i, pk in enumerate(_stored(ctx, n))],
        lambda a, r: r,
        lambda ctx, args: _draft_row(ctx, ctx.title(0)),
    ),
    Work(
        "delete",
        "delete() of an instance",
        "write",
        lambda ctx, n: [(obj,) for obj, _ in _loaded(ctx, n)],
        lambda a, r: None,
        lambda ctx, args: _draft_row(ctx, ctx.title(0)),
    ),
    Work(
        "get_or_create",
        "get_or_create(), half of them there",
        "write",
        _half_stored,
        lambda a, r: None,
        lambda ctx, args: _draft_row(ctx, args[0]["title"]),
    ),
    Work(
        "transaction",
        "transaction of five statements",
        "write",
        _new_drafts,
        lambda a, r: r,
        lambda ctx, args: _draft_row(ctx, args[0]["title"]),
    ),
    Work(
        "sleep",
        "10 x 100 ms gathered",
        "read",
        lambda ctx, n: [()] * n,
        lambda a, r: None,
        most=1,
        heavy=True,
        unit="ms",
    ),
    Work(
        "stream",
        "stream {events:,} rows",
        "special",
        lambda ctx, n: [],
        lambda a, r: None,
        heavy=True,
        unit="s",
    ),
    Work(
        "stall",
        "longest stall while {stall:,} rows load",
        "special",
        lambda ctx, n: [],
        lambda a, r: None,
        heavy=True,
        unit="ms",
    ),
    Work(
        "asgi",
        "ASGI requests",
        "special",
        lambda ctx, n: [],
        lambda a, r: None,
        heavy=True,
        unit="1/s",
    ),
]
BY_NAME = {work.name: work for work in WORKS}


def plain(value: Any) -> Any:
    """A result as JSON-able data: equal for equal values, whatever library made them."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat() if value.tzinfo else f"naive {value.isoformat()}"
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        return f"decimal {value}"
    if isinstance(value, int | float):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in sorted(value.items())}
    if isinstance(value, list | tuple) or hasattr(value, "__iter__"):
        return [plain(item) for item in value]
    return f"{type(value).__name__} {value}"


def digest(value: Any) -> str:
    """`plain(value)` as text, for comparison and for messages."""
    return json.dumps(plain(value), sort_keys=True)
