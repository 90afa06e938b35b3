"""Each replacement of other projects' code is in the registry, and can be undone."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from asyncorm import patches

ROOT = Path(__file__).parents[2]

# In a process of its own: everything that can be replaced, before and after it was.
SCRIPT = """
import importlib, pkgutil, sys, types

import django
from django.apps import apps
from django.core.signals import Signal
from django.utils.connection import BaseConnectionHandler

from asyncorm import patches
from asyncorm.apps import AsyncormConfig

PROJECTS = ("django", "asgiref", "psycopg", "psycopg_pool")


def ours(name):
    return name.partition(".")[0] in PROJECTS


def owners():
    for name, module in list(sys.modules.items()):
        if ours(name) and module is not None:
            yield name, module
            for attribute, value in list(vars(module).items()):
                if isinstance(value, type):
                    if ours(value.__module__):
                        yield f"{value.__module__}.{value.__qualname__}", value
                elif isinstance(value, (Signal, BaseConnectionHandler)):
                    yield f"{name}.{attribute}", value


def snapshot():
    return {
        (id(owner), name): (label, value)
        for label, owner in owners()
        for name, value in list(vars(owner).items())
        if not isinstance(value, types.ModuleType)
    }


def changed(before, after):
    known = {owner for owner, name in before}
    return {
        (owner, name)
        for owner, name in before.keys() | after.keys()
        if owner in known
        and before.get((owner, name), (0, None))[1] is not after.get((owner, name), (0, None))[1]
        and not name.startswith(("native_", "anative", "__abstractmethods__"))
    }


def describe(keys, *snapshots):
    return sorted(
        {f"{s[key][0]}.{key[1]}" for key in keys for s in snapshots if key in s}
    )


ready, AsyncormConfig.ready = AsyncormConfig.ready, lambda self: None
django.setup()
for package in ("db", "core", "dispatch", "utils", "urls", "test", "middleware", "views"):
    root = importlib.import_module(f"django.{package}")
    for each in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        try:
            importlib.import_module(each.name)
        except Exception:  # of drivers that are not installed
            pass
import asyncorm, asyncorm.asgi
from asyncorm import _events, driver, planned, related, seam, swap
from asyncorm._requests import blocking, djangos, signals
from asyncorm.backends import mixin

before = snapshot()
ready(apps.get_app_config("asyncorm"))
asyncorm.asgi.get_asgi_application()


class Listener(_events.Listener):
    def command_begun(self, command):
        pass


_events.listen(Listener())
after = snapshot()
found = changed(before, after)
registered = {(id(patch.owner), patch.name) for patch in patches.all_patches()}
assert len(found) > 30, found
unknown = describe(found - registered, before, after)
assert not unknown, f"replaced behind the registry's back: {unknown}"

for patch in reversed(patches.all_patches()):
    patches.undo(patch.owner, patch.name)
assert not patches.all_patches()
left = describe(changed(before, snapshot()), before, snapshot())
assert not left, f"still replaced: {left}"
"""


def test_every_replacement_is_registered_and_can_be_undone() -> None:
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_each_says_what_by_what_and_why() -> None:
    assert patches.all_patches()
    for patch in patches.all_patches():
        assert str(patch).endswith(f".{patch.name}") and len(str(patch)) > len(patch.name) + 5
        assert patch.new.startswith("asyncorm."), (str(patch), patch.new)
        assert patch.why and not patch.why.endswith(".")


def test_inherited_attributes_and_those_of_objects_come_back() -> None:
    class Base:
        name = "of the base"

    class Derived(Base):
        pass

    thing = types.SimpleNamespace(name="mine")
    patches.replace(Derived, "name", "ours", "a test")
    patches.replace(thing, "name", "ours", "a test", label="thing")
    assert (Derived.name, thing.name) == ("ours", "ours")
    assert str(patches.all_patches()[-1]) == "thing.name"
    patches.undo(Derived, "name")
    patches.undo(thing, "name")
    assert "name" not in vars(Derived) and (Derived.name, thing.name) == ("of the base", "mine")


def test_what_somebody_replaced_since_is_left_alone() -> None:
    thing = types.SimpleNamespace(name="mine")
    patches.replace(thing, "name", "ours", "a test", label="thing")
    assert patches.all_patches()[-1].in_force
    thing.name = "theirs"
    assert not patches.all_patches()[-1].in_force
    patches.undo(thing, "name")
    assert thing.name == "theirs"


def test_what_we_replaced_again_is_in_force() -> None:
    thing = types.SimpleNamespace(name="mine")
    patches.replace(thing, "name", "ours", "a test", label="thing")
    patches.replace(thing, "name", "ours, too", "a test", label="thing")
    first, second = patches.all_patches()[-2:]
    assert first.in_force and second.in_force
    thing.name = "theirs"
    assert not first.in_force and not second.in_force
    thing.name = "ours, too"
    patches.undo(thing, "name")
    assert first.in_force
    patches.undo(thing, "name")
    assert thing.name == "mine"


def test_for_the_duration_of_a_block() -> None:
    number = len(patches.all_patches())
    with pytest.raises(ZeroDivisionError), patches.replaced(patches, "_label", len, "a test"):
        assert patches._label is len
        raise ZeroDivisionError
    assert patches._label is not len
    assert len(patches.all_patches()) == number
