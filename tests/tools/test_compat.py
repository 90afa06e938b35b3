"""compat/: what makes a comparison fail, and that its page is what the results say."""

from typing import Any

import pytest

from compat import page, report
from compat.report import Outcome, app_of

listed = report.known_differences
WHEN = {"date": "2026-01-01", "commit": "0000000"}


def ran(outcome: str, **statements: int) -> dict[str, Any]:
    return {"outcome": outcome, "seconds": 0.1, **statements}


def compare(baseline: dict[str, Any], native: dict[str, Any], broken: Any = ()) -> Outcome:
    return Outcome(baseline, native, list(broken), "native", WHEN)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "known_differences", lambda series, way: {"app.listed": "Mocks."})


def test_the_same_outcomes_are_good() -> None:
    both = {"app.a": ran("passed"), "app.b": ran("skipped"), "app.c": ran("failed")}
    outcome = compare(both, {**both, "app.a": ran("passed", native=3, threads=2)})
    assert outcome.good
    assert outcome.table()["app"] == {
        "run": 3, "passed": 1, "failed": 1, "skipped": 1, "differing": 0, "native": 3,
        "failed on both": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "native",
    [
        {"app.a": ran("failed")},
        {"app.a": ran("skipped")},
        {},  # not run
        {"app.a": ran("passed"), "setUpClass (app.B)": {"outcome": "error"}},
        {"app.a": ran("passed", sync=1)},  # on a synchronous connection
        {"app.a": ran("passed"), "(after app.a)": {"outcome": "passed", "elsewhere": 1}},
        {"app.a": ran("passed"), "app.listed": ran("passed")},
    ],
)
def test_whatever_else_differs_is_not(native: dict[str, Any]) -> None:
    assert not compare({"app.a": ran("passed"), "app.listed": ran("passed")}, native).good


def test_listed_differences_are_good_and_a_worker_that_died_is_not() -> None:
    baseline, native = {"app.listed": ran("passed")}, {"app.listed": ran("error")}
    outcome = compare(baseline, native)
    assert outcome.good
    assert outcome.known == {"app.listed": "Mocks."}
    assert outcome.totals()["differing"] == 1
    assert not compare(baseline, native, ["native run of app: ended with 1"]).good


@pytest.mark.parametrize(
    ("test", "app"),
    [
        ("app.tests.Class.test", "app"),
        ("setUpClass (app.tests.Class)", "app"),
        ("(after app.tests.Class.test)", "app"),
        ("app.tests/test_x.py::Class::test[f(x)]", "app"),
        ("(outside tests)", None),
    ],
)
def test_app_of(test: str, app: str | None) -> None:
    assert app_of(test) == app


def test_the_page_is_up_to_date() -> None:
    assert page.PAGE.read_text() == page.text(), "python -m compat.page"


@pytest.mark.parametrize("series", ["5.2", "6.0", "6.1"])
def test_known_differences_are_few(series: str) -> None:
    assert 0 < len(listed(series, "native")) <= 15
    assert all(len(reason) > 20 for reason in listed(series, "async").values())
