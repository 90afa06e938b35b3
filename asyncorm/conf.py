"""The ASYNCORM setting: defaults, access and validation."""

from __future__ import annotations

from typing import Any

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


_SWITCHES = [key for key, value in DEFAULTS.items() if isinstance(value, bool)]
_WORDS = {"STATEMENT_CACHE": "verify"}  # what a switch may be beside True and False


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
    """What is wrong with the ASYNCORM setting, in words for the user."""
    value = getattr(django_settings, "ASYNCORM", None)
    if value is None:
        return []
    if not isinstance(value, dict):
        return [f"ASYNCORM must be a dict, not {type(value).__name__}."]
    found = [
        f"ASYNCORM has an unknown key {key!r}; the keys are {', '.join(DEFAULTS)}."
        for key in value
        if key not in DEFAULTS
    ]
    for key in _SWITCHES:
        word, switch = _WORDS.get(key), value.get(key, False)
        if not isinstance(switch, bool) and (word is None or switch != word):
            choices = f'True, False or "{word}"' if word else "True or False"
            found.append(f'ASYNCORM["{key}"] must be {choices}.')
    for key in ("LOCK_TIMEOUT", "FILL_DELAY"):
        seconds = value.get(key, DEFAULTS[key])
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
            found.append(f'ASYNCORM["{key}"] must be a positive number of seconds.')
    seconds = value.get("SLOW_CHECKOUT")
    if seconds is not None and (
        isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0
    ):
        found.append('ASYNCORM["SLOW_CHECKOUT"] must be a positive number of seconds, or None.')
    for key, what, unset in (
        ("PARALLELISM", "connections, or None", None),
        ("STATEMENT_CACHE_SIZE", "statements", 1),
    ):
        most = value.get(key, unset)
        if most is not unset and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            found.append(f'ASYNCORM["{key}"] must be a positive number of {what}.')
    for key, everything in (("NATIVE_MIDDLEWARE", "__all__"), ("NATIVE_VIEWS", True)):
        names = value.get(key, [])
        if names != everything and not (
            isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        ):
            found.append(f'ASYNCORM["{key}"] must be a list of dotted names, or {everything!r}.')
    for key in ("NATIVE_HANDLER", "DISTRIBUTED"):
        if value.get(key) not in (None, True, False):
            found.append(f'ASYNCORM["{key}"] must be True, False or None.')
    if value.get("REPLICA_POSITION", "cookie") not in ("cookie", "session"):
        found.append('ASYNCORM["REPLICA_POSITION"] must be "cookie" or "session".')
    seconds = value.get("SLOW_STEP")
    if seconds not in (None, False) and (
        isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0
    ):
        found.append(
            'ASYNCORM["SLOW_STEP"] must be a positive number of seconds, None, or False (never).'
        )
    return found


def validate() -> None:
    """Raise ImproperlyConfigured when the ASYNCORM setting cannot be used."""
    if found := problems():
        raise ImproperlyConfigured(" ".join(found) + see("settings#asyncorm"))
