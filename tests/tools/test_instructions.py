"""compat/bench/instructions.py: what it counts is repeatable, and what makes a comparison fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compat.bench import instructions
from compat.bench.works import BY_NAME


def test_what_costs_more_than_the_tolerance_is_named() -> None:
    kept = {"get": 100.0, "count": 100.0, "page": 100.0}
    lines, over = instructions.compare({"get": 104.9, "count": 105.1, "page": 50.0}, kept)
    assert [line.split()[0] for line in lines] == ["get", "count", "page"]
    assert over == ["count: 5.1% more than 100.0"]


def test_a_work_without_a_kept_figure_is_named() -> None:
    assert instructions.compare({"get": 1.0}, {})[1] == ["get: no figure is kept"]


def test_the_works_are_the_benchmarks() -> None:
    assert instructions.CALLS.keys() <= BY_NAME.keys()
    figures = json.loads(instructions.KEPT.read_text())
    assert all(found.keys() == instructions.CALLS.keys() for found in figures.values())


def test_without_valgrind_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="apt install valgrind"):
        instructions.measure(["get"])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind counts the instructions")
def test_it_counts_records_and_compares(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: Any) -> str:
        monkeypatch.setattr("sys.argv", ["instructions", "--works", "get,create", *args])
        instructions.main()
        return capsys.readouterr().out

    kept = tmp_path / "kept.json"
    monkeypatch.setattr(instructions, "KEPT", kept)
    assert f"Written: {kept}" in run("--record")
    (figures,) = json.loads(kept.read_text()).values()
    assert all(100 < value < 10_000 for value in figures.values())
    assert run().count("create") == 1  # within the tolerance of what it has just counted
    kept.write_text(json.dumps({instructions.kind(): {"get": 1.0, "create": 1e6}}))
    monkeypatch.setattr(instructions, "measure", lambda *args: figures)  # which were counted
    with pytest.raises(SystemExit, match="--record"):
        run()
    assert "more than 1.0" in capsys.readouterr().out
