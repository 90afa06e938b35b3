"""Django's PostgreSQL backend with a native side: ENGINE = "asyncorm.backends.postgresql"."""
