"""Compares the two runs, applies known_differences.toml, and writes tables."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from .suite import CACHE

HERE = Path(__file__).resolve().parent
KNOWN = HERE / "known_differences.toml"
RESULTS = HERE / "results"
FINE = ("passed", "expected failure")
BAD = ("failed", "error", "unexpected success")
NOT_RUN = "not run"
NAMES = {
    "native": "django", "async": "django-redirected", "requests": "django-requests",
    "apps": "apps-django",
}  # fmt: skip
COUNTS = ("run", "passed", "failed", "skipped", "differing", "native")


def known_differences(series: str, way: str) -> dict[str, str]:
    """Reason by test, for one Django series and way of running (a key of NAMES).

    What is known natively holds for requests through our handler, too.

    Raises:
        ValueError: an entry is incomplete.
    """
    known: dict[str, str] = {}
    for entry in tomllib.loads(KNOWN.read_text()).get("difference", []):
        if not (entry.get("test") and entry.get("reason") and entry.get("django")):
            raise ValueError(f"An entry needs django, test and reason: {entry}")
        listed = entry.get("way", "native")
        if series in entry["django"] and (
            way in (listed, "async") or (way == "requests" and listed == "native")
        ):
            known[entry["test"]] = entry["reason"]
    return known


def unsteady() -> dict[str, str]:
    """Reason by test, for tests whose outcome depends on what else goes on."""
    entries = tomllib.loads(KNOWN.read_text()).get("unsteady", [])
    return {entry["test"]: entry["reason"] for entry in entries}


class Outcome:
    """What the runs say.

    Attributes:
        differences: test: (outcome on the baseline, outcome natively, what it said).
        unlisted, stale: differences that are not listed; listed tests that pass natively.
        unsteady: differences of tests whose outcome depends on what else goes on.
        not_native: test: statements that went through a synchronous connection or elsewhere,
            other than in threads that the test started itself.
        versions: of other people's apps.
        left_out: label: why it could not be run.
        stock: date and commit of the run on the stock backend.
        reruns: what was run again after the whole run.
    """

    def __init__(
        self,
        baseline: dict[str, Any],
        native: dict[str, Any],
        broken: list[str],
        way: str,
        began: dict[str, str],
    ) -> None:
        import django

        self.baseline, self.native, self.broken = baseline, native, broken
        self.way, self.began, self.stock = way, began, began
        self.version = django.__version__
        self.series = ".".join(self.version.split(".")[:2])
        self.versions: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.reruns: list[dict[str, Any]] = []
        self._judge()

    def _judge(self) -> None:
        found = self._compare()
        shaky = unsteady()
        self.unsteady = {test: what for test, what in found.items() if test in shaky}
        self.differences = {test: what for test, what in found.items() if test not in shaky}
        known = known_differences(self.series, self.way)
        self.known = {test: known[test] for test in self.differences if test in known}
        self.unlisted = {t: d for t, d in self.differences.items() if t not in known}
        self.stale = sorted(
            test for test in known if test in self.native and self.native[test]["outcome"] in FINE
        )
        self.not_native = {
            test: entry.get("sync", 0) + entry.get("elsewhere", 0)
            for test, entry in self.native.items()
            if entry.get("sync") or entry.get("elsewhere")
        }

    def merge(self, apps: set[str]) -> None:
        """Put this run of some apps in the place of theirs in the last whole run."""
        before = json.loads(whole_run(self.way).read_text())
        self.reruns = [*before["reruns"], {**self.began, "apps": sorted(apps)}]
        self.began, self.stock = before["began"], before["stock"]
        for name in ("baseline", "native"):
            old = {t: entry for t, entry in before[name].items() if app_of(t) not in apps}
            setattr(self, name, {**old, **getattr(self, name)})
        self.broken += before["broken"]
        self._judge()

    def _compare(self) -> dict[str, tuple[str, str, str]]:
        found = {}
        for test, entry in self.baseline.items():
            mine = self.native.get(test)
            if entry["outcome"] in BAD or "seconds" not in entry:
                continue
            if mine is None:
                if not self._class_failed(test):
                    found[test] = (entry["outcome"], NOT_RUN, "")
            elif mine["outcome"] in BAD or (
                entry["outcome"] in FINE and mine["outcome"] == "skipped"
            ):
                found[test] = (entry["outcome"], mine["outcome"], mine.get("text", ""))
        for test, entry in self.native.items():
            # A class that could not be set up: not a test's name on the other side.
            if entry["outcome"] in BAD and test not in self.baseline:
                found[test] = ("passed or not run", entry["outcome"], entry.get("text", ""))
        return found

    def _class_failed(self, test: str) -> bool:
        name = test.rpartition(".")[0]
        return any(f"{step} ({name})" in self.native for step in ("setUpClass", "tearDownClass"))

    @property
    def good(self) -> bool:
        """Whether nothing differs but what is listed."""
        return not (self.unlisted or self.stale or self.not_native or self.broken)

    def table(self) -> dict[str, dict[str, int]]:
        """Counts of the native run by app."""
        apps: dict[str, dict[str, int]] = {}
        for test, entry in self.native.items():
            app = app_of(test)
            if app is None:
                continue
            row = apps.setdefault(app, dict.fromkeys((*COUNTS, "failed on both"), 0))
            row["native"] += entry.get("native", 0)
            if "seconds" in entry:
                outcome = entry["outcome"]
                row["run"] += 1
                kind = "passed" if outcome in FINE else "failed" if outcome in BAD else "skipped"
                row[kind] += 1
                if outcome in BAD and test not in self.differences and test not in self.unsteady:
                    row["failed on both"] += 1
        for test in self.differences:
            if (app := app_of(test)) in apps:
                apps[app]["differing"] += 1  # type: ignore[index]
        return dict(sorted(apps.items()))

    def totals(self) -> dict[str, int]:
        """The sums of the table."""
        total: dict[str, int] = {}
        for row in self.table().values():
            for key, value in row.items():
                total[key] = total.get(key, 0) + value
        for key in ("threads", "redirected"):
            total[key] = sum(entry.get(key, 0) for entry in self.native.values())
        total["elsewhere"] = sum(self.not_native.values())
        return total

    def text(self, seconds: float) -> str:
        """The table, then everything that is wrong."""
        header = ("app", "run", "passed", "failed", "skipped", "differing", "native statements")
        lines = [f"{header[0]:32}" + "".join(f"{name:>11}" for name in header[1:])]
        rows = [*self.table().items(), ("all", self.totals())]
        lines += [
            f"{app:32}" + "".join(f"{row.get(key, 0):>11}" for key in COUNTS) for app, row in rows
        ]
        totals = self.totals()
        lines.append(
            f"\n{NAMES[self.way]} {self.version}, Python {_python()}: "
            f"{totals.get('run', 0)} tests natively, {totals.get('native', 0)} native statements, "
            f"{totals['elsewhere']} on other connections, {totals['threads']} in threads that "
            f"tests start themselves; {totals['redirected']} calls sent through a* twins; "
            f"{len(self.known)} known differences; {seconds:.0f} s"
        )
        lines += [f"\nLEFT OUT: {label}, {why}" for label, why in self.left_out.items()]
        missing = Counter(app_of(t) for t, (_, now, _) in self.unlisted.items() if now == NOT_RUN)
        lines += [f"\nDIFFERS: {n} tests of {app} did not run" for app, n in missing.items()]
        for test, (was, now, said) in self.unlisted.items():
            if now == NOT_RUN:
                continue
            lines.append(f"\nDIFFERS: {test}: {was} on the stock backend, {now} natively\n{said}")
        lines += [f"LISTED in {KNOWN.name} but passes natively: {test}" for test in self.stale]
        lines += [
            f"NOT NATIVE: {count} statements during {test}"
            for test, count in self.not_native.items()
        ]
        lines += [f"BROKEN: {text}" for text in self.broken]
        lines.append("as on the stock backend" if self.good else "NOT as on the stock backend")
        return "\n".join(lines)

    def facts(self, seconds: float, bindir: Path | None) -> dict[str, Any]:
        """What is kept of the run, without its machine's paths."""
        server = "DATABASE_URL"
        if bindir is not None:
            done = subprocess.run(
                [bindir / "postgres", "--version"], capture_output=True, text=True
            )
            server = done.stdout.strip()
        baseline = [entry["outcome"] for entry in self.baseline.values() if "seconds" in entry]
        return {
            "suite": NAMES[self.way],
            "version": self.version,
            "versions": self.versions,
            "python": _python(),
            "server": server,
            **self.began,
            "reruns": self.reruns,
            "seconds": round(seconds),
            "good": self.good,
            "totals": self.totals(),
            "baseline": {
                **self.stock,
                "run": len(baseline),
                "passed": sum(outcome in FINE for outcome in baseline),
                "failed": sum(outcome in BAD for outcome in baseline),
                "skipped": baseline.count("skipped"),
            },
            "apps": self.table(),
            "known differences": self.known,
            "unlisted differences": {test: list(said[:2]) for test, said in self.unlisted.items()},
            "unsteady": {test: list(said[:2]) for test, said in self.unsteady.items()},
            "not native": self.not_native,
            "left out": self.left_out,
            "broken": [text.splitlines()[0] for text in self.broken],
        }

    def write(self, seconds: float, bindir: Path | None) -> None:
        """Write text, JSON and Markdown to compat/results/, and keep what a rerun needs."""
        facts = self.facts(seconds, bindir)
        RESULTS.mkdir(exist_ok=True)
        path = whole_run(self.way)
        (RESULTS / path.name).write_text(json.dumps(facts, indent=1) + "\n")
        plain = re.sub(r"(?m)^\s*File \".*\n?", "", self.text(seconds))
        (RESULTS / f"{path.stem}.txt").write_text(plain + "\n")
        (RESULTS / f"{path.stem}.md").write_text(markdown(facts))
        names = ("baseline", "native", "broken", "reruns", "began", "stock")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: getattr(self, name) for name in names}))


