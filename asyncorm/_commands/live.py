"""`manage.py asyncorm live`: what happens now in a running service, in the terminal.

A process of its own sees nothing of another's pools: it asks the view that the service has.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from django.core.management.base import CommandError
from django.urls import NoReverseMatch, reverse

from ..observe import live
from ..pages import see


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the service is, and how often it is asked."""
    parser.add_argument(
        "server",
        nargs="?",
        default="http://127.0.0.1:8000",
        help="address of a running server of this project, http://127.0.0.1:8000 by default",
    )
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="2 by default; 0: once"
    )


def run(options: dict[str, Any], write: Callable[[str], Any]) -> None:
    """Print it again and again, until interrupted."""
    view: Any = live.view  # Django's stubs know no asynchronous one
    try:
        url = options["server"].rstrip("/") + reverse(view)
    except NoReverseMatch:
        raise CommandError(
            "No URL of the project leads to the view that tells what happens in it. "
            'In urls.py: path("asyncorm/", asyncorm.observe.live.view).' + see("command#live")
        ) from None
    try:
        while True:
            for line in _lines(_ask(url)):
                write(line)
            if options["every"] <= 0:
                return
            time.sleep(options["every"])
            write("")
    except KeyboardInterrupt:
        pass


def _ask(url: str) -> dict[str, Any]:
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("not an address of HTTP")
        with urlopen(f"{url}?format=json", timeout=10) as answer:
            now: dict[str, Any] = json.load(answer)
            return now
    except HTTPError as error:
        why = "; it answers with DEBUG only" if error.code == 404 else ""
        raise CommandError(f"{url} answers {error.code}{why}.{see('command#live')}") from None
    except (OSError, ValueError) as error:  # nobody is there; it is somebody else
        raise CommandError(f"{url} does not answer: {error}.{see('command#live')}") from None


def _lines(now: dict[str, Any]) -> Iterator[str]:
    """What `live.snapshot()` said, as text."""
    for alias, of in now["pools"].items():
        used = of["pool_size"] - of["pool_available"]
        waiting = of.get("requests_waiting", 0)
        yield f"{alias}: {of['pool_size']} of {of['pool_max']} open, {used} in use, {waiting} wait"
    for each in now["holders"]:
        yield f"  {each['connection']} for {_ms(each)}: {each['holder']} ({each['task']})"
    for each in now["statements"]:
        where = each["connection"] or "waits"
        yield f"  {where}, {_ms(each)}: {each['sql']} ({each['task']})"
    for each in now["requests"]:
        yield f"{each['title']}: {each['queries']} queries, {_ms(each)}"
        yield from (f"  {found}" for found in each["findings"])
    if not any(now.values()):
        yield "nothing"


def _ms(of: dict[str, Any]) -> str:
    return "not ended" if of["seconds"] is None else f"{of['seconds'] * 1000:.1f} ms"
