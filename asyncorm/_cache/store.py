"""The table of plans: bounded, and which of them makes room is left to chance.

Of more shapes in rotation than the table holds, the one that was used least recently is the next to
be asked for: to drop that one is never to find any. By chance a share of them stays, a larger one
if most new ones are not let in at once; and a plan that is not kept need not be made.
"""

from __future__ import annotations

from collections.abc import Hashable
from random import Random
from threading import Lock
from typing import Any

_LET_IN = 0.25  # of the new ones, where another has to go for it
_chance = Random()  # not the program's, which may have been seeded


class Store(dict[Any, Any]):
    """A dict of at most `size` items: `keep()` puts them there, `drop()` and `clear()` remove them.

    Attributes:
        size: may be changed while it is empty.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._keys: list[Any] = []
        self._places: dict[Any, int] = {}
        self._lock = Lock()

    def lets_in(self) -> bool:
        """Whether a new item is to be made and kept now: always, or by chance if it is full."""
        return len(self) < self.size or _chance.random() < _LET_IN

    def keep(self, key: Hashable, value: object) -> None:
        """Put an item there, in the place of any other if it is new and there is no room."""
        with self._lock:
            if key not in self:
                place = len(self._keys)
                if place < self.size:
                    self._keys.append(key)
                else:
                    place = _chance.randrange(place)
                    old, self._keys[place] = self._keys[place], key
                    del self[old], self._places[old]
                self._places[key] = place
            self[key] = value

    def drop(self, key: Hashable) -> None:
        """Remove an item if it is there."""
        with self._lock:
            if self.pop(key, None) is not None:
                place, last = self._places.pop(key), self._keys.pop()
                if place < len(self._keys):
                    self._keys[place] = last
                    self._places[last] = place

    def clear(self) -> None:
        """Remove all."""
        with self._lock:
            super().clear()
            self._keys.clear()
            self._places.clear()
