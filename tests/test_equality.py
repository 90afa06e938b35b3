"""Native equals sync: for every shape of query, both ways give the same rows in every respect."""

from collections.abc import Callable

import pytest

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


def test_there_are_enough_shapes() -> None:
    assert len(SHAPES) >= 150
