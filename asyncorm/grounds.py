"""What plans rest on: code that is Django's own, tables, columns and lookups as they were.

A plan leaves out what Django would do again for each query: it calls no `Query.build_filter()`, no
`SQLCompiler.as_sql()`, no `Model.from_db()`. That is right as long as what it leaves out is of
Django's own and would do the same as when the plan was made. So nothing is planned where somebody
else has put something in the place of a function of Django's, or has overridden one that the SQL or
the items depend on; and each time a plan is used, the classes that it rests on must have the
contents that they had. A mock, a hook of another package, a lookup registered later are honoured at
once, and no longer than they are there.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- The classes in `_CLASSES`, those of fields, models and lookups: their contents are looked at.
- `RegisterLookupMixin.class_lookups`, `.instance_lookups`: what `register_lookup()` fills;
  `.get_class_lookups()`: a `functools.cache` that it empties.
- `Options.db_table`, `.managed`, `.concrete_fields`, `.concrete_model`, `.all_parents`,
  `Field.column`: what SQL is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import import_module
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from types import FunctionType
from typing import Any

from django.core.exceptions import FieldDoesNotExist
from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.base.operations import BaseDatabaseOperations
from django.db.backends.postgresql import base, features, operations
from django.db.models import Field, Model, Q, expressions, fields, lookups, query
from django.db.models.base import ModelBase
from django.db.models.fields.reverse_related import (
    ForeignObjectRel,
    ManyToManyRel,
    ManyToOneRel,
    OneToOneRel,
)
from django.db.models.query_utils import RegisterLookupMixin
from django.db.models.sql import compiler, datastructures, subqueries, where
from django.db.models.sql import query as sql_query
from django.db.models.sql.datastructures import Join
from django.db.models.sql.query import Query
from django.utils.tree import Node

from ._cache.looks import ALL_MODELS, Family, Last, Seen, contents_of, look_at
from .expressions import NotCacheable, names_in

_OWNERS = {"django", "asyncorm", "builtins", "functools", "contextlib", "typing", "types", "abc"}
# What every plan rests on.
_CLASSES = (
    query.QuerySet, sql_query.Query, subqueries.UpdateQuery, subqueries.InsertQuery,
    subqueries.DeleteQuery, compiler.SQLCompiler, compiler.SQLInsertCompiler,
    compiler.SQLUpdateCompiler, compiler.SQLDeleteCompiler, compiler.SQLAggregateCompiler,
    where.WhereNode, Q, datastructures.BaseTable, Join, expressions.BaseExpression,
    expressions.Expression, expressions.Col, expressions.F, lookups.IsNull,
    operations.DatabaseOperations, query.ModelIterable, query.ValuesIterable,
    query.ValuesListIterable, query.NamedValuesListIterable, query.FlatValuesListIterable,
    query.RelatedPopulator, ForeignObjectRel, ManyToOneRel, ManyToManyRel, OneToOneRel,
)  # fmt: skip
# Names that Django looks for without having them in its base classes.
_ASKED_FOR = {
    "from_db_value", "get_placeholder", "get_placeholder_sql", "as_sql", "as_postgresql",
    "get_db_converters", "select_format", "__call__", "__getattribute__", "__getattr__",
}  # fmt: skip
# What a field class may override: its values are asked for each time, the rest makes no SQL.
_LOOKED_UP = {"get_lookup", "get_transform", "get_lookups", "get_class_lookups", "_get_lookup"}
_FREE = {
    "_get_default",
    "get_prep_value", "get_db_prep_value", "get_db_prep_save", "from_db_value", "to_python",
    "pre_save", "value_from_object", "value_to_string", "formfield", "deconstruct", "clone",
    "check", "validate", "run_validators", "clean", "validators", "contribute_to_class",
    "contribute_to_related_class", "set_attributes_from_name", "get_default", "has_default",
    "save_form_data", "get_choices", "get_internal_type", "descriptor_class", "attr_class",
    "db_type", "rel_db_type", "db_parameters", "db_check", "db_type_parameters", "rel_class",
    "description", "choices", "flatchoices", "error_messages", "get_limit_choices_to",
    "update_dimension_fields", "forward_related_accessor_class", "related_accessor_class",
}  # fmt: skip


def is_anothers(value: object) -> bool:
    """Whether an attribute of a class of Django's comes from somebody else."""
    if isinstance(value, FunctionType):
        inner = value.__dict__.get("__wrapped__")
        # functools.wraps() copies __module__, but not this.
        owner = value.__globals__.get("__name__", "")
    elif isinstance(value, type):
        return False
    else:
        found = (getattr(value, name, None) for name in _WITHIN)
        inner = next((each for each in found if isinstance(each, FunctionType)), None)
        owner = type(value).__module__
    return owner.partition(".")[0] not in _OWNERS or (inner is not None and is_anothers(inner))


