"""What the answer store guarantees, on real Redis: one leads, and the bound holds for all."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from agentray.clock import SystemClock
from agentray.config.settings import CacheSettings, RedisSettings
from agentray.errors import StorageUnavailableError
from agentray.models.cache import CachedAnswer, CacheKey, ResponseCache
from agentray.storage.base import FlightBegun
from agentray.storage.redis_answers import RedisAnswers
from agentray.telemetry.metrics import Metrics
from tests.services import Services, until

TIMEOUT_S = 1.0
TERM_S = 30.0
LEADS, WAITS, ALONE = FlightBegun("leads"), FlightBegun("waits"), FlightBegun("alone")
BODIES, AGES, TOTAL = "ar:{answers}:bodies", "ar:{answers}:ages", "ar:{answers}:total"


def new_store(services: Services, **settings: Any) -> RedisAnswers:
    return RedisAnswers(
        services.redis.url,
        RedisSettings(timeout_s=TIMEOUT_S),
        CacheSettings(**settings),
        clock=SystemClock(),
    )


@pytest.fixture
async def store(services: Services) -> AsyncIterator[RedisAnswers]:
    store = new_store(services)
    yield store
    await store.close()


@pytest.fixture
async def redis(services: Services) -> AsyncIterator[Any]:
    """A client that does to the server what happens to servers."""
    async with cast(Any, Redis).from_url(services.redis.url) as client:
        yield client


async def begin(store: RedisAnswers, flight: str, key: str = "k") -> FlightBegun:
    return await store.begin_flight(key, flight, term_s=TERM_S)


async def counted(redis: Any) -> int:
    """Return the bytes that the store thinks it holds, having checked that it does."""
    bodies = await redis.hgetall(BODIES)
    assert sorted(bodies) == sorted(await redis.zrange(AGES, 0, -1))
    total = int(await redis.get(TOTAL) or 0)
    assert total == sum(len(key) + len(body) for key, body in bodies.items())
    return total


# Flights


async def test_of_all_that_ask_one_leads_and_the_others_get_its_answer(services: Services) -> None:
    hosts = [new_store(services) for _ in range(4)]
    asked = [begin(host, f"{n}/{i}") for n, host in enumerate(hosts) for i in range(5)]
    found = await asyncio.gather(*asked)
    assert sorted(one.outcome for one in found) == ["leads"] + ["waits"] * 19
    leader = found.index(LEADS)
    await hosts[leader // 5].put("k", f"{leader // 5}/{leader % 5}", b"\x00\xffanswer")
    for host in hosts:
        assert await begin(host, "x") == FlightBegun("answer", b"\x00\xffanswer")
        assert (await begin(host, "x", key="other")).answer == b""
        await host.close()


async def test_a_leader_that_asks_twice_still_leads(store: RedisAnswers) -> None:
    assert await begin(store, "a") == LEADS
    assert await begin(store, "a") == LEADS


async def test_a_flight_that_ended_without_an_answer_leaves_its_place_to_the_next(
    store: RedisAnswers,
) -> None:
    assert await begin(store, "a") == LEADS
    await store.end_flight("k", "b")
    assert await begin(store, "b") == WAITS
    await store.end_flight("k", "a")
    assert await begin(store, "b") == LEADS
    assert await begin(store, "a") == WAITS


async def test_an_answer_of_who_does_not_lead_is_kept_and_ends_no_flight(
    store: RedisAnswers, redis: Any
) -> None:
    assert await begin(store, "a") == LEADS
    await store.put("k", "late", b"answer")
    assert await begin(store, "b") == FlightBegun("answer", b"answer")
    assert await redis.get("ar:{answers}:flight:k") == b"a"
    await store.put("k", "a", b"answer 2")
    assert await redis.get("ar:{answers}:flight:k") is None
    assert await begin(store, "b") == FlightBegun("answer", b"answer 2")


async def test_where_an_answer_cannot_be_shared_all_are_told_to_call_alone(
    store: RedisAnswers,
) -> None:
    assert await begin(store, "a") == LEADS
    await store.end_flight("k", "a", alone_s=0.5)
    assert await begin(store, "b") == ALONE
    assert await begin(store, "c") == ALONE

    async def leads() -> bool:
        return await begin(store, "b") == LEADS

    await until(leads, "it is tried again")


async def test_a_flight_without_a_sign_of_life_ends_with_its_term(store: RedisAnswers) -> None:
    assert await store.begin_flight("k", "dies", term_s=0.5) == LEADS
    assert await store.begin_flight("l", "lives", term_s=0.5) == LEADS
    assert await store.renew_flight("l", "lives", term_s=TERM_S)
    assert not await store.renew_flight("l", "another", term_s=0.001)

    async def leads() -> bool:
        return await begin(store, "b") == LEADS

    await until(leads, "another takes over")
    assert not await store.renew_flight("k", "dies", term_s=TERM_S)
    assert await begin(store, "b", key="l") == WAITS


async def test_who_is_cancelled_does_not_mix_up_the_answers_of_others(store: RedisAnswers) -> None:
    for number in range(50):
        await store.put(f"k{number}", "f", b"answer %d" % number)
    rng = random.Random(3)
    for _ in range(20):
        asked = {n: asyncio.create_task(begin(store, "x", key=f"k{n}")) for n in range(50)}
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
        for number in rng.sample(range(50), 20):
            asked.pop(number).cancel()
        for number, task in asked.items():
            assert await task == FlightBegun("answer", b"answer %d" % number)


# Bounds


async def test_an_answer_is_not_given_beyond_its_age_and_is_swept(
    services: Services, redis: Any
) -> None:
    store = new_store(services, ttl_s=0.5)
    await store.put("k", "f", b"answer")
    assert (await begin(store, "x")).outcome == "answer"
    keeper = new_store(services)  # whose settings say an hour, so that Redis keeps all of it

    async def too_old() -> bool:
        await keeper.put("other", "f", b"answer")
        return (await begin(store, "x")).outcome != "answer"

    await until(too_old, "the answer is too old")
    assert await redis.hexists(BODIES, "k")
    await store.put("new", "f", b"answer")
    assert not await redis.hexists(BODIES, "k")
    assert await counted(redis) in (9, 9 + len("other") + 6)

    async def gone() -> bool:
        return not await redis.exists(BODIES, AGES, TOTAL)

    await until(gone, "a store that nobody writes to is empty")
    await store.close()
    await keeper.close()


async def test_all_answers_together_stay_below_the_bound_and_the_oldest_go_first(
    services: Services, redis: Any
) -> None:
    hosts = [new_store(services, max_bytes=1_000) for _ in range(3)]
    for number in range(30):
        await hosts[number % 3].put(f"k{number:02}", "f", b"x" * 97)
        assert await counted(redis) <= 1_000
        await asyncio.sleep(0.002)  # ages are in milliseconds
    assert sorted(await redis.hkeys(BODIES)) == [f"k{n}".encode() for n in range(20, 30)]
    await hosts[0].put("k20", "f", b"y" * 97)  # anew: now k21 is the oldest, and nothing had to go
    assert await redis.hlen(BODIES) == 10
    await hosts[1].put("large", "f", b"z" * 150)
    assert not await redis.hexists(BODIES, "k21")
    assert await redis.hexists(BODIES, "k20")
    await hosts[2].put("too large", "f", b"z" * 2_000)
    assert not await redis.hexists(BODIES, "too large")
    assert await counted(redis) <= 1_000
    rng = random.Random(5)
    at_once = [
        hosts[n % 3].put(f"c{n}", "f", rng.randbytes(rng.randint(1, 400))) for n in range(99)
    ]
    await asyncio.gather(*at_once)
    assert 500 < await counted(redis) <= 1_000
    for host in hosts:
        await host.close()


@pytest.mark.parametrize("lost", [[BODIES], [AGES], [TOTAL], [BODIES, AGES], [AGES, TOTAL]])
async def test_whatever_the_server_forgets_the_count_is_right_again(
    store: RedisAnswers, redis: Any, lost: list[str]
) -> None:
    for number in range(5):
        await store.put(f"k{number}", "f", b"answer")
    await redis.delete(*lost)
    # Nothing is given whose age is not known.
    assert (await begin(store, "x", key="k1")).outcome == ("answer" if lost == [TOTAL] else "leads")
    await store.put("new", "f", b"answer")
    assert await counted(redis) == 9
    assert (await begin(store, "x", key="new")).outcome == "answer"
    await redis.flushall()
    await redis.script_flush()
    assert await begin(store, "x", key="new") == LEADS
    await store.put("new", "x", b"answer")
    assert await counted(redis) == 9


# A server that is away


@pytest.mark.parametrize("how", ["stopped", "hung"])
async def test_a_server_that_is_away_is_an_error_within_its_time(
    services: Services, store: RedisAnswers, how: str
) -> None:
    await store.put("k", "f", b"answer")
    pid = services.redis.pid
    assert pid is not None
    if how == "stopped":
        await services.aside(services.redis.stop(hurry=True))
    else:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StorageUnavailableError):
            await begin(store, "x")
        assert time.monotonic() - began < TIMEOUT_S + 0.2
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(StorageUnavailableError):
                await begin(store, "x")
            with pytest.raises(StorageUnavailableError):
                await store.put("k", "x", b"answer")
            with pytest.raises(StorageUnavailableError):
                await store.end_flight("k", "x")
            with pytest.raises(StorageUnavailableError):
                await store.renew_flight("k", "x", term_s=1.0)
        # Who just failed does not try: at most one try in the half second that this could last.
        assert time.monotonic() - began < TIMEOUT_S + 0.3
        assert store.failures
    finally:
        if how == "stopped":
            await services.aside(services.redis.start())
        else:
            os.kill(pid, signal.SIGCONT)

    async def is_back() -> bool:
        try:
            await store.put("k", "f", b"answer")
        except StorageUnavailableError:
            return False
        return (await begin(store, "x")).outcome == "answer"

    await until(is_back, "the server is used again")


# All of it


async def test_a_thousand_equal_calls_on_three_hosts_are_one(services: Services) -> None:
    answer, calls = CachedAnswer("hello", "stop").encode(), 0
    key, metrics = CacheKey("d", "tiny", raw=False), Metrics()

    async def call() -> bytes:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.1)
        return answer

    stores = [new_store(services) for _ in range(3)]
    hosts = [
        ResponseCache(store, CacheSettings(), SystemClock(), metrics, owner=f"host{number}")
        for number, store in enumerate(stores)
    ]
    asked = [host.get_or_call(key, call) for host in hosts for _ in range(334)]
    found = await asyncio.gather(*asked)
    assert calls == 1
    assert sorted(found) == [(answer, False)] + [(answer, True)] * 1001
    for host, store in zip(hosts, stores, strict=True):
        await host.close()
        await store.close()
