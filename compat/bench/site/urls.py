"""The views: nothing, one get, a logged-in user, a synchronous get, the admin."""

import time
from typing import Any

from django.contrib import admin
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.urls import path


async def empty(request: Any) -> HttpResponse:
    return HttpResponse("empty")


async def one(request: Any) -> HttpResponse:
    return HttpResponse((await User.objects.aget(pk=1)).username)


async def user(request: Any) -> HttpResponse:
    user = await request.auser()
    count = await request.session.aget("count", 0) + 1
    await request.session.aset("count", count)
    return HttpResponse(f"{user.username} {count} {await User.objects.acount()}")


def synchronous(request: Any) -> HttpResponse:
    return HttpResponse(User.objects.get(pk=1).username)


async def cpu(request: Any) -> HttpResponse:
    """How much CPU time this process has taken."""
    return HttpResponse(repr(time.process_time()))


urlpatterns = [
    path("empty/", empty),
    path("one/", one),
    path("user/", user),
    path("synchronous/", synchronous),
    path("cpu/", cpu),
    path("admin/", admin.site.urls),
]