_WITHIN = ("__func__", "__wrapped__", "fget", "func")
# Plans do not leave it out, or look at it (clones_as_django()); strawberry-django replaces it.
_BESIDE: dict[type, set[str]] = {query.QuerySet: {"_clone"}}
_looked_at: dict[type, tuple[Any, bool]] = {}


@functools.cache
def _names(cls: type) -> set[str]:
    """What Django's class has, as far as it was seen at first."""
    return {name for each in cls.__mro__ for name in vars(each)} - {"__class_getitem__"}


def is_djangos(cls: type) -> bool:
    """Whether nothing that a class of Django's does is somebody else's now."""
    known = _looked_at.get(cls)
    if known is None or contents_of(cls) != known[0]:
        names = (_names(cls) | _ASKED_FOR) - _BESIDE.get(cls, set())
        own = not any(name in names and is_anothers(value) for name, value in vars(cls).items())
        known = _looked_at[cls] = contents_of(cls), own
    return known[1]


def are_djangos(*classes: type) -> bool:
    """Whether each class, and what it inherits, is Django's as it was made."""
    return all(is_djangos(each) for cls in classes for each in cls.__mro__[:-1])


def inherits(cls: type, base: type, names: Collection[str]) -> bool:
    """Whether a class leaves these attributes to a base of its."""
    return all(map(is_, _named(cls, names), _named(base, names)))


def _named(cls: type, names: Collection[str]) -> Iterator[Any]:
    return map(getattr, repeat(cls), names, repeat(None))


def clones_as_django() -> bool:
    """Whether a queryset that is made of another is as Django makes it."""
    return is_djangos_function(query.QuerySet._clone)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def is_djangos_function(function: Callable[..., Any]) -> bool:
    """Whether a function of a class of Django's, or of one that it makes, is its own."""
    return not is_anothers(function)


_atomic = transaction.atomic if is_djangos_function(transaction.atomic) else None


def begins_as_django() -> bool:
    """Whether `transaction.atomic()` is Django's own, which is left out around one statement."""
    return transaction.atomic is _atomic


class _Changes:
    """How often one of the backend's dicts was changed: to be looked at as a class is."""

    number = 0


def _changing(original: Any) -> Any:
    @functools.wraps(original)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        _Changes.number += 1
        return original(self, *args, **kwargs)

    return change


# A dict as the backend's classes have them: changed in place, it is the same object.
_CHANGES = "__setitem__ __delitem__ __ior__ update clear pop popitem setdefault".split()
_Noted = type("_Noted", (dict,), {name: _changing(vars(dict)[name]) for name in _CHANGES})
# SQL depends on what they say: operators, types, flags.
_BACKEND = {*base.DatabaseWrapper.__mro__, *features.DatabaseFeatures.__mro__, _Changes} - {object}
_DICTS = (
    (base.DatabaseWrapper, ("operators", "pattern_ops", "data_types")),
    (operations.DatabaseOperations, ("cast_data_types", "integerfield_type_map")),
    (BaseDatabaseOperations, ("integer_field_ranges", "set_operators")),
)


def noted_dicts() -> Iterator[tuple[type, str, dict[Any, Any]]]:
    """What takes the place of the backend's dicts: class, name, and the same with changes noted."""
    for cls, names in _DICTS:
        for name in names:
            yield cls, name, _Noted(vars(cls)[name])


# Modules whose classes make SQL, and items of rows.
_MAKERS = """
    models.query models.lookups models.expressions models.aggregates models.functions models.fields
    models.fields.files models.fields.generated models.fields.json models.fields.mixins
    models.fields.related models.fields.related_lookups models.fields.reverse_related
    models.fields.tuple_lookups models.sql.compiler models.sql.datastructures models.sql.query
    models.sql.subqueries models.sql.where backends.postgresql.operations
    backends.postgresql.compiler backends.utils
""".split()
_ORM = {
    cls
    for name in _MAKERS
    for cls in vars(import_module(f"django.db.{name}")).values()
    if type(cls) in (type, fields.AutoFieldMeta)
    and cls.__module__.startswith("django.db.")
    and not issubclass(cls, BaseException | tuple | list | type)
    and "__slots__" not in vars(cls)
} | {Node, Q, *_BACKEND}
_FIELDS = {cls for cls in _ORM if issubclass(cls, Field)}  # each new field changes a counter there
_METAS: set[type] = {ModelBase}
_orm, _of_fields, _metas = Family(_ORM - _FIELDS), Family(_FIELDS), Family(_METAS)


