"""Errors say what to write, and name a page and a heading of the documentation that exist."""

import ast
import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connection, transaction
from django.template import Context, Template
from django.utils.functional import SimpleLazyObject

import asyncorm
from asyncorm import pages
from tests.project.shop.models import Book, Customer, Note, Tag

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "asyncorm").rglob("*.py"))
SEE = re.compile(r'\b_?see\(\s*"([^"]+)"')


def test_the_places_that_errors_name_are_there() -> None:
    places = {place for module in MODULES for place in SEE.findall(module.read_text())}
    assert len(places) >= 30
    for place in places:
        assert pages.section(place).startswith("#"), place  # or it says that there is none
    for name in re.findall(r"docs/\w+\.md", "".join(map(Path.read_text, MODULES))):
        assert pages.section(name), name


# Errors that name no page: the beginnings of their messages, by why.
NO_PAGE = {
    "Django's and psycopg's own words": {
        "The connection '",
        "on_commit()'s callback must be a callable.",
        "on_commit() cannot be used in manual transaction management",
        "The rollback flag doesn't work outside of an 'atomic' block.",
        "Chunk size must be strictly positive.",
        " object has no attribute ",
        "the cursor is closed",
        "pipeline aborted",
        "must be at least 1",  # argparse prints how the command is called
        "SUBCOMMAND is one of these:",  # and what each is for
    },
    "what was asked for is a page": {"There is no page ", "The page "},
    "caught here, or part of another message": {
        "A write was refused, and the server is in hot standby",
        "The block is to be rolled back.",
        "The connection is still busy.",
        "The connection's socket is closed.",
        "Two tasks used one connection at the same time.",
        "A statement without a cursor gave ",
        "The server gave no result.",
        "The thread has not called the execute wrapper.",
        "Native code may call the synchronous ORM.",
        "database ",
        "OPTIONS['pool'][",
        "wait timeout expired",
        "not an address of HTTP",
    },
}


def raised(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Errors that are raised with a text of ours: its beginning, and the call."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        texts = [
            each
            for each in ast.walk(node.exc)
            if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        if texts:
            first = min(texts, key=lambda each: (each.lineno, each.col_offset))
            yield str(first.value), node.exc


def names_a_page(error: ast.Call) -> bool:
    return any(
        isinstance(each, ast.Call) and ast.unparse(each.func).split(".")[-1] in ADVISING
        for each in ast.walk(error)
    )


ADVISING = {"see", "_see", "synchronous_only", "difference_error"}


def test_each_error_names_a_page() -> None:
    without = set[str]()
    found = 0
    for module in MODULES:
        if "demo" in module.parts:
            continue
        for text, error in raised(ast.parse(module.read_text())):
            found += 1
            if not names_a_page(error):
                without.add(text)
    assert found > 100
    assert without == set().union(*NO_PAGE.values())


def test_the_address_is_that_of_the_project() -> None:
    """Once there is one, errors name it."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("urls", {}).get("Documentation", "docs/") == pages.PAGES


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
    assert text.endswith(pages.see("debugging#it-raises"))


async def test_an_error_of_ours_names_its_page(shop_data: Any) -> None:
    with pytest.raises(Exception, match=r"See docs/deployment\.md#other-backends "):
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
    with pytest.raises(Exception, match=r"See docs/transactions\.md#tasks-inside-a-block "):
        await task
