"""Settings of the tests' example project: two PostgreSQL databases and one of another engine.

`tests/conftest.py` starts the server and passes its address in ASYNCORM_TEST_DATABASE (JSON with
NAME, USER, PASSWORD, HOST, PORT). Without it the settings still load, for type checkers.
"""

import json
import os
from typing import Any

ENGINE = os.environ.get("ASYNCORM_TEST_ENGINE", "asyncorm.backends.postgresql")


def databases() -> dict[str, dict[str, Any]]:
    server = {"NAME": "asyncorm", "USER": "postgres", "OPTIONS": {}}
    server |= json.loads(os.environ.get("ASYNCORM_TEST_DATABASE", "{}"))
    # With a lock_timeout, a statement that waits for ever for a lock fails; the tests do not hang.
    options = {"pool": {"min_size": 1, "max_size": 20}, "options": "-c lock_timeout=30s"}
    # To run all tests with, say, {"server_side_binding": true}.
    options |= json.loads(os.environ.get("ASYNCORM_TEST_OPTIONS", "{}"))
    postgresql = server | {"ENGINE": ENGINE, "OPTIONS": server["OPTIONS"] | options}
    if age := os.environ.get("ASYNCORM_TEST_CONN_MAX_AGE"):
        postgresql["CONN_MAX_AGE"] = int(age)
    return {
        "default": postgresql,
        # Another time zone, so that a connection configured for the wrong alias gives wrong values.
        "other": postgresql | {"NAME": f"{server['NAME']}_other", "TIME_ZONE": "America/New_York"},
        "legacy": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    }


DEBUG = "ASYNCORM_TEST_DEBUG" in os.environ
DATABASES = databases()
DATABASE_ROUTERS = ["tests.project.routers.LegacyRouter"]

INSTALLED_APPS = [
    "asyncorm",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.postgres",
    "tests.project.shop",
    "tests.project.myapp",
    "tests.project.legacy",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
# In memory, so that tests leave no files behind.
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.InMemoryStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "tests.project.urls"
ASGI_APPLICATION = "tests.project.asgi.application"
SECRET_KEY = "only for tests"
ALLOWED_HOSTS = ["*"]
STATIC_URL = "static/"
USE_TZ = True
TIME_ZONE = "Europe/Vienna"
