"""The code in README.md and docs/ runs, or where it is settings or a test of its own, compiles."""

import ast
import asyncio
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from django.db.models import QuerySet

import asyncorm
from asyncorm import conf
from tests.browser import WIDTHS, browser, program
from tests.project.shop import models

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The first line of a block that stands for a file of the reader's project.
FILE = re.compile(r"# [\w/]+\.py")
# What the developers' tools may lack where it does not support a Python or a Django yet.
NEEDS = {
    "adrf.md": ["adrf"],
    "channels.md": ["channels"],
    "ninja.md": ["ninja"],
    "strawberry.md": ["strawberry_django"],
}

BEFORE = """
import asyncio
import asyncorm
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone
from psycopg import IsolationLevel
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as pages for a browser."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    result = subprocess.run(
        [*command, "docs", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_without_warnings(site: Path) -> None:
    reference = (site / "reference.html").read_text()
    for name in asyncorm.__all__:
        assert f'id="asyncorm.{name}"' in reference, f"{name} is not in the reference"


@pytest.mark.slow
@pytest.mark.skipif(program() is None, reason="no Chromium is installed")
async def test_no_page_is_wider_than_its_window(site: Path) -> None:
    paths = sorted(site.rglob("*.html"))  # noqa: ASYNC240
    async with browser() as page:
        for path in paths:
            await page.open(path.as_uri())
            for width in WIDTHS:
                assert not await page.overflows(width), f"{path.name}, {width} pixels"


def test_pages_for_contributors_name_what_exists() -> None:
    """ARCHITECTURE.md knows every module, and no page names a file that is not there."""
    pages = (
        "ARCHITECTURE.md",
        "INVARIANTS.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "tests/README.md",
    )
    text = {page: (ROOT / page).read_text() for page in pages}
    for page, content in text.items():
        for name in re.findall(r"`((?:tests|asyncorm|docs|compat)/[\w/.-]+)`", content):
            assert (ROOT / name).exists(), f"{page}: {name}"
        for name in re.findall(r"\]\(([^)#:]+)\)", content):
            assert ((ROOT / page).parent / name).exists(), f"{page}: {name}"
    modules = {path.stem for path in (ROOT / "asyncorm").glob("*.py")}
    modules |= {f"{path.parent.name}/" for path in (ROOT / "asyncorm").glob("*/__init__.py")}
    missing = {name for name in modules if f"`{name}`" not in text["ARCHITECTURE.md"]}
    assert not missing, f"put these into the map of ARCHITECTURE.md: {missing}"


def test_every_setting_and_check_is_documented() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "asyncorm").rglob("*.py"))
    ids = set(re.findall(r'id="(asyncorm\.[A-Z]\d+)"', code))
    missing = {name for name in {*conf.DEFAULTS, *ids} if f"`{name}`" not in page}
    assert not missing, f"put these into docs/settings.md: {missing}"
    assert set(re.findall(r"`(asyncorm\.[A-Z]\d+)`", page)) == ids


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_compiles(page: Path) -> None:
    for block in blocks(page):
        compile(block, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_blocks_run(
    page: Path, fresh_shop: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # strawberry-django replaces it once it is imported, which is not for all tests after this one.
    monkeypatch.setattr(QuerySet, "_clone", QuerySet._clone)
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package)
    settings.ASYNCORM = {"SWAP_MANAGERS": True}
    # The page's code is a module, where Django looks for `urlpatterns`.
    module = types.ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)
    settings.ROOT_URLCONF = "documented"
    names = vars(module)
    names |= {key: value for key, value in vars(models).items() if not key.startswith("__")}
    exec(BEFORE, names)
    names |= {
        "lines": [],
        "build_report": lambda year: year,
        "customer": models.Customer.objects.order_by("pk").first(),
        "product": models.Product.objects.order_by("pk").first(),
    }

    async def run() -> None:
        for block in blocks(page):
            if FILE.match(block):
                continue
            code = compile(block, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, names)
            if result is not None:
                await result

    asyncio.run(run())
