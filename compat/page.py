"""Makes docs/compatibility.md from compat/results/.

python -m compat.page [--check]   with --check it only says whether the page is up to date
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .report import HERE, RESULTS

PAGE = HERE.parent / "docs" / "compatibility.md"

HEAD = """\
# Compatibility

<!-- Made by `python -m compat.page` from compat/results/: do not edit. -->

What is guaranteed: ORM code behaves natively as it does on Django's own PostgreSQL backend. The
judge is Django's own test suite, unedited, from the source distribution of each version. It runs
twice on the same server: on `django.db.backends.postgresql`, and natively, inside a running event
loop on connections of asyncorm's pool, asynchronous tests awaited as coroutines with
`ASYNCORM = {"SWAP_MANAGERS": True}`. A test that passes on the first and not on the second is a
difference. Each is in `compat/known_differences.toml` with its reason; any other fails the run, and
so does a listed one that passes.

Statements are counted by the connection that they went through. One on a synchronous connection, or
in another thread, fails the run, unless a test started that thread itself.

In the native run three calls that a test makes are answered on the loop, as in a project that is
asynchronous from top to bottom: `sync_to_async(...)` (thread-sensitive) runs its function natively,
`async_to_sync(...)` and `asyncio.run(...)` in synchronous tests await. Nothing else of Django or of
the tests is replaced beyond what asyncorm itself replaces.

Reproduce it with `make compat DJANGO=6.1`, a part with `make compat APPS="queries transactions"`,
the ORM's part with `make compat-fast`, and all of this page with `make compat-matrix`.

## Django's test suite

"""

TABLE = """\
| Suite | Python | Server | Run | Passed | Failed on both | Skipped | Differing | \
Native statements | Others |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

TAIL = """
*Differing* counts tests that pass on the stock backend and not natively. *Others* counts statements
that were not native and that no test's own thread sent.
"""


def _row(facts: dict[str, Any]) -> str:
    totals = facts["totals"]
    differing = totals.get("differing", 0)
    cells = [
        f"{facts['suite']} {facts['version']}",
        facts["python"],
        facts["server"].removeprefix("postgres (PostgreSQL) ").split(" ")[0],
        totals.get("run", 0),
        totals.get("passed", 0),
        max(0, totals.get("failed", 0) - differing),
        totals.get("skipped", 0),
        differing,
        totals.get("native", 0),
        totals.get("elsewhere", 0),
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def text() -> str:
    """The page."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    out = HEAD + TABLE
    out += "".join(_row(facts) for facts in runs if facts["suite"] == "django") + TAIL
    if others := [facts for facts in runs if facts["suite"] != "django"]:
        out += "\n## Other suites\n\n" + TABLE + "".join(map(_row, others))
    out += "\n## Known differences\n\n"
    reasons: dict[str, tuple[str, set[str]]] = {}
    for facts in runs:
        for test, reason in facts["known differences"].items():
            reasons.setdefault(test, (reason, set()))[1].add(facts["version"])
    for test, (reason, versions) in sorted(reasons.items()):
        out += f"- `{test}` ({', '.join(sorted(versions))}): {reason}\n"
    unlisted = {
        (test, facts["version"]): outcomes
        for facts in runs
        for test, outcomes in facts["unlisted differences"].items()
    }
    if unlisted:
        out += "\n## Differences still to be looked into\n\n"
        for (test, version), (was, now) in sorted(unlisted.items()):
            out += f"- `{test}` ({version}): {was} on the stock backend, {now} natively\n"
    return out


def write() -> None:
    """Bring the page up to date."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text())


def main() -> int:
    if "--check" not in sys.argv[1:]:
        write()
    elif not PAGE.exists() or PAGE.read_text() != text():
        print("docs/compatibility.md is stale: python -m compat.page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
