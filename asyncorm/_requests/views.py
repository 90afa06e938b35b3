"""Which synchronous views run natively: those that ASYNCORM["NATIVE_VIEWS"] or a decorator names.

A view is known by where its function or class is defined, seen through partials, decorators and
`as_view()`; a view of the admin by its AdminSite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from django.core.signals import setting_changed

from .. import conf
from .thread_locals import thread_local_of

V = TypeVar("V", bound=Callable[..., Any])

_MARK = "_asyncorm_native_view"
_decided: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def native_view(view: V) -> V:
    """Have a synchronous view, a function or a class, run natively under our handler.

    It may use the ORM, templates and forms as ever; what else blocks would block the loop. See
    "Requests" in the documentation. Subclasses of a class are not meant.
    """
    setattr(view, _MARK, True)
    return view


def is_native(view: Callable[..., Any]) -> bool:
    """Whether a view runs natively, or would if it were synchronous."""
    try:
        found = _decided.get(view)
        if found is None:
            found = _decided[view] = _decide(view)
    except TypeError:  # not hashable, or no weak references
        found = _decide(view)
    return found


def _decide(view: Callable[..., Any]) -> bool:
    layers = list(_layers(view))
    target = _target(layers[-1])
    if any(vars(each).get(_MARK) for each in (*layers, target) if hasattr(each, "__dict__")):
        return True
    names = conf.get("NATIVE_VIEWS")
    if names is True:
        return not any(map(thread_local_of, modules(view)))
    name = f"{target.__module__}.{target.__qualname__}"
    return any(name == each or name.startswith(f"{each}.") for each in names)


def modules(view: Callable[..., Any]) -> set[str]:
    """The modules of the project's code that a view is known to run."""
    layers = list(_layers(view))
    found = {_target(layers[-1]).__module__}
    for layer in layers:
        if (model_admin := getattr(layer, "model_admin", None)) is not None:
            found.add(type(model_admin).__module__)
    return found


def _layers(view: Callable[..., Any]) -> Any:
    """A view and what it wraps, down to the function or class that the project wrote."""
    seen = 0
    while view is not None and seen < 100:
        yield view
        seen += 1
        inner: Any = None
        for name in ("admin_site", "view_class", "cls", "func", "__wrapped__"):
            inner = getattr(view, name, None)
            if inner is not None:
                break
        view = inner


def _target(view: Callable[..., Any]) -> Any:
    owner = getattr(view, "__self__", None)
    if owner is not None:  # a method: of the object that it is called on
        view = getattr(owner, "admin_site", owner)
    if not isinstance(view, type) and not hasattr(view, "__qualname__"):
        view = view.__class__  # not type(): `admin.site` is a lazy object
    return view


def problem(name: str) -> str | None:
    """What is wrong with an entry of NATIVE_VIEWS, in words for the user."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:end]))
        except ModuleNotFoundError as exc:
            if exc.name is not None and not name.startswith(exc.name):
                return f"cannot be imported ({exc})"
            continue
        except (ImportError, ValueError) as exc:
            return f"cannot be imported ({exc})"
        try:
            functools.reduce(getattr, parts[end:], found)
        except AttributeError:
            return f"does not exist: {found.__name__} has no {'.'.join(parts[end:])}"
        return None
    return "does not exist"


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting == "ASYNCORM":
        _decided.clear()


setting_changed.connect(_forget, dispatch_uid="asyncorm.views")
