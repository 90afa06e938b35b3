"""The benchmark's tables (schema.py makes them) as Django models."""

from typing import Any

from django.db import models


class Publisher(models.Model):
    name = models.CharField(max_length=100)
    country = models.CharField(max_length=2)

    class Meta:
        db_table = "bench_publisher"


class Author(models.Model):
    publisher: Any = models.ForeignKey(Publisher, models.CASCADE, related_name="authors")
    name = models.CharField(max_length=100)

    class Meta:
        db_table = "bench_author"


class Book(models.Model):
    author: Any = models.ForeignKey(Author, models.CASCADE, related_name="books")
    title = models.CharField(max_length=200)
    pages = models.IntegerField()
    price = models.DecimalField(max_digits=10, decimal_places=2)
    published = models.DateTimeField()
    updated = models.DateTimeField()
    meta = models.JSONField()

    class Meta:
        db_table = "bench_book"


class Draft(models.Model):
    title = models.CharField(max_length=200, unique=True)
    pages = models.IntegerField()
    price = models.DecimalField(max_digits=10, decimal_places=2)
    published = models.DateTimeField()
    updated = models.DateTimeField()
    meta = models.JSONField()
    active = models.BooleanField()

    class Meta:
        db_table = "bench_draft"


class Event(models.Model):
    book_id = models.BigIntegerField()
    kind = models.CharField(max_length=20)
    at = models.DateTimeField()
    amount = models.DecimalField(max_digits=10, decimal_places=2)

    class Meta:
        db_table = "bench_event"
