"""The example project, as a user has it: asyncorm's tests run its tests and serve it."""
