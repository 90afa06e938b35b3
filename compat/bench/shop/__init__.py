"""The benchmark's tables as a Django app."""
