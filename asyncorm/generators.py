"""The asynchronous generators in which something was entered that others are in as well.

A context variable that an asynchronous generator sets is set in its consumer too, and a `break`
there closes the generator only later, in another task. So what is entered (a transaction block,
`connection()`, `detached()`, `parallelism()`) is registered here with the generators around it:

- it is told at the very moment that one of them is dropped, for the consumer is then outside;
- what runs in a generator finds it, whichever task drives the generator.

Names of Python's that are not documented, and why: `BaseEventLoop._asyncgens` holds the generators
that began before we saw any (without it, on uvloop, the garbage collector is asked).
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from inspect import CO_ASYNC_GENERATOR, CO_OPTIMIZED
from opcode import opmap
from types import AsyncGeneratorType, FrameType
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from greenlet import getcurrent

Generator = AsyncGeneratorType[Any, Any]

_GET_ANEXT = opmap["GET_ANEXT"]  # a step of `async for`
_COPIES_VARIABLES = sys.version_info < (3, 13)


class Entry(Protocol):
    """What is entered in a generator."""

    places: tuple[Place, ...]

    def dropped(self, place: Place) -> None:
        """Nobody can continue the generator any more; it is about to be closed."""


class Place:
    """A generator in which something is entered.

    Attributes:
        entries: what is, in order.
    """

    def __init__(self, frame: FrameType, generator: Generator) -> None:
        # Not the frame: it may keep what keeps the generator, which would then never be dropped.
        self._frame = id(frame)
        self._code = frame.f_code
        self.generator: Callable[[], Generator | None] = ref(generator, self._dropped)
        self.entries: WeakKeyDictionary[Entry, None] = WeakKeyDictionary()

    def holds(self, frame: FrameType) -> bool:
        """Whether it is the generator of `frame`; the number of an old frame may come again."""
        generator = self.generator()
        if generator is None:
            return frame.f_code is self._code
        return generator.ag_frame is frame

    def _dropped(self, _: object) -> None:
        for entry in list(self.entries):
            entry.dropped(self)
        if not self.entries:  # what was entered by a task that has ended is gone already
            self.forget()

    def forget(self) -> None:
        """Nothing is entered there any more."""
        if places.get(self._frame) is self:
            del places[self._frame]
        self.generator = _no_generator  # the other one refers to the place


def _no_generator() -> None:
    return None


# By the id() of the generator's frame.
places: dict[int, Place] = {}
_started: dict[int, ref[Generator]] = {}


def enter(entry: Entry) -> None:
    """Register `entry` with the generators that the caller runs in, innermost first."""
    _follow()
    found: list[Place] = []
    for frame in _frames(CO_ASYNC_GENERATOR):
        place = places.get(id(frame))
        # A new frame may have the number and the code of one whose generator is gone.
        if place is None or place.generator() is None or not place.holds(frame):
            generator = _generator(frame)
            if generator is None:  # it is being closed: nobody else is in it
                continue
            place = places[id(frame)] = Place(frame, generator)
        place.entries[entry] = None
        found.append(place)
    entry.places = tuple(found)


def leave(entry: Entry) -> None:
    """Take `entry` out again, however often."""
    for place in entry.places:
        place.entries.pop(entry, None)
        if not place.entries:
            place.forget()


def around() -> tuple[Place, ...]:
    """The generators with something entered that the caller runs in, innermost first."""
    if not places:
        return ()
    found = ((places.get(id(frame)), frame) for frame in _frames(CO_ASYNC_GENERATOR))
    return tuple(place for place, frame in found if place is not None and place.holds(frame))


def is_left(entry: Entry) -> bool:
    """Whether a loop over the suspended generator that holds `entry` was left.

    It is not iterated over then: all that refers to it are plain variables of the caller's task, in
    functions that have loops, and not a loop, a context manager or a framework.
    """
    generator = entry.places[-1].generator() if entry.places else None
    if generator is None or generator.ag_running:
        return False
    unknown = sys.getrefcount(generator) - 2  # that of here and the argument
    for frame in _frames(CO_OPTIMIZED):
        code = frame.f_code
        if _GET_ANEXT not in code.co_code[::2]:
            continue
        names = {*code.co_varnames, *code.co_cellvars}
        variables = frame.f_locals
        unknown -= sum(v is generator for n, v in variables.items() if n in names)
        # Before 3.13 a copy that the frame keeps: nothing may live longer for it.
        if _COPIES_VARIABLES and sys.getrefcount(variables) <= 3:
            variables.clear()
    return unknown <= 0


def _frames(flag: int) -> list[FrameType]:
    """The frames that the caller runs in and whose code has a flag, innermost first.

    Of its own task only: an eager task begins on the stack of the one that starts it.
    """
    found = []
    frame: FrameType | None = sys._getframe(2)  # not the caller, which would keep its own frame
    greenlet: Any = getcurrent()
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        task = None
    outermost = None if task is None else getattr(task.get_coro(), "cr_frame", None)
    while True:
        while frame is not None:
            if frame.f_code.co_flags & flag:
                found.append(frame)
            if frame is outermost:
                return found
            frame = frame.f_back
        if (greenlet := greenlet.parent) is None:
            return found
        frame = greenlet.gr_frame


def _generator(frame: FrameType) -> Generator | None:
    started = _started.get(id(frame))
    generator = None if started is None else started()
    if generator is not None and generator.ag_frame is frame:
        return generator
    try:
        generators = getattr(asyncio.get_running_loop(), "_asyncgens", None)
    except RuntimeError:  # no loop will close it either
        return None
    if generators is None:
        generators = [o for o in gc.get_referrers(frame) if type(o) is AsyncGeneratorType]
    return next((g for g in generators if g.ag_frame is frame), None)


class _FirstIteration:
    """The loop's hook for generators that begin, and ours."""

    def __init__(self, hook: Callable[[Generator], None]) -> None:
        self._hook = hook

    def __call__(self, generator: Generator) -> None:
        number = id(generator.ag_frame)

        def forget(gone: ref[Generator]) -> None:
            if _started.get(number) is gone:
                del _started[number]

        _started[number] = ref(generator, forget)
        self._hook(generator)


def _follow() -> None:
    """See generators begin, as long as the loop of this thread runs."""
    hook = sys.get_asyncgen_hooks().firstiter
    if hook is not None and type(hook) is not _FirstIteration:
        sys.set_asyncgen_hooks(firstiter=_FirstIteration(hook))  # type: ignore[arg-type]
