"""What a native pool is asked for in DATABASES: what it must be, and its sizes resolved."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import iscoroutinefunction
from typing import Any

from django.core.checks import Error
from django.core.exceptions import ImproperlyConfigured

from ..conf import FINITE, SECONDS, MustBe, is_count, is_switch, misfits
from ..pages import see

# Options of Django's own "pool" key that this pool sets itself.
_IGNORED = ("close_returns", "connection_class", "reconnect_timeout")
_DEFAULTS = {"min_size": 4, "timeout": 30.0}  # psycopg_pool's own
_MAX_SIZE = 10  # without a "pool" key


def _is_whole(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    return is_count(value) or (_is_whole(value) and value == 0)


def _is_function(value: object) -> bool:
    return callable(value) and not iscoroutinefunction(value)


def _is_age(value: object) -> bool:
    return isinstance(value, int | float)  # Django takes what is negative for 0


_FUNCTION: MustBe = (
    "a function that is not asynchronous (it gets a synchronous connection), or None",
    _is_function,
    (None,),
)
_MUST_BE: dict[str, MustBe] = {
    "min_size": ("a number of connections", _is_whole, ()),
    "max_size": ("a number of connections, or None for min_size", _is_whole, (None,)),
    "timeout": FINITE,
    "max_waiting": ("a number of tasks, 0 for no limit", _is_number, ()),
    "max_lifetime": SECONDS,
    "max_idle": FINITE,
    "num_workers": ("a positive number", is_count, ()),
    "name": ("text, or None", lambda value: isinstance(value, str), (None,)),
    "check": _FUNCTION,
    "configure": _FUNCTION,
    "reset": _FUNCTION,
    "reconnect_failed": _FUNCTION,
    "reconnect_timeout": FINITE,
    "close_returns": ("True or False", is_switch, ()),
    "connection_class": ("a class", lambda value: isinstance(value, type), ()),
}
_AGE: dict[str, MustBe] = {"CONN_MAX_AGE": ("a number of seconds, or None", _is_age, (None,))}


def problems(alias: str, database: dict[str, Any]) -> Iterator[Error]:
    """What is wrong with an alias's pool, for `check` and for the first use."""
    name = f"DATABASES[{alias!r}]"
    age = {"CONN_MAX_AGE": database["CONN_MAX_AGE"]}
    for text in misfits(name, age, _AGE):
        yield Error(text, id="asyncorm.E007")
    name += "['OPTIONS']['pool']"
    option = database["OPTIONS"].get("pool")
    if not option or option is True:
        return
    if not isinstance(option, dict):
        yield Error(f"{name} must be True or a dict, not {option!r}.", id="asyncorm.E003")
        return
    wrong = list(misfits(name, option, _MUST_BE))
    for text in wrong:
        advice = "What psycopg connects with stands beside 'pool' in OPTIONS."
        hint = advice if "unknown key" in text else None
        yield Error(text, hint=hint, id="asyncorm.E007")
    sizes = _resolved(option)
    least, most = sizes["min_size"], sizes["max_size"]
    if not wrong and (not 0 <= least <= most or most < 1):
        yield Error(
            f"{name} has min_size {least} and max_size {most}.",
            hint="min_size must not be negative nor above max_size; max_size must be at least 1. "
            "What is not said is 4, and min_size.",
            id="asyncorm.E004",
        )


def _resolved(option: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {**_DEFAULTS, **option}
    if options.get("max_size") is None:
        options["max_size"] = options["min_size"]
    for name in _IGNORED:
        options.pop(name, None)
    return options


def validate(alias: str, database: dict[str, Any]) -> None:
    """Raise ImproperlyConfigured when an alias has a pool that cannot be made."""
    if found := list(problems(alias, database)):
        words = (" ".join(filter(None, (each.msg, each.hint))) for each in found)
        raise ImproperlyConfigured(" ".join(words) + see("deployment#pools"))


def pool_options(alias: str, database: dict[str, Any]) -> dict[str, Any]:
    """Native pool options of an alias, from Django's OPTIONS["pool"]; sizes resolved.

    Raises:
        ImproperlyConfigured: they are wrong.
    """
    validate(alias, database)
    option = database["OPTIONS"].get("pool")
    if not option:
        return {"min_size": 0, "max_size": _MAX_SIZE, "timeout": _DEFAULTS["timeout"]}
    return _resolved({} if option is True else option)
