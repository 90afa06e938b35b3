"""What the statement cache gives, compared with what Django's compiler would make of the query."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from asyncorm import planned, statements


@contextmanager
def hits_checked() -> Iterator[list[str]]:
    """Compile for each hit, too: statement, parameters and what makes the items must be the same.

    Yields:
        Where they were not.
    """
    wrong: list[str] = []
    original = statements.plan_for

    def plan_for(query: Any, wrapper: Any, compile: Any, *kind: Any, **named: Any) -> Any:
        before = statements.counts["hits"]
        found = original(query, wrapper, compile, *kind, **named)
        if found is not None and statements.counts["hits"] > before:
            plan, params, offset = found
            sql, values = statements._djangos(plan, params, offset)
            expected, real, maker = compile(query, wrapper)
            if sql != expected or not statements.same(list(real), list(values)):
                wrong.append(f"{sql} {values} should be {expected} {real}")
            elif made(plan.maker) != made(maker):
                wrong.append(f"{sql}: {made(plan.maker)} should be {made(maker)}")
        return found

    with mock.patch.object(planned, "plan_for", plan_for):
        yield wrong


def made(maker: Any) -> Any:
    """How a maker makes its items, as far as that can be compared."""
    return maker and (
        maker.item,
        maker.width,
        maker.body,
        maker.names_of_columns[: maker.width],
        {
            i: ([conv.__qualname__ for conv in convs], vars(type(expression.output_field)))
            for i, (convs, expression) in maker.converters.items()
        },
        [str(value) for value in maker.names.values() if isinstance(value, type)],
    )
