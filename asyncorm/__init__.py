"""The Django ORM, natively asynchronous on PostgreSQL: the public API."""

from django.core.exceptions import ImproperlyConfigured as _ImproperlyConfigured

from . import internals as _internals

_internals.require()  # before any of it is imported by name, or replaced

from . import bridge as _bridge
from ._transactions.on_commit import on_commit, set_rollback
from .batch import batch
from .bridge import await_, native
from .compiling import compiled
from .copying import copy_to
from .cursors import cursor
from .fate import CommitUnknown
from .limits import parallelism
from .listening import listen, notify
from .pages import see as _see
from .pinning import connection, detached, detached_task
from .pools import close_pools, pool_stats
from .retry import retrying
from .statements import statement_cache_stats
from .timeline import timeline
from .transactions import atomic

__version__ = "0.1.0"

__all__ = [
    "CommitUnknown",
    "atomic",
    "await_",
    "batch",
    "close_pools",
    "compiled",
    "connection",
    "copy_to",
    "cursor",
    "detached",
    "detached_task",
    "listen",
    "native",
    "notify",
    "on_commit",
    "parallelism",
    "pool_stats",
    "retrying",
    "set_rollback",
    "statement_cache_stats",
    "timeline",
]


def _not_installed() -> None:
    raise _ImproperlyConfigured(
        'asyncorm is not set up: add "asyncorm" to INSTALLED_APPS and call django.setup().'
        + _see("start#start")
    )


_bridge.set_guard(_not_installed)  # apps.py takes it away
