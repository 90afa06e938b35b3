"""Middleware that several tests of requests have: asynchronous, or setting a tenant."""

from typing import Any

from asgiref.sync import markcoroutinefunction
from django.db import connection


class AsynchronousMiddleware:
    """A base for those that are asynchronous only."""

    async_capable = True
    sync_capable = False

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)


def set_tenant(name: str) -> None:
    """Set it in the session of the caller's connection."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET app.tenant = '{name}'")


def sets_tenant(get_response: Any) -> Any:
    """A middleware that does so for each request."""

    def middleware(request: Any) -> Any:
        set_tenant("acme")
        return get_response(request)

    return middleware
