"""Recorded queries: what is done to them is known from the last time, and not done again."""
