"""The system checks: what can be seen to be wrong at start-up."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib import admin
from django.core.checks import CheckMessage, run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections, models
from django.test import override_settings
from django.test.utils import isolate_apps
from psycopg_pool import ConnectionPool

import asyncorm
from asyncorm import conf
from asyncorm._requests.thread_locals import thread_local_of
from tests.project.myapp.models import Item
from tests.support import backend_pid, database

ROOT = Path(__file__).parents[2]
urlpatterns: list[Any] = []


def found() -> list[CheckMessage]:
    return list(run_checks(tags=["asyncorm"]))


def no_coroutine(conn: Any) -> None: ...


async def coroutine(conn: Any) -> None: ...


def configure(conn: Any) -> None:
    conn.execute("SET my.marker = 'configured'")
    conn.commit()


def test_the_example_project_is_fine() -> None:
    assert found() == []
    with override_settings(
        ASYNCORM={"SWAP_MANAGERS": True}, ASGI_APPLICATION=None, ROOT_URLCONF=__name__
    ):
        assert found() == []
        del settings.ROOT_URLCONF  # a program that serves no requests
        assert found() == []


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"SWAP_MANAGER": True}, "'SWAP_MANAGER'"),
        ({"SWAP_MANAGERS": 1}, "SWAP_MANAGERS"),
        ({"SWAP_MANAGERS": "verify"}, "SWAP_MANAGERS"),
        ({"STATEMENT_CACHE": "check"}, 'True, False or "verify"'),
        ({"LOCK_TIMEOUT": 0}, "LOCK_TIMEOUT"),
        ({"LOCK_TIMEOUT": True}, "LOCK_TIMEOUT"),
        ({"FILL_DELAY": "1"}, "FILL_DELAY"),
        (["SWAP_MANAGERS"], "must be a dict"),
    ],
)
def test_wrong_settings(setting: Any, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not override_settings: the app refuses such settings as soon as they are set.
    monkeypatch.setattr(conf, "django_settings", SimpleNamespace(ASYNCORM=setting))
    messages = found()
    assert [message.id for message in messages] == ["asyncorm.E001"]
    assert word in messages[0].msg


WRONG_VALUES: dict[str, list[Any]] = {
    key: ["True", 1, None, [], lambda: True]
    for key, value in conf.DEFAULTS.items()
    if isinstance(value, bool)
} | {
    "STATEMENT_CACHE": ["True", 1, 0, None],
    "LOCK_TIMEOUT": ["30", 0, -1, True, None, float("nan"), lambda: 30],
    "FILL_DELAY": ["1", 0, None, float("inf")],
    "SLOW_CHECKOUT": ["5", 0, False],
    "SLOW_STEP": ["0.1", 0, True, float("inf")],  # a thread waits for so long
    "PARALLELISM": ["2", 0, 2.0, True],
    "STATEMENT_CACHE_SIZE": ["4096", 0, 1e3, None],
    "NATIVE_MIDDLEWARE": ["shop.middleware", [no_coroutine], None, True],
    "NATIVE_VIEWS": ["shop.views", [no_coroutine], 1, "__all__"],
    "NATIVE_HANDLER": ["True", 1, 0],
    "DISTRIBUTED": ["False", 0],
    "REPLICA_POSITION": ["cookies", None, ["cookie"]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG_VALUES.items() for value in values]
)
def test_wrong_values(key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImproperlyConfigured) as caught, override_settings(ASYNCORM={key: value}):
        pass
    monkeypatch.setattr(conf, "django_settings", SimpleNamespace(ASYNCORM={key: value}))
    [message] = found()
    assert message.id == "asyncorm.E001"
    assert f"ASYNCORM[{key!r}] must be " in message.msg and f"not {value!r}" in message.msg
    assert message.msg in str(caught.value) and "docs/settings.md" in str(caught.value)


def test_wrong_values_are_tried_of_each_key() -> None:
    assert WRONG_VALUES.keys() == conf.DEFAULTS.keys()


@pytest.mark.parametrize("options", [None, ["pool"], "pool"])
def test_options_that_are_no_dict(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check and command reads them: said once, when the project starts."""
    native = {"ENGINE": "asyncorm.backends.postgresql", "OPTIONS": options}
    databases = {"default": {}, "native": native, "others": {**native, "ENGINE": "others.backend"}}
    monkeypatch.setattr(conf, "django_settings", SimpleNamespace(DATABASES=databases))
    with pytest.raises(ImproperlyConfigured, match=r"DATABASES\['native'\]\['OPTIONS'\] must be"):
        conf.validate()
    assert len(conf.problems()) == 1


