"""Runs Django's own test suite twice, on the stock backend and natively, and compares.

python -m compat.run [APP ...]   see --help
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from asyncorm.demo.postgres import ServerError, find_bindir, postgres_server

from . import report, suite

ENGINES = {
    "baseline": "django.db.backends.postgresql",
    "native": "asyncorm.backends.postgresql",
    "async": "asyncorm.backends.postgresql",  # native, sync calls of tests sent through a* twins
    "requests": "asyncorm.backends.postgresql",  # native, requests through asyncorm's handler
}
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3600  # seconds for one worker

# Test modules that touch every part of the ORM.
FAST = """
aggregation aggregation_regress annotations async async_queryset auth_tests backends basic
bulk_create composite_pk constraints contenttypes_tests custom_columns custom_lookups
custom_managers custom_methods custom_pk datatypes dates datetimes db_functions db_typecasts
db_utils defer defer_regress delete delete_regress distinct_on_fields empty expressions
expressions_case expressions_window field_defaults filtered_relation force_insert_update
foreign_object from_db_value generic_relations generic_relations_regress get_earliest_or_latest
get_object_or_404 get_or_create indexes introspection known_related_objects lookup m2m_and_m2o
m2m_intermediary m2m_multiple m2m_recursive m2m_regress m2m_signals m2m_through
m2m_through_regress m2o_recursive managers_regress many_to_many many_to_one many_to_one_null
max_lengths model_fields model_inheritance model_inheritance_regress multiple_database
mutually_referential nested_foreign_keys null_fk null_fk_ordering null_queries one_to_one
or_lookups order_with_respect_to ordering pagination prefetch_related properties proxy_models
queries queryset_pickle raw_query reserved_names reverse_lookup save_delete_hooks
select_for_update select_related select_related_onetoone select_related_regress serializers
sessions_tests signals string_lookup test_utils transaction_hooks transactions unmanaged_models
update update_only_fields
""".split()

# Test modules that go through Django's handlers.
REQUESTS = """
asgi handlers middleware middleware_exceptions sessions_tests csrf_tests messages_tests auth_tests
admin_views generic_views async test_client test_client_regress i18n cache redirects_tests
flatpages_tests sites_tests logging_tests view_tests
""".split()

# Extensions without which the databases for a test module cannot be made.
NEEDS = {"db_functions": "pgcrypto", "postgres_tests": "uuid-ossp"}

SLOW = ("test_hashers", "test_forms")


class Worker(threading.Thread):
    """Takes jobs (mode, labels) from a queue and runs each in a process of its own."""

    def __init__(self, number: int, jobs: queue.Queue[Any], run: Run) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.jobs = jobs
        self.run_ = run

    def run(self) -> None:
        while True:
            try:
                mode, labels = self.jobs.get_nowait()
            except queue.Empty:
                return
            try:
                self.run_.process(self.number, mode, labels)
            except Exception as exc:
                self.run_.broken.append(f"{mode} run of {' '.join(labels)}: {exc}")


class Run:
    """One comparison: what to run, and what came out of it.

    Attributes:
        worker: the module that runs a job in a process of its own.
        results: by mode, by test: outcome and statements.
        broken: worker processes that did not finish, in words.
        verify: whether each hit of the statement cache is verified.
        cache: what the workers' statement caches did, in all.
        counted: by the first label, what a worker's statement cache did, and why not more of it.
    """

    worker = "compat.worker"

    def __init__(
        self, database: dict[str, Any], tests: Path, workers: int, verify: bool = False
    ) -> None:
        self.verify = verify
        self.cache: Counter[str] = Counter()
        self.counted: dict[str, tuple[Counter[str], Counter[str]]] = {}
        self.database = database
        self.tests = tests
        self.workers = workers
        self.results: dict[str, dict[str, Any]] = {mode: {} for mode in ENGINES}
        self.broken: list[str] = []
        self.folder = suite.CACHE / "logs" / time.strftime("%Y%m%d-%H%M%S")
        self.folder.mkdir(parents=True, exist_ok=True)

    def do(self, jobs: list[tuple[str, list[str]]]) -> None:
        """Run the jobs, as many at a time as there are workers."""
        waiting: queue.Queue[Any] = queue.Queue()
        for job in jobs:
            waiting.put(job)
        threads = [Worker(number, waiting, self) for number in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def order(self, number: int, mode: str, labels: list[str]) -> dict[str, Any]:
        """What the worker process has to know."""
        name = f"{mode}-{labels[0]}-{number}-{time.monotonic_ns()}"
        return {
            "engine": ENGINES[mode],
            "mode": mode,
            "cache": "verify" if self.verify else True,
            "labels": labels,
            "tests": str(self.tests),
            "database": self.database,
            "prefix": f"compat_{os.getpid()}_{number}",
            "output": str(self.folder / f"{name}.json"),
        }

    def process(self, number: int, mode: str, labels: list[str]) -> None:
        """Run labels in a worker process and take over its record."""
        order = self.order(number, mode, labels)
        output = Path(order["output"])
        log = output.with_suffix(".log")
        environment = {
            **os.environ,
            "ASYNCORM_COMPAT": json.dumps(order),
            "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(":"),
            "PYTHONHASHSEED": "0",
        }
        began = time.monotonic()
        with open(log, "wb") as file:
            done = subprocess.run(
                [sys.executable, "-m", self.worker],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=LIMIT,
            )
        if done.returncode or not output.exists():
            tail = log.read_text(errors="replace")[-3000:]
            current = output.with_suffix(".current")
            test = current.read_text() if current.exists() else "no test yet"
            raise RuntimeError(f"ended with {done.returncode} at {test}; the end of {log}:\n{tail}")
        answer = json.loads(output.read_text())
        self.results[mode].update(answer["tests"])
        self.cache.update(answer.get("cache", {}))
        if "reasons" in answer:
            self.counted[labels[0]] = Counter(answer["cache"]), Counter(answer["reasons"])
        tests = sum("seconds" in entry for entry in answer["tests"].values())
        verified = ""
        if self.verify and (cache := answer.get("cache")):
            verified = f": {cache['verified']:,} hits of {cache['verified_shapes']:,} shapes"
        print(
            f"  {mode}: {tests} tests of {len(labels)} modules in "
            f"{time.monotonic() - began:.0f} s ({labels[0]} ...){verified}",
            flush=True,
        )

    def verified(self) -> bool:
        """Say what was verified; whether that was all and as it should be."""
        if not self.verify:
            return True
        cache = self.cache
        print(
            f"Statement cache: {cache['hits']:,} hits, {cache['verified']:,} of them verified, of "
            f"{cache['verified_shapes']:,} shapes; {cache['different']} different"
        )
        return cache["verified"] == cache["hits"] and not cache["different"]


def split(labels: list[str], tests: Path, parts: int) -> list[list[str]]:
    """Labels in groups that take about as long, by the size of their test modules."""

    def weight(label: str) -> int:
        path = tests.joinpath(*label.split("."))
        files = path.rglob("test*.py") if path.is_dir() else [path.with_suffix(".py")]
        return 20_000 + sum(file.stat().st_size for file in files if file.exists())

    groups: list[list[str]] = [[] for _ in range(max(1, min(parts, len(labels))))]
    loads = [0] * len(groups)
    for label in sorted(labels, key=weight, reverse=True):
        lightest = loads.index(min(loads))
        groups[lightest].append(label)
        loads[lightest] += weight(label)
    return [sorted(group) for group in groups]


def all_labels(tests: Path) -> list[str]:
    """Every test module of the suite, as runtests.py finds them."""
    skipped = {"import_error_package", "test_runner_apps", "gis_tests", "templates"}
    return sorted(
        folder.name
        for folder in tests.iterdir()
        if folder.name not in skipped and (folder / "__init__.py").exists()
    )


def fast_labels(tests: Path) -> list[str]:
    """The modules of FAST that this version of the suite has, without what hashes passwords."""
    labels = []
    for label in FAST:
        if label == "auth_tests":
            modules = sorted(path.stem for path in (tests / label).glob("test_*.py"))
            labels += [f"{label}.{module}" for module in modules if module not in SLOW]
        elif (tests / label).exists():
            labels.append(label)
    return labels


def left_out(labels: list[str], tests: Path, database: dict[str, Any]) -> dict[str, str]:
    """The labels that cannot be run on this server, with what is missing, in words."""
    keys = ("NAME", "dbname"), ("USER", "user"), ("PASSWORD", "password"), ("HOST", "host")
    params = {key: database.get(name) for name, key in (*keys, ("PORT", "port"))}
    found = {}
    with psycopg.connect(**params) as conn:
        rows = conn.execute("SELECT name FROM pg_available_extensions").fetchall()
    for label in labels:
        app = label.split(".")[0]
        if (needed := NEEDS.get(app)) and (needed,) not in rows:
            files = (tests / app).rglob("test*.py")
            count = sum(file.read_text().count("\n    def test_") for file in files)
            found[label] = f"{count} tests: the server has no extension {needed}"
    return found


def doubtful(results: dict[str, Any]) -> list[str]:
    """Labels of the tests to run on the baseline too: those that did not simply pass natively."""
    labels = set()
    for test, entry in results.items():
        if entry["outcome"] not in ("passed", "expected failure"):
            # "setUpClass (app.tests.Class)"
            labels.add(test.partition("(")[2].rstrip(")") if "(" in test else test)
    return sorted(label for label in labels if label and not label.startswith("outside"))


def workers() -> int:
    """How many processes run tests at a time: one more than cores, since some tests sleep."""
    return min(os.cpu_count() or 1, 4) + 1


@contextmanager
def server(embedded: bool = False) -> Iterator[tuple[dict[str, Any], Path | None]]:
    """The server for the tests: its settings, and where its programs are if it is our own.

    A distribution's PostgreSQL, which has pgcrypto and ICU, if there is one; else the embedded one.
    """
    try:
        bindir = None if embedded else find_bindir(wheel=False)
    except ServerError:
        bindir = None
    settings = {"max_connections": "100", "max_prepared_transactions": "0"}
    with postgres_server(bindir=bindir, settings=settings) as found:
        yield found.settings, found.bindir


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m compat.run", description=__doc__)
    parser.add_argument("apps", nargs="*", help="test modules, or dotted names; default: all")
    parser.add_argument("--fast", action="store_true", help="the modules about the ORM alone")
    parser.add_argument(
        "--baseline",
        choices=("all", "doubtful", "kept"),
        help="what to run on the stock backend: all, or what does not pass natively, or nothing "
        "because the outcomes of the last whole run with these versions are kept "
        "(default: doubtful with --verify, with --requests, with --fast and without --results, "
        "else all)",
    )
    parser.add_argument("--workers", type=int, default=workers())
    parser.add_argument(
        "--redirect",
        action="store_true",
        help="natively, and the synchronous ORM calls that tests make sent through their a* twins",
    )
    parser.add_argument(
        "--requests",
        action="store_true",
        help="natively, and every request through the handler of asyncorm.asgi, all views native",
    )
    parser.add_argument(
        "--embedded", action="store_true", help="use the embedded server even if there is another"
    )
    parser.add_argument(
        "--results",
        action="store_true",
        help="write compat/results/; a run of some apps replaces what is there of these",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare each statement of the statement cache with Django's own",
    )
    options = parser.parse_args()
    way = "requests" if options.requests else "async" if options.redirect else "native"
    if options.baseline == "kept" and not report.whole_run("native").exists():
        parser.error("there are no results of a whole run to take the stock backend's from")
    if options.results and options.apps:
        if any("." in app for app in options.apps):
            parser.error("--results takes whole test modules")
        if not report.whole_run(way).exists():
            parser.error("there are no results of a whole run to put these into")

    began, when = time.monotonic(), report.when()
    stock = when
    try:
        tests = suite.django_tests()
    except suite.SuiteError as exc:
        print(exc, file=sys.stderr)
        return 2
    everything = all_labels(tests)
    some = fast_labels(tests) if options.fast else REQUESTS if options.requests else everything
    labels = options.apps or some
    if unknown := [label for label in labels if label.split(".")[0] not in everything]:
        print(f"No such test modules: {' '.join(unknown)}", file=sys.stderr)
        return 2
    fast = options.fast and not options.results  # what is kept is from full runs
    some_of_it = fast or options.verify or options.requests
    baseline = options.baseline or ("doubtful" if some_of_it else "all")
    with server(options.embedded) as (database, bindir):
        missing = left_out(labels, tests, database)
        labels = [label for label in labels if label not in missing]
        run = Run(database, tests, options.workers, options.verify)
        groups = split(labels, tests, options.workers * (1 if options.fast else 3))
        if baseline == "kept":
            run.do([(way, group) for group in groups])
            run.results["baseline"], stock = report.kept_baseline(labels)
        elif baseline == "all":
            run.do([(mode, group) for group in groups for mode in ("baseline", way)])
        else:
            run.do([(way, group) for group in groups])
            if again := doubtful(run.results[way]):
                groups = split(again, tests, 1 + len(again) // 200)
                run.do([("baseline", group) for group in groups])
    seconds = time.monotonic() - began
    outcome = report.Outcome(run.results["baseline"], run.results[way], run.broken, way, when)
    outcome.left_out, outcome.stock = missing, stock
    print(outcome.text(seconds))
    verified = run.verified()
    if options.results and options.apps:
        outcome.merge({label.split(".")[0] for label in labels})
    if options.results:
        outcome.write(seconds, bindir)
    return 0 if outcome.good and verified else 1


if __name__ == "__main__":
    sys.exit(main())
