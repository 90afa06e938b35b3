"""`get_or_create()` outside a block: no transaction around what is one INSERT.

Django has a savepoint there, so that a failed INSERT does not abort a transaction around it; with
none around, that is BEGIN and COMMIT. An INSERT is undone by itself when it fails. So it is sent
alone where nothing else can happen inside: no receivers of signals, no parents, no methods, fields
or defaults that others have made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from enum import EnumMeta
from operator import itemgetter
from types import FunctionType
from typing import Any, NamedTuple

import django
from django.db import IntegrityError, models, transaction
from django.db.models import NOT_PROVIDED, Field, Manager, Model, QuerySet
from django.db.models.base import ModelBase, ModelState
from django.db.models.signals import post_init, post_save, pre_init, pre_save
from django.db.models.utils import resolve_callables
from greenlet import getcurrent

from ..bridge import Runner
from ..columnar import PRE_SAVES, row_getter
from ..grounds import Ground, begins_as_django, is_anothers
from ..rows import is_heard, is_plain
from ..shapes import NotCacheable
from ..statements import UNPLANNED, learn, recall
from .get import PLAIN_VALUES
from .switch import native_wrapper

_SIGNALS = (pre_init, post_init, pre_save, post_save)
_VALUES = PLAIN_VALUES | {type(None), bool, bytes, dict, list}
# Methods of a model that `create()` does not call.
_UNCALLED = {
    "__str__", "__repr__", "__eq__", "__hash__", "__reduce__", "__getstate__", "__setstate__",
    "check", "clean", "clean_fields", "full_clean", "validate_unique",
    "validate_constraints", "unique_error_message", "date_error_message", "get_constraints",
    "delete", "adelete", "refresh_from_db", "arefresh_from_db", "asave", "from_db",
    "serializable_value", "prepare_database_save",
}  # fmt: skip
CALLED = {
    name for name, value in vars(models.Model).items() if isinstance(value, FunctionType | property)
} - _UNCALLED | {"__new__", "__setattr__", "__getattribute__", "__getattr__"}  # fmt: skip
_METHODS = sorted(CALLED & vars(models.Model).keys() - {"_do_insert", "_do_update"})
_methods = itemgetter(*_METHODS)
_DJANGOS = _methods(vars(models.Model))
_IS_KNOWN = django.VERSION < (6, 2)  # what these do between `save()` and the statement
# Where callables come from that do nothing but make a value.
_MODULES = {"builtins", "datetime", "decimal", "uuid", "random", "secrets", "django.utils.timezone"}


def get_or_create(original: Callable[..., Any]) -> Any:
    """`QuerySet.get_or_create()`."""

    @functools.wraps(original)
    def get_or_create(self: Any, defaults: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if type(getcurrent()) is not Runner:
            return original(self, defaults, **kwargs)
        self._for_write = True
        try:
            return self.get(**kwargs), False
        except self.model.DoesNotExist:
            params = self._extract_model_params(defaults, **kwargs)
            try:
                using = self.db
                if _is_outside(using) and inserts_alone(self, params):
                    return self.create(**params), True
                with transaction.atomic(using=using):
                    params = dict(resolve_callables(params))
                    return self.create(**params), True
            except IntegrityError:
                try:
                    return self.get(**kwargs), False
                except self.model.DoesNotExist:
                    pass
                raise

    return get_or_create


def _is_outside(using: str) -> bool:
    """Whether no transaction is open, and nobody wants to see each statement, BEGIN too."""
    wrapper = native_wrapper(using)
    return wrapper is not None and not (
        wrapper.in_atomic_block
        or wrapper.session.root is not None
        or (wrapper.connection is not None and not wrapper.autocommit)
        or wrapper.watched
        or not begins_as_django()
    )


class Plain(NamedTuple):
    """A model whose instances nobody's code but Django's makes and saves, by one statement each.

    Attributes:
        names: of its fields.
        attributes: which an instance is made of as it is loaded, by name; None: Django makes it.
        relates: whether one is a relation.
        key: the primary key.
        fields: what is inserted; None, as the others, where it is not known what Django does.
        keyless: the same where the database makes the key; None where it does not.
        others: what is updated.
        values: gives the values of these.
        returned: what an INSERT returns.
    """

    names: frozenset[str]
    attributes: dict[str, Any] | None
    relates: bool
    key: Any
    fields: tuple[Any, ...] | None
    keyless: tuple[Any, ...] | None
    others: tuple[Any, ...] | None
    values: Any
    returned: tuple[Any, ...]


def inserts_alone(queryset: QuerySet[Any], params: dict[str, Any]) -> Plain | None:
    """The model if `create()` there is one INSERT, and nobody else's code runs around it."""
    if (
        type(queryset).create is QuerySet.create
        and (plain := saved_plainly(queryset.model)) is not None
        and plain.names.issuperset(params)
        and (_VALUES.issuperset(map(type, params.values())) or all(map(_is_plain, params.values())))
    ):
        return plain
    return None


