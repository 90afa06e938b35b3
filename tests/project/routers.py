"""The router that keeps the `legacy` app, and nothing else, on the `legacy` alias."""

from typing import Any

from django.db.models import Model


class LegacyRouter:
    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        return "legacy" if model._meta.app_label == "legacy" else None

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        return (db == "legacy") == (app_label == "legacy")
