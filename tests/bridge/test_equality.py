"""Native equals sync: for every shape of query, both ways give the same rows in every respect."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

import asyncorm
from tests import operations, shapes
from tests.compare import differences
from tests.operations import READS, Do
from tests.shapes import SHAPES
from tests.ways import outcome, synchronously

pytestmark = [
    pytest.mark.usefixtures("shop_data"),
    # Deprecated, but to be had until Django 7.0.
    pytest.mark.filterwarnings("ignore:Calling select_related:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Calling select_related:PendingDeprecationWarning"),
]


@pytest.mark.parametrize("name", SHAPES)
def test_rows(name: str, way: Do, run: Callable) -> None:
    shape = SHAPES[name]
    expected = outcome(lambda: list(shape()))
    assert isinstance(expected, Exception) == (name in shapes.RAISES), repr(expected)
    assert bool(expected) == (name not in shapes.EMPTY)

    assert differences(expected, outcome(run, way.rows(shape()))) == []


@pytest.mark.parametrize("name", READS)
def test_reads(name: str, way: Do, run: Callable) -> None:
    operation = READS[name]
    expected = outcome(synchronously, operation(Do()))
    assert isinstance(expected, Exception) == (name in operations.RAISES), repr(expected)

    assert differences(expected, outcome(run, operation(way))) == []


def everything() -> dict[str, Any]:
    """What all shapes that do not fail give."""
    return {name: list(shape()) for name, shape in SHAPES.items() if name not in shapes.RAISES}


@functools.cache
def synchronous() -> dict[str, Any]:
    return everything()


def unequal(expected: dict[str, Any], actual: dict[str, Any]) -> dict[str, list[str]]:
    found = {name: differences(expected[name], actual[name]) for name in expected}
    return {name: said for name, said in found.items() if said}


def test_rows_of_all_shapes_at_once(run: Callable) -> None:
    expected = synchronous()

    async def gathered() -> dict[str, Any]:
        found = await asyncio.gather(*(SHAPES[name]().anative() for name in expected))
        return dict(zip(expected, found, strict=True))

    assert unequal(expected, run(gathered())) == {}


@pytest.mark.parametrize("in_block", [False, True])
def test_rows_of_all_shapes_in_batches(run: Callable, in_block: bool) -> None:
    expected = synchronous()

    async def batches() -> dict[str, Any]:
        found: list[Any] = []
        names = list(expected)
        for start in range(0, len(names), 25):
            found += await asyncorm.batch(*(SHAPES[name]() for name in names[start : start + 25]))
        return dict(zip(names, found, strict=True))

    async def inside() -> dict[str, Any]:
        async with asyncorm.atomic(), asyncorm.atomic(using="other"):
            return await batches()

    assert unequal(expected, run(inside() if in_block else batches())) == {}


def test_rows_of_all_shapes_on_one_connection(run: Callable) -> None:
    expected = synchronous()

    async def kept() -> dict[str, Any]:
        async with asyncorm.connection(), asyncorm.connection(using="other"):
            return {name: await SHAPES[name]().anative() for name in expected}

    assert unequal(expected, run(kept())) == {}


def test_rows_of_all_shapes_in_one_transaction(run: Callable) -> None:
    expected = synchronous()

    async def inside() -> dict[str, Any]:
        async with asyncorm.atomic(), asyncorm.atomic(using="other"):
            return {name: await SHAPES[name]().anative() for name in expected}

    assert unequal(expected, run(inside())) == {}


def test_rows_of_all_shapes_in_a_native_function(run: Callable) -> None:
    assert unequal(synchronous(), run(asyncorm.native(everything)())) == {}


def test_there_are_enough_shapes() -> None:
    assert len(SHAPES) >= 150