def test_autocommit() -> None:
    with database(AUTOCOMMIT=False):
        [message] = found()
    assert message.id == "asyncorm.E002"
    assert "'extra'" in message.msg
    assert "asyncorm.atomic()" in str(message.hint)


@pytest.mark.parametrize("pool", ["yes", 5, [1, 2]])
def test_a_pool_that_is_no_dict(pool: Any) -> None:
    with database(OPTIONS={"pool": pool}):
        [message] = found()
    assert message.id == "asyncorm.E003"
    assert "'extra'" in message.msg


@pytest.mark.parametrize(
    "pool", [{"min_size": 5, "max_size": 2}, {"min_size": -1, "max_size": 2}, {"min_size": 0}]
)
def test_sizes(pool: Any) -> None:
    with database(OPTIONS={"pool": pool}):
        [message] = found()
    assert message.id == "asyncorm.E004"
    assert f"min_size {pool['min_size']}" in message.msg


WRONG: dict[str, list[Any]] = {
    "min_size": ["4", 4.0, True, None, lambda: 4],
    "max_size": ["20", 20.0, False, lambda: 20, "", [20]],
    "timeout": ["x", "5", 0, -1, True, None, lambda: 5, float("nan"), float("inf")],
    "max_waiting": ["500", -1, 1.5, None, True],
    "max_lifetime": ["3600", 0, -1, None],
    "max_idle": ["600", 0, None],
    "num_workers": [0, "3", None, 2.0],
    "name": [5, b"shop"],
    "check": [True, "tests.check", coroutine],
    "configure": ["tests.configure", coroutine],
    "reset": [1, coroutine],
    "reconnect_failed": ["tests.failed"],
    "reconnect_timeout": ["5"],
    "close_returns": ["no"],
    "connection_class": ["psycopg.Connection"],
    # Django gives these itself.
    "kwargs": [{"connect_timeout": 3}],
    "conninfo": ["dbname=shop"],
    "open": [True],
    "max_sise": [4],
    3: [4],
}


@pytest.mark.usefixtures("threads_may")
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
async def test_wrong_options_of_a_pool(name: Any, value: Any) -> None:
    """The check and the first use say the same, of synchronous code as well."""
    with database(OPTIONS={"pool": {name: value}}) as alias:
        [message] = found()
        assert message.id == "asyncorm.E007"
        assert (
            f"DATABASES['extra']['OPTIONS']['pool'] has an unknown key {name!r}" in message.msg
            or (
                f"DATABASES['extra']['OPTIONS']['pool'][{name!r}] must be " in message.msg
                and f"not {value!r}" in message.msg
            )
        )
        await is_refused(alias, message)


