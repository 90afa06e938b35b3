"""The views: nothing, one get, a logged-in user, a synchronous get, the admin, a list by REST.

The asynchronous ones have a synchronous form, for a server with threads.
"""

from typing import Any

from django.conf import settings
from django.contrib import admin
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.urls import path
from rest_framework.generics import ListAPIView
from rest_framework.permissions import AllowAny
from rest_framework.serializers import ModelSerializer

from . import process


async def empty(request: Any) -> HttpResponse:
    return HttpResponse("empty")


async def one(request: Any) -> HttpResponse:
    return HttpResponse((await User.objects.aget(pk=1)).username)


async def user(request: Any) -> HttpResponse:
    user = await request.auser()
    count = await request.session.aget("count", 0) + 1
    await request.session.aset("count", count)
    return HttpResponse(f"{user.username} {count} {await User.objects.acount()}")


async def taken(request: Any) -> HttpResponse:
    return HttpResponse(process.taken())


def empty_in_a_thread(request: Any) -> HttpResponse:
    return HttpResponse("empty")


def synchronous(request: Any) -> HttpResponse:
    return HttpResponse(User.objects.get(pk=1).username)


def user_in_a_thread(request: Any) -> HttpResponse:
    count = request.session.get("count", 0) + 1
    request.session["count"] = count
    return HttpResponse(f"{request.user.username} {count} {User.objects.count()}")


def taken_in_a_thread(request: Any) -> HttpResponse:
    return HttpResponse(process.taken())


class UserSerializer(ModelSerializer[User]):
    class Meta:
        model = User
        fields = ("id", "username", "first_name", "last_name", "email", "is_staff", "date_joined")


class Users(ListAPIView[User]):
    queryset = User.objects.order_by("pk")
    serializer_class = UserSerializer
    permission_classes = (AllowAny,)


threads = settings.SITE["handler"] == "wsgi"
urlpatterns = [
    path("empty/", empty_in_a_thread if threads else empty),
    path("one/", synchronous if threads else one),
    path("user/", user_in_a_thread if threads else user),
    path("synchronous/", synchronous),
    path("admin/", admin.site.urls),
    path("rest/", Users.as_view()),
    path("taken/", taken_in_a_thread if threads else taken),
]

if "django_async_backend" in settings.SITE["apps"]:
    from django_async_backend.db.models.manager import AsyncManager

    User.add_to_class("async_objects", AsyncManager())

    async def one_by_the_backend(request: Any) -> HttpResponse:
        return HttpResponse((await User.async_objects.aget(pk=1)).username)  # type: ignore[attr-defined]

    urlpatterns[1] = path("one/", one_by_the_backend)
