"""The example project itself: its sample comes and goes, its migrations and checks are clean."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from django.core.management import call_command

from tests.compare import differences
from tests.project.legacy.models import LegacyRecord
from tests.project.shop.models import Book, OrderLine, Tag


def test_the_sample_is_on_both_aliases(shop_data: None) -> None:
    for alias in ("default", "other"):
        assert Book.objects.using(alias).count() == 30
        assert OrderLine.objects.using(alias).count() == 20


@pytest.mark.django_db
def test_without_the_sample_tables_are_empty() -> None:
    assert not Book.objects.exists()
    Tag.objects.create(name="rolled back")


@pytest.mark.django_db(transaction=True)
def test_without_the_sample_tables_are_empty_after_a_flush_too() -> None:
    assert not Tag.objects.exists()
    Tag.objects.create(name="flushed")


def test_the_sample_can_be_changed_and_comes_back(fresh_shop: Callable, stock: Any) -> None:
    before = stock.changes()
    assert [list(changes) for changes in before] == [["sequences"], ["sequences"]]
    Book.objects.all().delete()
    Tag.objects.using("other").create(name="new")
    default, other = stock.changes()
    assert {"shop_book", "shop_review"} <= default.keys()
    assert other.keys() == {"shop_tag", "sequences"}
    fresh_shop()
    assert differences(before, stock.changes()) == []


@pytest.mark.django_db(databases=["default", "legacy"])
def test_the_legacy_app_lives_on_its_own_engine() -> None:
    record = LegacyRecord.objects.create(name="old")
    assert record._state.db == "legacy"


@pytest.mark.django_db(databases=["default", "other", "legacy"])
def test_the_migrations_are_complete() -> None:
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)


@pytest.mark.django_db(databases=["default", "other"])
def test_the_system_checks_find_nothing() -> None:
    call_command("check", databases=["default", "other"], fail_level="WARNING")


@pytest.mark.django_db
def test_the_admin_serves_the_shop(admin_client: Any) -> None:
    Tag.objects.create(name="in the admin")
    assert b"in the admin" in admin_client.get("/admin/shop/tag/").content


def test_the_settings_load_without_a_server() -> None:
    # Type checkers read them so.
    code = "import tests.project.settings as s; assert s.DATABASES['default']['NAME'] == 'asyncorm'"
    subprocess.run([sys.executable, "-c", code], check=True, env={}, timeout=60)
