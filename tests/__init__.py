"""The tests of asyncorm."""
