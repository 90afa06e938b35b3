"""A request that runs on the event loop from the server to the response (asyncorm.asgi)."""
