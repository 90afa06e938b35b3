"""The deep comparison finds what it is there to find."""

import copy
import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.compare import differences
from tests.project.shop.models import Book, Publisher


def books() -> list[Book]:
    """Three books of one publisher, as select_related and prefetch_related would leave them."""
    publisher = Publisher(pk=1, name="P")
    result = [Book(pk=n, title=f"book {n}", price=Decimal("1.50")) for n in range(3)]
    for book in result:
        book._state.db = "default"
        book._state.adding = False
        book.publisher = publisher
        book.created = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
        tags: Any = Publisher.objects.all()
        tags._result_cache = [publisher]
        book._prefetched_objects_cache = {"tags": tags}
    return result


def set_in(target: str, value: Any) -> Callable[[list[Any]], None]:
    def change(rows: list[Any]) -> None:
        *path, last = target.split(".")
        place = rows[1]
        for name in path:
            place = place[name] if isinstance(place, dict) else getattr(place, name)
        if isinstance(place, dict):
            place[last] = value
        else:
            setattr(place, last, value)

    return change


CHANGES: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "missing row": (lambda rows: rows.pop(), "3 items became 2"),
    "swapped rows": (lambda rows: rows.reverse(), "[0].id"),
    "value": (set_in("title", "other"), "[1].title: 'book 1' became 'other'"),
    "type": (set_in("title", 5), "[1].title: str 'book 1' became int 5"),
    "type that is equal": (set_in("in_print", 1), "[1].in_print: bool True became int 1"),
    "decimal's scale": (set_in("price", Decimal("1.5")), "[1].price"),
    "time zone": (
        set_in("created", dt.datetime(2024, 1, 1, 1, tzinfo=ZoneInfo("Europe/Vienna"))),
        "[1].created",
    ),
    "alias": (set_in("_state.db", "other"), "[1]._state.db"),
    "adding": (set_in("_state.adding", True), "[1]._state.adding"),
    "deferred": (lambda rows: rows[1].__dict__.pop("title"), "[1]: title is only on the expected"),
    "annotation": (set_in("extra_name", 1), "[1]: extra_name is only on the actual side"),
    "related row": (set_in("publisher.name", "Q"), ".name: 'P' became 'Q'"),
    "no related row": (
        lambda rows: rows[1]._state.fields_cache.clear(),
        "[1]._state.fields_cache.keys()",
    ),
    "unshared": (
        lambda rows: set_in("_state.fields_cache.publisher", copy.copy(rows[1].publisher))(rows),
        "is shared between other places",
    ),
    "prefetch": (
        set_in("_prefetched_objects_cache.tags._result_cache", []),
        "['tags']._result_cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found(name: str) -> None:
    change, said = CHANGES[name]
    changed = books()
    change(changed)
    assert any(said in text for text in differences(books(), changed)), differences(
        books(), changed
    )


def test_equals_are_equal() -> None:
    assert differences(books(), books()) == []
