"""Requests as browsers make them, through the handler of asgi.py, on a real PostgreSQL."""

import asyncio

from asgiref.testing import ApplicationCommunicator
from django.contrib.auth.models import User
from django.test import (
    AsyncClient,
    AsyncRequestFactory,
    TestCase,
    TransactionTestCase,
    override_settings,
)

import asyncorm
from asyncorm.testing import native_only
from events.asgi import application
from events.models import Booking, Event

# What keeps the processor busy, as hashing passwords does, asyncorm's handler sends to a thread.
HASHING = "django.contrib.auth.hashers."
# Django's AsyncClient has threads of its own: for signals, the log, closing. A server has not.
CLIENT = ["django.dispatch.dispatcher", "django.utils.log", "django.http.response"]


@override_settings(PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"])
class Site(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.ann = User.objects.create_superuser("ann", password="secret")
        cls.event = Event.objects.create(title="Concert", places=1)

    async def test_a_visit_needs_a_thread_for_the_password_only(self):
        client = AsyncClient()
        with native_only(allow=CLIENT):
            response = await client.get("/")
            self.assertContains(response, "1 left")
            response = await client.get("/new/")
            self.assertRedirects(response, "/login/?next=/new/", fetch_redirect_response=False)
        data = {"username": "ann", "password": "secret"}
        with native_only(allow=[*CLIENT, HASHING]):
            response = await client.post("/login/?next=/new/", data)
            self.assertRedirects(response, "/new/", fetch_redirect_response=False)
        with native_only(allow=CLIENT):
            response = await client.post("/new/", {"title": "Concert", "places": 5})
            self.assertContains(response, "Event with this Title already exists.")
            response = await client.post("/new/", {"title": "Theatre", "places": 5}, follow=True)
            self.assertContains(response, "Theatre is announced.")
            response = await client.post(f"/{self.event.pk}/book/", follow=True)
            self.assertContains(response, "You have a place.")
            self.assertContains(response, "<li>ann</li>")
            response = await client.post(f"/{self.event.pk}/book/", follow=True)
            self.assertContains(response, "You have a place already.")
            self.assertContains(await client.post("/logout/", follow=True), "Log in")

    async def test_a_form_without_its_token_is_refused(self):
        client = AsyncClient(enforce_csrf_checks=True)
        await client.aforce_login(self.ann)
        with native_only(allow=CLIENT):
            response = await client.post(f"/{self.event.pk}/book/")
        self.assertEqual(response.status_code, 403)
        self.assertFalse(await Booking.objects.aexists())

    async def test_the_admin(self):
        client = AsyncClient()
        await client.aforce_login(self.ann)
        data = {
            "title": "Circus",
            "places": 10,
            "bookings-TOTAL_FORMS": 1,
            "bookings-INITIAL_FORMS": 0,
            "bookings-0-user": self.ann.pk,
        }
        with native_only(allow=CLIENT):
            response = await client.post("/admin/events/event/add/", data, follow=True)
            self.assertContains(response, "was added successfully")
            response = await client.get("/admin/events/event/?q=circ")
            self.assertContains(response, "1 result")
        self.assertEqual((await Booking.objects.aget()).user_id, self.ann.pk)


class AtOnce(TransactionTestCase):
    """Real connections and real commits, for what happens at the same time."""

    async def test_three_places_for_eight_people(self):
        event = await Event.objects.acreate(title="Concert", places=3)
        clients = [AsyncClient() for _ in range(8)]
        for number, client in enumerate(clients):
            await client.aforce_login(await User.objects.acreate(username=f"user{number}"))
        with native_only(allow=CLIENT):
            responses = await asyncio.gather(
                *[client.post(f"/{event.pk}/book/", follow=True) for client in clients]
            )
        pages = [response.content.decode() for response in responses]
        self.assertEqual(sum("You have a place." in page for page in pages), 3)
        self.assertEqual(sum("No place is left." in page for page in pages), 5)
        self.assertEqual(await Booking.objects.acount(), 3)

    async def test_forty_visitors_share_four_connections(self):
        await Event.objects.acreate(title="Concert", places=3)
        with native_only(allow=CLIENT):
            responses = await asyncio.gather(*[AsyncClient().get("/") for _ in range(40)])
        self.assertEqual({response.status_code for response in responses}, {200})
        stats = asyncorm.pool_stats()
        self.assertLessEqual(stats["pool_size"], 4)
        self.assertGreater(stats["statements_pipelined"], 0)  # they travelled together

    async def test_a_served_request_needs_no_thread_at_all(self):
        await Event.objects.acreate(title="Concert", places=3)
        scope = AsyncRequestFactory().get("/").scope
        with native_only():
            server = ApplicationCommunicator(application, scope)
            await server.send_input({"type": "http.request", "body": b""})
            start = await server.receive_output(timeout=30)
            body = await server.receive_output(timeout=30)
            await server.wait(timeout=30)
        self.assertEqual(start["status"], 200)
        self.assertIn("3 left", body["body"].decode())
