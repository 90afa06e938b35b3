"""ASGI: requests on the loop, pools opened and closed with the server, limits, ATOMIC_REQUESTS."""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any, TypeVar, cast

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction
from django.db import OperationalError, connections
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from . import bridge, elsewhere, limits, patches, pools
from ._pool.pool import ConnectionPool
from ._requests.health import health, health_view
from ._requests.views import native_view
from ._sessions import engines
from ._transactions.on_commit import set_rollback
from .growth import is_away
from .pages import see
from .transactions import atomic

F = TypeVar("F", bound=Callable[..., Any])
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


# ATOMIC_REQUESTS

# Whether AtomicRequestsMiddleware takes care of the request of this context.
_by_middleware: ContextVar[bool] = ContextVar("asyncorm_by_middleware", default=False)


class _Ours(set[str]):
    """A view's `_non_atomic_requests`, where Django looks before it refuses a coroutine.

    It seems to hold every alias that we make the transaction of; its items are those that the
    project excluded with django.db.transaction.non_atomic_requests().
    """

    decorated = False

    def __contains__(self, alias: object) -> bool:
        if self.excludes(alias):
            return True
        ours = self.decorated or _by_middleware.get()
        return ours and engines.native_class(str(alias)) is not None

    def excludes(self, alias: object) -> bool:
        return super().__contains__(alias)


def _aliases(ours: _Ours) -> list[str]:
    return [
        alias
        for alias, settings in connections.settings.items()
        if settings["ATOMIC_REQUESTS"]
        and not ours.excludes(alias)
        and engines.native_class(alias) is not None
    ]


class _Transactions(AsyncExitStack):
    """Those of one request."""

    aliases: list[str]

    async def begin(self, ours: _Ours) -> None:
        self.aliases = _aliases(ours)
        for alias in self.aliases:
            await self.enter_async_context(atomic(using=alias))

    def look_at(self, response: HttpResponseBase) -> None:
        """Roll back for an error that Django REST framework made a response of.

        It tells Django's own connections to, which have no part in it.
        """
        if getattr(response, "exception", False):
            for alias in self.aliases:
                set_rollback(True, using=alias)


def atomic_requests(view: F) -> F:
    """Give an asynchronous view what the ATOMIC_REQUESTS setting gives a synchronous one.

    A transaction on each alias that has ATOMIC_REQUESTS, for the view, not for middleware and not
    for the rendering of a streaming or template response. An exception of the view rolls back.
    django.db.transaction.non_atomic_requests() is honoured, above and below this decorator.

    Raises:
        TypeError: the view is synchronous.
        RuntimeError (when called, by Django): an alias with ATOMIC_REQUESTS has another engine.
    """
    if not iscoroutinefunction(view):
        raise TypeError(
            f"atomic_requests decorates asynchronous views, not {view!r}; Django makes "
            "synchronous ones atomic itself." + see("asgi#atomic_requests")
        )

    @functools.wraps(view)
    async def inner(*args: Any, **kwargs: Any) -> Any:
        async with _Transactions() as opened:
            await opened.begin(ours)
            response = await view(*args, **kwargs)
            opened.look_at(response)
            return response

    ours = _Ours(getattr(view, "_non_atomic_requests", ()))
    ours.decorated = True
    inner._non_atomic_requests = ours  # type: ignore[attr-defined]
    return inner  # type: ignore[return-value]


class AtomicRequestsMiddleware:
    """ATOMIC_REQUESTS for every asynchronous view, as `atomic_requests` on each would give it.

    Put it last in MIDDLEWARE: the transaction begins when the ones before have let the request
    pass.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response
        self.asynchronous = iscoroutinefunction(get_response)
        if self.asynchronous:
            markcoroutinefunction(self)
            # Django decides by the method's kind where it runs.
            self.process_view: Any = self._begin
            self.process_exception = self._roll_back
            self.process_template_response = self._commit
        else:
            self.process_view = self._run

    def __call__(self, request: Any) -> Any:
        return self._call(request) if self.asynchronous else self.get_response(request)

    async def _call(self, request: HttpRequest) -> Any:
        try:
            response = await self.get_response(request)
        except BaseException as exc:  # the request was cancelled
            await self._leave(request, exc)
            raise
        finally:
            _by_middleware.set(False)
        await self._leave(request, None)
        return response

    async def _begin(
        self, request: Any, view: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        ours = self._mark(view)
        if ours is None:
            return
        _by_middleware.set(True)
        request.asyncorm_transactions = _Transactions()
        await request.asyncorm_transactions.begin(ours)

    async def _roll_back(self, request: HttpRequest, exception: Exception) -> None:
        await self._leave(request, exception)

    async def _commit(self, request: HttpRequest, response: HttpResponseBase) -> Any:
        if (opened := request.__dict__.get("asyncorm_transactions")) is not None:
            opened.look_at(response)
        await self._leave(request, None)
        return response

    @staticmethod
    async def _leave(request: HttpRequest, exc: BaseException | None) -> None:
        opened = request.__dict__.pop("asyncorm_transactions", None)
        if opened is not None:
            await opened.__aexit__(type(exc) if exc else None, exc, exc and exc.__traceback__)

    def _run(
        self,
        request: HttpRequest,
        view: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # Django's synchronous handler (WSGI, the test client) runs each coroutine on a loop of its
        # own: the transaction must be begun on the view's.
        ours = self._mark(view)
        if ours is None or not _aliases(ours):
            return None
        return async_to_sync(atomic_requests(view))(request, *args, **kwargs)

    @staticmethod
    def _mark(view: Any) -> _Ours | None:
        """What the project excluded; None for a view that is not ours to make atomic."""
        if not iscoroutinefunction(view):
            return None
        ours = getattr(view, "_non_atomic_requests", ())
        if not isinstance(ours, _Ours):
            ours = _Ours(ours)
            try:
                getattr(view, "__func__", view)._non_atomic_requests = ours
            except AttributeError:
                return None  # Django refuses it
        return None if ours.decorated else ours
