"""Has the next request of a client read what this one has written, in whichever process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import MiddlewareNotUsed
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from .. import bridge, conf
from ..pages import see
from . import positions
from .contexts import taken
from .router import routers

COOKIE = "asyncorm_position"
_SALT = "asyncorm.replicas"


class ReplicaMiddleware:
    """Makes each request a piece of work of its own, and keeps its position for the next ones.

    Put it first in MIDDLEWARE. A request that has written sets a signed cookie, for a minute. With
    ASYNCORM["REPLICA_POSITION"] = "session" the position is kept in the session: put it right
    behind SessionMiddleware then; sessions are read on the primary.

    What a streaming response writes after its headers were sent is not in it.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        if not routers():
            raise MiddlewareNotUsed(
                "No ReplicaRouter is in DATABASE_ROUTERS." + see("replicas#settings")
            )
        self.get_response = get_response
        self.in_session = conf.get("REPLICA_POSITION") == "session"
        self.asynchronous = iscoroutinefunction(get_response)
        if self.asynchronous:
            markcoroutinefunction(self)

    def __call__(self, request: Any) -> Any:
        if self.asynchronous:
            return self._call(request)
        kept = request.session.get(COOKIE) if self.in_session else _cookie(request)
        need, before = _begin(kept)
        response = None
        try:
            response = self.get_response(request)
            if need.wrote and (position := taken(need, lenient=True)):
                if self.in_session:
                    request.session[COOKIE] = position
                else:
                    _set_cookie(response, position)
            return response
        finally:
            _end(before, response)

    async def _call(self, request: Any) -> Any:
        kept = await request.session.aget(COOKIE) if self.in_session else _cookie(request)
        need, before = _begin(kept)
        response = None
        try:
            response = await self.get_response(request)
            if need.wrote and (position := await bridge.run(taken, need, lenient=True)):
                if self.in_session:
                    await request.session.aset(COOKIE, position)
                else:
                    _set_cookie(response, position)
            return response
        finally:
            _end(before, response)


def _begin(kept: str | None) -> tuple[positions.Need, positions.Need]:
    need = positions.Need.of(positions.load(kept))
    return need, positions.enter(need)


def _end(before: positions.Need, response: Any) -> None:
    if not getattr(response, "streaming", False):  # its content belongs to the request
        positions.enter(before)


def _cookie(request: HttpRequest) -> str | None:
    # Its age is the browser's affair: the clock of the machine that has signed it may be wrong.
    kept: str | None = request.get_signed_cookie(COOKIE, default=None, salt=_SALT)
    return kept


def _set_cookie(response: HttpResponseBase, position: str) -> None:
    response.set_signed_cookie(
        COOKIE,
        position,
        salt=_SALT,
        max_age=int(positions.max_age()),
        path=settings.SESSION_COOKIE_PATH,
        domain=settings.SESSION_COOKIE_DOMAIN,
        secure=settings.SESSION_COOKIE_SECURE,
        samesite=settings.SESSION_COOKIE_SAMESITE,
        httponly=True,
    )
