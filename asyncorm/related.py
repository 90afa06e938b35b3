"""One level of prefetch_related() for plain relations: without a manager and a filter per instance.

Django makes a related manager and a filtered queryset for each instance, to hold what was fetched
for it. The first instance's is made by Django here too; what another's would be is told from that
one: the same but for the instance and its key. Rows of a foreign key, in either direction, are
asked for and told apart by key, without the methods that serve relations of any kind. All else is
Django's.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `ForwardManyToOneDescriptor`, `ReverseManyToOneDescriptor`, `ManyToManyDescriptor`,
  `.related_manager_cls`, `.field`; `source_field` of their managers: which relation it is.
- `QuerySet.__dict__`, `Query.__dict__`, `BaseManager._queryset_class`: what is copied; whatever is
  not of a kind known here is left to Django. The methods in `_QUERYSET` and `_MANAGER`: compared
  with the class's own to see whether they are overridden.
- `Query.add_q`, `QuerySet._add_hints`: how a level's rows are asked for.
- `ForeignKey.foreign_related_fields`, `.local_related_fields`, `.cache_name`,
  `ModelState.fields_cache`, `Model._prefetched_objects_cache`: where keys and results are.
"""

from __future__ import annotations

import functools
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import getattr_static
from operator import attrgetter, itemgetter
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections, router
from django.db.models import ForeignKey, Manager, Model, OneToOneField, Prefetch, Q, QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.db.models.fields.related_descriptors import (
    ForeignKeyDeferredAttribute,
    ForwardManyToOneDescriptor,
    ManyToManyDescriptor,
    ReverseManyToOneDescriptor,
)
from django.db.models.manager import BaseManager
from django.db.models.query_utils import DeferredAttribute
from django.db.models.sql.query import Query
from django.db.models.sql.where import WhereNode

from . import grounds, patches
from ._chains.recorded import settle
from ._chains.values import is_djangos
from ._hooks.iterate import give_turn
from ._hooks.keys import by_keys
from ._hooks.switch import native_wrapper

_SLICE = 500
_KEYS = {int, str, uuid.UUID}  # types that are compared alike as keys by everybody
_COLUMNS = (DeferredAttribute, ForeignKeyDeferredAttribute)
_PK: Any = Model.pk  # rows are told apart by it; without one of its own, by the column
_DESCRIPTORS = (ForwardManyToOneDescriptor, ReverseManyToOneDescriptor, ManyToManyDescriptor)
_QUERYSET = (
    "__new__", "__init__", "__iter__", "__setattr__", "_fetch_all", "_add_hints", "db", "query",
    "using", "filter", "_filter_or_exclude", "_filter_or_exclude_inplace", "_chain", "_clone",
    "_next_is_sticky", "_avoid_cloning", "_disable_cloning", "_enable_cloning", "_query", "_hints",
    "_deferred_filter", "_known_related_objects",
    "__getstate__", "__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__setstate__",
    "__getattribute__", "__getattr__", "__delattr__",
)  # fmt: skip
_MANAGER = ("__new__", "__init__", "__setattr__", "__getattribute__", "get_queryset")


def _is_djangos(cls: type, base: type, names: tuple[str, ...]) -> bool:
    return (
        grounds.is_djangos(base)
        and grounds.clones_as_django()
        and grounds.inherits(cls, base, names)
    )


class Relation:
    """A relation from the instances of one model to those of another.

    Attributes:
        field: the foreign key that leads back, or forward; None for a many-to-many relation.
        key: the attribute of an instance that is looked for.
        manager: the first instance's related manager; None if the foreign key leads forward.
        grouped: rows, and the same by the key that they lead back to, once they are there.
    """

    grouped: tuple[Any, dict[Any, list[Any]]] = None, {}

    def __init__(self, field: Any, key: str, manager: Any) -> None:
        self.field = field
        self.key = key
        self.manager = manager


def _forward(instances: Sequence[Any], descriptor: Any) -> Relation | None:
    """A foreign key of the instances' own."""
    model, field = type(instances[0]), descriptor.field
    if type(field) is not ForeignKey:
        return None
    (target,) = field.foreign_related_fields
    remote = field.remote_field.model
    manager: Any = remote._base_manager
    managers: Any = type(manager)
    if (
        field.primary_key
        or remote.pk is not _PK
        or model._meta.parents
        or field.model._meta.concrete_model is not model._meta.concrete_model
        or type(getattr_static(model, field.attname, None)) not in _COLUMNS
        or remote._meta.parents
        or target.model._meta.concrete_model is not remote._meta.concrete_model
        or not _is_djangos(managers, Manager, (*_MANAGER, "db_manager", "all", "fetch_mode"))
        or not _is_djangos(manager._queryset_class, QuerySet, _QUERYSET)
        or set(map(type, instances)) != {model}
    ):
        return None
    key, kinds = field.attname, _KEYS | {type(None)}
    for obj in instances:
        state = obj.__dict__
        if key not in state or type(state[key]) not in kinds:
            return None
    return Relation(field, key, None)


