"""What the demo prints: the settings compared, the code that ran, the figures side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from . import timeline_text
from .figures import Comparison, Report, Run, machine_text, milliseconds, number, summary
from .settings import ASYNCORM, DELAY, DJANGO, POOL

NARROWEST, WIDEST, PIPED = 60, 132, 100
HALVES = (DJANGO, ASYNCORM)
TITLES = (DJANGO.title, ASYNCORM.title)
FAR = f"{DELAY * 1000:g} ms of network each way"
SAME = f"The same code, server and pool in both halves; where asyncorm is alone, {FAR}."
ALONE = f"asyncorm both times, on up to {POOL['max_size']} connections, {FAR}."
FAIRNESS = (
    "Both halves run the code below, each in a process of its own, against the same server, with "
    f"the same pool of up to {POOL['max_size']} connections and the same warm-up; only the "
    "settings above differ. Django runs the a* calls of one request in one thread, and so one "
    "after another: that is its normal behaviour. (@named gives the statements their names in the "
    "pictures.)"
)
ACTS = (
    f"What Django has no word for: asyncorm alone, in two ways, with {FAR} between it and the "
    "server (a proxy on this machine)."
)


def make_console() -> Console:
    """A console for people, or plain text of a fixed width for pipes and log files."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show every character
    console = Console(highlight=False)
    piped = not console.is_terminal and "COLUMNS" not in os.environ
    console.width = PIPED if piped else min(max(console.width, NARROWEST), WIDEST)
    return console


def show_header(console: Console, machine: dict[str, str | int]) -> None:
    console.print(Rule(Text("asyncorm demo", style="bold"), style="green"))
    console.print(machine_text(machine), style="dim")
    console.print()


@contextmanager
def show_loading(console: Console, rows: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar; gives the function to tell it of further rows."""
    progress = Progress(
        TextColumn("Loading the sample shop"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", style="dim"),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("", total=rows)

        def advance(table: str, count: int) -> None:
            progress.update(task, advance=count, description=table)

        yield advance
        progress.update(task, description="done")
    if not console.is_terminal:
        console.print(f"Loaded the sample shop: {rows:,} rows")


def show_settings(console: Console) -> None:
    """The settings that differ, and what the comparison is."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("settings.py", *TITLES):
        table.add_column(heading, overflow="fold")
    table.add_row("ENGINE", *(f'"{half.engine}"' for half in HALVES))
    table.add_row("INSTALLED_APPS", *(_python([*half.apps, "..."]) for half in HALVES))
    table.add_row("asgi.py from", *(half.handler for half in HALVES))
    for name in ASYNCORM.extra:
        table.add_row(name, *(_python(half.extra.get(name)) for half in HALVES))
    console.print()
    console.print(table)
    console.print()
    console.print(FAIRNESS, style="dim")


def show_code(console: Console, title: str, code: str) -> None:
    console.print()
    console.print(Rule(Text(title, style="bold"), style="green", align="left"))
    console.print()
    syntax = Syntax("", "python", background_color="default")
    # As text: a Syntax of its own would fill every line up with blanks.
    console.print(syntax.highlight(indent(code, "  ")), soft_wrap=True)
    console.print()


def show_acts(console: Console) -> None:
    """What comes now."""
    console.print()
    console.print(Rule(Text("Many operations, few round trips", style="bold"), style="green"))
    console.print()
    console.print(ACTS, style="dim")


def show_comparison(console: Console, comparison: Comparison) -> None:
    table = Table(show_edge=False, pad_edge=False, header_style="bold", box=None, padding=(0, 3))
    table.add_column("")
    for title in comparison.titles:
        table.add_column(Text(title), justify="right")

    def row(name: str, figure: Callable[[Run], str], style: str = "") -> None:
        table.add_row(name, *(figure(run) for run in comparison.runs), style=style)

    row("wall-clock", lambda run: milliseconds(run.seconds), "bold")
    row("connections used", lambda run: str(len(run.connections)))
    row("threads used, the event loop's included", lambda run: str(run.threads))
    row("statements run", lambda run: f"{len(run.statements):,}")
    row("most of them at the same time", lambda run: str(run.at_once))
    console.print(Padding(table, (0, 0, 0, 2)))
    rounds = number(len(comparison.before.rounds), "round")
    best = f"best of {rounds}" if len(comparison.before.rounds) > 1 else rounds
    verdict = Text("  ")
    verdict.append(comparison.verdict, "bold green" if comparison.factor > 1 else "bold")
    verdict.append(f" ({best}; both returned the same rows)", "dim")
    console.print(verdict)
    console.print()
    for line in timeline_text.draw(comparison, console.width):
        if console.options.ascii_only:
            line.plain = line.plain.translate(timeline_text.ASCII)
        console.print(line, no_wrap=True, overflow="crop")


def show_end(console: Console, report: Report, svg: Path, json: Path | None) -> None:
    """Where the files are, and the summary: one line, the last one."""
    console.print()
    path = svg.resolve()
    console.print(f"Picture of the timelines: {path}", soft_wrap=True)
    console.print(f"  open it: python3 -m webbrowser {path.as_uri()}", soft_wrap=True)
    if json is not None:
        console.print(f"Figures: {json}", soft_wrap=True)
    console.print()
    # A terminal would break it within its figures.
    one_line = not console.is_terminal
    console.print(summary(report.comparisons), style="bold", soft_wrap=one_line)


def _python(value: Any) -> str:
    """A value as settings.py has it."""
    return "not set" if value is None else repr(value).replace("'...'", "...").replace("'", '"')
