"""The project of the measurement of requests: as `startproject` makes it, with a few views."""
