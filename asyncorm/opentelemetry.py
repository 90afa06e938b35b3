"""OpenTelemetry: a span for each native query (`asyncorm.observe.opentelemetry`)."""

from .observe.opentelemetry import instrument, uninstrument

__all__ = ["instrument", "uninstrument"]
