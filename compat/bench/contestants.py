"""Who takes part, and with which options."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

PREPARE = 5  # psycopg's default; Django's is None, which never prepares
_ASYNCORM = {"engine": "asyncorm.backends.postgresql"}
_BACKEND = {"engine": "django_async_backend.db.backends.postgresql"}


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        name: on the command line.
        title: for people.
        module: the adapter's, in adapters/.
        options: for the adapter.
        variant: another configuration of a row above; measured for the core works only.
        requires: the oldest Python that it runs on.
    """

    name: str
    title: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    variant: bool = False
    requires: tuple[int, int] = (3, 11)
    package: str = ""  # in peers.txt

    @property
    def unfit(self) -> str | None:
        """Why it cannot run on this interpreter, if so."""
        if sys.version_info[:2] < self.requires:
            return f"needs Python {'.'.join(map(str, self.requires))}"
        return None


def _with(**options: Any) -> dict[str, Any]:
    return {"prepare_threshold": PREPARE, **options}


FLOOR = "psycopg"
BOUND = {"server_side_binding": True}
CONTESTANTS = [
    Contestant(FLOOR, "psycopg pool, tuples", "psycopg_raw", _with()),
    Contestant("asyncpg", "asyncpg pool, records", "asyncpg_raw", _with()),
    Contestant("native", "asyncorm native_*", "asyncorm_native", _with(**_ASYNCORM)),
    Contestant("swap", "asyncorm, a* swapped", "django_async", _with(**_ASYNCORM, swap=True)),
    Contestant("django-sync", "Django, synchronous", "django_sync", _with()),
    Contestant("django-threads", "Django, synchronous, 10 threads", "django_threads", _with()),
    Contestant("django-async", "Django a*", "django_async", _with()),
    Contestant(
        "async-backend", "django-async-backend", "django_backend", _with(**_BACKEND),
        requires=(3, 12), package="django-async-backend",
    ),
    Contestant("tortoise-asyncpg", "Tortoise, asyncpg", "tortoise_orm", _with(driver="asyncpg"),
               package="tortoise-orm"),
    Contestant("tortoise-psycopg", "Tortoise, psycopg", "tortoise_orm", _with(driver="psycopg"),
               package="tortoise-orm"),
    Contestant("sqlalchemy-asyncpg", "SQLAlchemy, asyncpg", "sqlalchemy_orm",
               _with(driver="asyncpg"), package="sqlalchemy"),
    Contestant("sqlalchemy-psycopg", "SQLAlchemy, psycopg", "sqlalchemy_orm",
               _with(driver="psycopg"), package="sqlalchemy"),
    Contestant("piccolo", "Piccolo", "piccolo_orm", _with(), package="piccolo"),
    Contestant("yara", "yara-orm", "yara", _with(), package="yara-orm"),
    Contestant("oxyde", "oxyde", "oxyde_orm", _with(), package="oxyde"),
    # Other configurations. Django's default (prepare_threshold None) for each that has the option;
    # and server_side_binding, without which psycopg's client-side cursors never prepare.
    Contestant("psycopg-unprepared", "psycopg pool, threshold None", "psycopg_raw",
               _with(prepare_threshold=None), variant=True),
    Contestant("native-default", "asyncorm native_*, threshold None", "asyncorm_native",
               _with(**_ASYNCORM, prepare_threshold=None), variant=True),
    Contestant("native-compiled", "asyncorm compiled()", "asyncorm_compiled", _with(**_ASYNCORM),
               variant=True),
    Contestant("native-bound", "asyncorm native_*, server_side_binding", "asyncorm_native",
               _with(**_ASYNCORM, **BOUND), variant=True),
    Contestant("django-async-default", "Django a*, threshold None", "django_async",
               _with(prepare_threshold=None), variant=True),
    Contestant("django-async-bound", "Django a*, server_side_binding", "django_async",
               _with(**BOUND), variant=True),
    Contestant("django-sync-bound", "Django sync, server_side_binding", "django_sync",
               _with(**BOUND), variant=True),
]  # fmt: skip
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
