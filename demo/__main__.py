"""The demo's command line: Django's a* methods and asyncorm side by side on a live server."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .errors import DemoError

ROWS = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _check_outputs(options)
        _run(options)
    except DemoError as error:
        print(f"asyncorm demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("asyncorm demo: interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from .load import SMALLEST

    def rows(text: str) -> int:
        count = int(text.replace("_", "").replace(",", ""))
        if count < SMALLEST:
            raise argparse.ArgumentTypeError(f"at least {SMALLEST:,} rows, please")
        return count

    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Runs the same Django code with Django's own a* methods and with asyncorm, "
        "on a PostgreSQL server of its own, and shows what ran when on which connection.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--svg",
        type=Path,
        metavar="FILE",
        default=Path("asyncorm-demo.svg"),
        help="write the picture of the timeline there (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=rows, metavar="N", default=ROWS, help=f"size of the shop (default: {ROWS:,})"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write a picture of each act there"
    )
    parser.add_argument("--quick", action="store_true", help="fewer gets and one round of each")
    return parser.parse_args(arguments)


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse before the work what would fail after it."""
    for option in ("--svg", "--json"):
        path: Path | None = getattr(options, option[2:])
        if path is None:
            continue
        if path.is_dir():
            raise DemoError(f"{option}: {path} is a directory")
        if not path.absolute().parent.is_dir():
            raise DemoError(f"{option}: there is no directory {path.absolute().parent}")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise DemoError(f"{option}: {path} cannot be written")
    if options.pictures is not None and not os.access(options.pictures, os.W_OK | os.X_OK):
        raise DemoError(f"--pictures: {options.pictures} is not a folder that can be written to")
    if options.json is not None and options.json.absolute() == options.svg.absolute():
        raise DemoError(f"--svg and --json both name {options.json}")


def _run(options: argparse.Namespace) -> None:
    from asyncorm.demo.postgres import ServerError

    from .figures import machine_text

    try:
        from . import run, show, timeline_svg
    except ModuleNotFoundError as error:
        hint = 'pip install -e ".[demo]"'
        raise DemoError(f"{error.name} is not installed; the demo needs: {hint}") from error
    console = show.make_console()
    try:
        report = run.run(console, rows=options.rows, quick=options.quick, pictures=options.pictures)
    except ServerError as error:
        raise DemoError(str(error)) from error
    machine = machine_text(report.machine)
    about = f"{show.SAME} {machine}."
    _write(options.svg, timeline_svg.draw((*report.comparisons, *report.acts), about))
    if options.pictures is not None:
        for act in report.acts:
            about = f"{show.ALONE} {machine}."
            _write(options.pictures / f"{act.key}.svg", timeline_svg.draw([act], about))
    if options.json is not None:
        _write(options.json, json.dumps(report.figures()) + "\n")
    show.show_end(console, report, options.svg, options.json)


def _write(path: Path, content: str) -> None:
    """Write all of it or nothing."""
    try:
        if path.exists() and not path.is_file():  # such as /dev/stdout
            path.write_text(content, encoding="utf-8")
            return
        target = path.resolve()
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            draft.write_text(content, encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise DemoError(f"cannot write {path}: {error.strerror or error}") from error


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # unlike the default, this lets the server and the workers be ended


if __name__ == "__main__":
    sys.exit(main())
