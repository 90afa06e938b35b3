"""What the ASGI server serves: pages by Django, WebSockets by Channels."""

import os

from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.urls import path

from asyncorm.asgi import get_asgi_application, lifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "chat.settings")
pages = get_asgi_application()  # before what imports models

from chat.consumers import Room  # noqa: E402

sockets = URLRouter([path("rooms/<slug:room>/", Room.as_asgi())])
application = lifespan(
    ProtocolTypeRouter({"http": pages, "websocket": AllowedHostsOriginValidator(sockets)})
)
