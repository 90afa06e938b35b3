"""The sample shop: a Django app for the demo."""
