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


class MetricsBoard(Protocol):
    """Where hosts leave their metrics for each other."""

    async def post_metrics(self, host: str, page: bytes, *, ttl_s: float) -> None: ...

    async def read_metrics(self) -> dict[str, bytes]: ...


class _Pages(Collector):
    def __init__(self, pages: dict[str, bytes]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for host, page in sorted(self._pages.items()):
            for family in text_string_to_metric_families(page.decode()):
                into = merged.get(family.name)
                if into is None:
                    into = Metric(family.name, family.documentation, family.type)
                    merged[family.name] = into
                for sample in family.samples:
                    labels = {**sample.labels, "host": host}
                    into.add_sample(sample.name, labels, sample.value)
        return merged.values()


class Exposition:
    """Posts this host's metrics every two seconds, and reads those of the others.

    Each sample gets a label ``host``. While the board is away the page shows this host alone.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        board: MetricsBoard,
        observe: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._host = host
        self._board = board
        self._observe = observe

    def _own(self) -> bytes:
        self._observe()
        return generate_latest(self._registry)

    async def run(self) -> None:
        """Post until cancelled."""
        while True:
            await self._board.post_metrics(self._host, self._own(), ttl_s=3 * _PUBLISH_S)
            await asyncio.sleep(_PUBLISH_S)

    async def page(self) -> bytes:
        """Return the metrics of all hosts in Prometheus' text format."""
        pages = await self._board.read_metrics()
        pages[self._host] = self._own()
        registry = CollectorRegistry()
        registry.register(_Pages(pages))
        return generate_latest(registry)
