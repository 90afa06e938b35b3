"""The ASGI application: Django's handler or ours."""

import json
import os

if json.loads(os.environ["SITE"])["handler"] == "asyncorm":
    from asyncorm.asgi import get_asgi_application
else:
    from django.core.asgi import get_asgi_application

application = get_asgi_application()
