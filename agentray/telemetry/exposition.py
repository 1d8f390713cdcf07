"""Show the metrics of all hosts on one page, whichever host is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

__all__ = ["Exposition", "MetricsBoard"]

_PUBLISH_S = 2.0
_COUNTS_OF = "counts/"
_ADDING_UP = ("counter", "histogram", "summary")


class MetricsBoard(Protocol):
    """Where hosts leave their metrics for each other."""

    async def post_metrics(self, host: str, page: bytes, *, ttl_s: float) -> None: ...

    async def read_metrics(self) -> dict[str, bytes]: ...


class _Pages(Collector):
    def __init__(self, pages: dict[str, bytes]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for name, page in sorted(self._pages.items()):
            host = name.removeprefix(_COUNTS_OF)
            if host != name and host in self._pages:
                continue
            for family in text_string_to_metric_families(page.decode()):
                into = merged.get(family.name)
                if into is None:
                    into = Metric(family.name, family.documentation, family.type)
                    merged[family.name] = into
                for sample in family.samples:
                    labels = {**sample.labels, "host": host}
                    into.add_sample(sample.name, labels, sample.value)
        return merged.values()


class _Counts(Collector):
    """Of a registry only what adds up over time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return (family for family in self._registry.collect() if family.type in _ADDING_UP)


class Exposition:
    """Posts this host's metrics every two seconds, and reads those of the others.

    Each sample gets a label ``host``. What a host counted stays on the page for
    ``keep_counts_s`` after it has left, because work that was done is not undone by that; its
    gauges leave with it. While the board is away the page shows this host alone.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        board: MetricsBoard,
        observe: Callable[[], None],
        *,
        keep_counts_s: float = 86_400.0,
    ) -> None:
        self._registry = registry
        self._counts = CollectorRegistry()
        self._counts.register(_Counts(registry))
        self._host = host
        self._board = board
        self._observe = observe
        self._keep_counts_s = keep_counts_s

    def _own(self) -> bytes:
        self._observe()
        return generate_latest(self._registry)

    async def run(self) -> None:
        """Post until cancelled."""
        while True:
            await self._board.post_metrics(self._host, self._own(), ttl_s=3 * _PUBLISH_S)
            counts = generate_latest(self._counts)
            name = _COUNTS_OF + self._host
            await self._board.post_metrics(name, counts, ttl_s=self._keep_counts_s)
            await asyncio.sleep(_PUBLISH_S)

    async def page(self) -> bytes:
        """Return the metrics of all hosts in Prometheus' text format."""
        pages = await self._board.read_metrics()
        pages[self._host] = self._own()
        # There can be hundreds of pages: the event loop has better to do meanwhile.
        return await asyncio.to_thread(_merge, pages)


def _merge(pages: dict[str, bytes]) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Pages(pages))
    return generate_latest(registry)
