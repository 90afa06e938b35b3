"""`manage.py asyncorm`: what it prints is true of the project."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.backends.utils import CursorWrapper

from asyncorm import internals, patches
from asyncorm._commands.bench import _largest
from tests.project.shop.models import Tag
from tests.support import database

ROOT = Path(__file__).parents[2]


def shown(*args: str) -> str:
    """What the command prints."""
    out = io.StringIO()
    call_command("asyncorm", *args, stdout=out)
    return out.getvalue()


def section(text: str, title: str) -> list[str]:
    """The lines below a title."""
    lines = iter(text.splitlines())
    assert any(line.startswith(title) for line in lines), text
    found = []
    for line in lines:
        if not line:
            break
        found.append(line.strip())
    return found


def test_without_a_subcommand_it_says_which_there_are() -> None:
    with pytest.raises(CommandError, match=r"(?s)SUBCOMMAND.*status.*hops.*sizing.*live.*bench"):
        shown()


# docs


def test_docs_prints_what_an_error_names() -> None:
    text = shown("docs", "docs/transactions.md#tasks-inside-a-block")  # as messages have it
    assert text.startswith("## Tasks inside a block\n") and "\n## " not in text[1:]
    assert text == shown("docs", "transactions#tasks-inside-a-block")
    assert shown("docs", "transactions").startswith("# ") and text in shown("docs", "transactions")
    for place, named in {"nowhere": "transactions", "transactions#x": "a-lost-connection"}.items():
        with pytest.raises(CommandError, match=named):
            shown("docs", place)


def test_docs_without_a_page_lists_all_of_them() -> None:
    text = shown("docs")
    assert "  transactions        transactions and tasks\n" in text
    assert not re.search(r"[{}*]|\]\(|\.md", text)  # nothing of their markup
    listed = re.findall(r"^  (\S+) +\S", text, re.M)
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    reached = {path.with_suffix("").as_posix() for path in pages}
    assert sorted(listed) == sorted(
        each for each in reached if each != "index" and ("/" not in each or "README" in each)
    )
    for page in listed:
        assert shown("docs", page).startswith("# ")
        assert not re.search(r"```\{|^\.\. ", shown("docs", page), re.M)  # nothing left for Sphinx
    assert re.search(r"^- `help\(asyncorm\.atomic\)`: \w.+", shown("docs", "reference"), re.M)


# status


def test_status_in_a_process_of_its_own_needs_no_server() -> None:
    nowhere = json.dumps({"HOST": "127.0.0.1", "PORT": "1"})
    environ = os.environ | {
        "ASYNCORM_TEST_DATABASE": nowhere,
        "DJANGO_SETTINGS_MODULE": "tests.project.settings",
    }
    command = [sys.executable, "-m", "django", "asyncorm", "status"]
    text = subprocess.check_output(command, cwd=ROOT, env=environ, text=True, timeout=60)
    assert "psycopg " + psycopg.__version__ in "\n".join(section(text, "Versions"))
    default, other, legacy = section(text, "Databases")
    assert default.startswith("default: asyncorm.backends.postgresql; native: up to 20 for each")
    assert other.startswith("other: asyncorm.backends.postgresql")
    assert legacy == "legacy: django.db.backends.sqlite3, not native"
    assert section(text, "Off") == ["nothing"]


def test_status_prints_settings(settings: Any, django_db_blocker: Any) -> None:
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "STATEMENT_CACHE": False}
    with django_db_blocker.unblock():  # or pytest-django is somebody who wants to see each query
        text = shown("status")
    values = {line.split()[0]: line.split(maxsplit=1)[1] for line in section(text, "Settings")}
    assert values["SWAP_MANAGERS"] == "True"
    assert values["LOCK_TIMEOUT"] == "30.0 (default)"
    assert section(text, "Off") == ["STATEMENT_CACHE: ASYNCORM says so"]


def test_wrong_options_of_a_pool_are_one_clear_line() -> None:
    """`status` goes on, and `sizing` ends without a traceback."""
    with database(OPTIONS={"pool": {"max_size": "3"}}):
        printed = shown("status")
        assert "extra: asyncorm.backends.postgresql; its pool cannot be made" in printed
        assert printed.count("['max_size'] must be a number of connections") == 1
        with pytest.raises(CommandError, match="'max_size'"):
            shown("sizing")


def test_status_prints_what_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    lost = internals.Missing("Django", "django.db.x", "what for", internals.PREFETCH)
    monkeypatch.setattr(internals, "lost", lambda: {internals.PREFETCH: [lost]})
    monkeypatch.setattr(CursorWrapper, "execute", execute)
    text = shown("status")
    prefetch, cursors = section(text, "Off")
    assert prefetch.startswith("PARALLEL_PREFETCH: Django ") and "has no django.db.x" in prefetch
    assert "CursorWrapper" in cursors
    assert section(text, "Checks")[0].startswith("asyncorm.W010: ")


def test_status_prints_every_replacement() -> None:
    lines = section(shown("status"), "Replaced")
    assert len(lines) == len(patches.all_patches()) > 30
    assert any(
        line.startswith("django.db.transaction.Atomic.__enter__: ")
        and line.endswith("; by asyncorm._transactions.lifecycle.enter")
        for line in lines
    )


def test_status_prints_what_others_replaced_since(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db.transaction import Atomic

    enter = Atomic.__enter__
    monkeypatch.setattr(Atomic, "__enter__", lambda self: enter(self))
    lines = [line for line in section(shown("status"), "Replaced") if "replaced again" in line]
    assert len(lines) == 1 and lines[0].startswith("django.db.transaction.Atomic.__enter__")


@pytest.mark.parametrize(
    ("application", "expected"),
    [
        ("tests.project.asgi.application", "Django's own handler"),
        ("tests.tools.test_command.native_application", "asyncorm's handler"),
        (None, "tests.project.asgi: Django's own handler"),
        ("tests.support.free_port", "no handler is found"),
    ],
)
def test_status_prints_the_handler(settings: Any, application: Any, expected: str) -> None:
    settings.ASGI_APPLICATION = application
    settings.MIDDLEWARE = [
        "django.middleware.common.CommonMiddleware",
        "tests.tools.test_command.Slow",
    ]
    lines = section(shown("status"), "Requests")
    assert expected in lines[0]
    if "asyncorm" in expected:
        common, slow = lines[1:]
        assert common.endswith("on the event loop") and slow.endswith("in a thread")


def test_status_reads_the_asgi_module_that_nobody_names(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """startproject sets no ASGI_APPLICATION."""
    settings.ASGI_APPLICATION, settings.ROOT_URLCONF = None, "fresh.urls"
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "fresh" / "asgi.py"
    module.parent.mkdir()
    (module.parent / "__init__.py").touch()
    (module.parent / "urls.py").write_text("urlpatterns = []")
    for factory, expected in (("asyncorm", "asyncorm's handler"), ("django.core", "Django's own")):
        module.write_text(f"from {factory}.asgi import get_asgi_application\n")
        assert expected in section(shown("status"), "Requests")[0]


class Slow:
    """Somebody's middleware."""

    sync_capable, async_capable = True, False

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response


