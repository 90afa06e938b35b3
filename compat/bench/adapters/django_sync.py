"""Django's ORM in synchronous code."""

from __future__ import annotations

import os
from typing import Any

from ..works import SLEEP
from .base import Adapter
from .django_setup import setup


class DjangoSync(Adapter):
    packages = ("Django", "psycopg")
    sync = True
    remarks = {
        "get_100": "one after another",
        "sleep": "one after another",
        "asgi": "in asgiref's thread, as Django runs a synchronous view",
    }

    def __init__(self, settings: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__(settings, options)
        os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"  # for the measurement of stalls
        setup(settings, options)
        from ..shop import models

        self.m = models

    def authors_of(self, publisher: Any) -> Any:
        return publisher.authors.all()

    def books_of(self, author: Any) -> Any:
        return author.books.all()

    def get(self, pk: int) -> Any:  # type: ignore[override]
        return self.m.Book.objects.get(pk=pk)

    def get_100(self, pks: tuple[int, ...]) -> Any:  # type: ignore[override]
        return [self.get(pk) for pk in pks]

    def page(self, first: int, end: int) -> Any:  # type: ignore[override]
        return list(
            self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end).order_by("id")
        )

    def rows(self, first: int, end: int) -> Any:  # type: ignore[override]
        return list(self.m.Book.objects.filter(id__gte=first, id__lt=end).order_by("id"))

    def related(self, first: int, end: int) -> Any:  # type: ignore[override]
        books = self.m.Book.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return list(books.select_related("author__publisher"))

    def prefetch(self, first: int, end: int) -> Any:  # type: ignore[override]
        publishers = self.m.Publisher.objects.filter(id__gte=first, id__lt=end).order_by("id")
        return list(publishers.prefetch_related("authors__books"))

    def values(self, first: int, end: int) -> Any:  # type: ignore[override]
        books = self.m.Book.objects.filter(id__gte=first, id__lt=end)
        return list(books.values_list("id", "title", "price"))

    def count(self, first: int, end: int) -> Any:  # type: ignore[override]
        return self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end).count()

    def exists(self, pk: int) -> Any:  # type: ignore[override]
        return self.m.Book.objects.filter(pk=pk).exists()

    def aggregate(self, first: int, end: int) -> Any:  # type: ignore[override]
        from django.db.models import Max, Sum

        books = self.m.Book.objects.filter(author_id__gte=first, author_id__lt=end)
        return books.aggregate(a=Sum("price"), b=Max("pages")).values()

    def create(self, values: dict[str, Any]) -> Any:  # type: ignore[override]
        return self.m.Draft.objects.create(**values)

    def drafts(self, keys: list[int]) -> list[Any]:  # type: ignore[override]
        found = self.m.Draft.objects.in_bulk(keys)
        return [found[key] for key in keys]

    def save(self, obj: Any, pages: int) -> Any:  # type: ignore[override]
        obj.pages = pages
        obj.save()

    def bulk_create(self, values: list[dict[str, Any]]) -> Any:  # type: ignore[override]
        Draft = self.m.Draft
        return [obj.pk for obj in Draft.objects.bulk_create([Draft(**value) for value in values])]

    def update(self, pk: int, pages: int) -> Any:  # type: ignore[override]
        return self.m.Draft.objects.filter(pk=pk).update(pages=pages)

    def delete(self, obj: Any) -> Any:  # type: ignore[override]
        obj.delete()

    def get_or_create(self, values: dict[str, Any]) -> Any:  # type: ignore[override]
        return self.m.Draft.objects.get_or_create(title=values["title"], defaults=values)

    def transaction(self, values: dict[str, Any]) -> Any:  # type: ignore[override]
        from django.db.transaction import atomic

        Draft = self.m.Draft
        with atomic():
            key = Draft.objects.create(**values).pk
            Draft.objects.get(pk=key)
            Draft.objects.filter(pk=key).update(pages=7)
            there = Draft.objects.filter(pk=key).exists()
            Draft.objects.filter(pk=key).delete()
        return there

    def sleep(self) -> Any:  # type: ignore[override]
        for _ in range(10):
            list(sleeping(self.m))

    def stream(self) -> Any:
        return self.m.Event.objects.iterator(chunk_size=2000)

    def load(self, count: int) -> Any:  # type: ignore[override]
        return self.rows(1, count + 1)


def sleeping(models: Any) -> Any:
    """A queryset whose evaluation takes SLEEP seconds."""
    from django.db.models.expressions import RawSQL

    pause = RawSQL("pg_sleep(%s)::text", (SLEEP,))
    return models.Publisher.objects.filter(pk=1).annotate(pause=pause)


ADAPTER = DjangoSync
