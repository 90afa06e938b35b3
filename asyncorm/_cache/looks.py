"""Whether classes are as they were: Python itself tells when one of them, or a base, has changed.

Python remembers what it has found for an attribute of a class until something in that class or in
one of its bases changes; only then does it look through their namespaces again, and compare names.
A name that counts how often it is compared is a number of changes, at the cost of one attribute.

Names of Django (5.2 to 6.1) used beyond the documented API, and why:

- `Model.__bases__`, `QuerySet.__bases__`: get one more class, see `Last`.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter, itemgetter
from typing import Any
from weakref import WeakValueDictionary

from django.db.models import Field, Model, query
from django.db.models.manager import BaseManager

_MOST_UNFOUNDED = 16  # looks
_COUNTERS = {"creation_counter", "auto_creation_counter"}
# Of classes that count their instances, and of models' own base.
_within: dict[type, Any] = {
    cls: itemgetter(*vars(cls).keys() - _COUNTERS) for cls in (Field, BaseManager)
}
_within[Model] = itemgetter("__init__", "from_db")


def contents_of(cls: type) -> Any:
    """What a class has itself, to be compared with what it has later."""
    names = vars(cls)
    pick = _within.get(cls)
    return len(names), [*names.values()] if pick is None else pick(names)


class Name(str):
    """A name in a class's namespace that counts how often Python looks through that namespace.

    Python remembers what it has found for an attribute of a class until something in that class or
    in one of its bases changes, whatever it is; only then it looks again, and compares the name.
    """

    looks = 0

    def __eq__(self, other: object) -> bool:
        self.looks += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


class Look:
    """One look at which it is seen whether a class, or a base of it, has changed.

    Args:
        cls: has the name in its namespace, or in that of a base.

    Attributes:
        name: `name.looks` is what `changes()` returns after a look at that attribute of `cls`,
            `find(cls)`.
    """

    def __init__(self, cls: Any, name: Name) -> None:
        self.cls = cls
        self.name = name
        self.find = attrgetter(str(name))
        self._unfounded = 0
        self._contents: dict[type, tuple[int | None, Any]] = {}

    def changes(self) -> int:
        """A number that is another one once something has been changed."""
        try:
            self.find(self.cls)
        except AttributeError:  # see `Name`
            self.name.looks += 1
        return self.name.looks

    def contents(self, cls: type, number: int) -> Any:
        """What a class that is looked at has, after so many changes: one object for all plans."""
        at, known = self._contents.get(cls, (None, None))
        if at != number:
            now = contents_of(cls)
            known = known if known == now else now
            self._contents[cls] = number, known
        return known

    def nothing_changed(self) -> None:
        """Python looked again for no reason: it had used the place of what it found for another.

        Where that goes on, have it use another place.
        """
        self._unfounded += 1
        if self._unfounded > _MOST_UNFOUNDED:
            self._unfounded = 0
            self._move()

    def _move(self) -> None:
        if _free:
            looks = self.name.looks + 1
            self.name = _free.pop()
            self.name.looks = looks
            self.find = attrgetter(str(self.name))


class Family(Look):
    """Classes of Django's: an heir of all of them is looked at."""

    def __init__(self, classes: set[type]) -> None:
        leaves = classes.difference(*(each.__mro__[1:] for each in classes))
        self._leaves = tuple(sorted(leaves, key=lambda cls: (-len(cls.__mro__), cls.__qualname__)))
        super().__init__(None, Name("unchanged"))
        self._move()

    def _move(self) -> None:
        self.cls = type("_Heir", self._leaves, {self.name: None})


# Other people's classes get no heirs: `__subclasses__()` would show them. A last base of Django's
# classes has names for them to be looked at.
_free = [Name(f"_asyncorm_unchanged_{number}") for number in range(256)]
Last = type("Last", (), dict.fromkeys(_free))
for _root in (Model, query.QuerySet):
    _root.__bases__ = (*_root.__bases__, Last)
_looks: WeakValueDictionary[type, Look] = WeakValueDictionary()


def look_at(cls: type) -> Look | None:
    """A look at a class that has the names of `Last`; None where none of them is left."""
    look = _looks.get(cls)
    if look is None and _free:
        look = _looks[cls] = Look(cls, _free.pop())
    return look


class Seen:
    """Classes as they were.

    Args:
        look: at an heir of them all, or at one that they are bases of.

    Attributes:
        number: of the changes, when they were looked at.
    """

    __slots__ = ("_contents", "classes", "look", "number")

    def __init__(self, look: Look, classes: Iterable[type]) -> None:
        self.look = look
        self.classes = list(classes)
        self.number = look.changes()
        self._contents = [look.contents(cls, self.number) for cls in self.classes]

    def holds(self) -> bool:
        if self.number != (number := self.look.changes()):
            if [*map(contents_of, self.classes)] != self._contents:
                return False
            self.number = number
            self.look.nothing_changed()
        return True


ALL_MODELS = Look(Model, _free.pop())
