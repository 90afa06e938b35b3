"""Errors say what to write, and name a page and a heading of the documentation that exist."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connection, transaction
from django.template import Context, Template
from django.utils.functional import SimpleLazyObject

import asyncorm
from asyncorm import advice
from tests.project.shop.models import Book, Customer, Note, Tag

ROOT = Path(__file__).parents[2]
SEE = re.compile(r'\bsee\("([^"]+)"\)')


def headings(page: str) -> set[str]:
    """The anchors that MyST gives the headings of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    found = re.findall(r"^##?#? (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


def test_the_places_that_errors_name_are_there() -> None:
    places = {
        place
        for module in (ROOT / "asyncorm").rglob("*.py")
        for place in SEE.findall(module.read_text())
    }
    assert len(places) >= 8
    for place in places:
        page, _, anchor = place.partition("#")
        assert anchor in headings(page), place


def test_the_address_is_that_of_the_project() -> None:
    """Once there is one, errors name it."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("urls", {}).get("Documentation", "docs/") == advice.PAGES


def enter_atomic(_: Any) -> None:
    with transaction.atomic():
        pass


ADVICE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "foreign key": (
        lambda book: Book(publisher_id=1).publisher,
        r"Book\.publisher .*select_related\('publisher'\)",
    ),
    "in a template": (
        lambda book: Template("{{ book.publisher.name }}").render(
            Context({"book": Book(publisher_id=1)})
        ),
        r"Book\.publisher .*select_related\('publisher'\)",
    ),
    "one to one, reversed": (
        lambda book: book.product,
        r"Book\.product .*select_related\('product'\)",
    ),
    "one to one": (
        lambda book: Customer(pk=1, user_id=1).user,
        r"Customer\.user .*select_related\('user'\)",
    ),
    "generic": (
        lambda book: Note(content_type_id=1, object_id=1).target,
        r"Note\.target is read .*prefetch_related\('target'\)",
    ),
    "deferred": (
        lambda book: book.slug,
        r"Book\.slug was deferred.*arefresh_from_db\(fields=\['slug'\]\)",
    ),
    "iterated": (lambda book: list(Tag.objects.all()), "queryset of Tag by 'async for'"),
    "measured": (lambda book: len(Tag.objects.all()), r"'await queryset\.anative\(\)'"),
    "related": (lambda book: list(book.tags.all()), "queryset of Tag by 'async for'"),
    "get": (lambda book: Tag.objects.get(pk=1), r"aget\(\.\.\.\)' for Tag's get\(\)"),
    "count": (lambda book: book.tags.count(), r"acount\(\.\.\.\)' for Tag's count\(\)"),
    "add": (lambda book: book.tags.add(1), r"aadd\(\.\.\.\)' for Tag's add\(\)"),
    "create": (lambda book: Tag.objects.create(name="x"), r"acreate\(\.\.\.\)' for Tag's"),
    "save": (lambda book: book.save(), r"asave\(\.\.\.\)' for Book's save\(\)"),
    "delete": (lambda book: book.delete(), r"adelete\(\.\.\.\)' for Book's delete\(\)"),
    "stream": (lambda book: next(Tag.objects.iterator()), r"'native_iterator\(\)'"),
    "lazy object": (
        lambda book: str(SimpleLazyObject(lambda: Tag.objects.get(pk=1))),
        r"aget\(\.\.\.\)' for Tag's get\(\)",
    ),
    "cursor": (lambda book: connection.cursor(), r"asyncorm\.cursor\(\)"),
    "atomic": (enter_atomic, r"'async with asyncorm\.atomic\(\)'"),
}


@pytest.mark.parametrize("case", ADVICE)
async def test_synchronous_code_in_a_coroutine_is_told_what_to_write(
    case: str, shop_data: Any
) -> None:
    book = await Book.objects.defer("slug").native_get(pk=1)
    action, expected = ADVICE[case]
    with pytest.raises(SynchronousOnlyOperation) as caught:
        action(book)
    text = str(caught.value)
    assert text.startswith("You cannot call this from an async context - use a thread or")
    assert re.search(expected, text), text
    assert "'await asyncorm.native(function)(...)'" in text
    assert text.endswith("See docs/debugging.md#it-raises")


async def test_an_error_of_ours_names_its_page(shop_data: Any) -> None:
    with pytest.raises(Exception, match=r"See docs/deployment\.md#other-backends$"):
        await Tag.objects.using("legacy").native_count()

    async def later() -> None:
        await over.wait()
        await Tag.objects.native_count()

    over = asyncio.Event()
    async with asyncorm.atomic():
        task = asyncio.create_task(later())
        await Tag.objects.native_count()
        await asyncio.sleep(0)
    over.set()
    with pytest.raises(Exception, match=r"See docs/transactions\.md#tasks-inside-a-block$"):
        await task
