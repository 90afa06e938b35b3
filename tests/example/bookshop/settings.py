"""Settings of the example project. The tests pass the server's address, and vary a few of them."""

import json
import os

SERVER = {"NAME": "example", "USER": "postgres", "OPTIONS": {}}
SERVER |= json.loads(os.environ.get("ASYNCORM_TEST_DATABASE", "{}"))
POSTGRESQL = SERVER | {
    "ENGINE": "asyncorm.backends.postgresql",
    "NAME": SERVER["NAME"],
    "ATOMIC_REQUESTS": os.environ.get("EXAMPLE_ATOMIC_REQUESTS") == "1",
    "OPTIONS": SERVER["OPTIONS"] | {"pool": {"min_size": 2, "max_size": 8}},
}
DATABASES = {"default": POSTGRESQL}
if "EXAMPLE_LIVE" not in os.environ:
    DATABASES["other"] = POSTGRESQL | {"NAME": SERVER["NAME"] + "_other"}
ASYNCORM = {"SWAP_MANAGERS": True}
if "EXAMPLE_NATIVE_VIEWS" in os.environ:
    ASYNCORM["NATIVE_VIEWS"] = os.environ["EXAMPLE_NATIVE_VIEWS"].split()

INSTALLED_APPS = [
    "asyncorm",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "bookshop",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
if POSTGRESQL["ATOMIC_REQUESTS"]:
    MIDDLEWARE.append("asyncorm.asgi.AtomicRequestsMiddleware")
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
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
SESSION_ENGINE = os.environ.get("EXAMPLE_SESSIONS", "django.contrib.sessions.backends.db")
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "bookshop.urls"
SECRET_KEY = "only for tests"
ALLOWED_HOSTS = ["*"]
STATIC_URL = "static/"
USE_TZ = True
