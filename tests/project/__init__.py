"""The Django project that asyncorm's tests use."""
