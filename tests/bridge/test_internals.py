"""The registry of others' private names: each is there, and each is missed when it is not."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from asyncorm import internals
from asyncorm._cache import parts
from tests.support import run_script

NAMES = [
    (project.replace("-", "_").lower(), entry, name)
    for project, entries in internals.REGISTRY.items()
    for entry in entries
    for name in entry.names.split()
]


def test_all_are_there() -> None:
    assert internals.missing() == ()


def test_new_attribute_of_query() -> None:
    unknown = parts.unknown_attributes()
    assert not unknown, f"look at these attributes of Query, and put them into PARTS: {unknown}"


def test_bounds() -> None:
    text = (Path(internals.__file__).parents[1] / "pyproject.toml").read_text()
    required = map(Requirement, tomllib.loads(text)["project"]["dependencies"])
    bounds = {each.name: each.specifier for each in required}
    for project, tested in internals.TESTED.items():
        assert bounds[project] == SpecifierSet(tested)


def test_linter_knows_the_same_names() -> None:
    """SLF001 refuses every private name of others that is not in the registry."""
    text = (Path(internals.__file__).parents[1] / "pyproject.toml").read_text()
    allowed = tomllib.loads(text)["tool"]["ruff"]["lint"]["flake8-self"]["ignore-names"]
    registries = (internals.REGISTRY, internals.REQUESTS)
    entries = [each for registry in registries for some in registry.values() for each in some]
    names = {name for entry in entries for name in entry.names.split() if name[0] == "_"}
    assert sorted(allowed) == sorted(names | internals.DOCUMENTED | internals.UNVERIFIED.keys())


def without(names: list[Any]) -> Any:
    asked = [(project, entry.owner, name) for project, entry, name in names]
    source = "from tests import renaming; renaming.main()"
    done = run_script(source, timeout=300, RENAMED=json.dumps(asked))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(owner, name) for owner, name, _ in found] == [(o, n) for _, o, n in asked], done.stderr
    return zip(names, [result for _, _, result in found], strict=True)


def test_needed_names(fresh_shop: Any) -> None:
    for (_, entry, name), result in without([n for n in NAMES if n[1].part is None]):
        assert entry.full(name) in result.get("refused", ""), (entry, name, result)
        assert "psycopg>=" in result["refused"]


@pytest.mark.slow
def test_optional_names(fresh_shop: Any) -> None:
    optional = [n for n in NAMES if n[1].part is not None]
    works = [["three", *["of renaming"] * 2, *["two"] * 3], 30, [8, 1], 8]
    for (_, entry, name), result in without(optional):
        (warning,) = result.get("warnings", [result])
        assert entry.part in warning and entry.full(name) in warning
        assert result["works"] in (works, None)
        assert result["works"] or not name.startswith("_")
