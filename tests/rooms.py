"""Counts the modules that a get goes through: `python -m tests.rooms`.

For a get alone and for one of a hundred gathered: calls of asyncorm's functions, stays (runs of
calls in one module), modules, and how often it comes back to a module that it had left.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from asyncorm.demo.postgres import postgres_server


class Way(NamedTuple):
    """What was counted, for each get."""

    calls: float
    stays: float
    modules: int
    returns: float


async def walk(work: Callable[[], Awaitable[Any]], times: int = 1) -> Way:
    """Count while `work()` does `times` gets."""
    import asyncorm

    root = str(Path(asyncorm.__file__).parent) + os.sep
    seen: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            seen.append(frame.f_code.co_filename.removeprefix(root))

    sys.setprofile(note)
    try:
        await work()
    finally:
        sys.setprofile(None)
    stays = [name for n, name in enumerate(seen) if n == 0 or seen[n - 1] != name]
    modules = set(stays)
    return Way(
        len(seen) / times, len(stays) / times, len(modules), (len(stays) - len(modules)) / times
    )


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
        print(f"{'':22}{'calls':>8}{'stays':>8}{'modules':>9}{'comes back':>12}")
        for name, way in asyncio.run(measure()).items():
            print(f"{name:22}{way.calls:8.0f}{way.stays:8.1f}{way.modules:9}{way.returns:12.1f}")


if __name__ == "__main__":
    main()
