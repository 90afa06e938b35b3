"""The error that ends the demo with a message instead of a traceback."""


class DemoError(Exception):
    pass
