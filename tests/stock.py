"""What the PostgreSQL test databases hold: nothing, the sample, or what a test left."""

from typing import Any

import psycopg
from django.contrib.contenttypes.models import ContentType
from django.db import connections

from tests.project.shop import sample
from tests.snapshot import Snapshot


class Stock:
    def __init__(self) -> None:
        self.connections, self.empty, self.sample = [], [], []
        for alias in ("default", "other"):
            settings = connections[alias].settings_dict
            connection = psycopg.connect(
                dbname=settings["NAME"],
                user=settings["USER"],
                password=settings["PASSWORD"],
                host=settings["HOST"],
                port=settings["PORT"],
                application_name="the tests' stock",
                autocommit=True,
            )
            self.connections.append(connection)
            self.empty.append(Snapshot(connection))
            sample.load(alias)
            self.sample.append(Snapshot(connection))
        self.holds = "sample"

    def changes(self) -> list[dict[str, Any]]:
        """What differs from the sample, for each alias: rows of changed tables and sequences."""
        return [snapshot.changes() for snapshot in self.sample]

    def fill(self, holds: str) -> None:
        for snapshot in self.sample if holds == "sample" else self.empty:
            if "django_content_type" in snapshot.restore():
                ContentType.objects.clear_cache()
        self.holds = holds

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
