"""The ASYNCORM setting: defaults, access and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import TIMEOUT_MAX
from typing import Any, TypeAlias

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from . import internals
from .pages import see

DEFAULTS: dict[str, Any] = {
    # Make every a* method of the project's querysets, managers and models native.
    "SWAP_MANAGERS": False,
    # Seconds a statement waits for the lock of its transaction block while nothing happens on the
    # connection.
    "LOCK_TIMEOUT": 30.0,
    # Reset each connection on the server (DISCARD ALL) whenever it is given back.
    "RESET_ALWAYS": False,
    # Seconds after which a loop is taken to live on, and its pools are filled to min_size.
    "FILL_DELAY": 1.0,
    # Seconds of waiting for a connection after which a warning names who holds them; None: never.
    "SLOW_CHECKOUT": 5.0,
    # When all connections are in use, send statements of several operations together.
    "MULTIPLEXING": True,
    # The most connections of a pool that are used at once; None: its size.
    "PARALLELISM": None,
    # Keep the SQL that querysets of one shape are compiled to, for other values. "verify": compare
    # each statement from there with what Django's compiler makes of the queryset.
    "STATEMENT_CACHE": True,
    # The most shapes that this is known of.
    "STATEMENT_CACHE_SIZE": 4096,
    # On an event loop record what is done to querysets; their queries are made if they are needed.
    "RECORD_QUERYSETS": True,
    # Outside a block, execute a SELECT that Django made again on another connection if its own was
    # lost before the answer came.
    "RETRY_READS": True,
    # Run the queries of independent lookups of prefetch_related() at once.
    "PARALLEL_PREFETCH": True,
    # bulk_create() reserves keys, since rows may come back in another order (Citus). None: where
    # the server is not plain PostgreSQL, which is asked once.
    "DISTRIBUTED": None,
    # Where asyncorm.replicas keeps what a client has written: a signed "cookie", or the "session".
    "REPLICA_POSITION": "cookie",
    # Requests (asyncorm.asgi.get_asgi_application()): other people's middleware that runs on the
    # loop, by dotted name, or "__all__"; the same of synchronous views, by name or prefix, or True.
    "NATIVE_MIDDLEWARE": [],
    "NATIVE_VIEWS": [],
    # A client that goes away cancels native synchronous code, too.
    "CANCEL_NATIVE_VIEWS": False,
    # Django's AsyncClient goes through our handler; None: if ASGI_APPLICATION does.
    "NATIVE_HANDLER": None,
    # Seconds that one step may keep the loop busy before a warning names it; None: 0.1 with DEBUG.
    "SLOW_STEP": None,
}


def is_switch(value: object) -> bool:
    """Whether it is True or False."""
    return isinstance(value, bool)


def is_seconds(value: object) -> bool:
    """Whether it is a positive number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_finite(value: object) -> bool:
    return is_seconds(value) and value <= TIMEOUT_MAX  # type: ignore[operator]


def is_count(value: object) -> bool:
    """Whether it is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_no_other(value: object) -> bool:
    return False


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


# What a value must be: in words, how to tell, and what else it may be.
MustBe: TypeAlias = tuple[str, Callable[[object], bool], tuple[object, ...]]
SECONDS: MustBe = ("a positive number of seconds", is_seconds, ())
FINITE: MustBe = (f"{SECONDS[0]}, and finite", _is_finite, ())  # a thread waits for so long
_SWITCH: MustBe = ("True or False", is_switch, ())
_MUST_BE: dict[str, MustBe] = {
    **dict.fromkeys(DEFAULTS, _SWITCH),
    "STATEMENT_CACHE": ('True, False or "verify"', is_switch, ("verify",)),
    "LOCK_TIMEOUT": SECONDS,
    "FILL_DELAY": FINITE,
    "SLOW_CHECKOUT": (f"{SECONDS[0]}, or None", is_seconds, (None,)),
    "SLOW_STEP": (f"{FINITE[0]}, None, or False (never)", _is_finite, (None, False)),
    "PARALLELISM": ("a positive number of connections, or None", is_count, (None,)),
    "STATEMENT_CACHE_SIZE": ("a positive number of statements", is_count, ()),
    "NATIVE_MIDDLEWARE": ("a list of dotted names, or '__all__'", _is_names, ("__all__",)),
    "NATIVE_VIEWS": ("a list of dotted names, or True", _is_names, (True,)),
    "NATIVE_HANDLER": ("True, False or None", is_switch, (None,)),
    "DISTRIBUTED": ("True, False or None", is_switch, (None,)),
    "REPLICA_POSITION": ('"cookie" or "session"', _is_no_other, ("cookie", "session")),
}


def misfits(place: str, values: dict[Any, Any], must_be: dict[str, MustBe]) -> Iterator[str]:
    """What is wrong with a dict in the settings, in words for the user.

    Args:
        place: where it stands, `DATABASES['default']['OPTIONS']['pool']`.
        must_be: its keys.
    """
    for key, value in values.items():
        if key not in must_be:
            yield f"{place} has an unknown key {key!r}; the keys are {', '.join(must_be)}."
            continue
        words, fits, others = must_be[key]
        # 1 is not True here, and 0 not False.
        if not fits(value) and (type(value), value) not in [(type(each), each) for each in others]:
            text = " (what comes from the environment is text)" if isinstance(value, str) else ""
            yield f"{place}[{key!r}] must be {words}, not {value!r}{text}."


_values: dict[str, Any] | None = None


def get(name: str) -> Any:
    """The value of one key of the ASYNCORM setting, or its default."""
    global _values
    values = _values
    if values is None:  # Django searches for a setting that is not there each time
        values = {**DEFAULTS, **(getattr(django_settings, "ASYNCORM", None) or {})}
        values.update(dict.fromkeys(internals.lost(), False))
        _values = values
    return values[name]


def _forget(*, setting: str, **kwargs: Any) -> None:
    global _values
    if setting == "ASYNCORM":
        _values = None


# Connected before all others, which read the setting anew.
setting_changed.connect(_forget, dispatch_uid="asyncorm.conf")


def problems() -> list[str]:
    """What is wrong with the ASYNCORM setting, or the shape of DATABASES, in words for the user."""
    value = getattr(django_settings, "ASYNCORM", None)
    wrong = [
        f"DATABASES[{alias!r}]['OPTIONS'] must be a dict, not {database['OPTIONS']!r}."
        for alias, database in getattr(django_settings, "DATABASES", {}).items()
        if str(database.get("ENGINE")).startswith("asyncorm.")
        and not isinstance(database.get("OPTIONS", {}), dict)
    ]
    if value is None:
        return wrong
    if not isinstance(value, dict):
        return [*wrong, f"ASYNCORM must be a dict, not {type(value).__name__}."]
    return [*wrong, *misfits("ASYNCORM", value, _MUST_BE)]


def validate() -> None:
    """Raise ImproperlyConfigured when the ASYNCORM setting cannot be used."""
    if found := problems():
        raise ImproperlyConfigured(" ".join(found) + see("settings#asyncorm"))
