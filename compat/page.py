"""Makes docs/compatibility.md from compat/results/.

python -m compat.page [--check]   with --check it only says whether the page is up to date
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .report import HERE, RESULTS, unsteady

PAGE = HERE.parent / "docs" / "compatibility.md"

HEAD = """\
# Compatibility

<!-- Made by `python -m compat.page` from compat/results/: do not edit. -->

What is guaranteed: ORM code behaves natively as it does on Django's own PostgreSQL backend. The
judges are Django's own test suite and those of apps that people use, unedited, from the source
distribution of each version. They run twice on the same server: on `django.db.backends.postgresql`,
and natively, inside a running event loop on connections of asyncorm's pool, asynchronous tests
awaited as coroutines with `ASYNCORM = {"SWAP_MANAGERS": True}`. (On a version's second Python the
stock backend may be asked only about what does not pass natively.) A test that passes on the first
and not on the second is a difference. Each is in `compat/known_differences.toml` with its reason;
any other fails the run, and so does a listed one that passes.

Statements are counted by the connection that they went through. One on a synchronous connection, or
in another thread, fails the run, unless a test started that thread itself.

Reproduce all of this page with one command:

    make compat-matrix

It takes an hour and a half or so on two cores; a part of it with

| Command | Runs |
| --- | --- |
| `make compat` | Django's test suite; `DJANGO=6.1` chooses, `APPS="queries transactions"` a part |
| `make compat-fast` | the part about the ORM, some 5,000 tests; CI does |
| `make compat-redirected` | that part, synchronous calls of tests sent through their `a*` twins |
| `make compat-requests` | the part that goes through handlers, requests through asyncorm's own |
| `make compat-verify` | all, in [verify mode](speed.md); `ARGS=--fast` for the ORM's part |
| `make compat-apps` | other people's suites; `APPS="django-treebeard"` one of them |

The server is a distribution's PostgreSQL if there is one. The embedded one has neither pgcrypto nor
uuid-ossp nor ICU: on it `db_functions` and `postgres_tests` are left out and counted.

Each makes an environment of its own under `.cache/`, gets the source distributions from the package
index, and starts a PostgreSQL server of its own unless `DATABASE_URL` names one. With
`PYTHON=python3.13 VENV=.venv-3.13` they run on another interpreter.

In a native run three calls that a test makes are answered on the loop, as in a project that is
asynchronous from top to bottom: `sync_to_async(...)` (thread-sensitive, not in an ASGI handler)
runs its function natively, `async_to_sync(...)` and `asyncio.run(...)` in synchronous tests await.
Nothing else of Django or of the tests is replaced beyond what asyncorm itself replaces. Other
people's apps run with `PASSWORD_HASHERS` set to a quick one, as Django's suite does.
"""

REDIRECTED = """\
Few of Django's tests call `a*` methods. Here the ORM calls that the tests themselves make (`get()`,
`count()`, iteration, `save()`, related managers' methods, ...) go to the twin and are awaited:
{calls} calls in these runs. A call that an override makes of its own base (`super().save()`), and
one under `set_autocommit(False)`, stay as they are.

"""

REQUESTS = """\
Every request that a test makes, by `Client`, by `AsyncClient` or through `get_asgi_application()`,
goes through the handler of `asyncorm.asgi`, with all middleware and views native
([requests](requests.md)). The stock backend, under Django's own handler, is asked about what does
not pass.

"""

COLUMNS = ("Python", "PostgreSQL", "Run", "Passed", "Failed on both", "Skipped", "Differing")
COLUMNS += ("Native statements", "Others", "Date, commit")

TAIL = """
*Differing* counts tests that pass on the stock backend and not natively. *Others* counts statements
that were not native and that no test's own thread sent. Single results are in `compat/results/`.
"""


def _table(first: str, rows: list[tuple[str, dict[str, Any], dict[str, int]]]) -> str:
    lines = [
        f"| {' | '.join((first, *COLUMNS))} |",
        "| --- | --- | --- |" + " ---: |" * 7 + " --- |",
    ]
    for name, facts, counts in rows:
        cells = (
            name,
            facts["python"],
            facts["server"].removeprefix("postgres (PostgreSQL) ").split(" ")[0],
            *(counts[key] for key in ("run", "passed", "failed on both", "skipped", "differing")),
            counts["native"],
            counts.get("elsewhere", 0),
            _when(name, facts),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _when(name: str, facts: dict[str, Any]) -> str:
    """Date and commit of a row, and of what was run again later."""
    again = facts["reruns"]
    if name.split(" ")[0] in facts["versions"]:  # an app of its own
        again = [run for run in again if name.split(" ")[0] in run["apps"]]
    later = (f"{_which(run['apps'])} again {run['date']}, {run['commit']}" for run in again)
    return "; ".join((f"{facts['date']}, {facts['commit']}", *later))


def _which(apps: list[str]) -> str:
    return ", ".join(apps) if len(apps) <= 5 else f"{len(apps)} modules"


def _of(runs: list[dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    return [facts for facts in runs if facts["suite"] == suite]


def text() -> str:
    """The page."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    out = HEAD
    for title, suite, said in (
        ("Django's test suite", "django", ""),
        ("The ORM's part of it, through the a* methods", "django-redirected", REDIRECTED),
        ("Its part about requests, through asyncorm's handler", "django-requests", REQUESTS),
    ):
        if chosen := _of(runs, suite):
            rows = [(f"Django {facts['version']}", facts, facts["totals"]) for facts in chosen]
            calls = sum(facts["totals"]["redirected"] for facts in chosen)
            out += f"\n## {title}\n\n{said.format(calls=calls)}" + _table("Suite", rows)
    if chosen := _of(runs, "apps-django"):
        rows = [
            (f"{app} {facts['versions'][app]}, Django {facts['version']}", facts, counts)
            for app in chosen[0]["versions"]
            for facts in chosen
            if (counts := facts["apps"].get(app))
        ]
        out += "\n## Other people's suites\n\n" + _table("Suite", rows)
    out += TAIL + "\n## Known differences\n\n"
    reasons: dict[tuple[str, str], set[str]] = {}
    for facts in runs:
        for test, reason in facts["known differences"].items():
            reasons.setdefault((test, reason), set()).add(facts["version"])
    for (test, reason), versions in sorted(reasons.items()):
        out += f"- `{test}` ({', '.join(sorted(versions))}): {reason}\n"
    out += "\nNot compared, because the outcome depends on what else goes on:\n\n"
    out += "".join(f"- `{test}`: {reason}\n" for test, reason in sorted(unsteady().items()))
    unlisted = {
        (test, f"Django {facts['version']}, Python {facts['python']}"): outcomes
        for facts in runs
        for test, outcomes in facts["unlisted differences"].items()
    }
    if unlisted:
        out += "\n## Differences still to be looked into\n\n"
        for (test, where), (was, now) in sorted(unlisted.items()):
            out += f"- `{test}` ({where}): {was} on the stock backend, {now} natively\n"
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
