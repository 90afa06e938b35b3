"""A view that tells a load balancer whether this process reaches its databases."""

from __future__ import annotations

import asyncio
from contextvars import Context
from time import monotonic
from typing import Any

from django.db import connections, transaction
from django.http import HttpRequest, JsonResponse

from .. import bridge, pools, sessions
from .._sessions import engines

_DEADLINE = 1.0
_OK, _BUSY, _DOWN = "ok", "busy", "down"
_given_up: set[asyncio.Task[Any]] = set()


def health_view(using: Any = None, deadline: float = _DEADLINE) -> Any:
    """A view as `health`, of certain aliases or with another deadline.

    Args:
        using: database aliases; by default all whose ENGINE is native.
        deadline: seconds.
    """

    async def health(request: HttpRequest) -> JsonResponse:
        """Answer 200 if each database answers in a second, otherwise 503; nobody waits longer.

            urlpatterns = [path("health/", asyncorm.asgi.health)]

        The body says for each alias "ok", "busy" (no connection was free in time) or "down", the
        exception's name, the seconds it took and the state of the pool. No thread is used.
        """
        names = [*connections.settings] if using is None else list(using)
        aliases = [alias for alias in names if engines.native_class(alias) is not None]
        found = dict(
            zip(aliases, await asyncio.gather(*(_look(a, deadline) for a in aliases)), strict=True)
        )
        well = all(each["status"] == _OK for each in found.values())
        body = {"status": _OK if well else "unavailable", "databases": found}
        answer = JsonResponse(body, status=200 if well else 503)
        answer["Cache-Control"] = "no-store"
        return answer

    return transaction.non_atomic_requests(health)


async def _look(alias: str, deadline: float) -> dict[str, Any]:
    began = monotonic()
    # A statement that is cancelled waits for the server: nobody waits for that here. A context of
    # its own: it is in no block and has no limit.
    task = asyncio.get_running_loop().create_task(bridge.run(_ask, alias), context=Context())
    try:
        done, _ = await asyncio.wait((task,), timeout=deadline)
    finally:
        if not task.done():
            _given_up.add(task)
            task.add_done_callback(_forget)
            task.cancel()
    found: dict[str, Any] = {"status": _OK, "seconds": round(monotonic() - began, 4)}
    pool = pools.find(alias)
    stats = {} if pool is None else pool.stats()
    if not done:
        found["status"] = _BUSY if pool is not None and pool.is_full else _DOWN
        found["error"] = "TimeoutError"
    elif (error := task.exception()) is not None:
        found["status"], found["error"] = _DOWN, type(error).__name__
    if stats:
        found["pool"] = {
            "max": stats["pool_max"],
            "size": stats["pool_size"],
            "in_use": stats["pool_size"] - stats["pool_available"],
            "waiting": stats.get("requests_waiting", 0),
        }
    return found


def _ask(alias: str) -> None:
    with sessions.require(alias).wrapper.cursor() as cursor:
        cursor.execute("SELECT 1")


def _forget(task: asyncio.Task[Any]) -> None:
    _given_up.discard(task)
    if not task.cancelled():
        task.exception()  # it is late


health = health_view()
