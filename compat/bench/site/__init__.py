"""The project of the measurement of requests: as `startproject` makes it, with a few views.

Each server that serves it (asgi.py, wsgi.py, fast.py, bolt.py) counts the threads that it starts.
"""
