"""Settings: those of `startproject`; SITE in the environment has what differs, as JSON."""

import json
import os
from typing import Any

SITE: dict[str, Any] = json.loads(os.environ["SITE"])
DATABASES = {
    "default": {
        **SITE["database"],
        "ENGINE": SITE["engine"],
        "OPTIONS": {"pool": {"min_size": 4, "max_size": 20}},
    }
}
INSTALLED_APPS = [
    *SITE["apps"],
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
]
ASYNCORM = {"SWAP_MANAGERS": True, "NATIVE_VIEWS": ["django.contrib.admin", "compat.bench.site"]}
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
REST_FRAMEWORK = {
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "UNAUTHENTICATED_USER": None,
}
BOLT_API = ["compat.bench.site.bolt:api"]
ROOT_URLCONF = "compat.bench.site.urls"
SECRET_KEY = "only for the measurement"
ALLOWED_HOSTS = ["*"]
STATIC_URL = "static/"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
