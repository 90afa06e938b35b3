"""The ASGI application that the servers serve."""

import os

from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application
from django.urls import path

from asyncorm.asgi import lifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bookshop.settings")
views = get_asgi_application()

from bookshop.consumers import Log  # noqa: E402

protocols = {"http": views, "websocket": URLRouter([path("log/", Log.as_asgi())])}
application = lifespan(
    ProtocolTypeRouter(protocols), wait=float(os.environ.get("EXAMPLE_WAIT", "0"))
)
