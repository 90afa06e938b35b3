"""What may block is kept off the loop by itself in native code; a watchdog names what is not."""

import asyncio
import logging
import threading
import time
from typing import Any

import pytest
from django.contrib import auth, messages
from django.contrib.auth.backends import BaseBackend, ModelBackend
from django.contrib.auth.hashers import PBKDF2PasswordHasher, make_password
from django.contrib.auth.models import User
from django.contrib.messages.storage.base import BaseStorage
from django.contrib.sessions.backends.base import CreateError
from django.contrib.sessions.backends.base import SessionBase as Base
from django.contrib.sessions.backends.db import SessionStore as DatabaseStore
from django.core import mail
from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage, InMemoryStorage, storages
from django.core.mail.backends.base import BaseEmailBackend
from django.db import connections, transaction
from django.http import HttpResponse
from django.urls import path

import asyncorm
from asyncorm.asgi import get_asgi_application, native_view
from tests.asgi_client import ask
from tests.support import all_given_back, eventually, watched_threads

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "legacy"]),
    pytest.mark.filterwarnings("ignore:The EMAIL_BACKEND setting"),
]

seen: list[str] = []


def note(what: str) -> None:
    here = "loop" if threading.current_thread() is threading.main_thread() else "thread"
    seen.append(f"{what} ({here})")


class RemoteCache(LocMemCache):
    def get(self, *args: Any, **kwargs: Any) -> Any:
        note("cache get")
        return super().get(*args, **kwargs)

    def set(self, *args: Any, **kwargs: Any) -> Any:
        note("cache set")
        return super().set(*args, **kwargs)

    def __contains__(self, key: Any) -> bool:
        note("cache in")
        return super().__contains__(key)


class RemoteFile(ContentFile):  # type: ignore[type-arg]
    def read(self, *args: Any) -> Any:
        note("file read")
        return super().read(*args)


class RemoteStorage(InMemoryStorage):
    def _open(self, name: str, mode: str = "rb") -> Any:
        note("storage open")
        return RemoteFile(b"content", name)

    def exists(self, name: str) -> bool:
        note("storage exists")
        return super().exists(name)

    def url(self, name: str | None) -> str:
        note("storage url")
        return super().url(name)


class Mailer(BaseEmailBackend):
    def send_messages(self, email_messages: Any) -> int:
        note("mail")
        return len(email_messages)


class Hasher(PBKDF2PasswordHasher):
    iterations = 1

    def encode(self, *args: Any, **kwargs: Any) -> str:
        note("hash")
        return super().encode(*args, **kwargs)


class Backend(ModelBackend):
    def authenticate(self, request: Any, nickname: Any = None, **kwargs: Any) -> Any:
        note(f"authenticate, {User.objects.count()} users")
        return User.objects.filter(username=nickname).first()


class SessionStore(Base):
    """An engine that keeps sessions in the process."""

    kept: dict[str, Any] = {}

    def load(self) -> Any:
        note("session load")
        return self.kept.get(self.session_key or "", {})

    def create(self) -> None:
        note("session create")
        self._session_key = self._get_new_session_key()
        self.save(must_create=True)

    def save(self, must_create: bool = False) -> None:
        if must_create and self.session_key in self.kept:
            raise CreateError
        if self.session_key is None:
            return self.create()
        note("session save")
        self.kept[self.session_key] = self._get_session(no_load=must_create)
        return None

    def exists(self, session_key: str) -> bool:
        return session_key in self.kept

    def delete(self, session_key: str | None = None) -> None:
        self.kept.pop(session_key or self.session_key or "", None)


class Messages(BaseStorage):
    def _get(self, *args: Any, **kwargs: Any) -> Any:
        note("messages get")
        return [], True

    def _store(self, messages: Any, response: Any, *args: Any, **kwargs: Any) -> Any:
        note("messages store")
        return []


def csrf_failure(request: Any, reason: str = "") -> HttpResponse:
    note("csrf failure")
    return HttpResponse("refused", status=403)


def handler404(request: Any, exception: Exception) -> HttpResponse:
    note("handler404")
    return HttpResponse("not here", status=404)


@native_view
def uses(request: Any) -> HttpResponse:
    kind = request.GET["kind"]
    note(kind)
    return HttpResponse(str(USES[kind](request)))


