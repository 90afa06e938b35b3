"""What a native pool is asked for in DATABASES, its sizes resolved."""

from __future__ import annotations

from typing import Any

# Options of Django's own "pool" key that this pool sets itself.
_IGNORED = ("open", "close_returns", "connection_class", "kwargs", "reconnect_timeout")
_DEFAULTS = {"min_size": 4, "timeout": 30.0}  # psycopg_pool's own
_MAX_SIZE = 10  # without a "pool" key


def pool_options(settings_dict: dict[str, Any]) -> dict[str, Any]:
    """Native pool options of an alias, from Django's OPTIONS["pool"]; sizes resolved."""
    option = settings_dict["OPTIONS"].get("pool")
    if not option:
        return {"min_size": 0, "max_size": _MAX_SIZE, "timeout": _DEFAULTS["timeout"]}
    options: dict[str, Any] = {**_DEFAULTS, **(option if isinstance(option, dict) else {})}
    if options.get("max_size") is None:
        options["max_size"] = options["min_size"]
    for name in _IGNORED:
        options.pop(name, None)
    return options
