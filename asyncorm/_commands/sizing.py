"""`manage.py asyncorm sizing --workers 8`: connections to expect, against the servers' limits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .. import sizing


def number(text: str) -> int:  # "invalid number value", argparse says
    if (wanted := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes."""
    parser.add_argument(
        "--workers", type=number, default=1, help="processes of the service, 1 by default"
    )
    parser.add_argument(
        "--threads", type=number, default=1, help="threads of each for synchronous code, 1"
    )


def run(options: dict[str, Any], write: Callable[[str], Any]) -> None:
    """Print what each server will have to give."""
    workers = options["workers"]
    for line in sizing.lines(sizing.report(workers, options["threads"]), workers):
        write(line)
