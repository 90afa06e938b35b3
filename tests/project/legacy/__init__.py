"""An app whose table lives on an engine that asyncorm does not serve."""