def relation(instances: Any, prefetcher: Any, lookup: Any, level: int) -> Relation | None:
    """What a level of a lookup goes along; None: leave it to Django."""
    if (
        type(lookup) is not Prefetch
        or not grounds.are_sound()
        or not grounds.are_djangos(*_DESCRIPTORS, BaseManager, OneToOneField)
        or lookup.get_current_querysets(level)
        or lookup.get_current_to_attr(level)[1]
    ):
        return None
    model = type(instances[0])
    descriptor = getattr(model, lookup.prefetch_through.split(LOOKUP_SEP)[level], None)
    kind = type(descriptor)
    if kind is ForwardManyToOneDescriptor and prefetcher is descriptor:
        return _forward(instances, descriptor)
    if kind is not ReverseManyToOneDescriptor and kind is not ManyToManyDescriptor:
        return None
    managers: Any = descriptor.related_manager_cls  # type: ignore[union-attr]
    if (
        type(prefetcher) is not managers
        or prefetcher._db is not None
        or not grounds.is_djangos_function(managers.get_prefetch_querysets)
        or prefetcher._hints
        or prefetcher.instance is not instances[0]
        or not _is_djangos(managers.__mro__[1], Manager, _MANAGER)
        or not _is_djangos(managers._queryset_class, QuerySet, _QUERYSET)
    ):
        return None
    field = None
    if kind is ReverseManyToOneDescriptor:
        source = field = descriptor.field  # type: ignore[union-attr]
    else:
        source = prefetcher.source_field
    if type(source) is not ForeignKey and type(source) is not OneToOneField:
        return None
    (target,) = source.foreign_related_fields
    opts = model._meta
    if (
        model.pk is not _PK
        or (source.primary_key and source.model.pk is not _PK)
        or opts.parents
        or target.model._meta.concrete_model is not opts.concrete_model
        or type(getattr_static(model, target.attname, None)) not in _COLUMNS
        or set(map(type, instances)) != {model}
    ):
        return None
    for key in {target.attname, opts.pk.attname}:
        try:
            kinds = set(map(type, map(itemgetter(key), map(vars, instances))))
        except KeyError:  # unset, or deferred
            return None
        if not kinds <= _KEYS:  # an expression
            return None
    return Relation(field, target.attname, prefetcher)


def get_prefetch_querysets(
    along: Relation | None, prefetcher: Any, instances: Any, querysets: Any
) -> Any:
    """Django's; for plain keys, the rows and what it would tell of them."""
    if along is None:
        return prefetcher.get_prefetch_querysets(instances, querysets)
    if along.field is None:
        return _through(along, instances)
    if along.manager is None:
        return _ahead(along, prefetcher, instances)
    field, manager = along.field, along.manager
    of_instance = attrgetter(along.key)
    parents = {of_instance(obj): obj for obj in instances}
    queryset = manager._queryset_class(model=manager.model, hints={"instance": instances[0]})
    keys = list(parents)

    def narrow() -> Any:
        narrowed = queryset._chain()
        narrowed.query.add_q(Q(**{f"{field.name}__in": keys}), reuse_all=True)
        return narrowed

    rows = None
    if len(set(map(type, keys))) == 1:
        rows = by_keys(queryset, field.name, keys, narrow)
    if rows is None:
        rows = narrow()
    (source,) = field.local_related_fields
    name, attname = field.cache_name, source.attname
    of_row = attrgetter(attname)
    model = manager.model
    plain = type(getattr_static(model, attname, None)) in _COLUMNS
    plain = plain and {model}.issuperset(map(type, rows))
    groups: defaultdict[Any, list[Any]] = defaultdict(list)
    for part in _parts(rows, instances):
        for row in part:
            # By its attribute a foreign key's value costs a call.
            state = row.__dict__
            value = state[attname] if plain and attname in state else of_row(row)
            groups[value].append(row)
            cache = row._state.fields_cache
            if name not in cache:
                try:
                    cache[name] = parents[value]
                except KeyError as exc:
                    raise KeyError(exc.args) from None  # of a tuple, as from Django
    along.grouped = rows, groups
    return rows, of_row, of_instance, False, field.remote_field.cache_name, False


