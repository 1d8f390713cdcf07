"""Results of tools on the real Redis: their age is the tool's to say, and answers are apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from agentray.clock import SystemClock
from agentray.config.settings import CacheSettings, RedisSettings
from agentray.storage.base import FlightBegun, ResultStore
from agentray.storage.redis_answers import RedisAnswers
from agentray.tools.cache import ResultCache
from agentray.tools.spec import ToolResult, ToolSpec
from tests.services import Services

TERM_S = 30.0


def new_store(services: Services, name: str) -> RedisAnswers:
    settings = RedisSettings(timeout_s=1.0)
    return RedisAnswers(
        services.redis.url, settings, CacheSettings(ttl_s=60), clock=SystemClock(), name=name
    )


@pytest.fixture
async def stores(services: Services) -> AsyncIterator[tuple[RedisAnswers, RedisAnswers]]:
    stores = new_store(services, "results"), new_store(services, "answers")
    yield stores
    for store in stores:
        await store.close()


async def test_whoever_asks_says_what_is_too_old(
    stores: tuple[RedisAnswers, RedisAnswers],
) -> None:
    store: ResultStore = stores[0]
    await store.put("k", "f", b"found")
    until = time.monotonic() + 10
    # What is young for one is too old for another.
    while (await store.begin_flight("k", "f", term_s=TERM_S, age_s=0.05)).outcome == "answer":
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    found = await store.begin_flight("k", "g", term_s=TERM_S, age_s=30)
    assert found == FlightBegun("answer", b"found")
    assert await store.begin_flight("k", "g", term_s=TERM_S) == FlightBegun("answer", b"found")


async def test_stores_of_other_names_do_not_meet(
    stores: tuple[RedisAnswers, RedisAnswers],
) -> None:
    results, answers = stores
    await results.put("k", "f", b"found")
    assert await answers.begin_flight("k", "f", term_s=TERM_S) == FlightBegun("leads")
    found = await results.begin_flight("k", "f", term_s=TERM_S)
    assert found == FlightBegun("answer", b"found")


async def test_hosts_run_an_equal_call_once(services: Services) -> None:
    spec = ToolSpec("weather", "d", {}, cache_s=30)
    runs: list[int] = []
    leads = asyncio.Event()
    go = asyncio.Event()

    async def run() -> ToolResult:
        runs.append(1)
        leads.set()
        await go.wait()
        return ToolResult("ok", "sunny")

    stores = [new_store(services, "results") for _ in range(3)]
    hosts = [
        ResultCache(store, SystemClock(), owner=f"host{number}")
        for number, store in enumerate(stores)
    ]
    asked = [asyncio.ensure_future(host.get(spec, "acme", {"a": 1}, run)) for host in hosts]
    await asyncio.wait_for(leads.wait(), 10)
    go.set()
    found = await asyncio.wait_for(asyncio.gather(*asked), 10)
    assert [result.output for result in found] == ["sunny"] * 3
    assert len(runs) == 1
    for store in stores:
        await store.close()
