"""Django's AsyncClient on the way that requests take in production."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from django.http import HttpRequest

from .. import conf, internals
from . import blocking, checks, flow, signals
from .handler import Chain, NativeHandler


def chain_for_client() -> Callable[[HttpRequest], Coroutine[Any, Any, Any]] | None:
    """Calls the native chain for an AsyncClient; None where Django's own is to serve it."""
    if not _is_asked_for():
        return None
    internals.require_for_requests()
    signals.install()
    blocking.install()
    chain = Chain()
    chain.load_middleware()

    async def respond(request: HttpRequest) -> Any:
        around = flow.current()
        flow.begin(flow.Running())
        try:
            return await chain.respond(request)
        finally:
            flow.begin(around)

    return respond


def _is_asked_for() -> bool:
    asked = conf.get("NATIVE_HANDLER")
    if asked is None:
        return isinstance(checks.projects_handler(), NativeHandler)
    return bool(asked)
