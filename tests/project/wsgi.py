"""The WSGI application of the tests' example project; it asks the database when it is loaded."""

import os

from asgiref.sync import async_to_sync
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.project.settings")
application = get_wsgi_application()

if "ASYNCORM_TEST_PRELOAD" in os.environ:
    from tests.project.shop.models import Book

    # Natively alone: a child that is forked later closes Django's own connection for its parent.
    assert async_to_sync(Book.objects.native_count)()