@pytest.fixture
def threads_may(django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        yield


def synchronously(alias: str) -> int:
    """The thread of sync_to_async() has no wrapper of another test's alias of this name."""
    forget(alias)
    try:
        return backend_pid(alias)
    finally:
        forget(alias)


def forget(alias: str) -> None:
    connections[alias].close()
    del connections[alias]


async def is_refused(alias: str, message: CheckMessage) -> None:
    for use in (asyncorm.native(backend_pid), sync_to_async(synchronously)):
        with pytest.raises(ImproperlyConfigured) as caught:
            await use(alias)
        assert message.msg in str(caught.value)
        assert "docs/deployment.md#pools" in str(caught.value)
    with override_settings(DATABASE_ROUTERS=[]):  # the checks that ask servers leave it out
        tags = ["asyncorm", "database"]  # those of models may connect
        messages = run_checks(databases=[alias], tags=tags)
    assert [each for each in messages if each.id == message.id] == [message]


async def test_text_from_the_environment_is_told() -> None:
    with database(OPTIONS={"pool": {"max_size": "20"}}):
        assert "what comes from the environment is text" in found()[0].msg
    with database(OPTIONS={"pool": {"max_size": 2.0}}):
        assert "environment" not in found()[0].msg


@pytest.mark.usefixtures("threads_may")
@pytest.mark.parametrize("pool", ["yes", 5, [1, 2], 1])
async def test_a_pool_that_is_no_dict_is_refused(pool: Any) -> None:
    with database(OPTIONS={"pool": pool}) as alias:
        [message] = found()
        assert message.id == "asyncorm.E003" and f"not {pool!r}" in message.msg
        await is_refused(alias, message)


@pytest.mark.usefixtures("threads_may")
@pytest.mark.parametrize("pool", [{"min_size": 5, "max_size": 2}, {"max_size": 2}, {"min_size": 0}])
async def test_sizes_that_contradict_each_other_are_refused(pool: Any) -> None:
    with database(OPTIONS={"pool": pool}) as alias:
        [message] = found()
        assert message.id == "asyncorm.E004"
        await is_refused(alias, message)


@pytest.mark.usefixtures("threads_may")
@pytest.mark.parametrize("age", ["60", [60], lambda: 60])
async def test_wrong_ages(age: Any) -> None:
    with database(CONN_MAX_AGE=age, OPTIONS={"pool": None}) as alias:
        [message] = found()
        assert message.id == "asyncorm.E007" and "['CONN_MAX_AGE'] must be" in message.msg
        await is_refused(alias, message)


@pytest.mark.usefixtures("threads_may")
@pytest.mark.parametrize(
    "pool",
    [
        {"min_size": 0, "max_size": 1, "timeout": 0.5, "max_waiting": 0, "name": None},
        {"min_size": 1, "max_size": None, "max_lifetime": float("inf"), "max_idle": 1e9},
        {"min_size": 0, "max_size": 1, "check": None, "reset": no_coroutine, "num_workers": 1},
        {"max_size": 4, "close_returns": True, "reconnect_timeout": 0.5},
        {"configure": configure, "check": ConnectionPool.check_connection},
        {},
        "",  # as Django: no pool
        None,
        False,
        0,
    ],
)
async def test_right_options_of_a_pool(pool: Any) -> None:
    with database(OPTIONS={"pool": pool}) as alias:
        assert found() == []
        await asyncorm.native(backend_pid)(alias)
        await sync_to_async(synchronously)(alias)


@pytest.mark.usefixtures("threads_may")
async def test_callables_serve_djangos_pool_as_well() -> None:
    """Django gives its pool a `configure` and a `check` of its own, and refuses others."""
    checked: list[Any] = []
    option = {"min_size": 0, "max_size": 1, "configure": configure, "check": checked.append}

    def show(alias: str) -> Any:
        try:
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT current_setting('my.marker'), current_setting('TimeZone')")
                return cursor.fetchone()
        finally:
            connections[alias].close()
            del connections[alias]

    with database(TIME_ZONE="Asia/Tokyo", OPTIONS={"pool": option}) as alias:
        assert await sync_to_async(show)(alias) == ("configured", "Asia/Tokyo")
        assert await sync_to_async(show)(alias) == ("configured", "Asia/Tokyo")
        assert len(checked) == 2
    assert option.keys() == {"min_size", "max_size", "configure", "check"}


@pytest.mark.parametrize(("size", "warned"), [(25, False), (26, True), (100, True)])
def test_two_large_pools(size: int, warned: bool) -> None:
    with database(OPTIONS={"pool": {"min_size": 1, "max_size": size}}):
        messages = found()
    assert [message.id for message in messages] == ["asyncorm.W002"] * warned
    if warned:
        assert str(size) in messages[0].msg
        assert "max_connections" in str(messages[0].hint)


def test_no_alias_of_ours() -> None:
    from django.db import connections

    kept = dict(connections.settings)
    for alias in ("default", "other"):
        connections.settings[alias] = connections.settings[alias] | {
            "ENGINE": "django.db.backends.postgresql"
        }
    try:
        [message] = found()
    finally:
        connections.settings.update(kept)
    assert message.id == "asyncorm.W001"
    assert "asyncorm.backends.postgresql" in str(message.hint)


@pytest.mark.parametrize("swapped", [True, False])
@isolate_apps("tests.project.shop")
def test_methods_that_stay_in_threads(swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The swap cannot reach sync_to_async in the project's own methods: it names them."""

    class OwnQuerySet(models.QuerySet):
        async def astatistics(self) -> Any:
            return await sync_to_async(self.count)()

        async def afine(self) -> Any:
            return await self.acount()

    class OwnManager(models.Manager):
        async def amanage(self) -> Any:
            return await sync_to_async(self.count)()

    class Thing(models.Model):
        objects = OwnManager.from_queryset(OwnQuerySet)()
        other = OwnQuerySet.as_manager()

        class Meta:
            app_label = "shop"

        async def aarchive(self) -> None:
            await sync_to_async(self.save)()

    from django.apps import apps

    monkeypatch.setattr(apps, "get_models", lambda *args, **kwargs: [Thing])
    with override_settings(ASYNCORM={"SWAP_MANAGERS": swapped}):
        messages = [message for message in found() if message.id == "asyncorm.W003"]
    names = sorted(message.msg.split("()")[0].rpartition(".")[2] for message in messages)
    assert names == (["aarchive", "amanage", "astatistics"] if swapped else [])
    assert all("asyncorm.native()" in str(message.hint) for message in messages)


# Requests


def native(**changes: Any) -> list[CheckMessage]:
    with override_settings(ASYNCORM=changes):
        return found()


def test_names_that_do_not_exist() -> None:
    messages = native(NATIVE_MIDDLEWARE=["no.such"], NATIVE_VIEWS=["tests.nothing", "django.http"])
    assert [message.id for message in messages] == ["asyncorm.E005"] * 2
    assert "'no.such'" in messages[0].msg
    assert "'tests.nothing' does not exist: tests has no nothing" in messages[1].msg


def test_middleware_that_does_not_exist() -> None:
    with override_settings(MIDDLEWARE=["no.such", "tests.nothing"]):
        messages = found()
    assert [message.id for message in messages] == ["asyncorm.E005"] * 2
    assert "MIDDLEWARE: 'no.such' cannot be imported" in messages[0].msg


LOCAL = threading.local()


def keeps_state(get_response: Any) -> Any:
    return get_response


@pytest.mark.parametrize(
    ("imports", "maker"),
    [
        ("from shopfront.state import current", "shopfront.state"),
        ("from shopfront import helpers", "shopfront.state"),
        ("from shopfront.helpers import stored", "shopfront.state"),  # an instance of its class
        ("from otherpeople import get_current_user", "otherpeople"),
        ("from otherpeople.large import Large", None),
        ("import asgiref.sync, json", None),
    ],
)
def test_state_of_threads_of_imported_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imports: str, maker: str | None
) -> None:
    sources = {
        "shopfront/__init__": "",
        "shopfront/state": "import threading as t\n_s = t.local()\ndef current(): return _s\n"
        "class Stored: pass\n",
        "shopfront/helpers": "from shopfront.state import Stored\nstored = Stored()\n",
        "shopfront/middleware": f"{imports}\ndef plain(get_response): return get_response\n",
        "otherpeople/__init__": "from threading import local\n_s = local()\n"
        "def get_current_user(): return _s.user\n",
        "otherpeople/large": "from otherpeople import get_current_user\nclass Large: pass\n",
    }
    for name, source in sources.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    path = "shopfront.middleware.plain"
    thread_local_of.cache_clear()
    try:
        with override_settings(MIDDLEWARE=[path]):
            messages = native(NATIVE_MIDDLEWARE=[path]), native(NATIVE_MIDDLEWARE="__all__")
    finally:
        for name in [name for name in sys.modules if name.startswith(("shopfront", "otherp"))]:
            del sys.modules[name]
        thread_local_of.cache_clear()
    if maker is None:
        assert messages == ([], [])
    else:
        [warning], [info] = messages
        assert (warning.id, info.id) == ("asyncorm.W004", "asyncorm.I002")
        assert maker in warning.msg and maker in info.msg


def test_state_of_threads() -> None:
    path = f"{__name__}.keeps_state"
    with override_settings(MIDDLEWARE=[path]):
        assert native() == []
        [warning] = native(NATIVE_MIDDLEWARE=[path])
        assert warning.id == "asyncorm.W004"
        assert path in warning.msg and "all requests would share it" in warning.msg
        [info] = native(NATIVE_MIDDLEWARE="__all__")
        assert info.id == "asyncorm.I002"
        assert path in info.msg and "stays in threads" in info.msg


class ItemAdmin(admin.ModelAdmin): ...  # type: ignore[type-arg]


def test_what_comes_with_the_admin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(admin.site._registry, Item, ItemAdmin(Item, admin.site))
    [info] = native(NATIVE_VIEWS=["django.contrib.admin"])
    assert info.id == "asyncorm.I003"
    assert "'admin'" in info.msg and f"{__name__}.ItemAdmin" in info.msg


def test_the_other_handler() -> None:
    [info] = native(SWAP_MANAGERS=True)
    assert info.id == "asyncorm.I001"
    assert "get_asgi_application() of asyncorm.asgi" in str(info.hint)
    with override_settings(ASGI_APPLICATION=None):  # as startproject leaves it
        [info] = native(SWAP_MANAGERS=True)
        assert info.msg == "tests.project.asgi is served by Django's own handler."


class Synchronous:
    """Somebody's middleware."""

    sync_capable, async_capable = True, False

    def __init__(self, get_response: Any) -> None: ...

    def __call__(self, request: Any) -> Any: ...


class Asynchronous:
    """Somebody's, too."""

    sync_capable = async_capable = True

    def __init__(self, get_response: Any) -> None: ...

    def __call__(self, request: Any) -> Any: ...


def test_synchronous_middleware_under_the_swap() -> None:
    paths = [f"{__name__}.Synchronous", f"{__name__}.Asynchronous"]
    with override_settings(MIDDLEWARE=paths, ASGI_APPLICATION=None, ROOT_URLCONF=__name__):
        assert native() == []
        [warning] = native(SWAP_MANAGERS=True)
        assert warning.id == "asyncorm.W041"
        assert paths[0] in warning.msg and paths[1] not in warning.msg
        named = native(SWAP_MANAGERS=True, NATIVE_MIDDLEWARE=paths)
        assert "asyncorm.W041" not in {message.id for message in named}


def test_the_toolbars_own_panel_under_the_swap() -> None:
    pytest.importorskip("debug_toolbar")
    others = ["debug_toolbar.panels.timer.TimerPanel", "asyncorm.debug_toolbar.SQLPanel"]
    with override_settings(
        INSTALLED_APPS=[*settings.INSTALLED_APPS, "debug_toolbar"],
        ASGI_APPLICATION=None,
        ROOT_URLCONF=__name__,
    ):
        assert native() == []
        [warning] = native(SWAP_MANAGERS=True)
        assert warning.id == "asyncorm.W042" and "SQLPanel" in str(warning.hint)
        with override_settings(DEBUG_TOOLBAR_PANELS=others):
            assert native(SWAP_MANAGERS=True) == []


def test_the_backend_without_the_app() -> None:
    others = [app for app in settings.INSTALLED_APPS if app != "asyncorm"]
    code = (
        "from django.conf import settings\n"
        "from tests.project import settings as project\n"
        f"project.INSTALLED_APPS = {others!r}\n"
        "from django.core.management import execute_from_command_line\n"
        "execute_from_command_line(['manage.py', 'check', '--tag', 'asyncorm'])\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr.count("asyncorm.W040") == 1, result.stderr
    assert '"asyncorm" first in INSTALLED_APPS' in result.stderr


# The server


def of_server() -> list[CheckMessage]:
    messages = run_checks(databases=["default", "legacy"])
    return [message for message in messages if "asyncorm" in (message.id or "")]


def test_pools_that_the_server_has_no_room_for(
    stock: Any, django_db_blocker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    with django_db_blocker.unblock():
        assert of_server() == []
        with connection.cursor() as cursor:
            cursor.execute("SHOW max_connections")
            most = int(cursor.fetchone()[0])
        monkeypatch.setenv("WEB_CONCURRENCY", str(most))
        [warning] = of_server()
    assert warning.id == "asyncorm.W043"
    assert f"{most} x 40" in warning.msg and f"room for {most - 3}." in warning.msg
    assert found() == []  # it connects only where it may


REPLICAS = "asyncorm.replicas.ReplicaMiddleware"
SESSIONS = "django.contrib.sessions.middleware.SessionMiddleware"


@pytest.mark.parametrize(
    ("replicas", "middleware", "kept", "ids"),
    [
        (["r1"], [REPLICAS, SESSIONS], "cookie", []),
        (["r1"], [SESSIONS, REPLICAS], "session", []),
        (["r1"], [SESSIONS, REPLICAS], "cookie", ["W044"]),
        (["r1"], [REPLICAS, SESSIONS], "session", ["W044"]),
        (["r1"], [], "cookie", ["W044"]),
        (None, [REPLICAS], "cookie", ["W044"]),
        (["r1", "gone", "legacy"], [REPLICAS], "cookie", ["E006", "E006"]),
        (["r1", "several"], [REPLICAS], "cookie", ["W045"]),
    ],
)
def test_replicas(replicas: Any, middleware: list[str], kept: str, ids: list[str]) -> None:
    from asyncorm.replicas import ReplicaRouter

    routers = [] if replicas is None else [ReplicaRouter(replicas=replicas)]
    options = {"connect_timeout": 3, "tcp_user_timeout": 5000}
    with (
        database("r1"),
        database("several", HOST="one,two", OPTIONS=options),
        override_settings(
            DATABASE_ROUTERS=routers, MIDDLEWARE=middleware, ASYNCORM={"REPLICA_POSITION": kept}
        ),
    ):
        assert [message.id.removeprefix("asyncorm.") for message in found()] == ids
