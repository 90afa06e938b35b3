"""A deep comparison of query results, hidden state included, that says where they differ."""

import datetime as dt
import weakref
from decimal import Decimal
from typing import Any

from django.db.models import Manager, Model, QuerySet
from django.db.models.base import ModelState
from psycopg.types.range import Range


def differences(expected: Any, actual: Any) -> list[str]:
    """Say each place where `actual` is not what `expected` is; nothing if they are equal.

    Equal means: the same types, the same values down to a Decimal's scale and a datetime's zone,
    the same loaded fields, `_state`, relation and prefetch caches, the same sharing of instances.
    """
    comparison = Comparison()
    comparison.compare("", expected, actual)
    return comparison.found


class Comparison:
    def __init__(self) -> None:
        self.found: list[str] = []
        self.twins: dict[int, Any] = {}

    def report(self, path: str, text: str) -> None:
        self.found.append(f"{path or 'result'}: {text}")

    def compare(self, path: str, a: Any, b: Any) -> None:
        if type(a) is not type(b):
            self.report(path, f"{type(a).__name__} {a!r} became {type(b).__name__} {b!r}")
            return
        match a:
            case Model():
                if self.unseen(path, a, b):
                    self.compare_vars(path, vars(a), vars(b))
            case ModelState():
                self.compare_vars(path, vars(a), vars(b))
            case QuerySet():
                self.compare_querysets(path, a, b)
            case Manager():
                # Related managers that an instance keeps.
                self.compare(
                    f"{path}.instance", getattr(a, "instance", 0), getattr(b, "instance", 0)
                )
                self.compare(f"{path}._db", a._db, b._db)
            case dict():
                # Also the order: it is that of the columns.
                self.compare(f"{path}.keys()", list(a), list(b))
                for key in a.keys() & b.keys():
                    self.compare(f"{path}[{key!r}]", a[key], b[key])
            case list() | tuple():
                if len(a) != len(b):
                    self.report(path, f"{len(a)} items became {len(b)}: {a!r} became {b!r}")
                for n, (one, other) in enumerate(zip(a, b, strict=False)):
                    self.compare(f"{path}[{n}]", one, other)
            case Range():
                for name in ("lower", "upper", "bounds"):
                    self.compare(f"{path}.{name}", getattr(a, name, 0), getattr(b, name, 0))
            case weakref.ReferenceType():
                pass  # Django 6.1's fetch modes: how many peers an instance has is compared above
            case float() | Decimal() | dt.date() | dt.time():
                # Their == forgives the scale, the zone, the sign of zero.
                if repr(a) != repr(b):
                    self.report(path, f"{a!r} became {b!r}")
            case BaseException():
                # An error of the server may show a part of the statement: %s or $1.
                one, other = ([str(x).partition("\nLINE ")[0] for x in e.args] for e in (a, b))
                self.compare(f"{path}.args", one, other)
            case _:
                if a != b:
                    self.report(path, f"{a!r} became {b!r}")

    def unseen(self, path: str, a: Model, b: Model) -> bool:
        """Pair the two instances; an instance that already has another twin is a difference."""
        if id(a) not in self.twins and id(b) not in self.twins:
            self.twins[id(a)], self.twins[id(b)] = b, a
            return True
        if self.twins.get(id(a)) is not b or self.twins.get(id(b)) is not a:
            self.report(path, f"{a!r} is shared between other places than its counterpart")
        return False

    def compare_vars(self, path: str, a: dict[str, Any], b: dict[str, Any]) -> None:
        for name in sorted(a.keys() ^ b.keys()):
            self.report(path, f"{name} is only on the {'expected' if name in a else 'actual'} side")
        for name in a.keys() & b.keys():
            self.compare(f"{path}.{name}", a[name], b[name])

    def compare_querysets(self, path: str, a: QuerySet, b: QuerySet) -> None:
        for name in ("model", "_db", "_fields", "_hints", "_prefetch_done", "_result_cache"):
            self.compare(f"{path}.{name}", getattr(a, name), getattr(b, name))