def __getattr__(name: str) -> Any:
    if name == "native_application":
        from asyncorm._requests.handler import NativeHandler

        return NativeHandler.__new__(NativeHandler)
    raise AttributeError(name)


# hops


def hops(folder: Path, **sources: str) -> dict[str, tuple[str, str]]:
    """What the command says of these files: what is written and what to write instead, by place."""
    for name, text in sources.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found: dict[str, tuple[str, str]] = {}
    place = ""
    for line in shown("hops", str(folder)).splitlines():
        if line.startswith("    instead: "):
            found[place] = (found[place][0], line.removeprefix("    instead: "))
        elif line.startswith(str(folder)):
            file, number, what = line.removeprefix(f"{folder}/").split(":", 2)
            place = f"{file}:{number}"
            found[place] = (what.strip(), "")
    return found


CALLS = """\
import asyncio, asyncio as aio, time
from asgiref.sync import sync_to_async, sync_to_async as s2a
import asgiref.sync
from channels.db import database_sync_to_async
from .helpers import report

async def view(request, user, loop, client):
    await sync_to_async(Book.objects.get)(pk=1, title="a")
    await s2a(list)(Book.objects.filter(price=1))
    await asgiref.sync.sync_to_async(report)(2026, user=user)
    await database_sync_to_async(user.save)()
    await aio.to_thread(report, 2026)
    await loop.run_in_executor(None, report, 2026)
    await asyncio.to_thread(time.sleep, 1)
    await sync_to_async(client.get)("/")
    await asyncio.gather(*map(sync_to_async, [report]))

@sync_to_async
def decorated(): ...

@database_sync_to_async
def also(): ...

@sync_to_async(thread_sensitive=False)
def with_options():
    sync_to_async(sync_to_async(report))

twin = sync_to_async(Book.objects.count, thread_sensitive=True)

def not_ours(sync_to_thread, to_thread):
    to_thread(report)
    sync_to_thread(report)
"""


