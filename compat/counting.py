"""Counts in a worker what recordings catch, and why they do not catch the rest.

Every statement is one of the statement cache's statistics already. Here it is told which querysets
the statements are of, and for those that were not recorded, what had their query made. A reason
stays with a query and its copies as one more attribute, and is counted once for each statement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from traceback import walk_tb
from typing import Any

from django.db.models import Model, QuerySet

from asyncorm import statements
from asyncorm._cache.parts import PARTS
from asyncorm._chains import nodes, plans, recorded, twins, values
from asyncorm._hooks import terminals, write

reasons: Counter[str] = Counter()
_REASON = "_counted_reason"
_why: list[str] = []
_NEVER = "not made on the loop, or not by the manager"


def install() -> None:
    """Count from now on, in this process."""
    PARTS[_REASON] = None  # no part of a query's shape
    recorded.settle = plans.settle = _settling(recorded.settle)
    for name in ("add_q", "chain", "__setattr__"):
        noting = twins.originals[name] = _noting(twins.originals[name], name)
        setattr(recorded.Recorded, name, noting)
    recorded._step = _noting(recorded._step, "step")
    made = recorded._Made
    made.__get__ = _noting(made.__get__, "made")  # type: ignore[method-assign]
    plans._learn = _noting_failure(plans._learn)
    original = statements.plan_for
    for module in (statements, write, terminals):
        module.plan_for = _counting(original)  # type: ignore[attr-defined]


def _noting(method: Any, name: str) -> Any:
    """A method during which it is known what it is asked for."""

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        words = name
        with suppress(Exception):  # of a query that has been made
            words = _words(name, self, *args)
        _why.append(words)
        try:
            return method(self, *args, **kwargs)
        finally:
            _why.pop()

    return noting


def _words(name: str, query: Any, *args: Any) -> str:
    if name == "made":
        return f"asked for {query.name}"
    node = query.chain_node
    if name == "chain":
        return f"to {args[0].__name__}" if args and args[0] else "chain"
    if name == "__setattr__":
        return f"{args[0]} is set"
    if name == "step":
        return _of_child(node, args[0], str(args[0][0]))
    found: list[Any] = []
    form = values.read(args[0], found)
    if form is None:
        return f"value: {', '.join(sorted(set(_unfit(args[0]))))}"
    return _of_child(node, form, f"filter by {_lookups(args[0])}")


def _of_child(node: Any, form: Any, words: str) -> str:
    if not nodes.is_current(node):
        return "recorded before something changed"
    child = node.children.get(form, recorded._MISSING)
    if child is recorded._MISSING:
        return "first time"
    return f"never recorded: {words}" if child is None else f"not this value: {words}"


def _unfit(q: Any) -> list[str]:
    if type(q) is not values.Q:
        return [f"an expression ({type(q).__name__})"]
    found: list[str] = []
    for child in q.children:
        if type(child) is not tuple:
            found += _unfit(child)
        elif (value := child[1]) is not None and type(value) is not bool:
            found += _kind(value, child[0].rpartition("__")[2])
    return found


def _kind(value: Any, lookup: str) -> list[str]:
    if isinstance(value, QuerySet):
        return ["a queryset"]
    if isinstance(value, Model) and type(value) is not value.__class__:
        return ["a lazy instance"]
    if isinstance(value, list | tuple | set | frozenset):
        kinds = sorted({type(each).__name__ for each in value})
        return [f"{lookup} {type(value).__name__} of {'/'.join(kinds)}"]
    return [] if values.kind_of(value) is not None else [type(value).__name__]


def _lookups(q: Any) -> str:
    return "/".join(
        f"{name.rpartition('__')[2]} {type(value).__name__}"
        for name, value in (each for each in q.children if type(each) is tuple)
    )


def _settling(settle: Callable[[Any], None]) -> Callable[[Any], None]:
    def settling(query: Any) -> None:
        if type(query) is recorded.Recorded:
            reason = _why[-1] if _why else f"no plan: {_unplanned.get(query.chain_node)}"
            settle(query)
            vars(query).setdefault(_REASON, reason)

    return settling


def _noting_failure(learn: Any) -> Any:
    """What learns a recorded plan; where it gives up is known of the node from then on."""

    def noting(node: Any, *args: Any) -> Any:
        try:
            return learn(node, *args)
        except Exception as exc:
            *_, (frame, line) = walk_tb(exc.__traceback__)
            where = f"{frame.f_code.co_name}, line {line}"
            _unplanned[node] = f"{type(exc).__name__} in {where}, {_words_of(node)}"
            raise

    return noting


_unplanned: dict[Any, str] = {}


def _words_of(node: Any) -> str:
    while node.call is None and node.parent is not None:
        node = node.parent
    return f"{node.model.__name__}: {getattr(node.call, 'form', None) or vars(node.call)}"


def _counting(plan_for: Any) -> Any:
    """`plan_for()`, whose queries are not recorded."""

    def counting(query: Any, *args: Any, again: bool = False, **kwargs: Any) -> Any:
        if again:
            return plan_for(query, *args, again=True, **kwargs)
        hits, misses = statements.counts["hits"], statements.counts["misses"]
        found = plan_for(query, *args, **kwargs)
        if statements.counts["hits"] > hits:
            _count("a plan", query)
        elif statements.counts["misses"] == misses and found is None:
            _count("Django", query)
        return found

    return counting


def _count(way: str, query: Any) -> None:
    reasons[f"{way}: {vars(query).get(_REASON, _NEVER)}"] += 1
