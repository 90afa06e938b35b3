"""What the PostgreSQL test databases hold: nothing, the sample, or what a test left."""

from typing import Any

import psycopg
from django.contrib.contenttypes.models import ContentType
from django.core.management import call_command
from django.db import connections
from django.test import TransactionTestCase

from tests.project.shop import sample
from tests.snapshot import Snapshot

ALIASES = ("default", "other")


class Stock:
    def __init__(self) -> None:
        self.connections, self.empty, self.sample = [], [], []
        for alias in ALIASES:
            settings = connections[alias].settings_dict
            connection = psycopg.connect(
                dbname=settings["NAME"],
                user=settings["USER"],
                password=settings["PASSWORD"],
                host=settings["HOST"],
                port=settings["PORT"],
                application_name="the tests' stock",
                options=settings["OPTIONS"]["options"],
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

    def fill(self, holds: str, alone: bool = False) -> None:
        """Make that what the databases hold; if alone, no transaction may be open in them."""
        for snapshot in self.sample if holds == "sample" else self.empty:
            if "django_content_type" in snapshot.restore(alone):
                ContentType.objects.clear_cache()
        self.holds = holds

    def flush(self, case: TransactionTestCase) -> None:
        """What Django does behind a test without a transaction, in a tenth of the time."""
        self.fill("empty", alone=True)
        for alias in case._databases_names(include_mirrors=False):  # type: ignore[attr-defined]
            if alias not in ALIASES:
                call_command("flush", verbosity=0, interactive=False, database=alias)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
