"""Where the documentation tells more: the end of an error's message, and what is read there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# The documentation's address once it is published; until then the folder in the repository, whose
# pages a wheel has, too.
PAGES = "docs/"


def see(place: str) -> str:
    """The end of a message: where the documentation tells more.

    Args:
        place: a page and a heading on it, "transactions#cancellation".
    """
    page, _, anchor = place.partition("#")
    return f" See {PAGES}{page}.md#{anchor} (`manage.py asyncorm docs` prints it)"


def folder() -> Path:
    """Where the pages are: in the package, as it is installed, or beside it in the repository."""
    package = Path(__file__).parent
    inside = package / "docs"
    return inside if inside.is_dir() else package.parent / "docs"


def section(place: str) -> str:
    """What the documentation says there, up to the next heading that is not below.

    Args:
        place: a page, and maybe a heading on it; as see() writes it or as it is called with.

    Raises:
        LookupError: there is no such page or heading; it says which there are.
    """
    name, _, anchor = place.removeprefix(PAGES).partition("#")
    page = name.removesuffix(".md")
    path = folder() / f"{page}.md"
    known = sorted(each.stem for each in folder().glob("*.md"))
    if page not in known:
        raise LookupError(f"There is no page {page!r}. There are: {', '.join(known)}.")
    lines = path.read_text().splitlines()
    if not anchor:
        return "\n".join(lines)
    headings = list(_headings(lines))
    for at, level, found in headings:
        if found == anchor:
            ends = (line for line, depth, _ in headings if line > at and depth <= level)
            return "\n".join(lines[at : next(ends, None)])
    anchors = ", ".join(found for _, _, found in headings)
    raise LookupError(f"The page {page!r} has no heading {anchor!r}. It has: {anchors}.")


def _headings(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """Each heading's line, level and anchor (as GitHub and MyST make it)."""
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.startswith("```")
        if not in_code and (found := re.match(r"(##?#?) (.+)", line)):
            anchor = re.sub(r"[^\w\- ]", "", found[2].lower()).replace(" ", "-")
            yield number, len(found[1]), anchor
