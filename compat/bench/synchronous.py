"""What recording costs where it gains nothing: querysets of a loop that synchronous code uses.

`python -m compat.bench.synchronous`: instructions (valgrind) until the SQL is there, of querysets
that are built on an event loop and whose queries are made after all, with RECORD_QUERYSETS and
without. The server has no part in it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .instructions import _MISSING as MISSING
from .instructions import _mark as mark
from .instructions import _total as total
from .instructions import kind
from .run import ROOT

TURNS = 30
MOST = 1.10


def builds() -> dict[str, Callable[[int], Any]]:
    """Querysets as programs build them, by what is special of them."""
    from .shop.models import Author, Book

    books = Book.objects
    author = Author(pk=1)
    return {
        "by a key": lambda v: books.filter(pk=v),
        "page": lambda v: books.filter(pages__gt=v, title__contains="x").order_by("-pk")[
            v : v + 20
        ],
        "keys": lambda v: books.filter(pk__in=[v, v + 1, v + 2]).select_related("author"),
        "instance": lambda v: (
            books.filter(author=author).exclude(pages=v).values_list("pk", "title")
        ),
        "of an instance": lambda v: author.books.filter(pages__lt=v).only("title"),
    }


def work(record: bool) -> None:
    """Build and compile, in the process that is counted."""
    import django
    from django.conf import settings

    settings.configure(
        DATABASES={"default": {"ENGINE": "asyncorm.backends.postgresql", "NAME": "none"}},
        INSTALLED_APPS=["asyncorm", "compat.bench.shop"],
        ASYNCORM={"SWAP_MANAGERS": True, "RECORD_QUERYSETS": record},
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    )
    django.setup()
    gc.disable()

    async def main() -> None:
        for build in builds().values():
            for v in range(1, TURNS):
                build(v).query.sql_with_params()
            mark()
            for v in range(1, TURNS + 1):
                build(v).query.sql_with_params()
            mark()

    asyncio.run(main())


def measure(record: bool) -> list[float]:
    """Thousands of instructions of each queryset."""
    if not (valgrind := shutil.which("valgrind")):
        raise SystemExit(MISSING)
    with tempfile.TemporaryDirectory(prefix="asyncorm-synchronous-") as folder:
        out = Path(folder, "counts")
        subprocess.run(
            [
                valgrind, "--tool=callgrind", f"--callgrind-out-file={out}",
                "--dump-before=getpriority*", "--combine-dumps=no",
                sys.executable, "-m", __spec__.name, "--work", json.dumps(record),
            ],
            cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, check=True,
        )  # fmt: skip
        count = sum(1 for _ in Path(folder).glob("counts.*")) // 2
        return [total(Path(f"{out}.{2 + 2 * i}")) / TURNS / 1000 for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compat.bench.synchronous", description=__doc__)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    print(f"{kind()}: thousands of instructions until the SQL is there")
    print(f"{'':16}{'not recorded':>14}{'recorded':>14}{'ratio':>8}")
    plain, recorded = measure(False), measure(True)
    for name, before, after in zip(_NAMES, plain, recorded, strict=True):
        print(f"{name:16}{before:14,.1f}{after:14,.1f}{after / before:8.3f}")
    whole = sum(recorded) / sum(plain)
    print(f"{'all':16}{sum(plain):14,.1f}{sum(recorded):14,.1f}{whole:8.3f}")
    if whole > MOST:
        raise SystemExit(f"That is more than {MOST:.0%} of what it is without recording.")


_NAMES = ("by a key", "page", "keys", "instance", "of an instance")


if __name__ == "__main__":
    main()
