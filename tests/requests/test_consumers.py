"""Consumers of Channels: a message needs no thread, unless a thread has a connection to close."""

import pytest

from tests.support import run_script

_SETUP = """
import asyncio, threading
import django
from tests.project import settings
settings.DATABASES["default"]["OPTIONS"]["pool"] = None
settings.ASYNCORM = {"SWAP_MANAGERS": True}
if not FOREIGN:
    del settings.DATABASES["legacy"]
    settings.DATABASE_ROUTERS = []
django.setup()
from asgiref.sync import sync_to_async
from asgiref.testing import ApplicationCommunicator
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from channels.testing import ApplicationCommunicator as ChannelsCommunicator
from django.db import connections
from asyncorm.testing import native_only
from tests.project.shop.models import Tag
from tests.support import administrator

class Count(AsyncJsonWebsocketConsumer):
    async def receive_json(self, content):
        await self.send_json(await Tag.objects.acount())

async def ask(socket):
    await socket.send_input({"type": "websocket.receive", "text": "{}"})
    return int((await socket.receive_output(10))["text"])

async def connected(client=ApplicationCommunicator):
    socket = client(Count.as_asgi(), {"type": "websocket", "path": "/"})
    await socket.send_input({"type": "websocket.connect"})
    assert (await socket.receive_output(10))["type"] == "websocket.accept"
    return socket

async def disconnect(socket):
    await socket.send_input({"type": "websocket.disconnect", "code": 1000})
    await socket.wait(10)

def opened():
    Tag.objects.count()
    own = connections["default"]
    assert own.connection is not None
    return own
"""

_NATIVE = """
async def main():
    for client in (ApplicationCommunicator, ChannelsCommunicator):
        with native_only():
            socket = await connected(client)
            number = await ask(socket)
            assert [await ask(socket) for _ in range(3)] == [number] * 3
            await disconnect(socket)

asyncio.run(main())
print("OK")
"""

_THREAD = """
async def main():
    socket = await connected()
    theirs = await sync_to_async(opened)()
    await ask(socket)
    assert theirs.connection is None  # its thread was asked, as on stock Channels
    with native_only():
        await ask(socket)
    theirs = await sync_to_async(opened)()
    theirs.close_at = None  # CONN_MAX_AGE None
    await ask(socket)
    assert theirs.connection is not None
    await sync_to_async(connections.close_all)()
    await disconnect(socket)

asyncio.run(main())
print("OK")
"""

_FOREIGN = """
async def main():
    try:
        with native_only():
            await connected()
    except AssertionError as exc:
        assert "close_old_connections" in str(exc)
        print("OK")

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("script", "foreign"),
    [(_NATIVE, False), (_THREAD, False), (_FOREIGN, True)],
    ids=["native", "thread", "foreign"],
)
def test_a_consumers_messages(script: str, foreign: bool, fresh_shop: object) -> None:
    # Channels' own test client warns of asyncio's policies on newer Pythons.
    done = run_script(f"FOREIGN = {foreign}\n{_SETUP}{script}", "-W", "default::DeprecationWarning")
    assert done.stdout == "OK\n", done.stderr
