"""Metrics for Prometheus: what the collector says, from whichever thread and process."""

import asyncio
import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("prometheus_client")
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import asyncorm
from asyncorm import _events
from asyncorm.observe import prometheus
from tests.project.shop.models import Tag
from tests.support import database, free_port, run_script

pytestmark = pytest.mark.usefixtures("fresh_shop")


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    """A function that gives a metric's value."""
    registry = CollectorRegistry()
    collector = prometheus.install(registry)
    assert prometheus.install(registry) is collector

    def value(name: str, alias: str = "default", **labels: str) -> float | None:
        return registry.get_sample_value(f"asyncorm_{name}", {"alias": alias, **labels})

    value.registry = registry  # type: ignore[attr-defined]
    try:
        yield value
    finally:
        _events.unlisten(collector)


async def test_statements_errors_and_the_cache() -> None:
    with installed() as value:
        assert value("statements_total") is None
        for _ in range(3):
            await Tag.objects.filter(name="x", pk__lt=3).order_by("-pk", "name").anative()
        await asyncio.gather(*(Tag.objects.native_count() for _ in range(60)))
        with pytest.raises(Exception, match="nothing"):
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT nothing")
        statements = value("statements_total")
        assert statements is not None and statements >= 64
        hits, misses = value("cache_hits_total"), value("cache_misses_total")
        assert hits + misses >= 63 and hits >= 59 and misses >= 1
        assert value("errors_total", kind="ProgrammingError") == 1
        assert 0 < value("statement_seconds_total") < 60
        pipelined = value("statements_pipelined_total")
        assert pipelined is None or pipelined <= statements


async def test_pools_waits_and_blocks_seen_from_a_thread() -> None:
    with database(OPTIONS={"pool": {"min_size": 0, "max_size": 1}}) as alias, installed() as value:

        async def ask() -> None:
            async with asyncorm.detached(), asyncorm.atomic(alias):
                pass

        async with asyncorm.atomic(alias):
            await Tag.objects.using(alias).native_count()
            waiting = asyncio.create_task(ask())
            await asyncio.sleep(0.05)
            seen = await asyncio.to_thread(generate_latest, value.registry)
        await waiting
        families = {f.name: f for f in text_string_to_metric_families(seen.decode())}

        def of(name: str) -> float:
            family = families[f"asyncorm_{name}"]
            (sample,) = [s for s in family.samples if s.labels["alias"] == alias]
            return float(sample.value)

        assert (of("pool_size"), of("pool_max"), of("pool_in_use")) == (1, 1, 1)
        assert of("pool_waiting") == 1
        assert of("blocks_open") == 1 and 0.04 < of("block_age_seconds") < 10
        assert value("blocks_open", alias) == value("block_age_seconds", alias) == 0
        waits: dict[str, Any] = {"alias": alias, "what": "connection"}
        assert value("wait_seconds_count", **waits) >= 1
        assert value("wait_seconds_sum", **waits) >= 0.04
        assert value("wait_seconds_bucket", **waits, le="30.0") == value(
            "wait_seconds_count", **waits
        )
        assert value("wait_seconds_bucket", **waits, le="0.025") < value(
            "wait_seconds_count", **waits
        )
        await asyncorm.close_pools(alias)


WORKER = """
import asyncio, sys, django
django.setup()
import asyncorm
from asyncorm.observe import prometheus
print(prometheus.serve(int(sys.argv[1]), workers=2, addr="127.0.0.1"), flush=True)
async def main():
    for _ in range(int(sys.argv[2])):
        async with asyncorm.cursor() as cursor:
            await cursor.execute("SELECT 1")
    print("done", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncorm.close_pools()
asyncio.run(main())
"""


@pytest.mark.slow
def test_each_worker_has_a_port(shop_data: Any) -> None:
    first = free_port(2)
    with contextlib.ExitStack() as stack:
        found = {}
        for count in 5, 7:
            command = [sys.executable, "-c", WORKER, str(first), str(count)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            worker = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
            stack.callback(worker.kill)
            assert worker.stdout is not None
            port = int(worker.stdout.readline())
            assert worker.stdout.readline() == "done\n"
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                lines = answer.read().decode().splitlines()
            (line,) = [
                x for x in lines if x.startswith('asyncorm_statements_total{alias="default"}')
            ]
            found[port] = float(line.split()[-1])
        assert len(found) == 2 and set(found) == {first, first + 1}
        assert found[first + 1] - found[first] == 2


DJANGO_PROMETHEUS = """
import asyncio, sys
from django.conf import settings
import tests.project.settings as base
names = {name: getattr(base, name) for name in dir(base) if name.isupper()}
names["INSTALLED_APPS"] = ["django_prometheus", *names["INSTALLED_APPS"]]
settings.configure(**{**names, "ROOT_URLCONF": "django_prometheus.urls", "MIDDLEWARE": []})
import django
django.setup()
import asyncorm
from asyncorm.asgi import get_asgi_application
from tests.asgi_client import ask
async def main():
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT 1")
    print((await ask(get_asgi_application(), "/metrics")).body)
    await asyncorm.close_pools()
asyncio.run(main())
"""


@pytest.mark.slow
def test_django_prometheus_exports_them_without_a_line(shop_data: Any) -> None:
    pytest.importorskip("django_prometheus")
    result = run_script(DJANGO_PROMETHEUS, "-W", "ignore")
    assert result.returncode == 0, result.stderr
    families = {f.name: f for f in text_string_to_metric_families(result.stdout)}
    (size,) = families["asyncorm_pool_size"].samples
    assert (size.labels, size.value) == ({"alias": "default"}, 1)
    assert families["asyncorm_statements"].samples[0].value >= 1
