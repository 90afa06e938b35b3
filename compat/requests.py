"""Has every request of Django's tests go through asyncorm's handler, with all views native.

`Client` takes the native chain in the place of Django's, `AsyncClient` and `get_asgi_application()`
the native handler.
"""

from __future__ import annotations

import django.core.asgi
import django.test.client


def install() -> None:
    """Put the native handler in the place of Django's."""
    from asyncorm import asgi
    from asyncorm._requests import blocking, signals
    from asyncorm._requests.handler import Chain

    signals.install()
    blocking.install()
    django.test.client.ClientHandler.__bases__ = (Chain,)
    plain = django.core.asgi.get_asgi_application

    def get_asgi_application() -> object:
        django.core.asgi.get_asgi_application = plain
        try:
            return asgi.get_asgi_application()
        finally:
            django.core.asgi.get_asgi_application = get_asgi_application  # type: ignore[assignment]

    django.core.asgi.get_asgi_application = get_asgi_application  # type: ignore[assignment]
