"""Async views over the shop, native by their own choice."""

import os

from django.http import HttpRequest, JsonResponse

import asyncorm
from tests.project.shop.models import Book


async def books(request: HttpRequest) -> JsonResponse:
    rows = await Book.objects.order_by("pk").values("pk", "title").anative()
    return JsonResponse({"books": rows})


async def book(request: HttpRequest, pk: int) -> JsonResponse:
    try:
        found = await Book.objects.select_related("publisher").native_get(pk=pk)
    except Book.DoesNotExist:
        return JsonResponse({"error": f"there is no book {pk}"}, status=404)
    publisher = found.publisher.name if found.publisher else None
    return JsonResponse({"pk": found.pk, "title": found.title, "publisher": publisher})


async def processes(request: HttpRequest) -> JsonResponse:
    """Who serves: the process here and that of the database."""
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT pg_backend_pid()")
        (backend,) = await cursor.fetchone()
    return JsonResponse({"here": os.getpid(), "backend": backend})
