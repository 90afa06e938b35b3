"""Tools see native queries: one module for each, one line to set it up, or none.

`sentry`, `datadog`, `opentelemetry`, `prometheus`, `silk`, `live`; each is imported only by
who uses its tool. `found` looks which of them are set up already.
"""
