"""The ASGI application that the servers serve."""

import os

from channels.routing import ProtocolTypeRouter, URLRouter
from django.urls import path

from asyncorm.asgi import lifespan

if os.environ.get("EXAMPLE_HANDLER") == "django":
    from django.core.asgi import get_asgi_application
else:
    from asyncorm.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bookshop.settings")
views = get_asgi_application()

from bookshop.consumers import Log  # noqa: E402

protocols = {"http": views, "websocket": URLRouter([path("log/", Log.as_asgi())])}
application = lifespan(
    ProtocolTypeRouter(protocols), wait=float(os.environ.get("EXAMPLE_WAIT", "0"))
)
