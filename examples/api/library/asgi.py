"""What the ASGI server serves: whole requests on the event loop, pools opened at its start."""

import os

from asyncorm.asgi import get_asgi_application, lifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "library.settings")
application = lifespan(get_asgi_application())
