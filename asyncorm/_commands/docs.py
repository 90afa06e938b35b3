"""`manage.py asyncorm docs PAGE#HEADING`: what the documentation says where an error points."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from django.core.management.base import CommandError

from .. import pages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which page."""
    parser.add_argument(
        "place",
        nargs="?",
        metavar="PAGE#HEADING",
        help="as an error names it, or a page alone; without it the list of pages",
    )


def run(options: dict[str, Any], write: Callable[[str], Any]) -> None:
    """Print a page, a part of it, or which pages there are."""
    try:
        write(pages.section(options["place"]) if options["place"] else pages.contents())
    except LookupError as error:
        raise CommandError(error.args[0]) from None
