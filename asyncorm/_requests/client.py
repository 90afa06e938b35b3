"""Django's AsyncClient on the way that requests take in production."""

from __future__ import annotations

from .. import conf, internals
from . import blocking, checks, signals
from .handler import Chain, NativeHandler


def chain_for_client() -> Chain | None:
    """The native chain of an AsyncClient's handler; None where Django's own is to serve it."""
    if not _is_asked_for():
        return None
    internals.require_for_requests()
    signals.install()
    blocking.install()
    chain = Chain()
    chain.load_middleware()
    return chain


def _is_asked_for() -> bool:
    asked = conf.get("NATIVE_HANDLER")
    if asked is None:
        return isinstance(checks.projects_handler(), NativeHandler)
    return bool(asked)
