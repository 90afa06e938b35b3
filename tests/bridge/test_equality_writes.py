"""Native equals sync: every write leaves the same rows, sequences and results."""

from collections.abc import Callable

import pytest

from tests.compare import differences
from tests.operations import RAISES, UNCHANGED, WRITES, Do
from tests.stock import Stock
from tests.ways import outcome, synchronously


@pytest.mark.parametrize("name", WRITES)
def test_writes(
    name: str,
    way: Do,
    run: Callable,
    fresh_shop: Callable[[], None],
    stock: Stock,
) -> None:
    operation = WRITES[name]
    expected = outcome(synchronously, operation(Do()))
    written = stock.changes()
    assert isinstance(expected, Exception) == (name in RAISES), repr(expected)
    # Beside the sequences, which are always told.
    changed = any(len(changes) > 1 for changes in written)
    assert changed == (name not in RAISES | UNCHANGED)

    fresh_shop()
    assert differences(expected, outcome(run, operation(way))) == []
    assert differences(written, stock.changes()) == []
