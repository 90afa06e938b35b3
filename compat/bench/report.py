"""The result for people: a table in the terminal and a page with plots."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .contestants import FLOOR
from .plots import OURS, bars

SCALE = {"us": 1e6, "ms": 1e3, "s": 1.0, "MB": 1.0, "1/s": 1.0}
ABSOLUTE = {
    "empty",
    "stall",
    "stall_gc",
    "stream_memory",
}  # no ratio: the floor's is no measure for them


def median(result: dict[str, Any], metric: str, name: str) -> float | None:
    """The median over the rounds, in seconds or whatever the metric is in."""
    found = result["values"].get(metric, {}).get(name)
    return statistics.median(found) if found else None


def ratio(result: dict[str, Any], metric: str, name: str) -> tuple[float, float, float] | None:
    """(median, lowest, highest) over the rounds of the value against the floor's in that round."""
    found = result["values"].get(metric, {})
    mine, floor = found.get(name), found.get(FLOOR)
    if not mine or not floor:
        return None
    # Round by round, as the machine's mood changes.
    ratios = [a / b for a, b in zip(mine, floor, strict=False) if b]
    if not ratios:
        return None
    return statistics.median(ratios), min(ratios), max(ratios)


def number(value: float, unit: str) -> str:
    """A value in its unit, with a sensible number of digits."""
    scaled = value * SCALE[unit]
    return (
        f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:,.1f}" if scaled >= 1 else f"{scaled:.2f}"
    )


def cell(result: dict[str, Any], metric: dict[str, Any], name: str) -> str:
    """Value and ratio of one contestant at one metric, or why there is none."""
    value = median(result, metric["name"], name)
    if value is None:
        work = metric["name"].removesuffix("_cpu").removesuffix("_mean")
        work = "asgi" if work.startswith("asgi") else work
        failed = result["failed"].get(name, {}).get(work)
        return "-" if failed is None else "wrong" if failed.startswith("wrong") else "no"
    text = number(value, metric["unit"])
    found = ratio(result, metric["name"], name)
    if found is None or metric["name"] in ABSOLUTE:
        return text
    middle, low, high = found
    spread = f" ({low:.2f}-{high:.2f})" if name != FLOOR and high > low else ""
    return f"{text} · {middle:.2f}x{spread}"


def show(result: dict[str, Any]) -> None:
    """Print the result."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=170)
    names = [each for each in result["contestants"] if each["name"] not in result["skipped"]]
    for group, metrics in groups(result):
        table = Table(title=group, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        table.add_column("", no_wrap=True)
        for metric in metrics:
            table.add_column(f"{metric['title']} [{metric['unit']}]", justify="right")
        for each in names:
            cells = [cell(result, metric, each["name"]) for metric in metrics]
            if any(text != "-" for text in cells):
                style = "bold" if each["name"] in OURS else None
                lines = [text.replace(" · ", "\n") for text in cells]
                table.add_row(each["title"], *lines, style=style)
        console.print(table, markup=False)
    console.print("Below each time: against psycopg's pool in the same round (lowest-highest).")
    for line in notes(result):
        console.print(line, markup=False)


def notes(result: dict[str, Any]) -> list[str]:
    """What one has to know to read the figures."""
    where, sizes = result["machine"], result["sizes"]
    lines = [
        f"{result['when']}, {result['seconds']:g} s; Python {result['python']}, PostgreSQL "
        f"{result['server']}; {where['cpus']} CPUs ({where['cpu']}), {where['system']}; load at "
        f"the start {where['load']}.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        f"Medians over {sizes['rounds']} interleaved rounds ({sizes['heavy']} for the heavy works) "
        "of the median call in each; ratios are taken round by round, the spread is the lowest and "
        "the highest. Client and server share the CPUs. synchronous_commit is off, connections go "
        "over the same socket, each pool has 10, the loop is asyncio's own.",
        "Means have the collector's pauses and what else is seldom, which medians hide.",
        "The CPU time is that of the client's process with all its threads, without the server's: "
        "on a busy machine it is steadier than the time.",
    ]
    lines += [
        f"{name}, {work}: {remark}."
        for name, remarks in result["remarks"].items()
        for work, remark in remarks.items()
    ]
    lines += [f"Not measured: {name}: {why}" for name, why in result["skipped"].items()]
    lines += [
        f"Left out: {name}, {work}: {why}"
        for name, works in result["failed"].items()
        for work, why in works.items()
    ]
    return lines


def write(result: dict[str, Any], folder: Path, stem: str, remark: str) -> list[Path]:
    """Write page and plots; the JSON file is the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [each for each in result["contestants"] if each["name"] not in result["skipped"]]
    page = [f"# Benchmark, Python {result['python']}", ""]
    if remark:
        page += [f"**{remark}**", ""]
    page += [
        "Time of one operation and, against the raw psycopg pool in the same round, its ratio "
        "(lowest-highest). Less is better, except requests per second.",
        "",
    ]
    written = []
    for group, metrics in groups(result):
        page += [f"## {group}", ""]
        rows = [["", *(f"{each['title']} [{each['unit']}]" for each in metrics)]]
        for each in names:
            cells = [cell(result, metric, each["name"]) for metric in metrics]
            if any(text != "-" for text in cells):
                rows.append([each["title"], *cells])
        page += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        page += ["| " + " | ".join(row) + " |" for row in rows[1:]]
        page.append("")
        for metric in metrics:
            data = [
                (each["title"], value * SCALE[metric["unit"]], each["name"])
                for each in names
                if (value := median(result, metric["name"], each["name"])) is not None
            ]
            if not data or metric["name"].endswith(("_cpu", "_mean")):
                continue
            path = folder / f"{stem}-{metric['name']}.svg"
            path.write_text(bars(metric["title"], metric["unit"], data, metric["more"]))
            written.append(path)
            page += [f"![{metric['title']}]({path.name})", ""]
    page += ["## How to read it", "", *[f"- {line}" for line in notes(result)], ""]
    (folder / f"{stem}.md").write_text("\n".join(page))
    return [folder / f"{stem}.md", *written]


def groups(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The metrics by heading."""
    by_name = {metric["name"]: metric for metric in result["metrics"]}
    one = ("get", "get_100", "exists", "count", "aggregate")
    many = ("page", "rows", "values", "related", "prefetch")
    gathered = ("get_10", "get_100", "get_1000", "get_10000")
    writes = (
        "create", "save", "update", "delete", "get_or_create", "transaction", "bulk_create",
    )  # fmt: skip
    wanted = {
        "One row": one,
        "Many rows": many,
        "Writes": writes,
        "Concurrency and large results": (
            "empty", "sleep", "stream", "stream_memory", "stall", "stall_gc", "stall_load"
        ),
        "So many gathered gets, each": gathered,
        "CPU time of the client's process, so many gathered gets": tuple(
            f"{name}_cpu" for name in gathered
        ),
        "Requests per second": ("asgi_1", "asgi_64"),
        "CPU time of the client's process, one row": tuple(f"{name}_cpu" for name in one),
        "CPU time of the client's process, many rows": tuple(f"{name}_cpu" for name in many),
        "CPU time of the client's process, writing": tuple(f"{name}_cpu" for name in writes),
        "Means, one row": tuple(f"{name}_mean" for name in one),
        "Means, many rows": tuple(f"{name}_mean" for name in many),
        "Means, writing": tuple(f"{name}_mean" for name in writes),
    }  # fmt: skip
    found = []
    for group, names in wanted.items():
        if metrics := [by_name[n] for n in names if n in by_name and n in result["values"]]:
            found.append((group, metrics))
    return found
