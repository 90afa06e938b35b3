"""The swap: every a* method of the project is native, what must stay in threads stays there."""

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import django
import pytest
from django.contrib.auth import aauthenticate, aget_user, alogin, alogout
from django.contrib.auth.backends import BaseBackend, ModelBackend
from django.contrib.auth.hashers import MD5PasswordHasher
from django.contrib.auth.models import Group, Permission, User
from django.contrib.contenttypes.models import ContentType
from django.contrib.contenttypes.prefetch import GenericPrefetch
from django.contrib.sessions.backends.base import SessionBase
from django.contrib.sessions.backends.cached_db import SessionStore as CachedSessionStore
from django.contrib.sessions.backends.db import SessionStore
from django.core.cache.backends.locmem import LocMemCache
from django.core.files.base import ContentFile
from django.core.files.storage import InMemoryStorage
from django.db.models import QuerySet, aprefetch_related_objects
from django.http import Http404, HttpRequest
from django.shortcuts import aget_list_or_404, aget_object_or_404
from django.test import RequestFactory, override_settings

import asyncorm
from tests.project.legacy.models import LegacyRecord
from tests.project.shop.models import (
    Author,
    Basket,
    Book,
    Customer,
    Document,
    Note,
    Order,
    PrintedBook,
    Publisher,
    Tag,
)
from tests.support import in_thread, run_script, watched_threads

Operation = Callable[[], Awaitable[Any]]
OPERATIONS: dict[str, Operation] = {}


@pytest.fixture(autouse=True)
def _fresh(fresh_shop: Any) -> None:
    # Naming a generic related manager looks it up, synchronously, where it is not in the cache.
    ContentType.objects.get_for_model(Book)


@contextmanager
def swapped(on: bool = True) -> Iterator[None]:
    with override_settings(ASYNCORM={"SWAP_MANAGERS": on}):
        yield


async def warm() -> None:
    await Tag.objects.native_count()


def operation(function: Operation) -> Operation:
    OPERATIONS[function.__name__] = function
    return function


@operation
async def default_manager() -> None:
    assert await Tag.objects.acount() == 6
    assert (await Tag.objects.aget(pk=1)).name == "classic"


@operation
async def queryset() -> None:
    tags = Tag.objects.filter(pk__lt=3).order_by("pk")
    assert await tags.aexists()
    assert (await tags.afirst()).pk == 1
    assert (await tags.alast()).pk == 2
    assert (await tags.aaggregate(n=django.db.models.Count("pk")))["n"] == 2
    assert set(await tags.ain_bulk()) == {1, 2}
    assert await tags.acontains(await tags.afirst())
    assert "Scan" in await tags.aexplain()


@operation
async def writes() -> None:
    tag = await Tag.objects.acreate(name="new")
    _, created = await Tag.objects.aget_or_create(name="new")
    assert not created
    tag, created = await Tag.objects.aupdate_or_create(name="new", defaults={"weight": 3})
    assert (tag.weight, created) == (3, False)
    await Tag.objects.abulk_create([Tag(name="a"), Tag(name="b")])
    tag.weight = 4
    assert await Tag.objects.abulk_update([tag], ["weight"]) == 1
    assert await Tag.objects.filter(name="new").aupdate(weight=5) == 1
    assert (await Tag.objects.filter(name__in=["new", "a", "b"]).adelete())[0] == 3


@operation
async def custom_managers() -> None:
    assert await Book.objects.recent().acount() >= 0  # from_queryset
    assert await Document.objects.alive().acount() == 3  # as_manager
    assert await PrintedBook.objects.acount() < await PrintedBook.everything.acount()


@operation
async def related_managers() -> None:
    publisher = await Publisher.objects.aget(pk=1)
    n = await publisher.books.acount()
    book = await publisher.books.acreate(title="New", price=1)
    assert await publisher.books.acount() == n + 1
    await publisher.books.aremove(book)
    await publisher.books.aadd(book)
    await publisher.books.aclear()
    await publisher.books.aset([book])


