"""Tools for production see native queries: one module each, one line to set it up.

`prometheus`, `opentelemetry`, `sentry`, `datadog`; each is imported only by who uses it.
"""
