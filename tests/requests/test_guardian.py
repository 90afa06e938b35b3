"""Permissions for each object, by django-guardian and Django REST framework, under our handler.

guardian's is an authentication backend that is not Django's: outside a transaction it waits for a
thread, and in ATOMIC_REQUESTS it takes part in the transaction.
"""

import json
from typing import Any

import pytest

from tests.support import run_script

SCRIPT = """
import asyncio, json
from django.conf import settings
import tests.project.settings as base
names = {name: getattr(base, name) for name in dir(base) if name.isupper()}
names.update(
    INSTALLED_APPS=[*names["INSTALLED_APPS"], "guardian"], ROOT_URLCONF="__main__",
    ALLOWED_HOSTS=["*"], ANONYMOUS_USER_NAME=None,
    GUARDIAN_MONKEY_PATCH_USER=False, GUARDIAN_MONKEY_PATCH_GROUP=False,
    AUTHENTICATION_BACKENDS=["django.contrib.auth.backends.ModelBackend",
                             "guardian.backends.ObjectPermissionBackend"],
    ASYNCORM={"SWAP_MANAGERS": True, "NATIVE_VIEWS": ["__main__"]})
settings.configure(**names)
import django
django.setup()
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application as djangos
from django.db import connection, connections
from django.urls import path
from guardian.models import GroupObjectPermission, UserObjectPermission
from guardian.shortcuts import assign_perm, get_objects_for_user
from rest_framework.authentication import BaseAuthentication
from rest_framework.generics import ListAPIView, RetrieveUpdateAPIView
from rest_framework.permissions import DjangoObjectPermissions
from rest_framework.renderers import JSONRenderer
from rest_framework.parsers import JSONParser
from rest_framework.serializers import ModelSerializer
import asyncorm
from asyncorm.asgi import get_asgi_application
from tests.asgi_client import ask
from tests.project.myapp.models import Item
from tests.support import all_given_back, watched_threads

class ItemSerializer(ModelSerializer):
    class Meta:
        model = Item
        fields = ["remote_id", "name"]
class ByHeader(BaseAuthentication):
    def authenticate(self, request):
        return User.objects.get(username=request.headers["who"]), None
class Own(RetrieveUpdateAPIView):
    queryset = Item.objects.all()
    serializer_class = ItemSerializer
    authentication_classes = [ByHeader]
    permission_classes = [DjangoObjectPermissions]
    renderer_classes = [JSONRenderer]
    parser_classes = [JSONParser]
    lookup_field = "remote_id"
class Mine(ListAPIView):
    serializer_class = ItemSerializer
    authentication_classes = [ByHeader]
    renderer_classes = [JSONRenderer]
    permission_classes = []
    def get_queryset(self):
        return get_objects_for_user(self.request.user, "myapp.change_item").order_by("remote_id")
urlpatterns = [path("mine/", Mine.as_view()), path("<int:remote_id>/", Own.as_view())]

def prepare():
    with connection.schema_editor() as editor:
        for model in UserObjectPermission, GroupObjectPermission:
            editor.create_model(model)
    Item.objects.create(remote_id=1, name="one"), Item.objects.create(remote_id=2, name="two")
    for name in "one", "two":
        user = User.objects.create(username=name)
        assign_perm("myapp.change_item", user)
        assign_perm("myapp.change_item", user, Item.objects.get(name=name))

def clear():
    Item.objects.all().delete()
    User.objects.all().delete()
    with connection.schema_editor() as editor:
        for model in UserObjectPermission, GroupObjectPermission:
            editor.delete_model(model)
    connection.close()

async def asked(app):
    found = []
    for who in "one", "two":
        found.append((await ask(app, "/mine/", who=who)).body)
        for number in 1, 2:
            answer = await ask(app, f"/{number}/", method="PATCH", who=who,
                               body=b'{"name": "changed"}', content_type="application/json")
            found.append([answer.status, answer.body])
        await Item.objects.filter(remote_id=1).aupdate(name="one")
        await Item.objects.filter(remote_id=2).aupdate(name="two")
    return found

async def main():
    await sync_to_async(prepare)()
    try:
        ours, found = get_asgi_application(), []
        for atomic in False, True:
            connections.settings["default"]["ATOMIC_REQUESTS"] = atomic
            theirs = await asked(djangos())
            await asked(ours)
            with watched_threads() as threads:
                found.append([theirs, await asked(ours), len(threads)])
        await all_given_back()
        return found
    finally:
        await sync_to_async(clear)()
        await asyncorm.close_pools()
print(json.dumps(asyncio.run(main())))
"""


def test_permissions_of_objects(transactional_db: Any) -> None:
    pytest.importorskip("guardian")
    pytest.importorskip("rest_framework")
    done = run_script(SCRIPT, "-W", "ignore")
    assert done.returncode == 0, done.stderr
    for atomic, (theirs, ours, threads) in enumerate(json.loads(done.stdout)):
        assert ours == theirs
        assert [each[0] for each in ours if isinstance(each, list)] == [200, 403, 403, 200]
        assert (threads == 0) == bool(atomic)
