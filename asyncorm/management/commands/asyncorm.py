"""`manage.py asyncorm SUBCOMMAND`: what asyncorm does in a project (see _commands/)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error

from ..._commands import SUBCOMMANDS


def _module(name: str) -> Any:
    return import_module(f"asyncorm._commands.{name}")


class Command(BaseCommand):
    """Runs one of the subcommands."""

    help = "Shows what asyncorm does in this project."
    requires_system_checks = ()  # `status` tells what they find

    def add_arguments(self, parser: CommandParser) -> None:
        """A parser for each subcommand."""
        subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND")
        for name, text in SUBCOMMANDS.items():
            _module(name).add_arguments(subparsers.add_parser(name, help=text, description=text))

    def handle(self, *args: Any, subcommand: str | None, **options: Any) -> None:
        """Run the subcommand."""
        if subcommand is None:
            names = "".join(f"\n  {name}: {text}" for name, text in SUBCOMMANDS.items())
            raise CommandError(f"SUBCOMMAND is one of these:{names}", returncode=2)
        try:
            _module(subcommand).run(options, self.stdout.write)
        except (ImproperlyConfigured, Error) as exc:  # a database that is away, too
            raise CommandError(str(exc)) from exc
