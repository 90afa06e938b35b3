"""`manage.py asyncorm hops PATH...`: what in a project hops to a thread, and what to write instead.

`check` cannot say that, for it does not read the project's code.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError

from .. import conf
from .._requests import checks, middleware
from ..pages import see
from .hopping import Module, Project

_NOT_OURS = ("node_modules", "site-packages", "__pycache__")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files and folders to read."""
    parser.add_argument(
        "paths", nargs="*", metavar="PATH",
        help="files and folders; by default the project, of which a current folder in it",
    )  # fmt: skip


def run(options: dict[str, Any], write: Callable[[str], Any]) -> None:
    """Print each hop with its file and line.

    Raises:
        django.core.management.CommandError: a path does not exist.
    """
    project = Project(swap=conf.get("SWAP_MANAGERS"), is_native=_is_native)
    modules: dict[Path, Module] = {}
    for given, path in _files(options["paths"] or [_folder()]):
        try:
            with tokenize.open(path) as file:  # in the encoding that it says
                tree = ast.parse(file.read(), str(path))
            modules[path] = Module(_dotted(path, given), tree, path.name == "__init__.py")
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError) as exc:
            write(f"{path}: cannot be read: {exc}")
    for module in modules.values():
        project.learn(module)
    number = files = 0
    for path, module in modules.items():
        found = project.hops(module)
        files += bool(found)
        number += len(found)
        for hop in found:
            write(f"{path}:{hop.line}: {hop.what}\n    instead: {hop.instead}")
    write(f"{number} hop{'s' * (number != 1)} in {files} of {len(modules)} files.")
    if number and checks.served_by()[1] != checks.OURS:
        write(checks.HINT)


def _folder() -> str:
    """The current folder if it is in the project, else the one that has the settings' package:
    `python /app/manage.py` may be called from anywhere."""
    package = sys.modules.get((settings.SETTINGS_MODULE or "").partition(".")[0])
    file = getattr(package, "__file__", None)
    if package is None or file is None:  # settings.configure(), a package without a file
        return "."
    root = Path(file).resolve().parents[1 if hasattr(package, "__path__") else 0]
    return "." if Path.cwd().is_relative_to(root) else str(root)


def _files(paths: list[str]) -> Iterator[tuple[Path, Path]]:
    """The files, each after the path that it was found by."""
    for each in map(Path, paths):
        if each.is_dir():
            for folder, folders, names in os.walk(each):
                folders[:] = sorted(name for name in folders if _is_projects(folder, name))
                files = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
                yield from ((each, file) for file in files)
        elif each.exists():
            yield each.parent, each
        else:
            raise CommandError(f"{each} does not exist." + see("command#hops"))


def _is_projects(folder: str, name: str) -> bool:
    inner = Path(folder, name)
    return not (name.startswith(".") or name in _NOT_OURS or (inner / "pyvenv.cfg").exists())


def _dotted(path: Path, given: Path) -> str:
    """The name that a file is imported by."""
    file = path.resolve()
    roots = [Path(entry or ".").resolve() for entry in sys.path]
    above = [root for root in roots if file.is_relative_to(root)]
    root = max(above, key=lambda root: len(root.parts), default=given.resolve())
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _is_native(name: str) -> bool:
    """Whether the settings name a middleware or a view."""
    for key, everything in (("NATIVE_MIDDLEWARE", middleware.ALL), ("NATIVE_VIEWS", True)):
        names = conf.get(key)
        if names == everything or any(
            name == each or name.startswith(f"{each}.") for each in names
        ):
            return True
    return False
