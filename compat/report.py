"""Compares the two runs, applies known_differences.toml, and writes tables."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KNOWN = HERE / "known_differences.toml"
RESULTS = HERE / "results"
FINE = ("passed", "expected failure")
BAD = ("failed", "error", "unexpected success")


def known_differences(series: str, way: str) -> dict[str, str]:
    """Reason by test, for one Django series and way of running ("native" or "async").

    Raises:
        ValueError: an entry is incomplete.
    """
    known: dict[str, str] = {}
    for entry in tomllib.loads(KNOWN.read_text()).get("difference", []):
        if not (entry.get("test") and entry.get("reason") and entry.get("django")):
            raise ValueError(f"An entry needs django, test and reason: {entry}")
        if series in entry["django"] and way in (entry.get("way", "native"), "async"):
            known[entry["test"]] = entry["reason"]
    return known


def unsteady() -> set[str]:
    """Tests whose outcome depends on how busy the machine is."""
    return {entry["test"] for entry in tomllib.loads(KNOWN.read_text()).get("unsteady", [])}


class Outcome:
    """What the runs say.

    Attributes:
        differences: test: (outcome on the baseline, outcome natively, what it said).
        unlisted, stale: differences that are not listed; listed tests that pass natively.
        not_native: test: statements that went through a synchronous connection or elsewhere,
            other than in threads that the test started itself.
    """

    def __init__(
        self,
        baseline: dict[str, Any],
        native: dict[str, Any],
        broken: list[str],
        way: str,
    ) -> None:
        import django

        self.baseline, self.native, self.broken = baseline, native, broken
        self.name = "django" if way == "native" else "django-redirected"
        self.version = self.django = django.__version__
        self.series = ".".join(self.django.split(".")[:2])
        shaky = unsteady()
        self.differences = {t: d for t, d in self._compare().items() if t not in shaky}
        known = known_differences(self.series, way)
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

    def _compare(self) -> dict[str, tuple[str, str, str]]:
        found = {}
        for test, entry in self.baseline.items():
            mine = self.native.get(test)
            if entry["outcome"] in BAD or "seconds" not in entry:
                continue
            if mine is None:
                if not self._class_failed(test):
                    found[test] = (entry["outcome"], "not run", "")
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
            app = _app(test)
            if app is None:
                continue
            row = apps.setdefault(
                app, {"run": 0, "passed": 0, "failed": 0, "skipped": 0, "differing": 0, "native": 0}
            )
            row["native"] += entry.get("native", 0)
            if "seconds" in entry:
                outcome = entry["outcome"]
                row["run"] += 1
                kind = "passed" if outcome in FINE else "failed" if outcome in BAD else "skipped"
                row[kind] += 1
        for test in self.differences:
            if (app := _app(test)) in apps:
                apps[app]["differing"] += 1  # type: ignore[index]
        return dict(sorted(apps.items()))

    def totals(self) -> dict[str, int]:
        """The sums of the table."""
        total: dict[str, int] = {}
        for row in self.table().values():
            for key, value in row.items():
                total[key] = total.get(key, 0) + value
        total["threads"] = sum(entry.get("threads", 0) for entry in self.native.values())
        total["elsewhere"] = sum(self.not_native.values())
        return total

    def text(self, seconds: float) -> str:
        """The table, then everything that is wrong."""
        header = ("app", "run", "passed", "failed", "skipped", "differing", "native statements")
        lines = [f"{header[0]:32}" + "".join(f"{name:>11}" for name in header[1:])]
        rows = [*self.table().items(), ("all", self.totals())]
        lines += [
            f"{app:32}"
            + "".join(
                f"{row.get(key, 0):>11}"
                for key in ("run", "passed", "failed", "skipped", "differing", "native")
            )
            for app, row in rows
        ]
        totals = self.totals()
        lines.append(
            f"\n{self.name} {self.version}, Python {platform.python_version()}: "
            f"{totals.get('run', 0)} tests natively, {totals.get('native', 0)} native statements, "
            f"{totals['elsewhere']} on other connections, {totals['threads']} in threads that "
            f"tests start themselves; {len(self.known)} known differences; {seconds:.0f} s"
        )
        for test, (was, now, said) in self.unlisted.items():
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
            "suite": self.name,
            "version": self.version,
            "django": self.django,
            "python": platform.python_version(),
            "server": server,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(seconds),
            "good": self.good,
            "totals": self.totals(),
            "baseline": {
                "run": len(baseline),
                "passed": sum(outcome in FINE for outcome in baseline),
                "failed": sum(outcome in BAD for outcome in baseline),
                "skipped": baseline.count("skipped"),
            },
            "apps": self.table(),
            "known differences": self.known,
            "unlisted differences": {test: list(said[:2]) for test, said in self.unlisted.items()},
            "not native": self.not_native,
            "broken": [text.splitlines()[0] for text in self.broken],
        }

    def write(self, seconds: float, bindir: Path | None) -> None:
        """Write text, JSON and Markdown to compat/results/."""
        facts = self.facts(seconds, bindir)
        python = ".".join(facts["python"].split(".")[:2])
        stem = f"{self.name}-{self.version}-python-{python}"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n")
        plain = re.sub(r"(?m)^\s*File \".*\n?", "", self.text(seconds))
        (RESULTS / f"{stem}.txt").write_text(plain + "\n")
        (RESULTS / f"{stem}.md").write_text(markdown(facts))


def _app(test: str) -> str | None:
    if test.startswith("("):
        return None
    name = test.partition("(")[2] if "(" in test else test
    return name.split(".")[0].rstrip(")")


def markdown(facts: dict[str, Any]) -> str:
    """One run as a Markdown page."""
    totals, baseline = facts["totals"], facts["baseline"]
    lines = [
        f"# {facts['suite']} {facts['version']} on Python {facts['python']}",
        "",
        f"{facts['date']}, {facts['server']}, Django {facts['django']}, {facts['seconds']} s.",
        "",
        f"On the stock backend {baseline['run']} tests ran, {baseline['passed']} passed, "
        f"{baseline['failed']} failed, {baseline['skipped']} were skipped. Natively "
        f"{totals.get('run', 0)} ran, {totals.get('passed', 0)} passed, "
        f"{totals.get('failed', 0)} failed, {totals.get('skipped', 0)} were skipped.",
        "",
        "| App | Run | Passed | Failed | Skipped | Differing | Native statements |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    keys = ("run", "passed", "failed", "skipped", "differing", "native")
    for app, row in [*facts["apps"].items(), ("**all**", totals)]:
        lines.append(f"| {app} | " + " | ".join(str(row.get(key, 0)) for key in keys) + " |")
    lines += ["", "## Known differences", ""]
    lines += [f"- `{test}`: {reason}" for test, reason in facts["known differences"].items()]
    if facts["unlisted differences"]:
        lines += ["", "## Other differences", ""]
        lines += [
            f"- `{test}`: {was} on the stock backend, {now} natively"
            for test, (was, now) in facts["unlisted differences"].items()
        ]
    return "\n".join(lines) + "\n"