def whole_run(way: str) -> Path:
    """Where all of the last whole run is kept, test by test, for these versions."""
    import django

    python = ".".join(_python().split(".")[:2])
    return CACHE / "whole" / f"{NAMES[way]}-{django.__version__}-python-{python}.json"


def _python() -> str:
    return platform.python_version()


def when() -> dict[str, str]:
    """The date, and the commit that is run."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "asyncorm", "compat/*.py")
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit + (" and changes" * bool(changed))}


def name_of(test: str) -> str:
    """The dotted name in "app.tests.C.test", "setUpClass (app.tests.C)", "(after app.tests...)"."""
    found = re.fullmatch(r"(?:\w+(?:Class|Module) )?\((?:after )?(.+)\)", test)
    return found[1] if found else test


def app_of(test: str) -> str | None:
    """The app that a test, or what went wrong around tests, is of."""
    name = name_of(test).split(".")[0]
    return None if name == "outside tests" else name


def kept_baseline(labels: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The outcomes on the stock backend in the last whole run with these versions, and its date.

    They do not depend on asyncorm.
    """
    kept = json.loads(whole_run("native").read_text())
    starts = tuple(f"{label}." for label in labels)
    tests = {t: e for t, e in kept["baseline"].items() if f"{name_of(t)}.".startswith(starts)}
    return tests, kept["stock"]


