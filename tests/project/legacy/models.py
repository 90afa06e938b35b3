"""One model on SQLite, to test what happens on aliases of other engines."""

from django.db import models


class LegacyRecord(models.Model):
    name = models.CharField(max_length=50, unique=True)
    value = models.IntegerField(default=0)

    def __str__(self) -> str:
        return self.name
