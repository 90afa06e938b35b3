"""Runs some of Django's test modules in this process, natively or not, and writes what happened.

Started by run.py as `python -m compat.worker`, with its orders in ASYNCORM_COMPAT.
"""

from __future__ import annotations

import atexit
import faulthandler
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

from asyncorm import statement_cache_stats

HANG = 600  # seconds for one test, after which the worker says where it hangs and ends

# How bad an outcome is: the worst one of a test's subtests counts.
OUTCOMES = ("passed", "skipped", "expected failure", "unexpected success", "failed", "error")


class Record:
    """Outcome, statements and time of each test, in the order they ran."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.current = "(outside tests)"
        self.whereabouts = Path(os.devnull)
        self.began = 0.0

    def entry(self, test: str) -> dict[str, Any]:
        return self.tests.setdefault(test, {"outcome": "passed"})

    def begin(self, test: str) -> None:
        """A test starts: what is counted from now on is its own."""
        self.current = test
        self.whereabouts.write_text(test)  # for run.py, should we hang
        self.entry(test)
        self.began = time.monotonic()

    def end(self, test: str) -> None:
        """The test has ended."""
        self.entry(test)["seconds"] = round(time.monotonic() - self.began, 3)
        self.current = f"(after {test})"

    def outcome(self, test: str, outcome: str, text: str = "") -> None:
        entry = self.entry(test)
        if OUTCOMES.index(outcome) >= OUTCOMES.index(entry["outcome"]):
            entry["outcome"] = outcome
        if text:
            entry["text"] = f"{entry['text']}\n\n{text}" if "text" in entry else text

    def count(self, kind: str) -> None:
        """A statement was sent on a connection of this kind."""
        entry = self.entry(self.current)
        entry[kind] = entry.get(kind, 0) + 1

    def write(self, order: dict[str, Any], began: float) -> None:
        """The answer to run.py's order."""
        answer = {"tests": self.tests, "seconds": round(time.monotonic() - began, 1)}
        if order["mode"] != "baseline":
            answer["cache"] = statement_cache_stats()
        if order.get("count"):
            from . import counting

            answer["reasons"] = counting.reasons
        Path(order["output"]).write_text(json.dumps(answer))


record = Record()


class Result(unittest.TextTestResult):
    """Writes down the outcome of each test beside printing it."""

    def startTest(self, test: Any) -> None:
        faulthandler.dump_traceback_later(HANG, exit=True)
        record.begin(test.id())
        super().startTest(test)

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        record.end(test.id())

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        record.outcome(test.id(), "skipped", reason)

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        record.outcome(test.id(), "error", self.errors[-1][1])

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        record.outcome(test.id(), "failed", self.failures[-1][1])

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            text = (self.failures if failed else self.errors)[-1][1]
            record.outcome(test.id(), "failed" if failed else "error", f"{subtest}\n{text}")

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        super().addExpectedFailure(test, err)
        record.outcome(test.id(), "expected failure")

    def addUnexpectedSuccess(self, test: Any) -> None:
        super().addUnexpectedSuccess(test)
        record.outcome(test.id(), "unexpected success")


def recording(base: Any, order: dict[str, Any]) -> Any:
    """A Django test runner that records, and runs the tests natively if asked to."""
    native = order["mode"] != "baseline"
    if native:
        from . import natively

        natively.install(record, order["tests"])
        if order["mode"] == "async":
            from . import redirect

            redirect.install(record, order["tests"])
        if order["mode"] == "requests":
            from . import requests

            requests.install()

    class Runner(base):  # type: ignore[misc]
        def get_resultclass(self) -> Any:
            return Result

        def run_checks(self, databases: Any) -> None:
            """Done with the tests, so natively."""
            self.checked = databases

        def run_suite(self, suite: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                base.run_checks(self, self.checked)
                return base.run_suite(self, suite, **kwargs)

            return natively.run(run) if native else run()

    return Runner


def main() -> None:
    """Run, write the record as JSON, and end with 0 whatever the tests' outcome."""
    order = json.loads(os.environ["ASYNCORM_COMPAT"])
    faulthandler.enable()
    record.whereabouts = Path(order["output"]).with_suffix(".current")
    os.chdir(order["tests"])
    # Django's test modules first: their names are common.
    sys.path.insert(0, order["tests"])
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[:] = [path for path in sys.path if path not in ("", root)] + [root]
    os.environ["DJANGO_SETTINGS_MODULE"] = "compat.settings"

    # As runtests.py does when it is run as a program.
    temporary = tempfile.mkdtemp(prefix="django_")
    tempfile.tempdir = os.environ["TMPDIR"] = temporary
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)

    import runtests
    from django.test.utils import get_runner

    runtests.get_runner = lambda settings: recording(get_runner(settings), order)
    if order["mode"] != "baseline":
        runtests.ALWAYS_INSTALLED_APPS.append("asyncorm")
    options = dict.fromkeys(inspect.signature(runtests.django_tests).parameters)
    options |= {
        "verbosity": 1,
        "interactive": False,
        "failfast": False,
        "keepdb": False,
        "reverse": False,
        "debug_sql": False,
        "parallel": 1,
        "pdb": False,
        "buffer": False,
        "timing": False,
        "shuffle": False,
        "test_labels": order["labels"],
    }
    began = time.monotonic()
    runtests.django_tests(**options)
    faulthandler.cancel_dump_traceback_later()
    record.write(order, began)


if __name__ == "__main__":
    # Under its importable name, so that there is one Record only.
    from compat.worker import main as run_worker

    run_worker()
