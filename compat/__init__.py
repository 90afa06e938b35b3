"""Runs Django's own test suite, and other people's, natively and says where asyncorm differs."""
