"""Has every request of Django's tests go through asyncorm's handler, with all views native.

`Client` takes the native chain in the place of Django's, `AsyncClient` and `get_asgi_application()`
the native handler.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import django.core.asgi
import django.test.client


def _is_asynchronous_only(path: str, factory: Any) -> bool:
    return not getattr(factory, "sync_capable", True)


def install() -> None:
    """Put the native handler in the place of Django's."""
    from asyncorm import asgi
    from asyncorm._requests import blocking, middleware, signals
    from asyncorm._requests.handler import Chain

    class ChainOfClient(Chain):
        """For requests of WSGI: middleware is in the form that it has there.

        Before Django 6.1 RemoteUserMiddleware looks for another header in its asynchronous form.
        """

        def load_middleware(self, is_async: bool = False) -> None:
            with mock.patch.object(middleware, "has_async_form", _is_asynchronous_only):
                super().load_middleware()

    signals.install()
    blocking.install()
    django.test.client.ClientHandler.__bases__ = (ChainOfClient,)
    plain = django.core.asgi.get_asgi_application

    def get_asgi_application() -> object:
        django.core.asgi.get_asgi_application = plain
        try:
            return asgi.get_asgi_application()
        finally:
            django.core.asgi.get_asgi_application = get_asgi_application  # type: ignore[assignment]

    django.core.asgi.get_asgi_application = get_asgi_application  # type: ignore[assignment]
