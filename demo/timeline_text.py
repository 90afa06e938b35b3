"""Draws the timeline of a scenario in the terminal; without colours it can be read as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil

from rich.text import Text

from asyncorm.drawing import ticks

from .figures import Comparison, milliseconds
from .timeline import Lane, Mark, crowded, lanes, marks, span

NAME = 15
ROOM = 10  # at the right, for the end's label
IDLE = "·"
SHADES = f"{IDLE}░▒▓█"
FULLER = "The fuller a shade, the busier the connection."
ASCII = str.maketrans(f"{SHADES}━╵", ".:=*#-|")
CROWD_STYLES = ("bright_black", "green")


def draw(comparison: Comparison, width: int) -> Iterator[Text]:
    """The lanes of both ways above one axis, as lines of at most `width` characters."""
    cells = width - NAME - ROOM
    cell = span(comparison) / cells
    known = marks(comparison)
    for place, run in enumerate(comparison.runs):
        yield Text(comparison.titles[place], style="bold")
        found = lanes(run, crowd=crowded(comparison))
        for lane in found:
            text = Text(f"{lane.name:<{NAME}}", style="default")
            if crowded(comparison):
                text.append(_crowd(lane, cells, cell), CROWD_STYLES[place])
                text.highlight_regex(IDLE, "bright_black")
            else:
                text.append_text(_bars(lane, known, cells, cell))
            if lane is found[-1]:
                text.append(f" {milliseconds(run.seconds)}", "bold")
            yield text
    yield _axis(comparison, cells, cell)
    yield from _legend(comparison, known, width)


def _bars(lane: Lane, known: Mapping[str, Mark], cells: int, cell: float) -> Text:
    """Each cell belongs to the statement that filled most of it."""
    text = Text()
    before = None
    for place in range(cells):
        begin, end = place * cell, (place + 1) * cell
        shares = [(min(s.end, end) - max(s.start, begin), s) for s in lane.statements]
        share, statement = max(shares, key=lambda pair: pair[0])
        if share <= 0:
            text.append(IDLE, "bright_black")
            before = None
            continue
        mark = known[statement.query]
        if statement is not before:
            label = mark.symbol
        # Without colours the bar is a line; with them, the line is not to be seen.
        ink = "bold #ffffff" if label else mark.colour
        text.append(label[:1] or "━", f"{ink} on {mark.colour}")
        label = label[1:]
        before = statement
    return text


def _crowd(lane: Lane, cells: int, cell: float) -> str:
    """How busy the connection was, as shades of grey."""
    busy = [0.0] * cells
    for statement in lane.statements:
        last = min(int(statement.end / cell), cells - 1)
        for place in range(int(statement.start / cell), last + 1):
            overlap = min(statement.end, (place + 1) * cell) - max(statement.start, place * cell)
            busy[place] += overlap / cell
    most = len(SHADES) - 1
    return "".join(SHADES[min(ceil(share * most), most)] for share in busy)


def _axis(comparison: Comparison, cells: int, cell: float) -> Text:
    line = [" "] * (cells + ROOM)
    free = 0
    for tick in ticks(span(comparison), most=8):
        place, label = round(tick / 1000 / cell), f"╵{tick:,}"
        if place >= free and place + len(label) <= len(line):
            line[place : place + len(label)] = label
            free = place + len(label) + 1
    line[cells + 6 : cells + 9] = " ms"
    return Text(" " * NAME + "".join(line).rstrip(), style="bright_black")


def _legend(comparison: Comparison, known: Mapping[str, Mark], width: int) -> Iterator[Text]:
    if note := FULLER if crowded(comparison) else comparison.note:
        yield Text(" " * NAME + note, style="bright_black")
        return
    column = max(len(query) for query in known) + 6
    text = Text()
    for query, mark in known.items():
        if len(text) + column > width:
            yield text
            text = Text()
        text.append(f" {mark.symbol} ", f"bold #ffffff on {mark.colour}")
        text.append(f" {query}".ljust(column - 3))
    yield text
