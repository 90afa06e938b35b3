"""ASGI: requests on the loop, pools opened and closed with the server, limits on requests."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Any, cast

from django.db import OperationalError, connections

from . import bridge, elsewhere, limits, patches, pools
from ._pool.pool import ConnectionPool
from ._requests.atomic import AtomicRequestsMiddleware, atomic_requests
from ._requests.health import health, health_view
from ._requests.views import native_view
from ._sessions import engines
from .growth import is_away
from .pages import see

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

logger = logging.getLogger("asyncorm")

__all__ = [
    "AtomicRequestsMiddleware", "atomic_requests", "get_asgi_application", "health", "health_view",
    "lifespan", "limited", "native_view", "open_pools",
]  # fmt: skip

_AGAIN = 0.5  # seconds between attempts to reach the server at start-up
_SHORTEST = 5.0  # seconds for the first attempt, and the last
_FILL_TIMEOUT = 10.0  # seconds for the connections after the first


def get_asgi_application() -> Application:
    """Return Django's ASGI application, with the whole request on the event loop.

        from asyncorm.asgi import get_asgi_application

    In place of django.core.asgi's function of that name. Django's own middleware, sessions and
    signals need no thread then; other people's middleware and synchronous views stay in the
    request's thread until ASYNCORM["NATIVE_MIDDLEWARE"] and ["NATIVE_VIEWS"] name them.

    Raises:
        django.core.exceptions.ImproperlyConfigured: "asyncorm" is not in INSTALLED_APPS, or the
            ASYNCORM setting names something that does not exist.
    """
    # Tools (ddtrace, OpenTelemetry) replace Django's function: it is called by its name.
    import django.core.asgi

    from ._requests.handler import NativeHandler

    asgi = django.core.asgi
    with patches.replaced(asgi, "ASGIHandler", NativeHandler, "Django's function makes ours"):
        return cast(Application, asgi.get_asgi_application())


def lifespan(
    app: Application, *, using: Iterable[str] | None = None, wait: float = 30.0, drain: float = 10.0
) -> Application:
    """Wrap an ASGI application: pools open when the server starts and close when it stops.

        application = lifespan(get_asgi_application())

    At start-up each pool gets its `min_size` connections. With fewer, but one at least, the server
    starts and a warning says so. If the database cannot be reached the server does not start, and
    says why; but one of several worker processes starts if the reason passes by itself, since
    uvicorn and gunicorn stop the others when one that was replaced fails to start. At shut-down
    requests and other work in progress (of a websocket, only what uses a connection) are waited
    for, then the pools are closed. Answers the `lifespan` scope itself (Django refuses it) and
    passes everything else on; on a server without lifespan, such as daphne, pools open on first
    use.

    Args:
        app: Django's application, or one around it.
        using: database aliases; by default all whose ENGINE is native.
        wait: seconds to go on trying at start-up, for a database that starts or is away; 0: fail at
            once.
        drain: seconds to wait at shut-down for connections that are in use.
    """
    running = 0

    async def application(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        nonlocal running
        if scope["type"] != "lifespan":
            request = scope["type"] == "http"  # a websocket may be open, and idle, for ever
            running += request
            try:
                await app(scope, receive, send)
            finally:
                running -= request
            return
        await receive()
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(
                    open_pools(using, wait=wait, drain=drain, until=lambda: not running)
                )
            except Exception as exc:
                await send({"type": "lifespan.startup.failed", "message": str(exc)})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    application.app = app  # type: ignore[attr-defined]
    return application


def limited(app: Application, parallelism: int, using: str | None = None) -> Application:
    """Wrap an ASGI application: no request uses more than so many connections at once.

        application = limited(get_asgi_application(), parallelism=4)

    One request that gathers a hundred queries then leaves the rest of the pool to others.

    Args:
        app: Django's application, or one around it.
        parallelism: a positive number of connections, for each request (or websocket).
        using: a database alias; the default one by default.
    """
    limits.parallelism(parallelism, using)  # a wrong number is an error now

    async def application(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        else:
            async with limits.parallelism(parallelism, using):
                await app(scope, receive, send)

    application.app = app  # type: ignore[attr-defined]
    return application


@asynccontextmanager
async def open_pools(
    using: Iterable[str] | None = None,
    *,
    wait: float = 30.0,
    drain: float = 10.0,
    until: Callable[[], bool] = lambda: True,
) -> AsyncIterator[None]:
    """What `lifespan()` does, for an application that has a lifespan of its own.

    Args:
        using, wait, drain: as for `lifespan()`.
        until: drained only when this returns True, too.

    Raises:
        django.db.OperationalError: the database cannot be reached.
        django.db.NotSupportedError: an alias of `using` has another engine.
    """
    aliases = [*connections.settings] if using is None else list(using)
    replicas = {alias for each in elsewhere.routers() for alias in each.replicas}
    try:
        for alias in aliases:
            if alias in replicas:
                await _try(alias)
            elif engines.native_class(alias) is not None:
                await _open(alias, wait)
            elif using is not None:
                raise engines.refuse_foreign(alias)
        for each in elsewhere.routers():
            each.watch()
        yield
    finally:
        await _drain(aliases, until, monotonic() + drain)
        for alias in aliases:
            await pools.close_pools(alias)


async def _open(alias: str, wait: float) -> None:
    deadline = monotonic() + wait
    while True:
        try:
            await _reach(alias, max(deadline - monotonic(), _SHORTEST))
            break
        except OperationalError as exc:
            left = deadline - monotonic()
            if left <= 0:
                if wait and _is_one_of_several() and _passes(alias):
                    logger.error(
                        "Database %r cannot be reached. This worker process starts all the same: "
                        "that it does not might end the others. %s", alias, exc
                    )  # fmt: skip
                    return
                raise
            logger.warning("Waiting for database %r (%.0f s left): %s", alias, left, exc)
            await asyncio.sleep(min(_AGAIN, left))
    pool = pools.find(alias)
    if pool is None or pool.connections is None:  # in a test's transaction
        return
    await _fill(pool.connections, alias, pool.options["min_size"])


async def _try(alias: str) -> None:
    try:
        await _open(alias, 0)
    except OperationalError as exc:
        logger.warning(
            "Replica %r cannot be reached; reads go elsewhere until it can. %s", alias, exc
        )


async def _reach(alias: str, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await bridge.run(lambda: connections[alias].ensure_connection())
    except TimeoutError:
        pool = pools.find(alias)
        reason = pool and pool.connections and pool.connections.connect_error
        raise OperationalError(
            f"Cannot connect to database {alias!r}, no connection within {seconds:.1f} s: "
            f"{reason or 'no answer'}" + see("deployment#when-things-fail")
        ) from None


async def _fill(connections: ConnectionPool, alias: str, min_size: int) -> None:
    connections.fill(min_size)
    deadline = monotonic() + _FILL_TIMEOUT

    def fills() -> bool:
        return len(connections.live) < min(min_size, connections.opened)

    while fills() and monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    if len(connections.live) < min_size:
        logger.warning(
            "Database %r gave %d of the %d connections that OPTIONS['pool']['min_size'] asks for; "
            "the pool grows when they are needed. %s", alias, len(connections.live), min_size,
            connections.connect_error or "",
        )  # fmt: skip


def _is_one_of_several() -> bool:
    """Whether a server's main process has started this one, and may end when this one does."""
    return multiprocessing.parent_process() is not None or "gunicorn.arbiter" in sys.modules


def _passes(alias: str) -> bool:
    """Whether the database is only away, not wrongly named."""
    pool = pools.find(alias)
    conns = None if pool is None else pool.connections
    return conns is not None and conns.connect_error is not None and is_away(conns.connect_error)


async def _drain(aliases: list[str], until: Callable[[], bool], deadline: float) -> None:
    def busy() -> int:
        stats = [pools.pool_stats(alias) for alias in aliases]
        return sum(s["pool_size"] - s["pool_available"] for s in stats if s)

    while busy() or not until():
        if monotonic() >= deadline:
            logger.warning("Closing the pools with %d connections in use.", busy())
            return
        await asyncio.sleep(0.02)
