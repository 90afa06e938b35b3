"""The DatabaseWrapper that settings.DATABASES names by ENGINE = "asyncorm.backends.postgresql"."""

from django.db.backends.postgresql import base

from ..mixin import NativeBackendMixin


class DatabaseWrapper(NativeBackendMixin, base.DatabaseWrapper):
    """Django's PostgreSQL backend; its native side runs on asyncorm's pool."""
