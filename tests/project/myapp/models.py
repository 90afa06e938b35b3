"""One model with a unique key, which concurrent tasks fight over."""

from django.db import models


class Item(models.Model):
    remote_id = models.IntegerField(unique=True)
    name = models.CharField(max_length=50, default="")

    def __str__(self) -> str:
        return f"item {self.remote_id}"
