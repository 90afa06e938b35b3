"""The WSGI application, for Django in threads."""

from django.core.wsgi import get_wsgi_application

from . import process  # noqa: F401  (counts from now on)

application = get_wsgi_application()