def made(model: Any, plain: Plain, params: dict[str, Any]) -> Any:
    """What `model(**params)` gives, for parameters that were looked at (`inserts_alone()`)."""
    attributes = plain.attributes
    if attributes is None or not attributes.keys() >= params.keys():
        return model(**params)
    obj = object.__new__(model)
    state = obj.__dict__
    state["_state"] = ModelState()
    for name, field in attributes.items():
        value = params[name] if name in params else field.get_default()
        if field.is_relation:  # it looks into the cache of what is related
            setattr(obj, name, value)
        else:
            state[name] = value
    return obj


def saved_plainly(model: type[Model]) -> Plain | None:
    """A model if it is a plain one."""
    if _methods(vars(models.Model)) != _DJANGOS or is_heard(_SIGNALS, (model,)):
        return None
    key = QuerySet.get_or_create, model
    known = recall(key)
    if known is UNPLANNED:
        known = learn(key, model, functools.partial(_looked_at, model))
    return known  # type: ignore[no-any-return]


def _looked_at(model: Any) -> tuple[Plain, Ground]:
    opts = model._meta
    fields = opts.concrete_fields
    own = model.__mro__[: model.__mro__.index(models.Model)]
    if (
        type(model) is not ModelBase
        or opts.all_parents
        or opts.order_with_respect_to
        or type(opts.base_manager) is not Manager
        or any(map(is_anothers, _DJANGOS))
        or any(not CALLED.isdisjoint(vars(cls)) for cls in own)
        or not all(map(_is_djangos, fields))
    ):
        raise NotCacheable
    key, others = opts.pk, tuple(field for field in fields if field not in opts.pk_fields)
    plain = Plain(
        names=frozenset(name for field in fields for name in (field.name, field.attname)),
        attributes=None,
        relates=any(field.is_relation for field in (*fields, *opts.private_fields)),
        key=key,
        fields=None,
        keyless=None,
        others=None,
        values=None,
        returned=tuple(opts.db_returning_fields),
    )
    if _IS_KNOWN and not any(field.generated for field in fields):
        by_server = key is opts.auto_field and not (key.has_default() or key.has_db_default())
        as_loaded = is_plain(opts.model) and list(opts.fields) == list(fields)
        plain = plain._replace(
            attributes={field.attname: field for field in fields} if as_loaded else None,
            fields=tuple(fields),
            keyless=others if by_server else None,
            others=others or None,
            values=row_getter(others, add=False) if others else None,
        )
    return plain, Ground((), [model])


def _is_djangos(field: Field[Any, Any]) -> bool:
    """Whether a field does nothing but give its value, or a default that does nothing else."""
    default = field.default
    return (
        type(field).__module__.startswith("django.")
        and type(field).pre_save in PRE_SAVES
        and not vars(field).keys() & {"pre_save", "get_db_prep_save", "get_default"}
        and (
            default is NOT_PROVIDED
            or not callable(default)
            or getattr(default, "__module__", "") in _MODULES
        )
    )


def _is_plain(value: object) -> bool:
    cls = type(value)
    return cls in _VALUES or (isinstance(cls, ModelBase | EnumMeta) and not callable(value))
