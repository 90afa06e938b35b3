"""Runs the tests of one app in this process by pytest, natively or not, and writes what happened.

Started by apps.py as `python -m compat.apps_worker`, with its orders in ASYNCORM_COMPAT.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asyncorm import bridge

from .apps import APPS
from .worker import HANG, record


class Recorder:
    """A pytest plugin: outcome and time of each test."""

    def __init__(self, app: str) -> None:
        self.app = app

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        faulthandler.dump_traceback_later(HANG, exit=True)
        record.begin(f"{self.app}.{nodeid}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        outcome, text = report.outcome, report.longreprtext if report.failed else ""
        if hasattr(report, "wasxfail"):
            outcome = "expected failure" if report.skipped else "unexpected success"
        elif report.failed and report.when != "call":
            outcome = "error"
        record.outcome(f"{self.app}.{report.nodeid}", outcome, text)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        record.end(f"{self.app}.{nodeid}")


def configure(order: dict[str, Any]) -> None:
    """Have whatever settings the app's tests choose use our server and ENGINE.

    The ENGINE keeps Django's name, which some tests look at. Passwords are hashed quickly, as in
    Django's own suite.
    """
    from django import conf
    from django.db.utils import load_backend

    native = order["mode"] != "baseline"
    stock = "django.db.backends.postgresql"
    load_backend(stock).DatabaseWrapper = load_backend(order["engine"]).DatabaseWrapper

    def ours(databases: Any) -> dict[str, Any]:
        return {
            alias: {
                **order["database"],
                "ENGINE": stock,
                "NAME": f"{order['prefix']}_{alias}",
            }
            for alias in databases
        }

    def change(settings: dict[str, Any]) -> dict[str, Any]:
        changed = {
            "DATABASES": ours(settings["DATABASES"]),
            "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
        }
        if native:
            changed["INSTALLED_APPS"] = (*settings["INSTALLED_APPS"], "asyncorm")
            changed["ASYNCORM"] = {"SWAP_MANAGERS": True, "STATEMENT_CACHE": order["cache"]}
        return changed

    from_module = conf.Settings.__init__
    from_code = conf.LazySettings.configure

    def init(self: Any, module: str) -> None:
        from_module(self, module)
        for name, value in change(vars(self)).items():
            setattr(self, name, value)

    def configured(self: Any, default_settings: Any = conf.global_settings, **options: Any) -> None:
        from_code(self, default_settings, **{**options, **change(options)})

    conf.Settings.__init__ = init
    conf.LazySettings.configure = configured


def main() -> None:
    """Run, write the record as JSON, and end with 0 whatever the tests' outcome."""
    order = json.loads(os.environ["ASYNCORM_COMPAT"])
    app = APPS[order["app"]]
    faulthandler.enable()
    record.whereabouts = Path(order["output"]).with_suffix(".current")
    os.chdir(order["tests"])
    # The app's modules and tests first: "tests" is a common name.
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[:] = [order["tests"], *(p for p in sys.path if p not in ("", root)), root]
    os.environ.update(app.environ)
    configure(order)
    if app.settings is not None:
        module, _, function = app.settings.partition(":")
        if function:
            from django.conf import settings

            settings.configure(**getattr(importlib.import_module(module), function)())
        else:
            os.environ["DJANGO_SETTINGS_MODULE"] = module

    config = app.config or os.devnull  # or pytest would find ours
    options = ["-c", config, "--rootdir", ".", "-q", "-p", "no:cacheprovider", "--create-db"]
    options += [*app.options, *app.tests]

    def run() -> Any:
        return pytest.main(options, plugins=[Recorder(order["app"])])

    began = time.monotonic()
    if order["mode"] == "baseline":
        status = run()
    else:
        from . import natively

        if order["count"]:
            from . import counting

            counting.install()
        bridge.set_guard(None)  # pytest-django sets Django up, natively as all the rest
        natively.install(record, order["tests"])
        status = natively.run(run)
    faulthandler.cancel_dump_traceback_later()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with {status!r}")
    record.write(order, began)


if __name__ == "__main__":
    # Under its importable name, so that there is one Record only.
    from compat.apps_worker import main as run_worker

    run_worker()