def _through(along: Relation, instances: Any) -> Any:
    """The same for a many-to-many relation."""
    manager, of_instance = along.manager, attrgetter(along.key)
    source = manager.source_field
    keys = list(dict.fromkeys(map(of_instance, instances)))
    kind = type(keys[0])
    rows = None
    if len(set(map(type, keys))) == 1 and is_djangos(source):
        rows = by_keys(
            manager._queryset_class(model=manager.model, hints={"instance": instances[0]}),
            (manager.through, manager.query_field_name),
            keys,
            lambda: manager.get_prefetch_querysets(instances)[0],
        )
    if rows is None:
        return manager.get_prefetch_querysets(instances)
    of_row = attrgetter(f"_prefetch_related_val_{source.attname}")
    if {kind}.issuperset(map(type, map(of_row, rows))):
        return rows, of_row, of_instance, False, manager.prefetch_cache_name, False
    # Keys of another type than the column's: Django has the field prepare both.
    return rows, *manager.get_prefetch_querysets(instances)[1:]


def _ahead(along: Relation, descriptor: Any, instances: Any) -> Any:
    """The same for a foreign key that leads forward."""
    field, of_instance = along.field, attrgetter(along.key)
    keys = list(dict.fromkeys(map(of_instance, instances)))
    wanted = [key for key in keys if key is not None]
    rows = None
    if wanted and len(set(map(type, wanted))) == 1:
        queryset = descriptor.get_queryset(instance=instances[0])
        rows = by_keys(
            queryset,
            (field, "ahead"),
            wanted,
            lambda: descriptor.get_prefetch_querysets(instances)[0],
        )
    if rows is None:
        return descriptor.get_prefetch_querysets(instances)
    (target,) = field.foreign_related_fields
    return rows, attrgetter(target.attname), of_instance, True, field.cache_name, False


def assign(along: Relation, instances: Any, fetched: Any) -> Any:
    """What Django does with the rows of a level; returns what its prefetch_one_level() does.

    None if that cannot be told from the first instance's queryset.
    """
    rows, of_row, of_instance, _, cache_name, _ = fetched
    if getattr(rows, "_prefetch_related_lookups", ()):
        return None
    if along.manager is None:
        return _assign_one(rows, of_row, of_instance, cache_name, instances)
    first = along.manager.get_queryset()
    new = _maker(along, first)
    if new is None:
        return None
    objs = list(rows)
    grouped, groups = along.grouped
    if grouped is not rows:
        groups = defaultdict(list)
        for part in _parts(objs, instances):
            for obj in part:
                groups[of_row(obj)].append(obj)
    if along.field is not None:  # the managers would ask which connection is read from
        if router.routers:  # that of the first one has asked
            for obj in list({id(obj): obj for obj in instances}.values())[1:]:
                connections[router.db_for_read(along.manager.model, instance=obj)]
        else:
            for alias in {obj._state.db for obj in instances}:
                connections[alias or DEFAULT_DB_ALIAS]
    key = along.key
    for part in _parts(instances, instances):
        for obj in part:
            found = groups.get(of_instance(obj))
            if found is None:
                found = []
            cache = obj._prefetched_objects_cache
            if cache_name in cache:  # an instance that is there twice
                queryset = cache[cache_name]
                queryset._result_cache = found
                queryset._prefetch_done = True
            else:
                cache[cache_name] = new(obj, getattr(obj, key), found)
    return objs, []


def _assign_one(
    rows: Iterable[Any],
    of_row: Callable[[Any], Any],
    of_instance: Callable[[Any], Any],
    cache_name: str,
    instances: list[Any],
) -> Any:
    objs = list(rows)
    found: dict[Any, Any] = {}
    for part in _parts(objs, instances):
        for obj in part:
            found.setdefault(of_row(obj), obj)
    for part in _parts(instances, instances):
        for obj in part:
            obj._state.fields_cache[cache_name] = found.get(of_instance(obj))
    return objs, []


def _parts(objs: list[Any], instances: list[Any]) -> Iterator[Any]:
    """Slices, between which other tasks may have a turn."""
    size = len(objs)
    if size <= _SLICE:
        yield objs
        return
    wrapper = native_wrapper(instances[0]._state.db or DEFAULT_DB_ALIAS)
    for start in range(0, size, _SLICE):
        yield objs[start : start + _SLICE]
        if wrapper is not None:
            give_turn(wrapper)


