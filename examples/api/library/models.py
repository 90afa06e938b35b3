"""Books, who wrote them, and who has one at home."""

from django.db import models


class Author(models.Model):
    name = models.CharField(max_length=100, unique=True)

    def __str__(self):
        return self.name


class Book(models.Model):
    title = models.CharField(max_length=200)
    author = models.ForeignKey(Author, on_delete=models.CASCADE, related_name="books")
    copies = models.PositiveSmallIntegerField(default=1, help_text="those that are here")

    def __str__(self):
        return self.title


class Loan(models.Model):
    book = models.ForeignKey(Book, on_delete=models.CASCADE, related_name="loans")
    reader = models.CharField(max_length=100)
    lent_at = models.DateTimeField(auto_now_add=True)

    def __str__(self):
        return f"{self.book} to {self.reader}"