USES: dict[str, Any] = {
    "cache": lambda request: (
        caches["remote"].set("key", 1), caches["remote"].get("key"), "key" in caches["remote"],
    ),
    "locmem": lambda request: (caches["default"].set("key", 1), caches["default"].get("key")),
    "dbcache": lambda request: (caches["database"].set("key", 1), caches["database"].get("key")),
    "storage": lambda request: (
        storages["remote"].exists("x"), storages["remote"].open("x").read(),
        storages["remote"].url("x"),
    ),
    "mail": lambda request: mail.send_mail("subject", "body", "a@a.test", ["b@b.test"]),
    "hash": lambda request: make_password("secret"),
    "authenticate": lambda request: auth.authenticate(request, nickname="someone"),
    "session": lambda request: request.session.setdefault("key", 1),
    "messages": lambda request: messages.info(request, "hello"),
}  # fmt: skip


@native_view
def busy(request: Any) -> HttpResponse:
    time.sleep(0.5)
    return HttpResponse()


urlpatterns = [path("uses/", uses), path("busy/", busy)]
HERE = __name__


@pytest.fixture(autouse=True)
def _project(settings: Any) -> None:
    seen.clear()
    settings.ROOT_URLCONF = HERE
    settings.MIDDLEWARE = [
        "django.middleware.gzip.GZipMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ]
    cache = "django.core.cache.backends"
    settings.CACHES = {
        "default": {"BACKEND": f"{cache}.locmem.LocMemCache"},
        "remote": {"BACKEND": f"{HERE}.RemoteCache"},
        "database": {"BACKEND": f"{cache}.db.DatabaseCache", "LOCATION": "cache_table"},
    }
    settings.STORAGES = {**settings.STORAGES, "remote": {"BACKEND": f"{HERE}.RemoteStorage"}}
    settings.EMAIL_BACKEND = f"{HERE}.Mailer"
    settings.PASSWORD_HASHERS = [f"{HERE}.Hasher"]
    settings.AUTHENTICATION_BACKENDS = [f"{HERE}.Backend"]
    settings.MESSAGE_STORAGE = f"{HERE}.Messages"
    settings.CSRF_FAILURE_VIEW = f"{HERE}.csrf_failure"
    settings.ASYNCORM = {"SWAP_MANAGERS": True}


async def used(kind: str) -> str:
    answer = await ask(get_asgi_application(), f"/uses/?kind={kind}")
    assert answer.status == 200
    if asyncorm.pool_stats():
        await all_given_back()
    return answer.body


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("cache", ["cache set (thread)", "cache get (thread)", "cache in (thread)"]),
        ("storage", ["storage exists (thread)", "storage open (thread)", "file read (thread)",
                     "storage url (thread)"]),
        ("mail", ["mail (thread)"]),
        ("hash", ["hash (thread)"]),
        ("authenticate", ["authenticate, 0 users (thread)"]),
        ("messages", ["messages get (thread)", "messages store (thread)"]),
    ],
)  # fmt: skip
async def test_what_may_block_waits_for_a_thread(kind: str, steps: list[str]) -> None:
    await used(kind)
    assert seen == [f"{kind} (loop)", *steps]


async def test_other_tasks_run_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setitem(USES, "hash", lambda request: make_password("secret", hasher=Slow()))

    class Slow(Hasher):
        def salt(self) -> str:
            return "salt"

        def encode(self, *args: Any, **kwargs: Any) -> str:
            assert released.wait(10)
            return "encoded"

    from asyncorm._requests import blocking

    get_asgi_application()
    blocking._replace(Slow, blocking._methods(Slow, ["encode"]), sensitive=False)
    task = asyncio.create_task(used("hash"))
    await eventually(lambda: seen)
    await asyncio.sleep(0.05)
    assert not task.done()
    released.set()
    assert await task == "encoded"


async def test_what_cannot_block_is_called_at_once() -> None:
    def make() -> None:
        with connections["default"].cursor() as cursor:
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS cache_table"
                " (cache_key varchar PRIMARY KEY, value text, expires timestamptz)"
            )

    await asyncorm.native(make)()
    try:
        get_asgi_application()
        with watched_threads() as threads:
            assert await used("locmem") == "(None, 1)"
            assert await used("dbcache") == "(None, 1)"
            assert await caches["default"].aget("key") == 1
            assert await caches["database"].aget("key") == 1
        assert threads == []
    finally:
        drop = "DROP TABLE cache_table"
        await asyncorm.native(lambda: connections["default"].cursor().execute(drop))()


