"""`manage.py asyncorm`: what it prints is true of the project."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db.backends.utils import CursorWrapper

from asyncorm import internals, patches

ROOT = Path(__file__).parent.parent


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
    with pytest.raises(CommandError, match="SUBCOMMAND"):
        shown()


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


def test_status_prints_settings(settings: Any) -> None:
    settings.ASYNCORM = {"SWAP_MANAGERS": True, "STATEMENT_CACHE": False}
    text = shown("status")
    values = {line.split()[0]: line.split(maxsplit=1)[1] for line in section(text, "Settings")}
    assert values["SWAP_MANAGERS"] == "True"
    assert values["LOCK_TIMEOUT"] == "30.0 (default)"
    assert section(text, "Off") == ["STATEMENT_CACHE: ASYNCORM says so"]


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
        and line.endswith("; by asyncorm.transactions.enter")
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
        ("tests.test_command.native_application", "asyncorm's handler"),
        (None, "nothing"),
    ],
)
def test_status_prints_the_handler(settings: Any, application: Any, expected: str) -> None:
    settings.ASGI_APPLICATION = application
    settings.MIDDLEWARE = ["django.middleware.common.CommonMiddleware", "tests.test_command.Slow"]
    lines = section(shown("status"), "Requests")
    assert expected in lines[0]
    if "asyncorm" in expected:
        common, slow = lines[1:]
        assert common.endswith("on the event loop") and slow.endswith("in a thread")


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
