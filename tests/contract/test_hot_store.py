"""What the hot tier and the wire guarantee, on real Redis: nothing but that they never lie."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from agentray.clock import SystemClock
from agentray.config.settings import RedisSettings
from agentray.storage.base import HotCopy
from agentray.storage.redis import RedisStore
from tests.services import Services, until

WINDOW = 4
TIMEOUT_S = 0.3
NAME = "ar:hot:{t/s}"


@pytest.fixture
async def store(services: Services) -> AsyncIterator[RedisStore]:
    store = new_store(services)
    yield store
    await store.close()


def new_store(services: Services) -> RedisStore:
    settings = RedisSettings(timeout_s=TIMEOUT_S)
    return RedisStore(services.redis.url, settings, window_turns=WINDOW, clock=SystemClock())


@pytest.fixture
async def redis(services: Services) -> AsyncIterator[Any]:
    """A client that does to the server what happens to servers."""
    async with cast(Any, Redis).from_url(services.redis.url) as client:
        yield client


def copy_at(seq: int, epoch: int = 1) -> HotCopy:
    """Return the copy of a session whose every event ended a turn."""
    window = tuple(f"{epoch}/{n}".encode() for n in range(max(1, seq - WINDOW + 1), seq + 1))
    return HotCopy(epoch, seq, seq, window, seq / 8)


def save(store: RedisStore, copy: HotCopy, name: str = "s") -> None:
    store.save("t", name, copy, newest=1)


async def stored(store: RedisStore, copy: HotCopy, name: str = "s") -> None:
    async def is_there() -> bool:
        return await store.load("t", name) == copy

    await until(is_there, f"{copy} is stored")


# Copies


async def test_what_is_saved_is_loaded(store: RedisStore, redis: Any) -> None:
    assert await store.load("t", "s") is None
    save(store, copy_at(3))
    await stored(store, copy_at(3))
    assert await store.load("other", "s") is None
    assert 0 < await redis.pttl(NAME) <= 86_400_000


async def test_a_copy_of_another_version_is_none(store: RedisStore, redis: Any) -> None:
    await redis.rpush(NAME, b"1 1 1", b"1/1")
    assert await store.load("t", "s") is None
    save(store, copy_at(2))
    await stored(store, copy_at(2))


async def test_what_follows_is_appended_and_the_window_stays_bounded(
    store: RedisStore, redis: Any
) -> None:
    save(store, copy_at(3))
    await stored(store, copy_at(3))
    # Marked behind the store's back: what is sent again would take the mark away.
    await redis.lset(NAME, -1, b"mark")
    save(store, copy_at(4))
    await stored(store, HotCopy(1, 4, 4, (b"1/1", b"1/2", b"mark", b"1/4"), 0.5))
    save(store, copy_at(5))
    await stored(store, HotCopy(1, 5, 5, (b"1/2", b"mark", b"1/4", b"1/5"), 0.625))


async def test_saves_that_come_at_once_are_one(store: RedisStore) -> None:
    for seq in range(1, 8):
        save(store, copy_at(seq))
        save(store, copy_at(seq), name="other")
    await stored(store, copy_at(7))
    await stored(store, copy_at(7), name="other")


@pytest.mark.parametrize("stale", [copy_at(5, epoch=1), copy_at(3, epoch=2), copy_at(4, epoch=2)])
async def test_a_stale_copy_never_replaces_a_newer_one(
    services: Services, store: RedisStore, stale: HotCopy
) -> None:
    save(store, copy_at(4, epoch=2))
    await stored(store, copy_at(4, epoch=2))
    late = new_store(services)
    save(late, stale)
    await late.close()
    assert await store.load("t", "s") == copy_at(4, epoch=2)


async def test_a_new_owner_replaces_all_of_the_old_ones_copy(
    services: Services, store: RedisStore
) -> None:
    save(store, copy_at(4))
    await stored(store, copy_at(4))
    successor = new_store(services)
    save(successor, copy_at(5, epoch=2))
    await stored(successor, copy_at(5, epoch=2))
    # And the old one, which still thinks that its copy is there, does not add to it.
    save(store, copy_at(6))
    save(store, copy_at(7))
    await successor.close()
    save(store, copy_at(1), name="later")
    await stored(store, copy_at(1), name="later")
    assert await store.load("t", "s") == copy_at(5, epoch=2)


async def test_a_server_that_lost_everything_gets_it_again(store: RedisStore, redis: Any) -> None:
    save(store, copy_at(3))
    await stored(store, copy_at(3))
    await redis.flushall()
    save(store, copy_at(4))
    await stored(store, copy_at(4))
    await redis.script_flush()
    save(store, copy_at(5))
    await stored(store, copy_at(5))


async def test_a_dropped_copy_is_gone_until_the_next_save(store: RedisStore) -> None:
    save(store, copy_at(3))
    await stored(store, copy_at(3))
    store.drop("t", "s")

    async def is_gone() -> bool:
        return await store.load("t", "s") is None

    await until(is_gone, "the copy is dropped")
    save(store, copy_at(4))
    await stored(store, copy_at(4))


async def test_what_is_deleted_while_the_server_hangs_is_deleted_when_it_is_back(
    services: Services, store: RedisStore
) -> None:
    save(store, copy_at(3))
    await stored(store, copy_at(3))
    pid = services.redis.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert await store.load("t", "s") is None
        assert not store.available
        store.drop("t", "s")
    finally:
        os.kill(pid, signal.SIGCONT)

    async def is_gone() -> bool:
        # Any later save takes what is waiting along.
        save(store, copy_at(1), name="other")
        return store.available and await store.load("t", "s") is None

    await until(is_gone, "the copy is dropped")
    assert await store.load("t", "other") == copy_at(1)


async def test_whatever_the_server_forgets_what_is_loaded_was_saved(
    store: RedisStore, redis: Any
) -> None:
    rng = random.Random(11)
    saved: dict[tuple[int, int], HotCopy] = {}
    epoch, seq = 1, 0
    for _ in range(600):
        what = rng.randrange(12)
        if what < 7:
            seq += 1
            saved[epoch, seq] = copy = copy_at(seq, epoch)
            save(store, copy)
        elif what == 7:
            # The session leaves and comes back with another epoch.
            store.forget("t", "s")
            epoch += 1
        elif what == 8:
            await redis.delete(NAME)
        elif what == 9:
            await redis.script_flush()
        elif what == 10:
            await asyncio.sleep(rng.random() * 0.003)
        found = await store.load("t", "s")
        assert found is None or found == saved[found.epoch, found.seq]
    save(store, copy_at(seq + 1, epoch))
    await stored(store, copy_at(seq + 1, epoch))


async def test_a_save_that_is_refused_is_not_tried_for_ever(store: RedisStore, redis: Any) -> None:
    await redis.set(NAME, "something of somebody else")
    save(store, copy_at(1))
    save(store, copy_at(1), name="other")

    async def is_refused() -> bool:
        return store.failures > 0

    await until(is_refused, "the server refuses")
    await stored(store, copy_at(1), name="other")
    await asyncio.sleep(0.1)  # a loop without end would have come round a hundred times
    assert store.failures == 1
    await redis.delete(NAME)
    save(store, copy_at(2))
    await stored(store, copy_at(2))


# A server that is away


async def use_all(store: RedisStore) -> None:
    """Use everything there is; none of it may raise."""
    save(store, copy_at(1))
    store.drop("t", "other")
    assert await store.load("t", "s") is None
    assert not await store.write_tails([("k", 0, b"x")])
    await store.publish([("o", b"m")])
    await store.hint_owner("t", "s", "r")
    assert await store.owner_hint("t", "s") is None
    await store.put_waiting("t", "s", "c", b"place")
    assert await store.waiting("t", "s") == []
    await store.post_metrics("h", b"p", ttl_s=1.0)
    assert await store.read_metrics() == {}


@pytest.mark.parametrize("how", ["stopped", "hung"])
async def test_a_server_that_is_away_costs_bounded_time_and_no_error(
    services: Services, store: RedisStore, how: str
) -> None:
    save(store, copy_at(1), name="before")
    await stored(store, copy_at(1), name="before")
    pid = services.redis.pid
    assert pid is not None
    if how == "stopped":
        await services.aside(services.redis.stop(hurry=True))
    else:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        await store.load("t", "s")
        assert time.monotonic() - began < 2 * TIMEOUT_S + 0.5
        assert not store.available
        began = time.monotonic()
        for _ in range(5):
            await use_all(store)
        # Some always ask; what is asked for each message does not, once it is known.
        assert time.monotonic() - began < 5 * 4 * TIMEOUT_S + 1
        assert store.failures
        assert not await store.ping()
        began = time.monotonic()
        for _ in range(1_000):
            save(store, copy_at(2))
            await store.write_tails([("k", 0, b"x")])
            await store.publish([("o", b"m")])
        assert time.monotonic() - began < 0.5
    finally:
        if how == "stopped":
            await services.aside(services.redis.start())
        else:
            os.kill(pid, signal.SIGCONT)

    async def is_back() -> bool:
        return await store.ping()

    await until(is_back, "the server answers")
    save(store, copy_at(2), name="before")
    await stored(store, copy_at(2), name="before")


# Text of running calls


async def test_a_tail_is_what_was_written(store: RedisStore) -> None:
    assert await store.write_tails([("k", 0, b"ab"), ("l", 0, "ü".encode())])
    assert await store.write_tails([("k", 2, b"cd"), ("l", 2, b"x")])
    assert await store.read_tail("k") == b"abcd"
    assert await store.read_tail("l") == "üx".encode()
    assert await store.read_tail("none") is None


async def test_a_tail_whose_beginning_was_lost_is_no_tail(store: RedisStore, redis: Any) -> None:
    await store.write_tails([("k", 0, b"ab")])
    await redis.flushall()
    assert not await store.write_tails([("k", 2, b"cd"), ("l", 0, b"x"), ("l", 1, b"y")])
    assert await store.read_tail("k") is None
    assert await store.write_tails([("k", 0, b"abcd")])
    assert await store.read_tail("k") == b"abcd"


async def test_a_tail_is_asked_for_again_while_the_server_does_not_answer(
    services: Services, store: RedisStore
) -> None:
    pid = services.redis.pid
    assert pid is not None
    await store.write_tails([("k", 0, b"ab")])
    os.kill(pid, signal.SIGSTOP)
    try:
        reading = asyncio.create_task(store.read_tail("k"))

        async def has_failed() -> bool:
            return store.failures > 0

        await until(has_failed, "the first try fails")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await reading == b"ab"


async def test_a_tail_of_a_server_that_stays_away_is_given_up(
    services: Services, store: RedisStore
) -> None:
    pid = services.redis.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert await asyncio.wait_for(store.read_tail("k"), 15) is None
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_tail_that_begins_anew_forgets_the_old_one(store: RedisStore, redis: Any) -> None:
    await store.write_tails([("k", 0, b"a long text")])
    await store.write_tails([("k", 0, b"ab")])
    assert await store.read_tail("k") == b"ab"
    assert 0 < await redis.ttl("ar:tail:k") <= 900


# Messages


async def test_messages_reach_their_owner_in_order_also_behind_a_restart(
    services: Services, store: RedisStore
) -> None:
    heard: list[bytes] = []

    async def hear() -> None:
        listening = cast(Any, store.listen("o"))
        async with aclosing(listening) as messages:
            async for message in messages:
                heard.append(message)  # noqa: PERF401 - it never ends

    async def hears(what: bytes) -> None:
        async def said() -> bool:
            await store.publish([("another", b"not for us"), ("o", what)])
            return what in heard

        await until(said, f"{what!r} is heard")

    listening = asyncio.create_task(hear())
    await hears(b"hello")
    await store.publish([("o", b"1"), ("o", b"2"), ("o", b"3")])

    async def all_there() -> bool:
        return heard[-3:] == [b"1", b"2", b"3"]

    await until(all_there, "three messages arrive in order")
    await services.aside(services.redis.stop(hurry=True))
    await services.aside(services.redis.start())
    await hears(b"again")
    assert b"not for us" not in heard
    listening.cancel()
    await asyncio.wait([listening])


async def test_calls_that_wait_are_seen_by_all(services: Services, store: RedisStore) -> None:
    another = new_store(services)
    await store.put_waiting("t", "s", "a", b"far")
    await store.put_waiting("t", "s", "b", b"first")
    await store.put_waiting("t", "s", "a", b"near")
    assert sorted(await another.waiting("t", "s")) == [b"first", b"near"]
    assert await another.waiting("u", "s") == []
    await store.put_waiting("t", "s", "a", None)
    await store.put_waiting("t", "s", "b", None)
    assert await another.waiting("t", "s") == []
    await another.close()


async def test_hints_and_metrics_are_shared(services: Services, store: RedisStore) -> None:
    another = new_store(services)
    await store.hint_owner("t", "s", "replica1")
    assert await another.owner_hint("t", "s") == "replica1"
    await store.post_metrics("a", b"page of a", ttl_s=5.0)
    await another.post_metrics("b", b"page of b", ttl_s=5.0)
    assert await store.read_metrics() == {"a": b"page of a", "b": b"page of b"}
    await another.close()
