"""Requests as clients make them, through the handler of asgi.py, on a real PostgreSQL."""

import asyncio
from base64 import b64encode

from django.contrib.auth.models import User
from django.test import AsyncClient, TestCase, TransactionTestCase, override_settings

import asyncorm
from asyncorm.testing import native_only
from library.models import Author, Book, Loan

# What keeps the processor busy, as hashing passwords does, asyncorm's handler sends to a thread.
HASHING = "django.contrib.auth.hashers."
# Django's AsyncClient has threads of its own: for signals, the log, closing. A server has not.
CLIENT = ["django.dispatch.dispatcher", "django.utils.log", "django.http.response"]


def sent_by(name):
    """What a client of that name sends beside the address: JSON and a password."""
    credentials = b64encode(f"{name}:secret".encode()).decode()
    headers = {"authorization": f"Basic {credentials}"}
    return {"headers": headers, "content_type": "application/json"}


@override_settings(PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"])
class Api(TestCase):
    @classmethod
    def setUpTestData(cls):
        User.objects.create_user("ann", password="secret")
        cls.author = Author.objects.create(name="Le Guin")
        cls.book = Book.objects.create(title="The Dispossessed", author=cls.author, copies=1)

    async def test_reading_needs_no_thread(self):
        with native_only(allow=CLIENT), self.assertNumQueries(1):
            response = await self.async_client.get("/books/")
        self.assertEqual(
            response.json(),
            [
                {
                    "id": self.book.pk,
                    "title": "The Dispossessed",
                    "author": self.author.pk,
                    "author_name": "Le Guin",
                    "copies": 1,
                }
            ],
        )

    async def test_writing_needs_one_for_the_password_only(self):
        client, ann = self.async_client, sent_by("ann")
        with native_only(allow=[*CLIENT, HASHING]):
            author = await client.post("/authors/", {"name": "Lem"}, **ann)
            self.assertEqual(author.status_code, 201, author.content)
            again = await client.post("/authors/", {"name": "Lem"}, **ann)
            self.assertEqual(again.status_code, 400)
            address = f"/authors/{author.json()['id']}/"
            changed = await client.patch(address, {"name": "Stanisław Lem"}, **ann)
            self.assertEqual(changed.json()["name"], "Stanisław Lem")
            self.assertEqual((await client.delete(address, **ann)).status_code, 204)
        self.assertEqual(await Author.objects.acount(), 1)

    async def test_strangers_only_read(self):
        with native_only(allow=CLIENT):
            response = await self.async_client.post(f"/books/{self.book.pk}/lend/")
        self.assertEqual(response.status_code, 401)

    async def test_what_is_not_there(self):
        with native_only(allow=[*CLIENT, HASHING]):
            response = await self.async_client.post(
                f"/books/{self.book.pk + 1}/lend/", **sent_by("ann")
            )
        self.assertEqual(response.status_code, 404)


@override_settings(PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"])
class AtOnce(TransactionTestCase):
    """Real connections and real commits, for what happens at the same time."""

    async def test_three_copies_for_eight_readers(self):
        author = await Author.objects.acreate(name="Le Guin")
        book = await Book.objects.acreate(title="The Dispossessed", author=author, copies=3)
        names = [f"reader{number}" for number in range(8)]
        for name in names:
            await User.objects.acreate_user(name, password="secret")
        with native_only(allow=[*CLIENT, HASHING]):
            responses = await asyncio.gather(
                *[AsyncClient().post(f"/books/{book.pk}/lend/", **sent_by(name)) for name in names]
            )
        statuses = sorted(response.status_code for response in responses)
        self.assertEqual(statuses, [201] * 3 + [409] * 5)
        await book.arefresh_from_db()
        self.assertEqual((book.copies, await Loan.objects.acount()), (0, 3))

    async def test_the_summary_is_one_round_trip(self):
        await Author.objects.acreate(name="Lem")
        before = asyncorm.pool_stats()
        with native_only(allow=CLIENT):
            response = await self.async_client.get("/summary/")
        after = asyncorm.pool_stats()
        self.assertEqual(response.json(), {"authors": 1, "books": 0, "loans": 0})
        grown = [after[key] - before.get(key, 0) for key in ("pipelines", "statements_pipelined")]
        self.assertEqual(grown, [1, 3])
