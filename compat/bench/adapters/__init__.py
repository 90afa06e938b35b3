"""One small module for each contestant: the same work in its own words (see base.py)."""
