"""bulk_create() where the server may return rows in another order than they were sent.

Django puts what an INSERT of several rows returns on the objects in the order in which it comes.
PostgreSQL keeps to the order of the rows; Citus and others, which have several servers insert them,
do not: objects would get each other's keys. There the keys are reserved first and sent along, and
what is returned is told apart by them. What has no such keys is inserted one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.db import NotSupportedError, connections, transaction
from django.db.models import AutoField
from django.db.models.constants import OnConflict
from django.db.models.query import QuerySet

from . import conf
from ._sessions import engines
from .pages import see

# Others than PostgreSQL say so in their version, or call themselves by its name with a suffix.
_ASK = r"""
    SELECT version() !~ '^PostgreSQL [0-9.]+((devel|beta|rc)[0-9]*)? '
        OR version() ~* 'greenplum|redshift|cockroach|yugabyte'
        OR EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'citus')
"""
# An identity that is GENERATED ALWAYS takes no keys.
_RESERVE = """
    SELECT nextval(pg_get_serial_sequence(%s, %s)::regclass) FROM generate_series(1, %s)
    WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute
        WHERE attrelid = %s::regclass AND attname = %s AND attidentity = 'a')
"""

_found: dict[tuple[Any, ...], bool] = {}


def concerns(alias: str) -> bool:
    """Whether rows of an alias may come back in another order.

    The setting DISTRIBUTED says so, or the server is asked once.
    """
    if (said := conf.get("DISTRIBUTED")) is not None:
        return bool(said)
    if engines.native_class(alias) is None:
        return False
    settings = connections.settings[alias]
    key = (alias, *map(settings.get, ("HOST", "PORT", "NAME")))
    if key not in _found:
        connection: Any = connections[alias]
        connection.ensure_connection()
        # Not a cursor of Django's: it is no query of the project.
        with connection.wrap_database_errors, connection.connection.cursor() as cursor:
            _found[key] = bool(cursor.execute(_ASK).fetchone()[0])
    return _found[key]


def insert(
    queryset: QuerySet[Any],
    original: Callable[..., list[Any]],
    objs: list[Any],
    fields: list[Any],
    batch_size: int | None,
    on_conflict: OnConflict | None = None,
    **options: Any,
) -> list[Any]:
    """`QuerySet._batched_insert()`: for each object, in their order, what the server returned.

    Raises:
        django.db.NotSupportedError: the server has put other keys in the place of those sent.
    """
    opts = queryset.model._meta
    returned = tuple(opts.db_returning_fields)
    keys = tuple(getattr(opts, "pk_fields", (opts.pk,)))

    if on_conflict == OnConflict.IGNORE or not returned:
        return original(queryset, objs, fields, batch_size, on_conflict=on_conflict, **options)
    # Before Django 6.1 it is in one already.
    with transaction.atomic(using=queryset.db, savepoint=False):
        # A row that was there keeps its own key.
        if on_conflict is None and _has_keys(objs[0], keys):
            if not set(returned) <= set(keys):
                return _by_keys(queryset, objs, fields, batch_size, keys, returned)
            original(queryset, objs, fields, batch_size, **options)
            return [tuple(getattr(obj, field.attname) for field in returned) for obj in objs]
        if on_conflict is None and isinstance(opts.pk, AutoField) and _reserve(queryset, objs):
            try:
                every = [field for field in opts.concrete_fields if not field.generated]
                return _by_keys(queryset, objs, every, batch_size, keys, returned)
            except BaseException:
                for obj in objs:
                    obj.pk = None
                raise
        rows: list[Any] = []
        for obj in objs:
            rows += original(queryset, [obj], fields, None, on_conflict=on_conflict, **options)
        return rows


def _has_keys(obj: Any, keys: tuple[Any, ...]) -> bool:
    """Whether it is known here which keys it will have."""
    return obj._is_pk_set() and not any(
        hasattr(getattr(obj, field.attname), "resolve_expression") for field in keys
    )


def _reserve(queryset: QuerySet[Any], objs: list[Any]) -> bool:
    """Give the objects keys of the sequence, unless there is none to take them from."""
    opts = queryset.model._meta
    connection = connections[queryset.db]
    table, column = connection.ops.quote_name(opts.db_table), opts.pk.column
    with connection.cursor() as cursor:
        cursor.execute(_RESERVE, [table, column, len(objs), table, column])
        found = [key for (key,) in cursor.fetchall()]
    if len(found) != len(objs) or None in found:
        return False
    for obj, key in zip(objs, found, strict=True):
        obj.pk = key
    return True


def _by_keys(
    queryset: Any,
    objs: list[Any],
    fields: list[Any],
    batch_size: int | None,
    keys: tuple[Any, ...],
    returned: tuple[Any, ...],
) -> list[Any]:
    names = (*keys, *(field for field in returned if field not in keys))
    most = max(connections[queryset.db].ops.bulk_batch_size(fields, objs), 1)
    size = min(batch_size or most, most)
    rows: dict[Any, dict[Any, Any]] = {}
    for start in range(0, len(objs), size):
        for row in queryset._insert(
            objs[start : start + size], fields=fields, using=queryset.db, returning_fields=names
        ):
            rows[tuple(row[: len(keys)])] = dict(zip(names, row, strict=True))
    try:
        found = [
            rows[tuple(field.to_python(getattr(obj, field.attname)) for field in keys)]
            for obj in objs
        ]
    except KeyError as exc:
        raise NotSupportedError(
            f"bulk_create() sent keys for {queryset.model._meta.label}, and the server returned "
            "others (a trigger?): nobody can tell which row is which object's. Save the objects "
            "one by one." + see("distributed#citus")
        ) from exc
    return [tuple(row[field] for field in returned) for row in found]
