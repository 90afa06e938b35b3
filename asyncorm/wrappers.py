"""The type of the DatabaseWrappers of backends/, for modules that those import."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backends.synchronous import SynchronousWrapper as Wrapper
else:
    from django.db.backends.base.base import BaseDatabaseWrapper as Wrapper

__all__ = ["Wrapper"]
