"""Native views, and a synchronous one beside them."""

import asyncio
import hashlib

from django.contrib import messages
from django.contrib.auth import aauthenticate, alogin, alogout
from django.contrib.auth.decorators import login_required, permission_required
from django.contrib.contenttypes.models import ContentType
from django.db import transaction
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.shortcuts import aget_object_or_404, redirect
from django.utils.translation import gettext

import asyncorm
from bookshop.models import Book, Visit


async def books(request):
    """Two queries at once."""
    titles, number = await asyncio.gather(
        Book.objects.order_by("pk").values_list("title", flat=True).anative(),
        Book.objects.acount(),
    )
    return JsonResponse({"titles": titles, "number": number})


def books_synchronously(request):
    return JsonResponse({"titles": [*Book.objects.order_by("pk").values_list("title", flat=True)]})


async def book(request, pk):
    found = await aget_object_or_404(Book.objects.select_related("publisher"), pk=pk)
    kind = await ContentType.objects.aget(app_label="bookshop", model="book")
    return JsonResponse({"title": found.title, "type": kind.pk})


async def add_book(request):
    """One transaction, with a callback after it."""
    async with asyncorm.atomic():
        book = await Book.objects.acreate(title=request.POST["title"])
        asyncorm.on_commit(lambda: asyncio.sleep(0))
    return HttpResponse(book.pk)


@permission_required("bookshop.add_book", raise_exception=True)
async def add_book_if_allowed(request):
    response = await add_book(request)
    messages.success(request, "added")
    return response


async def log_in(request):
    if request.method == "GET":
        return JsonResponse({"token": get_token(request)})
    user = await aauthenticate(
        request, username=request.POST["username"], password=request.POST["password"]
    )
    if user is None:
        return HttpResponse("wrong", status=403)
    await alogin(request, user)
    return redirect("whoami")


async def log_out(request):
    await alogout(request)
    return HttpResponse()


@login_required
async def whoami(request):
    """The user, what they may, how often they were here, and what they were told since."""
    user = await request.auser()
    visits = await request.session.aget("visits", 0) + 1
    await request.session.aset("visits", visits)
    return JsonResponse(
        {
            "user": user.username,
            "may_add": await user.ahas_perm("bookshop.add_book"),
            "visits": visits,
            "messages": [str(message) for message in messages.get_messages(request)],
        }
    )


async def stream(request):
    """Rows as they come from a server-side cursor; with ?slow=1 for as long as somebody reads."""

    async def lines():
        async for book in Book.objects.order_by("pk").aiterator(chunk_size=2):
            yield f"{book.title}\n"
            if "slow" in request.GET:
                await asyncio.sleep(0.5)

    return StreamingHttpResponse(lines(), content_type="text/plain")


async def upload(request):
    """What has arrived, and in which language the client is answered."""
    file = request.FILES["file"]
    body = hashlib.sha256(b"".join(file.chunks())).hexdigest()
    return JsonResponse({"name": file.name, "body": body, "yes": gettext("Yes")})


async def visit(request, token):
    """Leave a row, then take some time."""
    await Visit.objects.acreate(token=token)
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT pg_sleep(%s)", [float(request.GET.get("seconds", 0.1))])
    return HttpResponse(token)


async def visit_and_fail(request, token):
    """Rolled back where the request is a transaction."""
    await Visit.objects.acreate(token=token)
    raise ValueError(token)


@transaction.non_atomic_requests
async def pool(request):
    """Called while others run: it must not hold a connection itself."""
    return JsonResponse(asyncorm.pool_stats())
