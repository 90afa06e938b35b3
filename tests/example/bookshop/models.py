"""A shelf of books, and a log of visits."""

from django.db import models


class Publisher(models.Model):
    name = models.CharField(max_length=100)

    def __str__(self):
        return self.name


class Book(models.Model):
    title = models.CharField(max_length=100, unique=True)
    price = models.DecimalField(max_digits=8, decimal_places=2, default=0)
    publisher = models.ForeignKey(Publisher, models.CASCADE, null=True, blank=True)

    def __str__(self):
        return self.title


class Visit(models.Model):
    token = models.CharField(max_length=100)
