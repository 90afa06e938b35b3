"""Settings of the site, as `startproject` makes them but for DATABASES and ASYNCORM.

PostgreSQL is where libpq's variables (PGHOST, ...) say.
"""

import os

SECRET_KEY = os.environ.get("SECRET_KEY", "only for an example")
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]

DATABASES = {
    "default": {
        "ENGINE": "asyncorm.backends.postgresql",
        "NAME": os.environ.get("PGDATABASE", "postgres"),
        "OPTIONS": {"pool": {"min_size": 2, "max_size": 4}},
    }
}
ASYNCORM = {
    "SWAP_MANAGERS": True,
    # Synchronous views that run on the event loop under the handler of asgi.py.
    "NATIVE_VIEWS": ["events.views", "django.contrib.auth.views", "django.contrib.admin"],
}
INSTALLED_APPS = [
    "asyncorm",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "events",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
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
ROOT_URLCONF = "events.urls"
ASGI_APPLICATION = "events.asgi.application"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = LOGOUT_REDIRECT_URL = "events"
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
TIME_ZONE = "UTC"
USE_TZ = True
