"""The few SVG elements that pictures of timelines are made of, as strings."""

from __future__ import annotations

from html import escape

FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def rect(
    x: float, y: float, width: float, height: float, fill: str, radius: float = 0, title: str = ""
) -> str:
    """A rectangle; a browser shows its title when pointed at."""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'rx="{radius:g}" fill="{fill}">{titled(title)}</rect>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    ends = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
    return f'<line {ends} stroke="{colour}"/>'


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: float = 13,
    colour: str = "#1c2430",
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" fill="{colour}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{escape(content)}</text>'
    )


def document(width: float, height: float, title: str, elements: list[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONT}">'
    return "\n".join(
        ('<?xml version="1.0" encoding="UTF-8"?>', head, titled(title), *elements, "</svg>\n")
    )


def titled(content: str) -> str:
    """What a browser shows when an element is pointed at."""
    return f"<title>{escape(content)}</title>" if content else ""
