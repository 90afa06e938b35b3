"""Who wants to know that Django's own connections, or a COMMIT, may have written something.

(Of statements of native code tell the events.) Nobody, as a rule: then it is one look at a list.
"""

from __future__ import annotations

from collections.abc import Callable

# Called with the alias, and the statement; None stands for COMMIT.
listeners: list[Callable[[str, str | None], None]] = []


def tell(alias: str, text: str | None = None) -> None:
    """It was executed, or failed, which may be after the server had done it."""
    for listener in listeners:
        listener(alias, text)