@operation
async def many_to_many() -> None:
    book, tag = await Book.objects.aget(pk=2), await Tag.objects.aget(pk=1)
    await book.tags.aadd(tag)
    assert await book.tags.acount() == 1
    await book.tags.aset([2, 3])
    await book.tags.aremove(2)
    made = await book.tags.acreate(name="made here")
    await book.tags.aget_or_create(name="made here")
    await book.tags.aupdate_or_create(name="made here", defaults={"weight": 9})
    assert [t.pk async for t in book.tags.order_by("pk")] == [3, made.pk]
    await book.tags.aclear()


@operation
async def generic_related_manager() -> None:
    book = await Book.objects.aget(pk=5)
    note = await book.notes.acreate(text="x")
    await book.notes.aget_or_create(text="x")
    await book.notes.aupdate_or_create(text="x", defaults={"text": "y"})
    assert [n.text async for n in book.notes.all()] == ["y"]
    await book.notes.aset([note])
    await book.notes.aadd(note)
    await book.notes.aremove(note)
    await book.notes.aclear()


@operation
async def instances() -> None:
    tag = Tag(name="mine")
    await tag.asave()
    await Tag.objects.filter(pk=tag.pk).aupdate(weight=7)
    await tag.arefresh_from_db()
    assert tag.weight == 7
    await tag.adelete()


@operation
async def iteration() -> None:
    assert len([tag async for tag in Tag.objects.all()]) == 6
    assert len([tag async for tag in Tag.objects.values_list("pk", flat=True)]) == 6
    assert len([tag async for tag in Tag.objects.aiterator(chunk_size=2)]) == 6
    books = Book.objects.order_by("pk").prefetch_related("tags")
    assert len([book.tags.all() async for book in books.aiterator(chunk_size=7)]) == 30


async def test_a_wrong_chunk_size_is_an_error_when_it_is_iterated() -> None:
    with swapped():
        for size in (0, -1):
            rows = Tag.objects.aiterator(chunk_size=size)
            with pytest.raises(ValueError, match="strictly positive"):
                await anext(rows)


@operation
async def raw_queryset() -> None:
    if hasattr(type(Tag.objects.raw("")), "__aiter__"):
        assert len([tag async for tag in Tag.objects.raw("SELECT * FROM shop_tag")]) == 6
    else:
        await Tag.objects.acount()


@operation
async def prefetching() -> None:
    books = [book async for book in Book.objects.filter(pk__lt=4)]
    await aprefetch_related_objects(books, "tags", "publisher__country")
    assert all("tags" in book._prefetched_objects_cache for book in books)


@operation
async def shortcuts() -> None:
    assert (await aget_object_or_404(Tag, pk=1)).pk == 1
    assert len(await aget_list_or_404(Tag, pk__lt=3)) == 2
    with pytest.raises(Http404):
        await aget_object_or_404(Tag, pk=1000)


@operation
async def paginator() -> None:
    try:
        from django.core.paginator import AsyncPaginator
    except ImportError:  # before Django 6.0
        await Tag.objects.acount()
        return
    pages = AsyncPaginator(Tag.objects.order_by("pk"), 4)
    assert await pages.acount() == 6
    page = await pages.apage(2)
    assert [tag.pk async for tag in page] == [5, 6]


@operation
async def permissions() -> None:
    user = await User.objects.aget(pk=2)
    permission = await Permission.objects.aget(codename="add_tag")
    assert not await user.ahas_perm("shop.add_tag")
    await user.user_permissions.aadd(permission)
    user = await User.objects.aget(pk=2)
    assert await user.ahas_perm("shop.add_tag")
    assert "shop.add_tag" in await user.aget_all_permissions()
    assert await user.ahas_module_perms("shop")


@operation
async def users() -> None:
    # set_password() hashes at once, in the caller, as Django does it.
    user = await User.objects.acreate_user("carl", password="secret")
    assert (await User.objects.aget_by_natural_key("carl")).pk == user.pk
    group = await Group.objects.acreate(name="new")
    await user.groups.aadd(group)