@functools.cache
def _overridable(cls: Any) -> frozenset[str]:
    """Which attributes of a field itself would be in place of a method, or say how rows are read.

    The latter: JSON of a field without a decoder is read by a plan's own code.
    """
    return frozenset(
        _ASKED_FOR.union(
            {"decoder"}, (name for name in dir(cls) if callable(getattr(cls, name, None)))
        )
    )


class Ground:
    """What one plan rests on.

    Args:
        classes: whose contents matter.
        models: whose tables and columns, and whose instances' making, matter.
    """

    __slots__ = (
        "_columns", "_fields", "_kept", "_lookups", "_mocks", "_of_fields", "_of_metas",
        "_of_models", "_of_orm", "_options", "_others", "_registered", "_registries",
    )  # fmt: skip

    def __init__(self, classes: Iterable[type], models: Iterable[Any] = ()) -> None:
        options = list(dict.fromkeys(model._meta for model in models))
        concrete = list(dict.fromkeys(f for opts in options for f in opts.concrete_fields))
        all_of = dict.fromkeys([*classes, *map(type, concrete), *models, *map(type, models)])
        parts = {part for cls in all_of for part in cls.__mro__} - {object, type, Last}
        self._of_orm = Seen(_orm, parts & _ORM - _FIELDS)
        self._of_fields = Seen(_of_fields, parts & _FIELDS)
        self._of_metas = Seen(_metas, parts & _METAS)
        others = parts - _ORM - _METAS
        bases = {base for cls in others for base in cls.__mro__[1:]}
        self._of_models = [
            Seen(look, others.intersection(cls.__mro__))
            for cls in others - bases
            if issubclass(cls, Last) and (look := look_at(cls)) is not None
        ]
        others = others.difference(*(seen.classes for seen in self._of_models))
        if Model in others:
            self._of_models.append(Seen(ALL_MODELS, [Model]))
        self._lookups = registered_lookups()
        registries = [vars(cls).get("class_lookups") for cls in parts]
        self._registries = [each.values() for each in registries if each is not None]
        self._registered = [*map(list, self._registries)]
        fields = [vars(field) for field in concrete]
        # A mock on a field itself makes it larger; then it has to be the same one.
        self._fields = fields
        self._columns = [*map(len, fields), *map(_COLUMN, fields)]
        self._mocks = [
            (own, name, own[name])
            for own, cls in zip(fields, map(type, concrete), strict=True)
            for name in own.keys() & _overridable(cls)
        ]
        self._options = [(each, _TABLE(each)) for each in options]
        self._others = [vars(cls).values() for cls in others - {Model}]
        instances = [field.get("instance_lookups") for field in fields]
        self._others += [each.values() for each in instances if each is not None]
        self._kept = [*map(list, self._others)]

    def holds(self) -> bool:
        """Whether all is as it was, as far as that can be seen."""
        # For each use of a plan: without the calls that a change needs.
        try:
            _orm.cls.unchanged, _of_fields.cls.unchanged, _metas.cls.unchanged  # noqa: B018
            for seen in self._of_models:
                seen.look.find(seen.look.cls)
        except AttributeError:  # see `Name`
            return False
        if not (
            (self._of_orm.number == _orm.name.looks or self._of_orm.holds())
            and (self._of_fields.number == _of_fields.name.looks or self._of_fields.holds())
            and (self._of_metas.number == _metas.name.looks or self._of_metas.holds())
            and (self._lookups is registered_lookups() or self._has_lookups())
        ):
            return False
        for seen in self._of_models:
            if seen.number != seen.look.name.looks and not seen.holds():
                return False
        fields = self._fields
        if [*map(len, fields), *map(_COLUMN, fields)] != self._columns:
            return False
        for own, name, value in self._mocks:
            if own.get(name) is not value:
                return False
        for each, kept in self._options:
            if _TABLE(each) != kept:
                return False
        return not self._others or [*map(list, self._others)] == self._kept

    def _has_lookups(self) -> bool:
        """Whether the lookups that were registered or taken out are of no concern here."""
        lookups = registered_lookups()
        if [*map(list, self._registries)] != self._registered:
            return False
        self._lookups = lookups
        return True


# Gives another object whenever a lookup was registered or taken out, of whichever class: Django
# makes other dicts of all lookups then.
registered_lookups: Callable[[], Any] = functools.partial(
    vars(RegisterLookupMixin)["get_class_lookups"].__func__, Field
)
_TABLE = attrgetter("db_table", "concrete_fields", "managed", "concrete_model", "proxy")
_COLUMN = itemgetter("column")


