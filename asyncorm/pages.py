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
    known = [each.relative_to(folder()).with_suffix("") for each in folder().rglob("*.md")]
    names = sorted(map(Path.as_posix, known))
    if page not in names:
        raise LookupError(f"There is no page {page!r}. There are: {', '.join(names)}.")
    lines = _text(folder() / f"{page}.md").splitlines()
    if not anchor:
        return "\n".join(lines)
    headings = list(_headings(lines))
    for at, level, found in headings:
        if found == anchor:
            ends = (line for line, depth, _ in headings if line > at and depth <= level)
            return "\n".join(lines[at : next(ends, None)])
    anchors = ", ".join(found for _, _, found in headings)
    raise LookupError(f"The page {page!r} has no heading {anchor!r}. It has: {anchors}.")


def contents() -> str:
    """The pages by name and title, in the groups of the start page."""
    lines = []
    for group, links in re.findall(r"^\*\*(\w+)\*\*: (.+)$", _text(folder() / "index.md"), re.M):
        lines += ["", group]
        lines += [
            f"  {name:<19} {title}" for title, name in re.findall(r"\[(.+?)\]\((.+?)\.md\)", links)
        ]
    return "\n".join([*lines[1:], "", "`manage.py asyncorm docs PAGE` prints one of them."])


def _text(path: Path) -> str:
    """A page, with those that it includes whole (a wheel has not all of them), and of the
    docstrings that Sphinx would include how they begin."""
    import pydoc  # not for every process that starts

    def included(directive: re.Match[str]) -> str:
        found = path.parent / directive[1]
        if not found.is_file():
            return f"(In the repository: {directive[1].removeprefix('../')})"
        return re.sub("^#", "##" if directive[2] else "#", found.read_text(), flags=re.M)

    def documented(directive: re.Match[str]) -> str:
        lines = []
        for name in re.findall(r"^\.\. auto\w+:: (\S+)$", directive[0], re.M):
            text, *_ = pydoc.getdoc(pydoc.locate(name)).split("\n\n")
            lines.append(f"- `help({name})`: {text.rstrip(':')}")
        return "\n".join(lines)

    directives = r"^```\{include\} (\S+)\n(:heading-offset: 1\n)?```$"
    text = re.sub(directives, included, path.read_text(), flags=re.M)
    return re.sub(r"^```\{(?:eval-rst|toctree)\}\n[\s\S]+?^```$", documented, text, flags=re.M)


def _headings(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """Each heading's line, level and anchor (as GitHub and MyST make it)."""
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.startswith("```")
        if not in_code and (found := re.match(r"(##?#?) (.+)", line)):
            anchor = re.sub(r"[^\w\- ]", "", found[2].lower()).replace(" ", "-")
            yield number, len(found[1]), anchor
