"""The ASGI application: Django's handler or ours."""

import json
import os

from . import process  # noqa: F401  (counts from now on)

if json.loads(os.environ["SITE"])["handler"] == "asyncorm":
    from asyncorm.asgi import get_asgi_application
else:
    from django.core.asgi import get_asgi_application

application = get_asgi_application()
