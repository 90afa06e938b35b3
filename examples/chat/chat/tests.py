"""Browsers in rooms, on a real PostgreSQL: what is said is heard when it is committed.

TransactionTestCase, since notifications are delivered at a real commit.
"""

import asyncio
import sys

from channels.testing import WebsocketCommunicator
from django.core.management import call_command
from django.db import connection
from django.test import SimpleTestCase, TransactionTestCase

import asyncorm
from asyncorm.testing import native_only
from chat.asgi import application
from chat.models import ACTIVITY, Message, say

# Channels closes old synchronous connections in a thread at each message (which its test client
# replaces by nothing), Django's AsyncClient sends signals and closes in one. The chat needs none.
OTHERS = ["channels.testing.", "django.dispatch.dispatcher", "django.http.response"]
ORIGIN = [(b"origin", b"http://localhost")]


async def enter(room):
    """A browser in a room."""
    browser = WebsocketCommunicator(application, f"/rooms/{room}/", headers=ORIGIN)
    connected, _ = await browser.connect(timeout=30)
    assert connected
    return browser


async def leave(*browsers):
    for browser in browsers:
        await browser.disconnect(timeout=30)


class Chat(TransactionTestCase):
    async def test_everybody_in_the_room_hears_it(self):
        with native_only(allow=OTHERS):
            ann, bob, carl = await asyncio.gather(enter("lobby"), enter("lobby"), enter("garden"))
            await ann.send_json_to({"author": "Ann", "text": "Hello"})
            for browser in ann, bob:
                heard = await browser.receive_json_from(timeout=30)
                self.assertEqual((heard["author"], heard["text"]), ("Ann", "Hello"))
            await carl.send_json_to({"author": "Carl", "text": "Alone"})
            self.assertEqual((await carl.receive_json_from(timeout=30))["text"], "Alone")
            self.assertTrue(await bob.receive_nothing())
            late = await enter("lobby")
            self.assertEqual(await late.receive_json_from(timeout=30), heard)
            await leave(ann, bob, carl, late)
        self.assertEqual(await Message.objects.acount(), 2)

    async def test_what_is_not_valid_is_told_to_its_author_only(self):
        ann, bob = await asyncio.gather(enter("lobby"), enter("lobby"))
        await ann.send_json_to({"author": "Ann"})
        heard = await ann.receive_json_from(timeout=30)
        self.assertEqual(list(heard["errors"]), ["text"])
        self.assertTrue(await bob.receive_nothing())
        await leave(ann, bob)

    async def test_what_is_rolled_back_was_not_said(self):
        ann = await enter("lobby")
        with self.assertRaises(ZeroDivisionError):
            async with asyncorm.atomic():
                await say("lobby", "Bob", "never")
                raise ZeroDivisionError
        await say("lobby", "Bob", "kept")
        self.assertEqual((await ann.receive_json_from(timeout=30))["text"], "kept")
        await leave(ann)

    async def test_a_crowd_at_once(self):
        """Forty people in a room talk at once: eight connections, each hears every message."""
        with native_only(allow=OTHERS):
            crowd = await asyncio.gather(*[enter("lobby") for _ in range(40)])
            await asyncio.gather(*[say("lobby", f"{n}", "Hello") for n in range(40)])
            for browser in crowd:
                heard = [await browser.receive_json_from(timeout=30) for _ in crowd]
                self.assertEqual(len({message["author"] for message in heard}), 40)
            self.assertLessEqual(asyncorm.pool_stats()["pool_size"], 8)
            await leave(*crowd)

    async def test_another_process_takes_part(self):
        ann = await enter("lobby")
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", OTHER, connection.settings_dict["NAME"]]
        )
        self.assertEqual((await ann.receive_json_from(timeout=60))["text"], "from outside")
        self.assertEqual(await process.wait(), 0)
        await leave(ann)


OTHER = """
import os, sys
os.environ["PGDATABASE"] = sys.argv[1]
os.environ["DJANGO_SETTINGS_MODULE"] = "chat.settings"
import django
django.setup()
from django.core.management import call_command
call_command("say", "lobby", "Zoe", "from outside")
"""


class Activity(TransactionTestCase):
    async def test_streams_share_one_connection(self):
        with native_only(allow=OTHERS):
            responses = [await self.async_client.get("/activity/") for _ in range(3)]
            streams = [aiter(response) for response in responses]
            for stream in streams:
                self.assertEqual(await anext(stream), b": listening\n\n")
            async with asyncorm.cursor() as cursor:
                await cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND query LIKE %s",
                    ["LISTEN%"],
                )
                self.assertEqual(await cursor.fetchone(), (1,))
            await say("garden", "Ann", "Hello")
            await asyncorm.notify(ACTIVITY, "elsewhere")
            for stream in streams:
                self.assertEqual(await anext(stream), b"data: garden\n\n")
                self.assertEqual(await anext(stream), b"data: elsewhere\n\n")
                await stream.aclose()

    async def test_the_page_opens_the_socket_of_its_room(self):
        with native_only(allow=OTHERS):
            response = await self.async_client.get("/rooms/garden/")
        self.assertContains(response, "${location.host}/rooms/garden/")


class Command(TransactionTestCase):
    def test_say(self):
        call_command("say", "lobby", "Zoe", "Hello")
        self.assertEqual(str(Message.objects.get()), "Zoe: Hello")


class Origins(SimpleTestCase):
    async def test_other_sites_are_refused(self):
        headers = [(b"origin", b"http://evil.example")]
        browser = WebsocketCommunicator(application, "/rooms/lobby/", headers=headers)
        self.assertFalse((await browser.connect(timeout=30))[0])
