"""Replaces other projects' code: the one place where it is done, so that it is known what is
replaced, why and by what, and can be undone.

`manage.py asyncorm status` prints what is in force.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import getmodule
from typing import Any

_ABSENT: Any = object()


@dataclass(frozen=True, eq=False)
class Patch:
    """One replacement.

    Attributes:
        owner: a module, a class or an object.
        name: the attribute of the owner.
        by: what is there now.
        why: in a few words.
        label: how the owner is called.
        before: what was there; nothing where it is inherited.
    """

    owner: Any
    name: str
    by: Any
    why: str
    label: str
    before: Any

    @property
    def in_force(self) -> bool:
        """Whether nobody else has replaced it again since."""
        return vars(self.owner).get(self.name) is _of(self.owner, self.name)[-1].by

    @property
    def new(self) -> str:
        """What it was replaced by, for people."""
        maker = getattr(self.by, "__code__", None) or type(self.by)
        module = getmodule(maker)
        name = getattr(maker, "co_qualname", None) or maker.__qualname__
        return f"{module.__name__ if module else '?'}.{name}"

    def __str__(self) -> str:
        return f"{self.label}.{self.name}"


_patches: list[Patch] = []


def replace(owner: object, name: str, by: object, why: str, label: str | None = None) -> None:
    """Replace an attribute.

    Args:
        owner: a module, a class or an object.
        name: the attribute's; it may be inherited, or be new.
        by: what is put there.
        why: in a few words, for `manage.py asyncorm status`.
        label: how an owner is called that is neither a module nor a class.
    """
    before = vars(owner).get(name, _ABSENT)
    if before is by:
        return
    _patches.append(Patch(owner, name, by, why, label or _label(owner), before))
    setattr(owner, name, by)


def _label(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__


def replaced_by_us(owner: object, name: str) -> bool:
    """Whether `replace()` was called for an attribute and is not undone."""
    return bool(_of(owner, name))


def _of(owner: object, name: str) -> list[Patch]:
    return [patch for patch in _patches if patch.owner is owner and patch.name == name]


def all_patches() -> list[Patch]:
    """Each replacement that was made, in that order."""
    return list(_patches)


def undo(owner: object, name: str) -> None:
    """Put back what was there before the last replacement, unless somebody replaced it since."""
    patch = _of(owner, name)[-1]
    in_force = patch.in_force
    _patches.remove(patch)
    if not in_force:
        return
    if patch.before is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, patch.before)


@contextmanager
def replaced(owner: object, name: str, by: object, why: str) -> Iterator[None]:
    """Replace an attribute for the duration of a block."""
    replace(owner, name, by, why)
    try:
        yield
    finally:
        undo(owner, name)
