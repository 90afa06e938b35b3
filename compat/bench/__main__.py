"""`python -m compat.bench`: what `make bench` runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from . import report, web, works
from .contestants import BY_NAME, CONTESTANTS, FLOOR
from .run import ROOT, Failed, run


def main() -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less data and time: under 2 minutes")
    parser.add_argument("--tiny", action="store_true", help="only to see that everything works")
    parser.add_argument("--profile", action="store_true", help="where the time of a get goes")
    parser.add_argument("--only", metavar="NAMES", help="contestants, comma-separated")
    parser.add_argument("--works", metavar="NAMES", help="works, comma-separated")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--list", action="store_true", help="show the names and end")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="default: docs/benchmarks, for whole runs",
    )
    parser.add_argument("--remark", default="", help="a sentence at the top of the page")
    args = parser.parse_args()
    if args.list:
        for name, each in BY_NAME.items():
            print(f"{name:22}{each.title}")
        print()
        for name, work in works.BY_NAME.items():
            print(f"{name:22}{work.title}")
        return
    if args.profile:
        from .profiling import profile

        profile()
        return
    sizes = works.TINY if args.tiny else works.QUICK if args.quick else works.FULL
    if args.rounds:
        sizes = dataclasses.replace(sizes, rounds=args.rounds)
    only = set(args.only.split(",")) | {FLOOR} if args.only else set(BY_NAME)
    wanted = set(args.works.split(",")) if args.works else set(works.BY_NAME)
    if unknown := (only - set(BY_NAME)) | (wanted - set(works.BY_NAME)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; see --list")
    contestants = [each for each in CONTESTANTS if each.name in only]
    chosen = [work for work in works.WORKS if work.name in wanted]

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    try:
        result = run(contestants, chosen, sizes, say)
    except Failed as exc:
        raise SystemExit(f"The benchmark cannot run: {exc}") from None
    report.show(result)
    if not (args.only or args.works):
        seconds, rounds = (0.3, 1) if args.tiny else (1.0, 1) if args.quick else (3.0, 3)
        requests = web.report(web.measure(seconds, rounds, [1, 64], [*web.VIEWS]))
        print(requests)
    if (args.tiny or args.only or args.works) and not args.out:
        return
    folder = args.out or ROOT / "docs" / "benchmarks"
    stem = f"python{sys.version_info[0]}.{sys.version_info[1]}" + "-quick" * args.quick
    if not (args.only or args.works or args.quick):
        (folder / "requests.md").write_text(requests)
    paths = report.write(result, folder, stem, args.remark)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written: {paths[0]} with its plots, {folder / stem}.json")


if __name__ == "__main__":
    main()
