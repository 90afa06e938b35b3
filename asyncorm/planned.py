"""Where Django uses plans: the methods that are replaced.

In native code they take the statement from the cache if it has or can make a plan; otherwise, and
outside native code, they are Django's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from django.core.signals import setting_changed
from django.db.models import Model, query
from django.db.models.sql import compiler
from django.db.models.sql.query import Query
from django.db.models.sql.subqueries import DeleteQuery
from django.utils import deprecation

from . import conf, grounds, internals, patches, verifying
from ._chains import roots
from ._hooks import aggregate, create, get, insert, iterate, switch, terminals, write
from .statements import clear, plans

_ROWS = "rows are read by a plan of the statement cache"
_SHARED = "tasks may evaluate one queryset at the same time"
_WRITES = "writes take their SQL from the statement cache"
_ALONE = "outside a block an INSERT needs no transaction of its own"
_BULK = "bulk_create() takes its values by columns"
_NOTED = "it is noted when SQL is made of something else"
_WARNED = "Django's warnings name the caller's line, past our frames as well as its own"


def _replacements() -> Iterator[tuple[Any, str, Any, str]]:
    """What is replaced: owner, name, by what, and why."""
    querysets: Any = query.QuerySet
    for cls in iterate.ITERABLES:
        yield cls, "__iter__", iterate.planned(cls), _ROWS
    raw = query.RawModelIterable
    yield raw, "__iter__", iterate.raw(raw.__iter__), _ROWS
    raws: Any = query.RawQuerySet
    for each in (querysets, raws):
        yield each, "_fetch_all", iterate.fetch_all(each._fetch_all), _SHARED
    yield querysets, "get", get.get(querysets.get), _ROWS
    yield querysets, "get_or_create", create.get_or_create(querysets.get_or_create), _ALONE
    yield Query, "has_results", aggregate.has_results(Query.has_results), _ROWS
    yield Query, "get_count", aggregate.get_count(Query.get_count), _ROWS
    yield Query, "get_aggregation", aggregate.get_aggregation(Query.get_aggregation), _ROWS
    select = compiler.SQLCompiler
    yield select, "execute_sql", aggregate.execute_select(select.execute_sql), _ROWS
    for writer in (compiler.SQLUpdateCompiler, compiler.SQLDeleteCompiler):
        yield writer, "execute_sql", write.execute_write(writer.execute_sql), _WRITES
    inserter = compiler.SQLInsertCompiler
    yield inserter, "execute_sql", insert.execute_insert(inserter.execute_sql), _WRITES
    yield Model, "_do_update", write.do_update(Model._do_update), _WRITES
    yield Model, "_do_insert", insert.do_insert(Model._do_insert), _WRITES
    yield DeleteQuery, "delete_batch", write.delete_batch(DeleteQuery.delete_batch), _WRITES
    for name, wrap, why in (
        ("update", write.update, _WRITES),
        ("_raw_delete", write.raw_delete, _WRITES),
        ("_prepare_for_bulk_create", insert.prepare_for_bulk_create, _BULK),
        ("_batched_insert", insert.batched_insert, _BULK),
    ):
        yield querysets, name, wrap(getattr(querysets, name)), why
    for cls, name, by in grounds.noted_dicts():
        yield cls, name, by, _NOTED
    yield from _skipped_in_warnings()


def _skipped_in_warnings() -> Iterator[tuple[Any, str, Any, str]]:
    """What Django 6 asks for the folders whose frames no warning of its own names."""
    name = "django_file_prefixes"
    if (djangos := getattr(deprecation, name, None)) is None:
        return
    ours = os.path.join(os.path.dirname(__file__), "")

    def django_file_prefixes() -> tuple[str, ...]:
        return (*djangos(), ours)

    # The modules that warn have imported it; later ones find it in its own.
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(name) is djangos:
            yield module, name, django_file_prefixes, _WARNED


def install() -> None:
    """Put the replacements in place, once, and follow the settings."""
    if internals.CACHE in internals.lost() or patches.replaced_by_us(Query, "has_results"):
        return
    for owner, name, by, why in list(_replacements()):
        patches.replace(owner, name, by, why)
    roots.install()
    terminals.install()
    setting_changed.connect(_settings_changed, dispatch_uid="asyncorm.planned")
    _settings_changed()


def _settings_changed(**kwargs: Any) -> None:
    switch.is_on = bool(conf.get("STATEMENT_CACHE"))
    verifying.active = conf.get("STATEMENT_CACHE") == "verify"
    clear()
    plans.size = conf.get("STATEMENT_CACHE_SIZE")
    roots.follow_settings()
