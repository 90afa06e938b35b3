"""The benchmark: asyncorm beside the bare drivers, Django's own async methods and other ORMs."""