def _maker(along: Relation, first: Any) -> Callable[[Any, Any, list[Any]], Any] | None:
    """A function from an instance, its key and its rows to the queryset Django would give it."""
    field, key, manager = along.field, along.key, along.manager
    obj, state = manager.instance, dict(first.__dict__)
    hints, asked, known = (
        state.pop(name, None) for name in ("_hints", "_deferred_filter", "_known_related_objects")
    )
    query = state.pop("_query", None)
    mode = state.pop("_fetch_mode", None)  # since Django 6.1
    state.pop("_result_cache", None)
    if not (
        type(first) is manager._queryset_class
        and type(hints) is dict
        and [*hints] == ["instance"]
        and hints["instance"] is obj
        and type(asked) is tuple
        and asked[:2] == (False, ())
        and len(asked) == 3
        and len(asked[2]) == 1
        and mode is getattr(obj._state, "fetch_mode", None)
        and all(map(_is_shared, state.values()))
    ):
        return None
    ((name, value),) = asked[2].items()
    if field is not None:
        kept = [(k, v) for of in known.values() for k, v in of.items()]
        if value is not obj or [*known] != [field] or kept != [(getattr(obj, key), obj)]:
            return None
    elif known or value is not obj.__dict__[key]:
        return None
    copied = _copier(query)
    if copied is None:
        return None
    state["_prefetch_done"] = True
    names = {f"s{i}": shared for i, shared in enumerate(state.values())}
    lines = [f"new.{own} = {i}" for own, i in zip(state, names, strict=True)]
    lines += [f"new.{_MAKES} = makes, obj, key", "new._result_cache = found"]
    if mode is not None:
        lines.append("new._fetch_mode = obj._state.fetch_mode")

    def makes(obj: Any, key: Any) -> Any:
        yield "_query", copied()
        yield "_hints", {"instance": obj}
        yield "_deferred_filter", (False, (), {name: key if field is None else obj})
        yield "_known_related_objects", {} if field is None else {field: {key: obj}}

    names |= {"create": object.__new__, "cls": type(first), "makes": makes}
    code = "\n    ".join(["def new(obj, key, found):", "new = create(cls)", *lines, "return new"])
    exec(_compiled(code), names)
    return names["new"]  # type: ignore[no-any-return]


@functools.cache
def _compiled(code: str) -> Any:
    return compile(code, __name__, "exec")


def _is_shared(value: object) -> bool:
    """Whether copies may have the same object."""
    return value is None or value == () or isinstance(value, bool | type)


def _copier(query: Query) -> Callable[[], Any] | None:
    """A function that copies a query that nothing was done to yet."""
    settle(query)
    if type(query) is not Query or type(query.where) is not WhereNode or query.where.children:
        return None
    state = dict(query.__dict__)
    where = dict(state.pop("where").__dict__)
    del where["children"]
    own = []
    for name, value in state.items():
        if type(value) in (dict, set) and not value:
            own.append((name, type(value)))
        elif not _is_shared(value):
            return None
    create = object.__new__

    def copied() -> Any:
        new, node = create(Query), create(WhereNode)
        node.__dict__.update(where)
        node.__dict__["children"] = []
        attributes = new.__dict__
        attributes.update(state)
        for name, kind in own:
            attributes[name] = kind()
        attributes["where"] = node
        return new

    return copied


_MAKES = "_asyncorm_later"  # what makes the rest of a queryset, while nobody has asked for it
_LATER = ("_query", "_hints", "_deferred_filter", "_known_related_objects")


class _Later:
    """An attribute of the querysets made here: hardly anybody ever needs their queries.

    Each object that is not made is one that the garbage collector does not go through.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, queryset: Any, owner: Any = None) -> Any:
        if queryset is None:
            return self
        state = queryset.__dict__
        later = state.get(_MAKES)
        if later is not None:
            makes, obj, key = later
            for name, value in makes(obj, key):
                state.setdefault(name, value)
            state.pop(_MAKES, None)
        if self.name not in state:
            raise AttributeError(
                f"{type(queryset).__name__!r} object has no attribute {self.name!r}",
                name=self.name,
                obj=queryset,
            )
        return state[self.name]


def _completed(original: Callable[..., Any]) -> Any:
    """A method of QuerySet that goes through the attributes."""

    @functools.wraps(original)
    def method(self: Any, *args: Any) -> Any:
        if _MAKES in self.__dict__:
            self._hints  # noqa: B018
        return original(self, *args)

    return method


def install() -> None:
    """Let querysets do without a query and what goes with it until somebody asks, once."""
    if "_query" not in vars(QuerySet):
        why = "a related queryset makes its query when somebody asks for it"
        for name in _LATER:
            patches.replace(QuerySet, name, _Later(name), why)
        for name in ("__getstate__", "__deepcopy__"):
            patches.replace(QuerySet, name, _completed(getattr(QuerySet, name)), why)