@operation
async def content_types() -> None:
    content_type = await ContentType.objects.aget(app_label="shop", model="tag")
    notes = Note.objects.prefetch_related(GenericPrefetch("target", [Book.objects.all()]))
    assert [note async for note in notes.filter(pk=1)]
    assert await ContentType.objects.filter(pk=content_type.pk).aexists()


@operation
async def sessions() -> None:
    session = SessionStore()
    await session.aset("key", "value")
    await session.asave()
    again = SessionStore(session.session_key)
    assert await again.aget("key") == "value"
    await again.acycle_key()
    assert await again.aexists(again.session_key)
    await again.adelete()
    await SessionStore.aclear_expired()


@pytest.mark.parametrize("name", OPERATIONS)
async def test_it_is_native(name: str) -> None:
    await warm()
    with swapped(), watched_threads() as seen:
        await OPERATIONS[name]()
    assert seen == []
    assert asyncorm.pool_stats()["requests_num"] > 1


@pytest.mark.parametrize("name", OPERATIONS)
async def test_without_the_swap_it_is_as_ever(name: str) -> None:
    """The same operations in Django's threads: what the test above watches for is there."""
    await warm()
    before = asyncorm.pool_stats()["requests_num"]
    with swapped(False), watched_threads() as seen:
        await OPERATIONS[name]()
    assert seen != []
    assert asyncorm.pool_stats()["requests_num"] == before
    await in_thread(lambda: None)


async def test_results_are_those_of_the_synchronous_calls() -> None:
    expected = await in_thread(lambda: list(Book.objects.order_by("pk").values()))
    with swapped():
        assert [row async for row in Book.objects.order_by("pk").values()] == expected


async def test_it_is_undone() -> None:
    await warm()
    with swapped(), watched_threads() as seen:
        await Tag.objects.acount()
    assert seen == []
    with watched_threads() as seen:
        await Tag.objects.acount()
    assert len(seen) >= 1
    await in_thread(lambda: None)


async def test_it_is_nested() -> None:
    await warm()
    with swapped():
        with swapped(False), watched_threads() as seen:
            await Tag.objects.acount()
        assert seen
        with watched_threads() as seen:
            await Tag.objects.acount()
        assert seen == []
    await in_thread(lambda: None)


def test_installed_from_the_start() -> None:
    done = run_script("""
import asyncio, threading, django
from django.conf import settings
settings.ASYNCORM = {"SWAP_MANAGERS": True}
django.setup()
from tests.project.shop.models import Tag
async def main():
    print(len([tag async for tag in Tag.objects.all()]), threading.active_count())
asyncio.run(main())
""")
    assert (done.stdout, done.stderr) == ("6 1\n", "")


# What the project overrides is honoured


async def test_overridden_methods_are_called_natively() -> None:
    threads: list[int] = []

    class Loud(QuerySet):
        def get(self, *args: Any, **kwargs: Any) -> Any:
            threads.append(threading.get_ident())
            return super().get(*args, **kwargs)

    await warm()
    with swapped(), watched_threads() as seen:
        await Loud(Tag).aget(pk=1)
        document = await Document.objects.aget(key="DOC1")  # get() of the model's queryset
        revision = document.revision
        await document.asave()  # save() counts revisions
        await document.adelete()  # delete() only marks
        await document.arefresh_from_db()
    assert seen == []
    assert threads == [threading.get_ident()]
    assert (document.revision, document.deleted) == (revision + 2, True)


async def test_receivers_run_on_the_loops_thread() -> None:
    from django.db.models.signals import post_save

    threads: list[int] = []

    def receiver(**kwargs: Any) -> None:
        threads.append(threading.get_ident())

    post_save.connect(receiver, sender=Basket)
    try:
        with swapped():
            await Basket.objects.acreate(name="x")
    finally:
        post_save.disconnect(receiver, sender=Basket)
    assert threads == [threading.get_ident()]


