"""What the statement cache gives, compared with what Django's compiler makes of the query."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from asyncorm import statements, verifying
from asyncorm._chains import twins


@contextmanager
def hits_checked() -> Iterator[None]:
    """Have Django compile for each hit, too, with the cache as it is; none may be different."""
    was_active = verifying.active
    before = dict(statements.statement_cache_stats())
    with mock.patch.object(verifying, "active", True):
        twins.follow(True)
        try:
            yield
        finally:
            twins.follow(was_active)
    after = statements.statement_cache_stats()
    assert after["different"] == before["different"]
    assert after["verified"] - before["verified"] == after["hits"] - before["hits"]
