"""Prometheus: a collector of what the pools, statements, blocks and the statement cache do.

The names of the metrics are in docs/observability.md; each is labelled by database alias. A
collector may be read from any thread; it has the sums over all event loops of its process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from threading import Lock
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector as _Collector

from .. import _events, pools
from ..pages import see

# Upper bounds in seconds of the histogram of waits.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_POOL = {
    "pool_size": "Connections that are open.",
    "pool_max": "Connections that may be open.",
    "pool_in_use": "Connections that somebody has.",
    "pool_waiting": "Operations that wait for a connection, or for their statement to be sent.",
}
_COUNTED = {
    "statements": "Statements that native code has executed, failed ones included.",
    "statement_seconds": "Seconds from when statements were sent until their results were there.",
    "statements_pipelined": "Statements that went to the server together with others.",
    "cache_hits": "Statements whose SQL the statement cache had.",
    "cache_misses": "Statements that were compiled for the statement cache.",
    "cache_uncacheable": "Statements that were left to Django's compiler.",
}
_OF_CACHE = {
    "hit": "cache_hits", "miss": "cache_misses", "uncacheable": "cache_uncacheable",
}  # fmt: skip


class _Waits:
    """How long tasks waited, in buckets."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    @property
    def buckets(self) -> list[tuple[str, float]]:
        total, found = 0, []
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Collector(_Collector, _events.Listener):
    """What `install()` registers; counts from when it was made on."""

    def __init__(self) -> None:
        self._lock = Lock()  # loops may run in several threads
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
        self._errors: Counter[tuple[str, str]] = Counter()
        self._waits: dict[tuple[str, str], _Waits] = {}
        self._blocks: set[_events.Block] = set()
        _events.listen(self)

    def statement_ended(self, statement: _events.Statement) -> None:
        """Count a statement."""
        if not statement.native:
            return
        alias, counts = statement.alias, self._counts
        seconds: Any = statement.ended - statement.sent
        with self._lock:
            counts["statements"][alias] += 1
            counts["statement_seconds"][alias] += seconds
            if statement.pipelined:
                counts["statements_pipelined"][alias] += 1
            if statement.cache is not None:
                counts[_OF_CACHE[statement.cache]][alias] += 1
            if statement.error is not None:
                self._errors[alias, type(statement.error).__name__] += 1

    def waited(self, wait: _events.Wait) -> None:
        """Count a wait."""
        key = wait.alias, "connection" if wait.what == "for a connection" else "block"
        with self._lock:
            if key not in self._waits:
                self._waits[key] = _Waits()
            self._waits[key].add(wait.ended - wait.began)

    def block_begun(self, block: _events.Block) -> None:
        """Keep a transaction while it is open."""
        if block.outermost:
            with self._lock:
                self._blocks.add(block)

    def block_ended(self, block: _events.Block) -> None:
        """Forget it."""
        with self._lock:
            self._blocks.discard(block)

    # Read, in whichever thread

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering it asks no pool."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        yield from self._of_pools()
        with self._lock:
            found = [*self._of_statements(), self._of_waits(), *self._of_blocks()]
        yield from found

    def _of_pools(self) -> Iterator[Metric]:
        totals = pools.total_stats()
        values: dict[str, Any] = {
            "pool_size": lambda stats: stats["pool_size"],
            "pool_max": lambda stats: stats["pool_max"],
            "pool_in_use": lambda stats: stats["pool_size"] - stats["pool_available"],
            "pool_waiting": lambda stats: stats.get("requests_waiting", 0),
        }
        for name, text in _POOL.items():
            gauge = GaugeMetricFamily(f"asyncorm_{name}", text, labels=["alias"])
            for alias, stats in totals.items():
                gauge.add_metric([alias], values[name](stats))
            yield gauge

    def _of_statements(self) -> Iterator[Metric]:
        for name, text in _COUNTED.items():
            counter = CounterMetricFamily(f"asyncorm_{name}", text, labels=["alias"])
            for alias, count in self._counts[name].items():
                counter.add_metric([alias], count)
            yield counter
        counter = CounterMetricFamily(
            "asyncorm_errors", "Statements that failed, by exception.", labels=["alias", "kind"]
        )
        for (alias, kind), count in self._errors.items():
            counter.add_metric([alias, kind], count)
        yield counter

    def _of_waits(self) -> Metric:
        histogram = HistogramMetricFamily(
            "asyncorm_wait_seconds",
            "Waits for a connection or for a transaction block that another task uses.",
            labels=["alias", "what"],
        )
        for labels, waits in self._waits.items():
            histogram.add_metric(list(labels), waits.buckets, waits.sum)
        return histogram

    def _of_blocks(self) -> Iterator[Metric]:
        count = GaugeMetricFamily("asyncorm_blocks_open", "Open transactions.", labels=["alias"])
        age = GaugeMetricFamily(
            "asyncorm_block_age_seconds", "Age of the oldest open transaction.", labels=["alias"]
        )
        now = monotonic()
        begun: dict[str, list[float]] = {alias: [] for alias in self._counts["statements"]}
        for block in self._blocks:
            begun.setdefault(block.alias, []).append(block.began)
        for alias, times in begun.items():
            count.add_metric([alias], len(times))
            age.add_metric([alias], now - min(times, default=now))
        yield count
        yield age


_installed: WeakKeyDictionary[CollectorRegistry, Collector] = WeakKeyDictionary()


def install(registry: CollectorRegistry = REGISTRY) -> Collector:
    """Add the metrics to those that are exported already; done once for each registry.

    With django-prometheus among the INSTALLED_APPS it is done by itself.
    """
    if registry not in _installed:
        collector = Collector()
        registry.register(collector)
        _installed[registry] = collector
    return _installed[registry]


def serve(port: int, workers: int = 1, addr: str = "0.0.0.0") -> int:
    """Export the metrics by HTTP, in a thread; each worker process takes the first free port.

        asyncorm.observe.prometheus.serve(9400, workers=4)  # in asgi.py: 9400 to 9403

    Args:
        port: the first port.
        workers: how many processes the server has.
        addr: the address to listen at.

    Returns:
        the port.

    Raises:
        OSError: none of the ports is free.
    """
    install()
    for number in range(port, port + workers):
        try:
            start_http_server(number, addr)
            return number
        except OSError:
            if number == port + workers - 1:
                raise
    raise ValueError("workers must be a positive number." + see("observability#prometheus"))