def markdown(facts: dict[str, Any]) -> str:
    """One run as a Markdown page."""
    totals, baseline = facts["totals"], facts["baseline"]
    lines = [
        f"# {facts['suite']} {facts['version']} on Python {facts['python']}",
        "",
        f"{facts['date']}, commit {facts['commit']}, {facts['server']}, {facts['seconds']} s.",
        *(
            f"Run again later, {run['date']}, commit {run['commit']}: {', '.join(run['apps'])}."
            for run in facts["reruns"]
        ),
        "",
        f"On the stock backend ({baseline['date']}) {baseline['run']} tests ran, "
        f"{baseline['passed']} passed, {baseline['failed']} failed, {baseline['skipped']} were "
        f"skipped. Natively {totals.get('run', 0)} ran, {totals.get('passed', 0)} passed, "
        f"{totals.get('failed', 0)} failed, {totals.get('skipped', 0)} were skipped.",
        "",
        "| App | Run | Passed | Failed | Skipped | Differing | Native statements |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for app, row in [*facts["apps"].items(), ("**all**", totals)]:
        lines.append(f"| {app} | " + " | ".join(str(row.get(key, 0)) for key in COUNTS) + " |")
    if facts["left out"]:
        lines += ["", "## Left out", ""]
        lines += [f"- `{label}`: {why}" for label, why in facts["left out"].items()]
    lines += ["", "## Known differences", ""]
    lines += [f"- `{test}`: {reason}" for test, reason in facts["known differences"].items()]
    if facts["unlisted differences"]:
        lines += ["", "## Other differences", ""]
        lines += [
            f"- `{test}`: {was} on the stock backend, {now} natively"
            for test, (was, now) in facts["unlisted differences"].items()
        ]
    return "\n".join(lines) + "\n"
