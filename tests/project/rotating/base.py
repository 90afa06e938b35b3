"""The wrapper of the backend."""

from typing import Any, ClassVar

from asyncorm.backends.postgresql import base


class DatabaseWrapper(base.DatabaseWrapper):
    tokens: ClassVar[dict[str, str]] = {}  # by alias, as they are now

    def get_connection_params(self) -> dict[str, Any]:
        return {**super().get_connection_params(), "password": self.tokens[self.alias]}
