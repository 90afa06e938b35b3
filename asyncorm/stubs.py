"""Type stubs: `python -m asyncorm.stubs` copies the installed django-stubs and adds to them.

asyncorm adds its methods to Django's classes when the project starts, which type checkers do not
see. The copy has a twin of each asynchronous method that the stubs declare, with its types. mypy
finds it by `mypy_path = "typings"`, pyright by itself.
"""

from __future__ import annotations

import argparse
import ast
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .pages import see

# Whose asynchronous methods have twins, and what else these classes have.
_FILES = ("db/models/**/*.pyi", "contrib/*/models.pyi", "contrib/*/base_user.pyi",
          "contrib/contenttypes/fields.pyi")  # fmt: skip
_MORE = """
    async def anative(self) -> list[{row}]: ...
    def native_iterator(
        self, chunk_size: int = 2000, *, read_ahead: int = 0
    ) -> AsyncIterator[{row}]: ...
"""
_ROWS = {"QuerySet": "_Row", "BaseManager": "_T", "RawQuerySet": "Any"}


def _twins(source: str) -> str:
    """A stub file with the methods added."""
    lines = source.splitlines()
    for node in sorted(_methods(ast.parse(source)), key=lambda node: -node.lineno):
        name = node.name[1:]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        assert node.end_lineno is not None
        text = "\n".join(lines[first - 1 : node.end_lineno])
        text = text.replace(f"async def a{name}(", f"async def native_{name}(", 1)
        if name == "bulk_create":
            arguments, arrow, rest = text.rpartition(") ->")
            comma = "" if arguments.rstrip().endswith(",") else ", "
            text = f'{arguments}{comma}*, method: str = "insert"{arrow}{rest}'
        lines[node.end_lineno : node.end_lineno] = text.splitlines()
    for cls in sorted(_classes(ast.parse("\n".join(lines))), key=lambda cls: -cls.lineno):
        if row := _ROWS.get(cls.name):
            assert cls.end_lineno is not None
            lines[cls.end_lineno : cls.end_lineno] = _MORE.format(row=row).splitlines()
            lines.insert(_after_future(lines), "from collections.abc import AsyncIterator")
    return "\n".join(lines) + "\n"


def _after_future(lines: list[str]) -> int:
    future = [n for n, line in enumerate(lines) if line.startswith("from __future__")]
    return future[-1] + 1 if future else 0


def _classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def _methods(tree: ast.Module) -> Iterator[ast.AsyncFunctionDef]:
    for cls in _classes(tree):
        for node in cls.body:
            if isinstance(node, ast.AsyncFunctionDef) and node.name.startswith("a"):
                yield node


def write(directory: Path) -> Path:
    """Make `directory`/django anew; return it.

    Raises:
        FileNotFoundError: django-stubs is not installed.
        FileExistsError: there is something that this function has not made.
    """
    stubs = Path(sysconfig.get_path("purelib")) / "django-stubs"
    if not stubs.is_dir():
        raise FileNotFoundError(
            "django-stubs is not installed: pip install django-stubs" + see("typing#types")
        )
    target, mark = directory / "django", directory / "django" / ".asyncorm"
    if target.exists():
        if not mark.exists():
            raise FileExistsError(
                f"{target} exists and was not made by asyncorm." + see("typing#types")
            )
        shutil.rmtree(target)
    shutil.copytree(stubs, target)
    mark.touch()
    for pattern in _FILES:
        for file in target.glob(pattern):
            file.write_text(_twins(file.read_text(encoding="utf-8")), encoding="utf-8")
    return target


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m asyncorm.stubs", description=__doc__)
    parser.add_argument(
        "directory", nargs="?", default="typings", type=Path, help="where (default: typings)"
    )
    try:
        print(f"Written: {write(parser.parse_args().directory)}")
    except (FileNotFoundError, FileExistsError) as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