class Classes:
    """Classes of lookups and fields, with all that they inherit, as they were."""

    __slots__ = ("_kept", "_others", "_seen")

    def __init__(self, classes: Iterable[type]) -> None:
        parts = {part for cls in classes for part in cls.__mro__[:-1]}
        self._seen = Seen(_orm, parts & _ORM - _FIELDS), Seen(_of_fields, parts & _FIELDS)
        self._others = [vars(cls).values() for cls in parts - _ORM]
        self._kept = [*map(list, self._others)]

    def are_as_they_were(self) -> bool:
        try:
            _orm.cls.unchanged, _of_fields.cls.unchanged  # noqa: B018
        except AttributeError:  # see `Name`
            return False
        for seen in self._seen:
            if seen.number != seen.look.name.looks and not seen.holds():
                return False
        return [*map(list, self._others)] == self._kept


_base = Seen(_orm, set(_CLASSES))
_sound = all(map(is_djangos, _CLASSES))


def are_sound() -> bool:
    """Whether what every plan rests on is Django's own."""
    global _base, _sound
    try:
        _orm.cls.unchanged  # noqa: B018
    except AttributeError:  # see `Name`
        return False
    if _base.number != _orm.name.looks and not _base.holds():
        _base = Seen(_orm, set(_CLASSES))
        _sound = all(map(is_djangos, _CLASSES))
    return _sound


def of_query(
    asked: Query,
    kept: Iterable[Any],
    maker: Any,
    wrapper: BaseDatabaseWrapper,
    compared: Iterable[type],
    *more: type,
    short: bool = False,
) -> Ground:
    """What the plan of a compiled query rests on.

    Args:
        kept: objects that its key tells by their identity: fields, and tuples of them.
        compared: the classes of its lookups.
        more: other classes.
        short: whether the lookups themselves are looked up no more.

    Raises:
        NotCacheable: something of it is not Django's.
    """
    compared, ops = tuple(compared), type(wrapper.ops)
    told = {f for each in kept for f in (each if isinstance(each, tuple) else (each,))}
    joins: set[Any] = {join.join_field for join in asked.alias_map.values() if type(join) is Join}
    of_relations = {getattr(f, "field", f) for f in told | joins}
    models: set[Any] = {getattr(f, "model", None) for f in told | joins}  # an output field has none
    models |= {f.related_model for f in joins}
    models |= {asked.model, *_ordered_by(asked), *(maker.models if maker is not None else ())}
    models.discard(None)
    models |= {parent for model in models for parent in model._meta.all_parents}
    made = type(asked.get_compiler(connection=wrapper))
    columns = {f for model in models for f in model._meta.concrete_fields}
    if not (
        are_djangos(made, ops, *compared)
        and all(speaks_for_itself(f, short) for f in of_relations | columns)
    ):
        raise NotCacheable
    return Ground([made, ops, *_BACKEND, *compared, *map(type, of_relations), *more], models)


def _ordered_by(asked: Any) -> Iterator[Any]:
    """The models of the columns that a query is ordered by, those of relations, too."""
    items = [(asked.model, each) for each in asked.order_by or asked.get_meta().ordering or ()]
    seen = set()
    while items:
        model, item = items.pop()
        for name in names_in(item):
            end = model
            for step in name.removeprefix("-").split("__"):
                try:
                    end = end._meta.get_field(step).related_model
                except FieldDoesNotExist:  # pk, an annotation
                    break
                if end is None:
                    break
                yield end
            else:
                if end not in seen:
                    seen.add(end)
                    items += [(end, each) for each in end._meta.ordering or ()]


def speaks_for_itself(field: Field[Any, Any], short: bool = False) -> bool:
    """Whether the SQL that a field makes depends on nothing but its class and its state."""
    cls = type(field)
    return not (
        # A method that was put on the field itself.
        any(
            isinstance(of_class(cls, name), FunctionType)
            for each in cls.__mro__
            for name in vars(field).keys() & vars(each).keys()
        )
        or not is_as_made(cls)
        or _overrides(cls, short)
    )


def of_class(cls: type, name: str) -> Any:
    """An attribute of a class as it stands there: no descriptor is asked. None if there is none."""
    return next((found[name] for each in cls.__mro__ if name in (found := vars(each))), None)


def is_as_made(cls: type) -> bool:
    """Whether what a class has of Django's is as Django made it."""
    return all(map(is_djangos, filter(_is_made_by_django, cls.__mro__[:-1])))


def _is_made_by_django(cls: type) -> bool:
    return cls.__module__.startswith("django.")


def _overrides(cls: type, short: bool) -> bool:
    """Whether a field class of somebody else's overrides what SQL is made of."""
    others = [each for each in cls.__mro__[:-1] if not _is_made_by_django(each)]
    if not others:
        return False
    base = next(filter(_is_made_by_django, cls.__mro__), Field)
    bound = {name for name in _names(base) if not name.startswith(("__", "_check"))} | _ASKED_FOR
    bound -= _FREE if short else _FREE | _LOOKED_UP
    return any(
        name in bound and (callable(value) or hasattr(value, "__get__"))
        for each in others
        for name, value in vars(each).items()
    )
