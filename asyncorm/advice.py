"""What a SynchronousOnlyOperation advises: what to write instead.

`SynchronousOnlyOperation` is raised deep inside Django, far from the attribute that was read. Its
advice comes from the frames between Django's query and the code that caused it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import FrameType
from typing import Any

import django
from django.db.models import Model, QuerySet
from django.db.models.manager import BaseManager
from django.db.models.query import RawQuerySet

from .pages import see

_OURS = os.path.dirname(__file__), os.path.dirname(django.__file__)
_ITERATING = {"__iter__", "__len__", "__bool__", "__getitem__", "__contains__", "__repr__"}


def synchronous_only(frame: FrameType | None, otherwise: str = "") -> str:
    """The message of a SynchronousOnlyOperation: Django's, and what to write in its place.

    Args:
        frame: the one that would have used the connection.
        otherwise: the advice if the frames tell nothing.
    """
    advice = ""
    for method, me, variables in _of_django(frame):  # the outermost one is what was written
        advice = _about(method, me, variables) or advice
    return (
        "You cannot call this from an async context - use a thread or sync_to_async. "
        + (advice or otherwise or "SQL is executed by 'async with asyncorm.cursor()'.")
        + " Or have the synchronous code run natively: 'await asyncorm.native(function)(...)'."
        + see("debugging#it-raises")
    )


def _of_django(frame: FrameType | None) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The methods that run in code of Django's and ours, from the inside to the outside."""
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        if "self" in (variables := frame.f_locals):
            yield frame.f_code.co_name, variables["self"], variables
        frame = frame.f_back


def _about(method: str, me: Any, variables: dict[str, Any]) -> str:
    if method == "__get__" and issubclass(type(variables.get("instance")), Model):
        return _of_attribute(me, variables["instance"])
    kind = type(me)  # isinstance() would ask a lazy object, which would ask the database
    if issubclass(kind, QuerySet | RawQuerySet) and method in _ITERATING:
        return (
            f"Iterate this queryset of {me.model.__name__} by 'async for', or take its rows by "
            "'await queryset.anative()'."
        )
    if issubclass(kind, QuerySet | BaseManager | Model):
        cls = kind if issubclass(kind, Model) else me.model
        if method in ("iterator", "_iterator"):
            return f"Iterate {cls.__name__} by 'async for' over 'native_iterator()'."
        if hasattr(me, f"a{method}"):
            return f"Write 'await ....a{method}(...)' for {cls.__name__}'s {method}()."
    return ""


def _of_attribute(descriptor: Any, instance: Model) -> str:
    field = getattr(descriptor, "field", descriptor)  # before Django 6.1 a generic key is both
    if (related := getattr(descriptor, "related", None)) is not None:
        name, load = related.get_accessor_name(), "select_related"
    else:
        name, load = field.name, "select_related"
        if not field.is_relation or name in instance.get_deferred_fields():
            load = ""
        elif getattr(field, "remote_field", None) is None:  # a generic key
            load = "prefetch_related"
    cls = type(instance).__name__
    if not load:
        return (
            f"{cls}.{name} was deferred and is read from the database now: load it with the "
            f"others, or by 'await instance.arefresh_from_db(fields=[{name!r}])'."
        )
    return f"{cls}.{name} is read from the database now: load it beforehand by {load}({name!r})."
