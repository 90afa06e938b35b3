"""Runs the test suites of other people's apps, on the stock backend and natively, and compares.

python -m compat.apps [--results] [APP ...]   in the environment that `make compat-apps` makes
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from typing import Any

from . import report, suite
from .run import Run, server, workers


@dataclasses.dataclass(frozen=True)
class App:
    """An app and how its own tests are started, from its source distribution as it is.

    Attributes:
        version: the one in requirements-apps.txt.
        settings: its settings module for tests, or "module:function" for one that returns a
            dictionary of settings, or None when its tests configure Django themselves.
        tests: what pytest gets to collect, in `folder` of the source distribution.
        config: its own file with settings of pytest, if it has one.
        options: further options for pytest.
        environ: environment variables that its tests read.
    """

    version: str
    settings: str | None
    tests: tuple[str, ...] = ("tests",)
    folder: str = "."
    config: str | None = None
    options: tuple[str, ...] = ()
    environ: dict[str, str] = dataclasses.field(default_factory=dict)


APPS = {
    "django-filter": App("26.2", "tests.settings"),
    "django-guardian": App(
        "3.5.2",
        "guardian.testapp.testsettings",
        tests=("guardian/testapp/tests",),
        config="pyproject.toml",
    ),
    "django-model-utils": App("5.0.0", "tests.settings", config="setup.cfg"),
    "django-reversion": App(
        "6.4.0", "test_project.settings", tests=("test_app/tests",), folder="tests"
    ),
    "django-simple-history": App(
        "3.13.0",
        "runtests:get_default_settings",
        tests=("simple_history/tests", "simple_history/registry_tests"),
        options=("-o", "python_files=test*.py"),
    ),
    "django-treebeard": App("7.0.3", "tests.settings", environ={"DATABASE_ENGINE": "psql"}),
    "djangorestframework": App("3.18.3", None, config="pyproject.toml"),
}


class AppsRun(Run):
    """A comparison in which each job is one app.

    Attributes:
        count: whether it is counted what recordings catch, and why not the rest.
    """

    worker = "compat.apps_worker"
    count = False

    def order(self, number: int, mode: str, labels: list[str]) -> dict[str, Any]:
        (name,) = labels
        app = APPS[name]
        folder = suite.source(name, app.version)
        return {
            **super().order(number, mode, labels),
            "app": name,
            "count": self.count,
            "tests": str(folder / app.folder),
        }

    def text_of_counts(self) -> str:
        """What was counted of each app and in all, and the reasons, the most frequent first."""
        lines = [f"{'':24}{'querysets':>12}{'recorded':>12}{'by a plan':>12}{'Django':>12}"]
        ranked: Counter[str] = Counter()
        for name, (cache, reasons) in sorted(self.counted.items()):
            lines.append(_counted(name, cache, reasons))
            ranked += reasons
        caches = sum((cache for cache, _ in self.counted.values()), Counter())
        lines += [_counted("all", caches, ranked), "", "Not recorded:"]
        return "\n".join([*lines, *(f"{n:10,}  {why}" for why, n in ranked.most_common(30))])


def _counted(name: str, cache: Counter[str], reasons: Counter[str]) -> str:
    """A line about the statements of querysets whose shape was not new."""
    ways = Counter(recorded=cache["recorded"])
    for reason, number in reasons.items():
        ways[reason.partition(":")[0]] += number
    each = [ways[way] for way in ("recorded", "a plan", "Django")]
    shares = "".join(f"{number / max(sum(each), 1):12.0%}" for number in each)
    return f"{name:24}{sum(each):12,}{shares}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m compat.apps", description=__doc__)
    parser.add_argument("apps", nargs="*", help=f"of {', '.join(APPS)}; default: all")
    parser.add_argument("--workers", type=int, default=workers())
    parser.add_argument("--results", action="store_true", help="write compat/results/")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare each statement of the statement cache with Django's own",
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="natively alone: count what recorded querysets catch, and why not the rest",
    )
    options = parser.parse_args()
    if unknown := [name for name in options.apps if name not in APPS]:
        parser.error(f"no such apps: {' '.join(unknown)}")
    if options.results and options.apps and not report.whole_run("apps").exists():
        parser.error("there are no results of a whole run to put these into")
    names = options.apps or list(APPS)

    began, when = time.monotonic(), report.when()
    try:
        for name in names:
            suite.source(name, APPS[name].version)
    except suite.SuiteError as exc:
        print(exc, file=sys.stderr)
        return 2
    with server() as (database, bindir):
        run = AppsRun(database, suite.CACHE, options.workers, options.verify)
        run.count = options.count
        modes = ("native",) if options.count else ("baseline", "native")
        run.do([(mode, [name]) for name in reversed(names) for mode in modes])
    if options.count:
        print(run.text_of_counts(), *run.broken, sep="\n")
        return bool(run.broken)
    seconds = time.monotonic() - began
    outcome = report.Outcome(
        run.results["baseline"], run.results["native"], run.broken, "apps", when
    )
    print(outcome.text(seconds))
    verified = run.verified()
    if options.results and options.apps:
        outcome.merge(set(names))
    if options.results:
        outcome.versions = {name: app.version for name, app in APPS.items()}
        outcome.write(seconds, bindir)
    return 0 if outcome.good and verified else 1


if __name__ == "__main__":
    sys.exit(main())
