"""The metrics of all hosts on one page, of those that left too."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from agentray.telemetry.exposition import Exposition
from agentray.telemetry.metrics import Metrics


class Board:
    """What hosts posted, with its time to live; ``expire`` lets time pass."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[bytes, float]] = {}
        self.posted = asyncio.Event()

    async def post_metrics(self, host: str, page: bytes, *, ttl_s: float) -> None:
        self.pages[host] = (page, ttl_s)
        if len(self.pages) % 2 == 0:
            self.posted.set()

    async def read_metrics(self) -> dict[str, bytes]:
        return {host: page for host, (page, _) in self.pages.items()}

    def expire(self, seconds: float) -> None:
        self.pages = {host: kept for host, kept in self.pages.items() if kept[1] > seconds}


async def posted(board: Board, host: str, turns: int) -> Exposition:
    metrics = Metrics()
    metrics.turns.labels("completed").inc(turns)
    metrics.turn_seconds.observe(1.0)
    exposition = Exposition(
        metrics.registry, host, board, lambda: metrics.resident.set(7), keep_counts_s=100.0
    )
    board.posted.clear()
    running = asyncio.create_task(exposition.run())
    await board.posted.wait()
    running.cancel()
    await asyncio.wait([running])
    return exposition


def values(page: bytes, name: str) -> dict[str, float]:
    return {
        sample.labels["host"]: sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if sample.name == name
    }


async def test_what_a_host_counted_outlives_it_and_its_gauges_do_not() -> None:
    board = Board()
    asked = await posted(board, "a", 3)
    await posted(board, "b", 4)
    for _ in range(2):  # with the counts of all kept beside their pages, nothing is double
        page = await asked.page()
        assert values(page, "agentray_turns_total") == {"a": 3, "b": 4}
        assert values(page, "agentray_sessions_resident") == {"a": 7, "b": 7}
    board.expire(50.0)
    page = await asked.page()
    assert values(page, "agentray_turns_total") == {"a": 3, "b": 4}
    assert values(page, "agentray_turn_seconds_count") == {"a": 1, "b": 1}
    assert values(page, "agentray_sessions_resident") == {"a": 7}
    board.expire(100.0)
    assert values(await asked.page(), "agentray_turns_total") == {"a": 3}
