"""Database backends for settings.DATABASES."""