def test_hops_finds_each_call_and_says_what_to_write_instead(tmp_path: Path) -> None:
    instead = {place: text for place, (_, text) in hops(tmp_path, shop__views=CALLS).items()}
    assert instead == {
        "shop/views.py:8": "await Book.objects.native_get(pk=1, title='a')",
        "shop/views.py:9": "await Book.objects.filter(price=1).anative()",
        "shop/views.py:10": "await asyncorm.native(report)(2026, user=user), if it uses the ORM",
        "shop/views.py:11": "await user.native_save() of a model or queryset, else "
        "await asyncorm.native(user.save)(), if it uses the ORM",
        "shop/views.py:12": "await asyncorm.native(report)(2026), if it uses the ORM",
        "shop/views.py:13": "await asyncorm.native(report)(2026), if it uses the ORM",
        "shop/views.py:14": "nothing, if it is to block: the ORM is not in it",
        "shop/views.py:15": "await client.native_get('/') of a model or queryset, else "
        "await asyncorm.native(client.get)('/'), if it uses the ORM",
        "shop/views.py:16": "asyncorm.native",
        "shop/views.py:18": "@asyncorm.native",
        "shop/views.py:21": "@asyncorm.native",
        "shop/views.py:24": "@asyncorm.native",
        "shop/views.py:26": "asyncorm.native(report), if it uses the ORM",
        "shop/views.py:28": "Book.objects.native_count",
    }


def test_hops_knows_the_swap(tmp_path: Path, settings: Any) -> None:
    settings.ASYNCORM = {"SWAP_MANAGERS": True}
    (place,) = hops(
        tmp_path,
        views="from asgiref.sync import sync_to_async\nx = sync_to_async(Book.objects.get)(pk=1)\n",
    ).values()
    assert place[1] == "await Book.objects.aget(pk=1)"


MIDDLEWARE = """\
from django.utils.decorators import sync_and_async_middleware
from django.utils.deprecation import MiddlewareMixin

def function(get_response): ...

@sync_and_async_middleware
def both(get_response): ...

class Plain:
    def __init__(self, get_response): ...
    def __call__(self, request): ...

class Asynchronous:
    async_capable = True
    def __init__(self, get_response): ...
    def __call__(self, request): ...

class Hooks(MiddlewareMixin):
    def process_request(self, request): ...

class Other:
    def __init__(self, name): ...
"""

VIEWS = """\
from ninja import NinjaAPI
from rest_framework.decorators import api_view
from django.views.generic import ListView, View
from asyncorm.asgi import native_view

api = NinjaAPI()

def index(request): ...

async def detail(request): ...

def helper(request): ...

@native_view
def native(request): ...

class Books(ListView): ...

class Orders(View):
    async def get(self, request): ...

class Users(View):
    def get(self, request): ...

@api.get("/items")
def items(request): ...

@api_view(["POST"])
def posted(request): ...

class Items: ...
class BookAdmin: ...
"""

URLS = """\
from django.contrib import admin
from django.urls import include, path, re_path
from . import views
from .views import Users
from .models import Book

admin.site.register(Book, views.BookAdmin)
router.register("items", views.Items)
urlpatterns = [
    path("", cache_page(60)(views.index)),
    path("detail", views.detail),
    path("native", views.native),
    re_path("books", views.Books.as_view(), name="books"),
    path("orders", login_required(views.Orders.as_view())),
    path("users", Users.as_view()),
    path("other", include("other.urls")),
]
"""


def test_hops_finds_synchronous_middleware_and_views(tmp_path: Path) -> None:
    sources = {"shop__middleware": MIDDLEWARE, "shop__views": VIEWS, "shop__urls": URLS}
    found = hops(tmp_path, **sources)
    assert {place: what for place, (what, _) in found.items()} == {
        "shop/middleware.py:4": "synchronous middleware function",
        "shop/middleware.py:9": "synchronous middleware Plain",
        "shop/middleware.py:18": "synchronous middleware Hooks",
        "shop/views.py:8": "synchronous view index",
        "shop/views.py:17": "synchronous view Books",
        "shop/views.py:22": "synchronous view Users",
        "shop/views.py:26": "synchronous view items",
        "shop/views.py:29": "synchronous view posted",
        "shop/views.py:31": "synchronous view Items",
    }
    assert "NATIVE_MIDDLEWARE" in found["shop/middleware.py:9"][1]
    assert "NATIVE_VIEWS" in found["shop/views.py:17"][1]


def test_hops_leaves_out_what_the_settings_name(tmp_path: Path, settings: Any) -> None:
    settings.ASYNCORM = {"NATIVE_VIEWS": ["tests.project.shop.sample"]}
    sample = ROOT / "tests" / "project" / "urls.py"
    assert "synchronous view" not in shown("hops", str(sample))
    settings.ASYNCORM = {"NATIVE_VIEWS": True, "NATIVE_MIDDLEWARE": "__all__"}
    assert not hops(tmp_path, middleware=MIDDLEWARE, views=VIEWS, urls=URLS)


