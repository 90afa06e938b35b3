"""The race of a get-or-create: 5 and 100 tasks of the command `sync_myapp` want the same row."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import IntegrityError, connection
from django.test import override_settings

from tests.project.myapp.models import Item

pytestmark = pytest.mark.django_db(transaction=True)

TASKS = pytest.mark.parametrize("tasks", [5, 100])
NAMES = pytest.mark.parametrize("prefix", ["native_", "a"])


def race(tasks: int, **options: Any) -> tuple[Counter[str], Exception | None]:
    """What the tasks said, and what the command raised."""
    out = io.StringIO()
    error = None
    with override_settings(ASYNCORM={"SWAP_MANAGERS": options.get("prefix") == "a"}):
        try:
            call_command("sync_myapp", *[1] * tasks, stdout=out, **options)
        except IntegrityError as raised:
            error = raised
    return Counter(out.getvalue().split()), error


@TASKS
@NAMES
@pytest.mark.parametrize("together", [True, False], ids=["together", "as it comes"])
def test_get_or_create_creates_once(tasks: int, prefix: str, together: bool) -> None:
    said, error = race(tasks, mode="aget_or_create", prefix=prefix, together=together)
    assert error is None
    assert said == {"True": 1, "False": tasks - 1}
    assert Item.objects.get().remote_id == 1


@TASKS
@NAMES
def test_the_naive_way_fails_for_all_but_one(tasks: int, prefix: str) -> None:
    # All of them have looked, and found nothing, before any of them creates.
    said, error = race(tasks, mode="naive", prefix=prefix, together=True)
    assert said == {"True": 1, "IntegrityError": tasks - 1}
    assert "myapp_item_remote_id_key" in str(error)
    assert Item.objects.get().remote_id == 1


@TASKS
def test_the_naive_way_fails_for_some_by_itself(tasks: int) -> None:
    said, error = race(tasks, mode="naive")
    assert said["True"] == 1
    assert said["IntegrityError"] >= 1
    assert said["True"] + said["False"] + said["IntegrityError"] == tasks
    assert isinstance(error, IntegrityError)


@TASKS
@NAMES
def test_an_atomic_block_with_a_second_look_succeeds_for_all(tasks: int, prefix: str) -> None:
    said, error = race(tasks, mode="atomic", prefix=prefix, together=True)
    assert error is None
    assert said == {"True": 1, "False": tasks - 1}
    assert Item.objects.get().remote_id == 1


@TASKS
def test_different_rows_do_not_race(tasks: int) -> None:
    out = io.StringIO()
    call_command("sync_myapp", *range(tasks), mode="naive", together=True, stdout=out)
    assert out.getvalue().split() == ["True"] * tasks
    assert Item.objects.count() == tasks


def test_from_the_command_line() -> None:
    server = json.loads(os.environ["ASYNCORM_TEST_DATABASE"])
    server["NAME"] = connection.settings_dict["NAME"]  # the test database
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "django", "sync_myapp", *"11111"],
        env=os.environ | {"ASYNCORM_TEST_DATABASE": json.dumps(server)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Counter(done.stdout.split()) == {"True": 1, "False": 4}
    assert Item.objects.get().remote_id == 1
