"""Renames something inside an installed project, as its next release may: for test_internals.py.

`main()` in a fresh process takes a list of names as JSON from RENAMED and prints for each what
became of asyncorm, each tried in a process of its own (a fork of that one).
"""

import asyncio
import functools
import importlib
import inspect
import json
import os
import sys
import traceback
import types
from typing import Any

GONE = "_of_another_release"


def rename(project: str, owner: str, name: str) -> None:
    """Give an attribute another name, in the project's own code as well."""
    module, _, path = owner.partition(":")
    target: Any = importlib.import_module(module)
    for step in path.split(".") if path else ():
        target = getattr(target, step)
    owners = [target] if inspect.ismodule(target) else (
        target if inspect.isclass(target) else type(target)
    ).__mro__  # fmt: skip
    if name.startswith("_") and not name.startswith("__"):  # others may be anybody's
        for each in list(sys.modules.values()):
            if (each.__name__ or "").partition(".")[0] == project:
                _rename_uses(vars(each).values(), project, name)
    else:
        for each in owners:
            _rename_uses(vars(each).values(), project, name)
    for each in {target, *owners} - {object}:
        if name in vars(each):
            setattr(each, name + GONE, vars(each)[name])
            delattr(each, name)


_seen: set[type] = set()


def _is_of(member: Any, project: str) -> bool:
    return str(member.__module__).partition(".")[0] == project


def _rename_uses(members: Any, project: str, name: str) -> None:
    for member in list(members):
        if inspect.isclass(member) and _is_of(member, project) and member not in _seen:
            _seen.add(member)
            _rename_uses(vars(member).values(), project, name)
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, classmethod | staticmethod):
            member = member.__func__
        elif isinstance(member, functools.cached_property):
            member = member.func
        if isinstance(member, types.FunctionType):
            member = inspect.unwrap(member)
        if isinstance(member, types.FunctionType) and _is_of(member, project):
            member.__code__ = _renamed(member.__code__, name)


def _renamed(code: types.CodeType, name: str) -> types.CodeType:
    return code.replace(
        co_names=tuple(n + GONE if n == name else n for n in code.co_names),
        co_consts=tuple(
            _renamed(c, name) if isinstance(c, types.CodeType) else c for c in code.co_consts
        ),
    )


def _import_all() -> None:
    """Import what is registered, but nothing of asyncorm that uses it."""
    for module in (
        "psycopg_pool.pool_async",
        "psycopg_pool.sched_async",
        "psycopg.generators",
        "django.db.models.sql.compiler",
        "django.db.backends.postgresql.base",
        "django.core.handlers.base",
        "django.db.transaction",
    ):
        importlib.import_module(module)


def outcome(name: str) -> dict[str, Any]:
    """What asyncorm says now, and does if Django itself can do without the name."""
    from django.core.exceptions import ImproperlyConfigured

    try:
        import django

        django.setup()
    except ImproperlyConfigured as exc:
        return {"refused": str(exc)}
    from django.core import checks

    warnings = [m.msg for m in checks.run_checks(tags=["asyncorm"]) if m.id == "asyncorm.W010"]
    works = asyncio.run(_works()) if name.startswith("_") else None
    return {"warnings": warnings, "works": works}


async def _works() -> list[Any]:
    import asyncorm
    from tests.project.shop.models import Author, Tag

    names = ["of renaming", "two"]
    await Tag.objects.native_bulk_create([Tag(name=name) for name in names])
    tags = [await Tag.objects.native_get(name=name) for name in names for _ in range(3)]
    gathered = await asyncio.gather(*(Tag.objects.native_get(pk=tags[0].pk) for _ in range(30)))
    tags[0].name = "three"
    await tags[0].native_save()
    counts = await asyncorm.batch(Tag.objects.count, Tag.objects.filter(name="three").count)
    authors = await Author.objects.prefetch_related("books__tags", "books__publisher").anative()
    await Tag.objects.filter(pk__in=[tag.pk for tag in tags]).native_delete()
    return [[tag.name for tag in tags], len(gathered), counts, len(authors)]


def main() -> None:
    _import_all()
    for project, owner, name in json.loads(os.environ["RENAMED"]):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            try:
                rename(project, owner, name)
                result = outcome(name)
            except BaseException as exc:
                result = {"raised": "".join(traceback.format_exception(exc))}
            with open(writing, "w") as out:
                json.dump(result, out)
            os._exit(0)
        os.close(writing)
        with open(reading) as answer:
            print(json.dumps([owner, name, json.load(answer)]), flush=True)
        os.waitpid(child, 0)
