"""Draws the timelines of all scenarios as one self-contained SVG file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from asyncorm.drawing import ticks
from asyncorm.svg import document, line, rect, text, titled

from .figures import Comparison, Run, Statement, milliseconds, number
from .timeline import Lane, Mark, crowded, lanes, marks, span

WIDTH = 1200
MARGIN = 36
PADDING = 24
LEFT = MARGIN + PADDING + 170  # where time 0 is
RIGHT = WIDTH - MARGIN - PADDING - 72  # where the scale ends; the rest is for the end's label
LANE, GAP = 18, 4
LEGEND_COLUMNS = 4

BARS = "A lane is a connection; a bar lasts from when a statement is sent until its result is read."
SLIVERS = "Each sliver is one statement; where the lane is pale, the connection was idle."

GREY, AXIS, GRID, TRACK = "#66717f", "#b8c1cc", "#dde3ea", "#f3f5f8"
CARD, PAPER = "#ffffff", "#e8ecf1"
FASTER, SLOWER = "#0b7a53", "#66717f"
ACCENTS = ("#5f6b7a", "#0b7a53")  # the first way, the second
CROWD = ("#9aa5b4", "#2e9e6b")


def draw(comparisons: Iterable[Comparison], about: str) -> str:
    """The picture of scenarios; `about` says what was compared."""
    elements = [
        text(MARGIN, 58, "Which query ran when, on which connection", size=26, weight=700),
        text(MARGIN, 84, about, colour=GREY),
        text(MARGIN, 103, BARS, colour=GREY),
    ]
    y = 124.0
    for comparison in comparisons:
        panel, height = _panel(comparison, y)
        elements += panel
        y += height + 20
    y += 12
    background = rect(0, 0, WIDTH, y, PAPER)
    return document(WIDTH, y, "asyncorm: timeline of the demo", [background, *elements])


def _panel(comparison: Comparison, top: float) -> tuple[list[str], float]:
    """One scenario on a card of its own: both ways above one axis; and its height."""
    scale = (RIGHT - LEFT) / span(comparison)
    known = marks(comparison)
    crowd = crowded(comparison)
    tracks: list[str] = []
    grid: list[str] = []
    bars = [text(MARGIN + PADDING, top + 38, comparison.title, size=18, weight=600)]
    bars += _verdict(comparison, top)
    y = top + 54
    for place, run in enumerate(comparison.runs):
        y += 24
        bars += _caption(comparison.titles[place], run, ACCENTS[place], y)
        y += 12
        start, end = y, LEFT + run.seconds * scale
        found = lanes(run, crowd=crowd)
        bottom = y + len(found) * (LANE + GAP) - GAP
        for lane in found:
            tracks.append(rect(LEFT, y, RIGHT - LEFT, LANE, TRACK, 3))
            if lane.name:
                bars += _lane_name(lane, y)
            if crowd:
                bars.append(_crowd(lane, y, scale, CROWD[place]))
            else:
                bars += [_bar(statement, known, y, scale) for statement in lane.statements]
            y += LANE + GAP
        grid += _grid(comparison, scale, start - 4, bottom + 4)
        bars.append(line(end, start - 4, end, bottom + 4, ACCENTS[place]))
        label = milliseconds(run.seconds)
        bars.append(text(end + 8, bottom - 4, label, colour=ACCENTS[place], weight=700))
        y += 4
    axis = _axis(comparison, scale, y)
    y += 40
    if note := SLIVERS if crowd else comparison.note:
        bars.append(text(LEFT, y + 10, note, colour=GREY))
        y += 16
    else:
        y += 4
        legend, height = _legend(known, y)
        bars += legend
        y += height
    y += 16
    card = rect(MARGIN, top, WIDTH - 2 * MARGIN, y - top, CARD, 14)
    return [card, *tracks, *grid, *bars, *axis], y - top


def _verdict(comparison: Comparison, top: float) -> list[str]:
    """What is gained, as a pill in the upper right corner."""
    words = comparison.verdict
    width = 26 + 8 * len(words)
    left = WIDTH - MARGIN - PADDING - width
    return [
        rect(left, top + 18, width, 28, FASTER if comparison.factor >= 1.05 else SLOWER, 14),
        text(
            left + width / 2, top + 37, words, size=14, colour="#fff", weight=600, anchor="middle"
        ),
    ]


def _caption(title: str, run: Run, accent: str, y: float) -> list[str]:
    beside = MARGIN + PADDING + 24 + 9 * len(title)
    facts = ", ".join((number(len(run.connections), "connection"), number(run.threads, "thread")))
    return [
        rect(MARGIN + PADDING, y - 11, 4, 14, accent, 2),
        text(MARGIN + PADDING + 12, y, title, size=14, weight=600),
        text(max(LEFT, beside), y, f"{milliseconds(run.seconds)} on {facts}", colour=GREY),
    ]


def _lane_name(lane: Lane, y: float) -> list[str]:
    return [
        text(MARGIN + PADDING + 12, y + 13, lane.name, size=12),
        text(LEFT - 10, y + 13, f"pid {lane.server_process}", size=11, colour=GREY, anchor="end"),
    ]


def _bar(statement: Statement, known: Mapping[str, Mark], y: float, scale: float) -> str:
    mark = known[statement.query]
    x, width = LEFT + statement.start * scale, (statement.end - statement.start) * scale
    times = f"{statement.start * 1000:.1f} to {statement.end * 1000:.1f} ms"
    title = f"{statement.query}: {times} on pid {statement.connection}"
    # A hair's breadth less, so that bars that follow each other stay apart.
    bar = rect(x, y, max(width - 0.75, 0.75), LANE, mark.colour, 2 if width > 6 else 0, title)
    if width > 9 * len(mark.symbol) + 6:
        bar += text(
            x + width / 2, y + 13, mark.symbol, size=12, colour="#fff", weight=600, anchor="middle"
        )
    return bar


def _crowd(lane: Lane, y: float, scale: float, colour: str) -> str:
    spans = []
    for statement in lane.statements:
        width = (statement.end - statement.start) * scale
        spans.append((LEFT + statement.start * scale, max(width * 0.9, 0.15)))
    # Many narrow rectangles in one row, as one shape.
    shape = "".join(f"M{x:.2f} {y:.1f}h{width:.2f}v{LANE}h-{width:.2f}z" for x, width in spans)
    what = f"{number(len(lane.statements), 'statement')} on pid {lane.server_process}"
    return f'<path d="{shape}" fill="{colour}">{titled(what)}</path>'


def _grid(comparison: Comparison, scale: float, top: float, bottom: float) -> list[str]:
    places = (LEFT + tick / 1000 * scale for tick in ticks(span(comparison)))
    return [line(x, top, x, bottom, GRID) for x in places]


def _axis(comparison: Comparison, scale: float, y: float) -> list[str]:
    """The axis of both ways, in milliseconds."""
    elements = [line(LEFT, y + 2, RIGHT, y + 2, AXIS)]
    for tick in ticks(span(comparison)):
        x = LEFT + tick / 1000 * scale
        elements.append(line(x, y + 2, x, y + 7, AXIS))
        elements.append(text(x, y + 21, f"{tick:,}", size=12, colour=GREY, anchor="middle"))
    elements.append(text(RIGHT + 12, y + 21, "ms", size=12, colour=GREY))
    return elements


def _legend(known: Mapping[str, Mark], y: float) -> tuple[list[str], float]:
    elements = []
    width = (WIDTH - 2 * (MARGIN + PADDING)) / LEGEND_COLUMNS
    for place, (query, mark) in enumerate(known.items()):
        row, column = divmod(place, LEGEND_COLUMNS)
        x, middle = MARGIN + PADDING + column * width, y + row * 24
        elements += [
            rect(x, middle, 22, 16, mark.colour, 3),
            text(
                x + 11, middle + 12, mark.symbol, size=11, colour="#fff", weight=600,
                anchor="middle",
            ),
            text(x + 30, middle + 12.5, query, size=13),
        ]  # fmt: skip
    rows = -(-len(known) // LEGEND_COLUMNS)
    return elements, rows * 24 - 4
