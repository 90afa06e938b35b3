"""A temporary PostgreSQL server: for tests, for a first look, and for the repository's demo."""
