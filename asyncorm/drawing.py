"""Draws a timeline: as text, as an SVG picture, as a page of HTML."""

from __future__ import annotations

import math
from collections.abc import Sized
from html import escape
from typing import TYPE_CHECKING

from .svg import document, line, rect, text

if TYPE_CHECKING:
    from .timeline import Span, Timeline

PALETTE = (
    "#2f6fb5", "#c9700f", "#2e9e5b", "#c9413f", "#7d5bb5",
    "#96643c", "#d65f9e", "#5f6b7a", "#7f7f12", "#128796",
)  # fmt: skip
WAIT = "#d5dae1"
_MOST = 200  # queries as lines of text, tasks as rows of a picture
_BAR = 30  # characters
_WIDTH, _LEFT, _ROW, _TOP = 1200, 190, 22, 64


def ticks(seconds: float, most: int = 12) -> list[int]:
    """Round numbers of milliseconds from 0 to the end of the scale."""
    total = max(seconds * 1000, 1)
    power = 10 ** math.floor(math.log10(total / most)) if total > most else 1
    step = next(power * n for n in (1, 2, 5, 10) if power * n * most >= total)
    return list(range(0, math.floor(total) + 1, int(step)))


def shortened(code: str, most: int = 120) -> str:
    """One line of SQL, or of Python."""
    code = " ".join(code.split())
    return code if len(code) <= most else code[: most - 3] + "..."


def _who(connection: int, name: str = "") -> str:
    return f"{name}{connection}" if connection else ""


def _total(timeline: Timeline) -> float:
    return max((span.ended for span in timeline.spans), default=0.0) or 1e-9


def _summary(timeline: Timeline) -> str:
    connections = {span.connection for span in timeline.queries}
    return (
        f"{_counted(timeline.queries, 'query', 'queries')} of "
        f"{_counted(timeline.by_task, 'task', 'tasks')} on "
        f"{_counted(connections, 'connection', 'connections')}, {_total(timeline) * 1000:.1f} ms"
    )


def _counted(some: Sized, one: str, many: str) -> str:
    return f"{len(some)} {one if len(some) == 1 else many}"


def as_text(timeline: Timeline) -> str:
    """A line for each query, command and wait, then what was found."""
    spans = sorted(timeline.spans, key=lambda span: span.began)
    total = _total(timeline)
    width = max((len(span.task) for span in spans), default=0)
    lines = [_summary(timeline)]
    if len(spans) > _MOST:
        lines.append(f"(the first {_MOST} of {len(spans)} lines)")
    for span in spans[:_MOST]:
        place = min(round(span.began / total * _BAR), _BAR - 1)
        bar = " " * place + ("." if span.is_wait else "#") * max(
            1, round(span.seconds / total * _BAR)
        )
        what = f"waited {span.what}" if span.is_wait else shortened(span.what)
        who = _who(span.connection)
        lines.append(
            f"|{bar[:_BAR]:<{_BAR}}| {span.seconds * 1000:8.1f} ms  {span.task:<{width}}  "
            f"{who:>8}  {what}"
        )
    return "\n".join([*lines, *timeline.findings()])


def as_svg(timeline: Timeline) -> str:
    """A row for each task, a colour for each connection, waits in grey, commands narrow."""
    total = _total(timeline)
    scale = (_WIDTH - _LEFT - 30) / total
    connections = list(dict.fromkeys(s.connection for s in timeline.spans if not s.is_wait))
    colours = {pid: PALETTE[n % len(PALETTE)] for n, pid in enumerate(connections)}
    tasks = list(timeline.by_task.items())
    elements = [text(20, 30, _summary(timeline), size=16, weight=600)]
    x = 20.0
    for pid, colour in list(colours.items())[:12]:
        elements += [rect(x, 40, 12, 12, colour, 2), text(x + 17, 50, _who(pid, "pid "), size=11)]
        x += 85
    bottom = _TOP + _ROW * min(len(tasks), _MOST)
    for tick in ticks(total):
        at = _LEFT + tick / 1000 * scale
        elements.append(line(at, _TOP, at, bottom + 5, "#dde3ea"))
        elements.append(text(at, bottom + 18, f"{tick:,}", size=11, anchor="middle"))
    elements.append(text(_WIDTH - 22, bottom + 18, "ms", size=11))
    for row, (task, spans) in enumerate(tasks[:_MOST]):
        y = _TOP + row * _ROW
        elements.append(text(_LEFT - 10, y + 14, task[:28], size=12, anchor="end"))
        elements += [_bar(span, colours, y, scale) for span in spans]
    if len(tasks) > _MOST:
        elements.append(text(20, bottom + 36, f"{len(tasks) - _MOST} more tasks", size=12))
    height = bottom + 50
    background = rect(0, 0, _WIDTH, height, "#ffffff")
    return document(_WIDTH, height, "asyncorm: timeline", [background, *elements])


def _bar(span: Span, colours: dict[int, str], y: float, scale: float) -> str:
    when = f"{span.began * 1000:.1f} to {span.ended * 1000:.1f} ms"
    if span.is_wait:
        return rect(
            _LEFT + span.began * scale, y + 6, max(span.seconds * scale, 0.75), 6, WAIT, 0,
            f"waited {span.what}: {when}",
        )  # fmt: skip
    title = f"{shortened(span.what, 400)}\n{when} on {_who(span.connection, 'pid ')}, {span.place}"
    inset = 5 if span.is_command else 0
    return rect(
        _LEFT + span.began * scale, y + inset, max(span.seconds * scale - 0.5, 0.75),
        18 - 2 * inset, colours[span.connection], 2, title,
    )  # fmt: skip


_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em}svg{max-width:100%;height:auto}"
    "table{border-collapse:collapse}td,th{padding:.2em .6em;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #dde3ea}td.n{text-align:right}code{white-space:pre-wrap}"
    "td{overflow-wrap:anywhere}"
)


def as_fragment(timeline: Timeline) -> str:
    """The picture and what was found, for a page around it."""
    picture = as_svg(timeline).partition("\n")[2]  # without the XML declaration
    found = "".join(f"<li>{escape(finding)}</li>" for finding in timeline.findings())
    return f"{picture}<ul>{found}</ul>"


def as_html(timeline: Timeline) -> str:
    """A self-contained page."""
    rows = "".join(
        f"<tr><td class=n>{span.began * 1000:.1f}</td><td class=n>{span.seconds * 1000:.1f}</td>"
        f"<td>{escape(span.task)}</td><td>{_who(span.connection)}</td><td>"
        + (f"waited {escape(span.what)}" if span.is_wait else f"<code>{escape(span.what)}</code>")
        + f"</td><td>{escape(span.place)}</td></tr>"
        for span in sorted(timeline.spans, key=lambda span: span.began)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><title>asyncorm: timeline</title>'
        f"<style>{_STYLE}</style>{as_fragment(timeline)}<table><tr><th>at, ms<th>took, ms"
        f"<th>task<th>pid<th>what<th>where</tr>{rows}</table></html>\n"
    )
