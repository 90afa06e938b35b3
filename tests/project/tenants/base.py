"""The wrapper of the backend."""

from typing import Any

from asyncorm.backends.postgresql import base


class DatabaseWrapper(base.DatabaseWrapper):
    tenant = ""

    def _cursor(self, name: str | None = None) -> Any:
        cursor = super()._cursor(name)  # type: ignore[misc]
        with cursor.cursor.connection.cursor() as plain:
            plain.execute("SELECT set_config('my.tenant', %s, false)", [self.tenant])
        return cursor
