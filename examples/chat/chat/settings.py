"""Settings of the chat: PostgreSQL, where libpq's variables (PGHOST, ...) say, and no broker."""

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
ASYNCORM = {"SWAP_MANAGERS": True}
CHANNEL_LAYERS = {"default": {"BACKEND": "asyncorm.channel_layer.PostgresChannelLayer"}}
INSTALLED_APPS = ["asyncorm", "channels", "chat"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
ROOT_URLCONF = "chat.urls"
ASGI_APPLICATION = "chat.asgi.application"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
TIME_ZONE = "UTC"
USE_TZ = True
