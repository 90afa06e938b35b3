"""psycopg's adapters that count their changes, for who keeps what was made from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import pq
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.pq.abc import PGresult
from psycopg.types import TypesRegistry
from psycopg.types.string import TextLoader

if TYPE_CHECKING:
    from ..driver import Connection


_TIMESTAMPTZ = 1184
_AS_TEXT = 2**32 - 1  # stands for no type of the server's


class _Types(TypesRegistry):
    """A registry of types that counts its changes."""

    version = 0

    def add(self, info: Any) -> None:
        super().add(info)
        self.version += 1


class Adapters(AdaptersMap):
    """An adapters map that counts its changes, for who keeps a Transformer."""

    version = 0

    def __init__(self, template: AdaptersMap) -> None:
        super().__init__(template)
        self.types: _Types = _Types(template.types)

    def register_dumper(self, *args: Any, **kwargs: Any) -> None:
        super().register_dumper(*args, **kwargs)
        self.version += 1

    def register_loader(self, *args: Any, **kwargs: Any) -> None:
        super().register_loader(*args, **kwargs)
        self.version += 1


def has_own(adapters: AdaptersMap) -> bool:
    """Whether something was registered in an adapters map since it was copied from another."""
    return bool(
        any(adapters._own_loaders)
        or any(adapters._own_dumpers_by_oid)
        or any(adapters._own_dumpers.values())
        or adapters.types._own_state
    )


class AdaptersContext:
    """What a Transformer is made from."""

    def __init__(self, adapters: AdaptersMap, connection: Any) -> None:
        self.adapters = adapters
        self.connection = connection


class _TimesAsText(Transformer):  # type: ignore[misc, valid-type]
    """A Transformer that leaves the timestamps of a row as the server wrote them.

    Only where one is a column of its own: what has timestamps in it (arrays, ranges, composites)
    has them loaded by the loader that the connection has for them.
    """

    _oids: tuple[int, ...] | None = None  # of the columns that it has loaders for

    def set_pgresult(
        self, result: PGresult, *, oids: tuple[int, ...] | None = None, **kwargs: Any
    ) -> None:
        super().set_pgresult(result, set_loaders=False)
        if result is not None:
            if oids is None:
                oids = types_of(result)
            if oids != self._oids:
                self.set_loader_types(
                    [_AS_TEXT if oid == _TIMESTAMPTZ else oid for oid in oids], pq.Format.TEXT
                )
                self._oids = oids


def types_of(result: PGresult) -> tuple[int, ...]:
    """The oids of the types of a result's columns."""
    return tuple(map(result.ftype, range(result.nfields)))


def text_transformer_of(conn: Connection) -> Any:
    """A Transformer that leaves a timestamptz as the server wrote it."""
    adapters = AdaptersMap(conn.adapters)
    adapters.register_loader(_AS_TEXT, TextLoader)
    return _TimesAsText(AdaptersContext(adapters, conn))
