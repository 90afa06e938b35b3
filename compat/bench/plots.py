"""Bar charts as SVG, readable on light and dark pages."""

from __future__ import annotations

from html import escape

OURS = ("native", "swap")
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 15px; }
.bar { fill: #8c959f; } .ours { fill: #1a7f37; } .floor { fill: #0969da; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .bar { fill: #6e7681; } }
"""


def bars(title: str, unit: str, data: list[tuple[str, float, str]], more: bool) -> str:
    """A chart of (label, value, contestant's name)."""
    step, left, width = 22, 270, 430
    height = 40 + step * len(data) + 8
    top = max(value for _, value, _ in data) or 1.0
    hint = "more is better" if more else "less is better"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 90} {height}"'
        f' role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="8" y="22">{escape(title)}, {escape(unit)} ({hint})</text>',
    ]
    for i, (label, value, name) in enumerate(data):
        y = 40 + step * i
        kind = "ours" if name in OURS else "floor" if name == "psycopg" else "bar"
        length = max(1.0, width * value / top)
        text = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
        parts += [
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="{kind}" x="{left}" y="{y}" width="{length:.1f}" height="16" rx="2"/>',
            f'<text x="{left + length + 6:.1f}" y="{y + 13}">{text}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