async def test_inside_a_block_everything_is_rolled_back_together() -> None:
    with swapped():
        with pytest.raises(ZeroDivisionError):
            async with asyncorm.atomic():
                await Tag.objects.acreate(name="a")
                session = SessionStore()
                await session.asave()
                await User.objects.acreate_user("carl")
                raise ZeroDivisionError
        assert not await Tag.objects.filter(name="a").aexists()
        assert not await session.aexists(session.session_key)
        assert not await User.objects.filter(username="carl").aexists()


# What stays in threads


@pytest.mark.skipif(django.VERSION < (6, 0), reason="Django 5.2 hashes on the loop itself")
async def test_hashing_a_password_stays_in_a_thread() -> None:
    threads: list[int] = []

    class Hasher(MD5PasswordHasher):
        algorithm = "watched"

        def encode(self, password: str, salt: str) -> str:
            threads.append(threading.get_ident())
            digest = hashlib.sha1((salt + password).encode()).hexdigest()
            return f"{self.algorithm}${salt}${digest}"

    with override_settings(PASSWORD_HASHERS=[f"{__name__}.WatchedHasher"]):
        globals()["WatchedHasher"] = Hasher
        with swapped():
            user = User(username="dora")
            user.set_password("secret")
            await user.asave()
            threads.clear()
            assert await user.acheck_password("secret")
            found = await aauthenticate(username="dora", password="secret")
            assert await aauthenticate(username="dora", password="wrong") is None
    assert found is not None and found.pk == user.pk
    assert len(threads) >= 3
    assert threading.get_ident() not in threads


class OwnBackend(BaseBackend):
    """Somebody's directory service: it blocks."""

    seen: list[int] = []

    def authenticate(self, request: Any, **credentials: Any) -> Any:
        self.seen.append(threading.get_ident())
        return User(pk=1, username="from outside")

    def get_user_permissions(self, user_obj: Any, obj: Any = None) -> set[str]:
        self.seen.append(threading.get_ident())
        return {"shop.fly"}


class OwnModelBackend(ModelBackend):
    """Overrides a method of Django's backend with one that blocks."""

    seen: list[int] = []

    def get_user_permissions(self, user_obj: Any, obj: Any = None) -> set[str]:
        self.seen.append(threading.get_ident())
        return {"shop.swim"}


async def test_other_peoples_auth_backends_stay_in_threads() -> None:
    with (
        swapped(),
        override_settings(AUTHENTICATION_BACKENDS=[f"{__name__}.OwnBackend"]),
    ):
        assert (await aauthenticate(name="x")).username == "from outside"  # type: ignore[union-attr]
        assert await User(pk=1).ahas_perm("shop.fly")
    assert len(OwnBackend.seen) == 2
    assert threading.get_ident() not in OwnBackend.seen


class OwnSession(SessionBase):
    """Somebody's session store."""

    seen: list[int] = []

    def load(self) -> dict[str, Any]:
        self.seen.append(threading.get_ident())
        return {"a": 1}

    def exists(self, session_key: str) -> bool:
        self.seen.append(threading.get_ident())
        return False


async def test_other_peoples_sessions_stay_in_threads() -> None:
    with swapped():
        session = OwnSession("x" * 32)
        assert await session.aget("a") == 1
        assert not await session.aexists("y")
    assert len(OwnSession.seen) == 2
    assert threading.get_ident() not in OwnSession.seen