def test_hops_reads_the_project_alone(tmp_path: Path) -> None:
    hop = "from asyncio import to_thread\nto_thread(f)\n"
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    sources = {"venv__a": hop, "node_modules__a": hop, ".hidden__a": hop, "mine": hop}
    assert hops(tmp_path, **sources).keys() == {"mine.py:2"}
    (tmp_path / "broken.py").write_text("def")
    text = shown("hops", str(tmp_path))
    assert "broken.py: cannot be read: " in text and "1 hop in 1 of 1 files." in text


def test_hops_reads_the_project_wherever_it_is_called(tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "a project", tmp_path / "elsewhere"
    sources = {
        project / "mysite" / "conf" / "dev.py": 'INSTALLED_APPS = ["asyncorm"]\nDATABASES = {}\n',
        project / "mysite" / "__init__.py": "",
        project / "shop" / "views.py": "import asyncio\n\nasync def v():\n"
        "    await asyncio.to_thread(print)\n",
        elsewhere / "other.py": "import asyncio\n\nasync def v():\n"
        "    await asyncio.to_thread(print)\n",
    }
    for path, source in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    environ = os.environ | {
        "DJANGO_SETTINGS_MODULE": "mysite.conf.dev", "PYTHONPATH": f"{project}:{ROOT}"
    }  # fmt: skip
    for folder in (elsewhere, project, project / "shop"):
        text = subprocess.check_output(
            [sys.executable, "-m", "django", "asyncorm", "hops"],
            cwd=folder, env=environ, text=True, timeout=60,
        )  # fmt: skip
        assert "views.py:4" in text and "other.py" not in text


def test_hops_of_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="does not exist"):
        shown("hops", str(tmp_path / "nowhere"))


def test_hops_tells_of_djangos_handler(tmp_path: Path, settings: Any) -> None:
    (tmp_path / "a.py").write_text("def a(get_response): ...\n")
    assert "asyncorm.asgi" in shown("hops", str(tmp_path)).splitlines()[-1]
    settings.ASGI_APPLICATION = "tests.tools.test_command.native_application"
    assert shown("hops", str(tmp_path)).splitlines()[-1] == "1 hop in 1 of 1 files."


# bench


@pytest.mark.django_db(transaction=True)
def test_bench_reads_and_compares() -> None:
    for number in range(3):
        Tag.objects.create(name=f"tag {number}")
    before = list(Tag.objects.values())
    title, heads, *lines = shown("bench", "shop.Tag", "--seconds", "0").splitlines()
    assert title.startswith("shop.Tag in database 'default'; milliseconds")
    assert heads.split() == ["Django", "native"]
    assert [line[:32].strip() for line in lines] == [
        "a get by pk", "a list of 3", "100 gets gathered"
    ]  # fmt: skip
    for line in lines:
        djangos, native, times = line[32:].split()
        assert float(djangos) > 0 and float(native) > 0 and times.endswith("x")
    assert list(Tag.objects.values()) == before


@pytest.mark.django_db(transaction=True)
def test_bench_says_what_it_cannot_measure() -> None:
    with pytest.raises(CommandError, match=r"shop\.Tag has no rows in database 'default'"):
        shown("bench", "shop.Tag")
    with pytest.raises(CommandError, match=r"no model 'shop\.Nothing'"):
        shown("bench", "shop.Nothing")
    with pytest.raises(CommandError, match=r"no model 'Tag': It is written app_label\.Model\."):
        shown("bench", "Tag")
    with pytest.raises(CommandError, match="'legacy' does not run natively"):
        shown("bench", "--database", "legacy")


def test_a_database_that_is_away_is_no_traceback(django_db_blocker: Any) -> None:
    away = database(HOST="127.0.0.1", PORT="1", OPTIONS={"pool": False})
    refused = pytest.raises(CommandError, match="Connection refused")
    with django_db_blocker.unblock(), away, refused:
        shown("bench", "shop.Tag", "--database", "extra")


@pytest.mark.django_db(transaction=True)
def test_bench_takes_the_model_with_the_most_rows() -> None:
    Tag.objects.bulk_create(Tag(name=f"tag {number}") for number in range(500))
    connection.close()  # its statistics are the server's now
    for _ in range(100):
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")  # other tests have filled and emptied tables
        if _largest("default") is Tag:
            break
    assert shown("bench", "--seconds", "0").startswith("shop.Tag in database")
