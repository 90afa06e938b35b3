"""For orientation: django-bolt, with a server of its own, no MIDDLEWARE, and a* methods."""

from typing import Any

from django.contrib.auth.models import User
from django_bolt import BoltAPI
from django_bolt.responses import PlainText

from . import process

api = BoltAPI(trailing_slash="keep")


@api.get("/empty/")
async def empty() -> PlainText:
    return PlainText("empty")


@api.get("/one/")
async def one() -> PlainText:
    return PlainText((await User.objects.aget(pk=1)).username)


@api.get("/rest/")
async def rest() -> Any:
    names = ("id", "username", "first_name", "last_name", "email", "is_staff", "date_joined")
    return [
        {name: getattr(user, name) for name in names} async for user in User.objects.order_by("pk")
    ]


@api.get("/taken/")
async def taken() -> PlainText:
    return PlainText(process.taken())
