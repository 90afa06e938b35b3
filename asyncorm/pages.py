"""Where the documentation tells more: the end of an error's message."""

from __future__ import annotations

# The documentation's address once it is published; until then the folder in the repository.
PAGES = "docs/"


def see(place: str) -> str:
    """The end of a message: where the documentation tells more.

    Args:
        place: a page and a heading on it, "transactions#cancellation".
    """
    page, _, anchor = place.partition("#")
    return f" See {PAGES}{page}.md#{anchor}"
