"""Verify mode: what is recorded is done to a query of Django's as well, its twin, call by call.

A hit is compared with what Django makes of the twin: to do what was recorded once more would only
repeat what the recording takes for the same and is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.db.models.sql.query import Query

from .. import verifying
from . import nodes
from .recorded import RECORDING, Recorded

_set: Any = object.__setattr__
originals: dict[str, Callable[..., Any]] = {name: vars(Recorded)[name] for name in RECORDING}


def follow(is_on: bool) -> None:
    """Give recorded queries twins, or not."""
    for name, original in originals.items():
        setattr(Recorded, name, _with_twin(name, original) if is_on else original)


def djangos(query: Any) -> Any:
    """A copy of the query that Django has made, to be compiled."""
    if type(query) is not Recorded:
        return query.clone()
    twin = _twin(query)
    # A queryset that is older than the setting has none.
    return nodes.made(query.chain_node, query.chain_values) if twin is None else twin.clone()


def _twin(query: Any) -> Any:
    twin = query.chain_twin
    if twin is None and query.chain_node.parent is None:
        twin = Query(query.chain_node.model)
        _set(query, "chain_twin", twin)
    return twin


def _with_twin(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    by_django = getattr(Query, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        twin = _twin(self) if type(self) is Recorded else None
        value = original(self, *args, **kwargs)
        changed = self if value is None else value
        if twin is None or type(changed) is not Recorded:
            return value
        try:
            made = by_django(twin, *args, **kwargs)
        except Exception as exc:
            what = f"Django refuses what was recorded ({name})"
            raise verifying.difference_error(what, f"Its arguments: {args!r}") from exc
        if value is not None:
            _set(value, "chain_twin", made)
        return value

    return method
