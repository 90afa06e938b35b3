"""The ASGI application that the servers serve."""

import os

from django.core.asgi import get_asgi_application

from asyncorm.asgi import lifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bookshop.settings")
application = lifespan(get_asgi_application(), wait=float(os.environ.get("EXAMPLE_WAIT", "0")))
