"""Counts the rooms that a get goes through: `python -m tests.rooms`.

For a get alone and for one of a hundred gathered: calls of asyncorm's functions; then modules, and
rooms as the map of ARCHITECTURE.md has them, with the stays (runs of calls in one) and how often
it comes back to one that it had left; how many calls go down from one room to another, and which
go up: a lower room that calls what a higher one has given it.
"""

import asyncio
import os
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from asyncorm.demo.postgres import postgres_server


class Stays(NamedTuple):
    """How many modules or rooms, and how often each get is in one, and comes back to one."""

    places: int
    stays: float
    returns: float

    @classmethod
    def of(cls, seen: list[str], times: int) -> "Stays":
        """Count where the calls of `times` gets were, one after the other."""
        stays = [name for n, name in enumerate(seen) if n == 0 or seen[n - 1] != name]
        places = len(set(stays))
        return cls(places, len(stays) / times, (len(stays) - places) / times)


class Way(NamedTuple):
    """What was counted, for each get."""

    calls: float
    modules: Stays
    rooms: Stays
    down: float
    up: dict[str, float]


def rooms() -> dict[str, str]:
    """The room of each module, and of each folder, by the map of ARCHITECTURE.md."""
    text = (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ((?:`[^`|]+`,? ?)+)\|", text, re.MULTILINE)
    return {name: room for room, names in rows for name in re.findall(r"`([^`]+)`", names)}


async def walk(work: Callable[[], Awaitable[Any]], times: int = 1) -> Way:
    """Count while `work()` does `times` gets."""
    import asyncorm

    root = str(Path(asyncorm.__file__).parent) + os.sep
    seen: list[str] = []
    called: set[FrameType] = set()  # each is kept, so that a coroutine that goes on is known
    steps: Counter[tuple[str, str, str]] = Counter()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and (name := of_ours(frame, root)) is not None:
            seen.append(name)
            if frame not in called:
                called.add(frame)
                if (above := caller(frame, root)) is not None:
                    what = f"{above.f_code.co_qualname} calls {frame.f_code.co_qualname}"
                    steps[str(of_ours(above, root)), name, what] += 1

    sys.setprofile(note)
    try:
        await work()
    finally:
        sys.setprofile(None)
    room_of = rooms()
    room = {name: room_of[place_of(name)] for name in seen}
    order = [*dict.fromkeys(room_of.values())]
    down, up = 0.0, Counter[str]()
    for (above, below, call), count in steps.items():
        way = order.index(room[below]) - order.index(room[above])
        if way > 0:
            down += count / times
        elif way < 0:
            up[f"{room[above]} > {room[below]}: {call}"] += count / times
    return Way(
        len(seen) / times,
        Stays.of(seen, times),
        Stays.of([room[name] for name in seen], times),
        down,
        dict(up),
    )


def of_ours(frame: FrameType, root: str) -> str | None:
    """The module of a function, as a path below the package, if it is one of ours."""
    path = frame.f_code.co_filename
    return path.removeprefix(root) if path.startswith(root) else None


def caller(frame: FrameType, root: str) -> FrameType | None:
    """Which function of ours has called; not the one that only runs operations."""
    above = frame.f_back
    while above is not None and of_ours(above, root) in (None, "bridge.py"):
        above = above.f_back
    return above


def place_of(name: str) -> str:
    """A module or folder as the map has it."""
    first, *rest = Path(name).parts
    return f"{first}/" if rest else first.removesuffix(".py")


async def measure() -> dict[str, Way]:
    """A get alone, and each of a hundred that are gathered on four connections."""
    from django.contrib.auth.models import Group

    group = await Group.objects.acreate(name="a")

    async def get() -> Any:
        return await Group.objects.aget(pk=group.pk)

    async def gathered() -> Any:
        return await asyncio.gather(*(get() for _ in range(100)))

    for _ in range(3):  # the plan is known, the connections are open
        await get()
        await gathered()
    return {"one get": await walk(get), "one of 100 gathered": await walk(gathered, 100)}


def main() -> None:
    """Print what was counted, on a server of our own."""
    import django
    from django.conf import settings
    from django.core.management import call_command

    with postgres_server() as server:
        database = {
            **server.settings,
            "ENGINE": "asyncorm.backends.postgresql",
            "OPTIONS": {"pool": {"min_size": 1, "max_size": 4}},
        }
        settings.configure(
            DATABASES={"default": database},
            INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "asyncorm"],
            ASYNCORM={"SWAP_MANAGERS": True},
        )
        django.setup()
        call_command("migrate", verbosity=0)
        titles = ("calls", "modules", "stays", "back", "rooms", "stays", "back", "down", "up")
        print(" " * 20 + "".join(f"{title:>9}" for title in titles))
        ways = asyncio.run(measure())
        for name, way in ways.items():
            counts = (way.calls, *way.modules, *way.rooms, way.down, sum(way.up.values()))
            print(f"{name:20}" + "".join(f"{count:9.1f}" for count in counts))
        for name, way in ways.items():
            print(f"\nUp, in {name}:")
            for call, count in sorted(way.up.items(), key=lambda each: -each[1]):
                print(f"{count:9.2f}  {call}")


if __name__ == "__main__":
    main()
