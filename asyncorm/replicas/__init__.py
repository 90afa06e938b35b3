"""Reads on replicas (standbys) that have what was written before: a router, and what goes with it.

`ReplicaRouter` in DATABASE_ROUTERS decides where to read, `ReplicaMiddleware` first in MIDDLEWARE
has a client's next requests see what this one has written, in whichever process. `position()` and
`after()` do that for tasks, websockets and other services.
"""

from .contexts import after, position, stats
from .middleware import ReplicaMiddleware
from .router import ReplicaRouter

__all__ = ["ReplicaMiddleware", "ReplicaRouter", "after", "position", "stats"]