class WatchedCache(LocMemCache):
    seen: list[int] = []

    def get(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(threading.get_ident())
        return super().get(*args, **kwargs)

    def set(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(threading.get_ident())
        return super().set(*args, **kwargs)


async def test_the_cache_of_cached_sessions_stays_in_a_thread() -> None:
    with swapped(), override_settings(CACHES={"default": {"BACKEND": f"{__name__}.WatchedCache"}}):
        before = asyncorm.pool_stats().get("requests_num", 0)
        session = CachedSessionStore()
        await session.aset("key", "value")
        await session.asave()
        again = CachedSessionStore(session.session_key)
        assert await again.aget("key") == "value"
        assert asyncorm.pool_stats()["requests_num"] > before
    assert len(WatchedCache.seen) >= 2
    assert threading.get_ident() not in WatchedCache.seen


class WatchedStorage(InMemoryStorage):
    seen: list[int] = []

    def _save(self, name: str, content: Any) -> str:
        self.seen.append(threading.get_ident())
        return super()._save(name, content)

    def delete(self, name: str) -> None:
        self.seen.append(threading.get_ident())
        super().delete(name)


@pytest.mark.parametrize("name", ["native_save", "asave"])
async def test_a_file_is_stored_in_a_thread_and_its_model_saved_natively(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = Book._meta.get_field("sample")
    storage = WatchedStorage()
    monkeypatch.setattr(field, "storage", storage)
    monkeypatch.setattr(WatchedStorage, "seen", [])
    with swapped():
        before = asyncorm.pool_stats().get("requests_num", 0)
        book = Book(title="With a file", price=1)
        book.sample = ContentFile(b"content", name="file.txt")
        await getattr(book, name)()
        assert asyncorm.pool_stats()["requests_num"] > before
        found = await Book.objects.aget(pk=book.pk)
        assert found.sample.name == book.sample.name
        assert storage.exists(book.sample.name)
        await asyncorm.native(book.sample.delete)()
        assert not storage.exists("samples/file.txt")
    assert len(WatchedStorage.seen) == 2
    assert threading.get_ident() not in WatchedStorage.seen
    assert field.storage is storage


# Other engines


async def test_an_alias_of_another_engine_stays_on_djangos_path() -> None:
    from django.db import connections

    def create() -> None:
        with connections["legacy"].schema_editor() as editor:
            tables = connections["legacy"].introspection.table_names()
            if LegacyRecord._meta.db_table not in tables:
                editor.create_model(LegacyRecord)

    from asgiref.sync import sync_to_async

    await sync_to_async(create)()
    with swapped(), watched_threads() as seen:
        record = await LegacyRecord.objects.acreate(name="x")
        assert await LegacyRecord.objects.acount() == 1
        assert [r.name async for r in LegacyRecord.objects.all()] == ["x"]
        assert [r.name async for r in LegacyRecord.objects.aiterator()] == ["x"]
        assert (await aget_object_or_404(LegacyRecord, name="x")).pk == record.pk
        record.value = 3
        await record.asave()
        await record.arefresh_from_db()
        assert record.value == 3
        await record.adelete()
        assert not await LegacyRecord.objects.aexists()
    assert len(seen) >= 8
    assert asyncorm.pool_stats() == {}


async def test_both_engines_at_once() -> None:
    with swapped():
        counts = await asyncio.gather(Tag.objects.acount(), Author.objects.acount())
        assert all(counts)
        assert await Order.objects.using("other").acount() == 12


# The whole way of a request


async def test_login_and_logout() -> None:
    await warm()
    request: HttpRequest = RequestFactory().get("/")
    request.session = SessionStore()
    with swapped():
        user = await User.objects.aget(pk=1)
        await alogin(request, user, backend="django.contrib.auth.backends.ModelBackend")
        await request.session.asave()
        again: HttpRequest = RequestFactory().get("/")
        again.session = SessionStore(request.session.session_key)
        found = await aget_user(again)
        assert found.pk == 1
        await alogout(again)
        assert (await aget_user(again)).is_anonymous
    # Signal.asend() calls synchronous receivers (of last_login) in a thread.
    await in_thread(lambda: None)


async def test_lazy_relations_are_loaded_before() -> None:
    """The swap does not change that attributes cannot wait: Django's error stays."""
    from django.core.exceptions import SynchronousOnlyOperation

    with swapped():
        customer = await Customer.objects.aget(pk=1)
        with pytest.raises(SynchronousOnlyOperation):
            _ = customer.user
        customer = await Customer.objects.select_related("user").aget(pk=1)
        assert customer.user is not None
