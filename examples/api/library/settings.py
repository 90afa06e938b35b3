"""Settings of the library's API: PostgreSQL is where libpq's variables (PGHOST, ...) say."""

import os

SECRET_KEY = os.environ.get("SECRET_KEY", "only for an example")
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]

DATABASES = {
    "default": {
        "ENGINE": "asyncorm.backends.postgresql",
        "NAME": os.environ.get("PGDATABASE", "postgres"),
        "OPTIONS": {"pool": {"min_size": 2, "max_size": 8}},
    }
}
ASYNCORM = {
    "SWAP_MANAGERS": True,
    "NATIVE_VIEWS": ["library.views"],  # synchronous views, on the event loop
}
INSTALLED_APPS = [
    "asyncorm",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "rest_framework",
    "library",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
]
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["rest_framework.authentication.BasicAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticatedOrReadOnly"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
ROOT_URLCONF = "library.urls"
ASGI_APPLICATION = "library.asgi.application"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
TIME_ZONE = "UTC"
USE_TZ = True
