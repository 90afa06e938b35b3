"""What `await qs.anative()` and the like are to mypy with django-stubs and to pyright."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncorm import stubs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

MODELS = """
from django.db import models


class Publisher(models.Model):
    name = models.CharField(max_length=50)


class Book(models.Model):
    title = models.CharField(max_length=50)
    publisher = models.ForeignKey(Publisher, on_delete=models.CASCADE, related_name="books")
"""

CODE = """
from typing import assert_type

import asyncorm
from app.models import Book, Publisher


def report(year: int) -> dict[str, int]:
    return {"books": Book.objects.count(), "year": year}


async def main(publisher: Publisher) -> None:
    assert_type(await Book.objects.filter(title="x").anative(), list[Book])
    assert_type(await Book.objects.anative(), list[Book])
    assert_type(await Book.objects.order_by("title").native_first(), Book | None)
    assert_type(await Book.objects.native_get(pk=1), Book)
    assert_type(await Book.objects.native_get_or_create(title="x"), tuple[Book, bool])
    assert_type(await Book.objects.filter().native_count(), int)
    async for book in Book.objects.filter().native_iterator(500, read_ahead=1):
        assert_type(book, Book)
    await Book.objects.native_bulk_create([Book(title="x")], method="copy")
    book = await Book.objects.native_create(title="x", publisher=publisher)
    assert_type(await book.native_save(), None)
    assert_type(await asyncorm.native(report)(2026), dict[str, int])
    async with asyncorm.atomic(), asyncorm.timeline() as seen:
        assert_type(str(seen), str)
    assert_type(await asyncorm.copy_to(Book.objects.all(), "books.csv"), int)
"""
PLUGIN = """
    assert_type(await Book.objects.values_list("title", flat=True).anative(), list[str])
    assert_type(await publisher.books.filter().anative(), list[Book])
"""  # what only mypy's plugin knows of Django's models
WRONG = """
    assert_type(await Book.objects.anative(), list[str])
    await asyncorm.native(report)("x")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typed")
    stubs.write(folder / "typings")
    (folder / "app").mkdir()
    (folder / "app" / "__init__.py").touch()
    (folder / "app" / "models.py").write_text(MODELS)
    (folder / "settings.py").write_text(
        'SECRET_KEY = "x"\nINSTALLED_APPS = ["asyncorm", "app"]\n'
        'DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"\n'
    )
    (folder / "mypy.ini").write_text(
        "[mypy]\nmypy_path = typings\nplugins = mypy_django_plugin.main\nstrict = true\n"
        "[mypy.plugins.django-stubs]\ndjango_settings_module = settings\n"
    )
    (folder / "pyrightconfig.json").write_text(
        '{"typeCheckingMode": "standard", "include": ["check.py"], "extraPaths": ["."]}'
    )
    return folder


def run(folder: Path, code: str, *command: str) -> subprocess.CompletedProcess[str]:
    (folder / "check.py").write_text(code)
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_mypy(project: Path) -> None:
    result = run(project, CODE + PLUGIN, "mypy", "check.py")
    assert result.returncode == 0, result.stdout + result.stderr
    result = run(project, CODE + WRONG, "mypy", "check.py")
    assert result.stdout.count("error:") == 2, result.stdout + result.stderr


def test_pyright(project: Path) -> None:
    pytest.importorskip("basedpyright")
    python = ("--pythonpath", sys.executable)
    result = run(project, CODE, "basedpyright", *python)
    assert result.returncode == 0, result.stdout + result.stderr
    result = run(project, CODE + WRONG, "basedpyright", *python)
    assert result.stdout.count("error:") == 2, result.stdout + result.stderr


def test_the_command(tmp_path: Path) -> None:
    first = run(tmp_path, "", "asyncorm.stubs")
    assert first.returncode == 0 and "typings" in first.stdout, first.stderr
    assert run(tmp_path, "", "asyncorm.stubs").returncode == 0
    (tmp_path / "own" / "django").mkdir(parents=True)
    refused = run(tmp_path, "", "asyncorm.stubs", "own")
    assert refused.returncode == 1 and "was not made by asyncorm" in refused.stderr