async def test_session_engines_of_other_people(settings: Any) -> None:
    settings.SESSION_ENGINE = HERE
    await used("session")
    assert seen == [
        "session (loop)", "session create (thread)", "session save (thread)",
    ]  # fmt: skip
    [(key, kept)] = SessionStore.kept.items()
    assert kept == {"key": 1}
    seen.clear()
    answer = await ask(get_asgi_application(), "/uses/?kind=session", cookie=f"sessionid={key}")
    assert answer.body == "1"
    assert seen == ["session (loop)", "session load (thread)"]
    SessionStore.kept.clear()


async def test_in_a_transaction_what_uses_the_orm_takes_part_in_it() -> None:
    get_asgi_application()

    def work() -> Any:
        with transaction.atomic():
            User.objects.create(username="someone")
            return auth.authenticate(None, nickname="someone")

    assert (await asyncorm.native(work)()).username == "someone"
    assert seen == ["authenticate, 1 users (loop)"]


class Directory(BaseBackend):
    def authenticate(self, request: Any, **credentials: Any) -> Any:
        note(f"authenticate, {User.objects.count()} users")
        return User.objects.filter(**credentials).first()

    def get_user(self, user_id: Any) -> Any:
        return User.objects.filter(pk=user_id).first()


async def test_so_does_a_backend_of_other_people_by_its_asynchronous_methods(settings: Any) -> None:
    settings.AUTHENTICATION_BACKENDS = [f"{HERE}.Directory"]
    settings.ASYNCORM = {"SWAP_MANAGERS": True}
    async with asyncorm.atomic():
        user = await User.objects.acreate(username="someone")
        assert await auth.aauthenticate(None, username="someone") == user
        assert await Directory().aget_user(user.pk) == user
    assert seen == ["authenticate, 1 users (loop)"]
    assert await auth.aauthenticate(None, username="someone") == user
    assert seen[1:] == ["authenticate, 1 users (thread)"]


async def test_views_of_the_project_that_django_calls() -> None:
    app = get_asgi_application()
    assert (await ask(app, "/nothing/")).body == "not here"
    assert (await ask(app, "/uses/", method="POST")).body == "refused"
    assert seen == ["handler404 (thread)", "csrf failure (thread)"]


def processor(request: Any) -> dict[str, str]:
    note("context processor")
    return {"name": "from the processor"}


async def test_error_pages_of_the_project_are_rendered_in_a_thread(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(globals(), "handler404")
    settings.TEMPLATES = [
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "OPTIONS": {
                "loaders": [
                    ("django.template.loaders.locmem.Loader", {"404.html": "page {{ name }}"})
                ],
                "context_processors": [f"{HERE}.processor"],
            },
        }
    ]
    app = get_asgi_application()
    assert (await ask(app, "/nothing/")).body == "page from the processor"
    assert seen == ["context processor (thread)"]
    seen.clear()
    settings.ASYNCORM = {"NATIVE_VIEWS": ["django.views.defaults"]}
    assert (await ask(app, "/nothing/")).body == "page from the processor"
    assert seen == ["context processor (loop)"]


async def test_outside_native_code_all_is_as_it_was() -> None:
    get_asgi_application()
    caches["remote"].set("key", 1)
    make_password("secret")
    assert seen == ["cache set (loop)", "hash (loop)"]
    assert isinstance(storages["default"], InMemoryStorage | FileSystemStorage)
    assert DatabaseStore().exists is not None


# The watchdog


async def test_the_watchdog_names_what_keeps_the_loop_busy(
    settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "asyncorm")
    settings.ASYNCORM = {"SLOW_STEP": 0.1}
    app = get_asgi_application()
    await ask(app, "/uses/?kind=locmem")
    await ask(app, "/busy/")
    [record] = [each for each in caplog.records if "busy for more than" in each.message]
    assert record.message.startswith(f"{HERE}.busy() has kept the event loop busy")
    assert "time.sleep(0.5)" in record.message
    await asyncio.sleep(0.3)
    assert len([each for each in caplog.records if "busy for more than" in each.message]) == 1


async def test_without_it_no_thread_looks(settings: Any) -> None:
    with watched_threads() as threads:
        await ask(get_asgi_application(), "/uses/?kind=locmem")
    assert threads == []
    settings.DEBUG = True
    with watched_threads() as threads:
        await ask(get_asgi_application(), "/uses/?kind=locmem")
    assert threads == ["thread asyncorm-watchdog"]
