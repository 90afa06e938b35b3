"""Native views and a synchronous one."""

import asyncio

from django.http import HttpResponse, JsonResponse

import asyncorm
from bookshop.models import Book


async def books(request):
    """Two queries at once."""
    titles, number = await asyncio.gather(
        Book.objects.order_by("pk").values_list("title", flat=True).anative(),
        Book.objects.acount(),
    )
    return JsonResponse({"titles": titles, "number": number})


async def add_book(request):
    """One transaction, with a callback after it."""
    async with asyncorm.atomic():
        book = await Book.objects.acreate(title=request.POST["title"])
        asyncorm.on_commit(lambda: asyncio.sleep(0))
    return HttpResponse(book.pk)
