"""Turns in PostgreSQL: accepted once, in one order, and heard of by somebody."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from psycopg import AsyncConnection

from agentray.storage.base import (
    Accepted,
)
from agentray.storage.postgres import PostgresStore
from tests.contract.durable import (
    T,
    accept,
    blocked,
    born,
    claim,
    expire,
    lines,
    own,
    put,
    row_of,
)


async def test_an_accepted_turn_waits_for_its_owner(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    accepted = await accept(store, "s", "t1", input=b'["x"]')
    assert (accepted.outcome, accepted.owner, accepted.owner_alive) == ("accepted", "me", True)
    assert (accepted.epoch, accepted.inbox) == (epoch, 1)
    assert accepted.turn == await store.turn(T, "s", "t1")
    found = await store.open_turns(T, "s", epoch=epoch)
    assert found == (1, (accepted.turn,))
    [mail] = await store.inbox("me")
    assert (mail.session_id, mail.turn_id, mail.state) == ("s", "t1", "accepted")
    assert await store.inbox("another") == []
    assert await store.open_turns(T, "s", epoch=epoch - 1) is None


async def test_what_is_not_accepted(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    assert (await accept(store, "none", "t")).outcome == "gone"
    await put(store, lines("s", epoch, 1, born=born("t1")))
    assert (await accept(store, "s", "t2", if_busy="reject")).outcome == "busy"
    assert (await accept(store, "s", "t2", after_turn="t0")).outcome == "outdated"
    assert (await accept(store, "s", "t2", max_queued=1)).outcome == "full"
    assert (await row_of(store, "s")).inbox == 0
    assert (await accept(store, "s", "t2", after_turn="t1")).outcome == "accepted"
    assert (await accept(store, "s", "t3", after_turn="t1")).outcome == "outdated"


async def test_a_session_whose_time_is_over_takes_no_turn(store: PostgresStore) -> None:
    await expire(store, "s")
    assert (await accept(store, "s", "t1")).outcome == "closed"


async def test_a_key_is_accepted_once(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    first = await accept(store, "s", "t1", idempotency_key="k")
    again = await accept(store, "s", "t2", idempotency_key="k", if_busy="reject")
    assert again.outcome == "duplicate"
    assert again.turn == first.turn
    # Nor is the turn itself, when its acceptance was in doubt.
    assert (await accept(store, "s", "t1")).outcome == "duplicate"
    assert await put(store, lines("s", epoch, 1, born=born("t1"), inbox=1)) == ["duplicate"]
    assert (await row_of(store, "s")).inbox == 1


async def test_interrupting_cancels_whatever_is_open(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    await put(store, lines("s", epoch, 1, born=born("t1")))
    await accept(store, "s", "t2")
    await accept(store, "s", "t3", if_busy="interrupt")
    found = await store.open_turns(T, "s", epoch=epoch)
    assert found is not None
    assert [turn.cancel_requested for turn in found[1]] == [True, True, False]


async def test_many_messages_at_once_make_one_order(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    accepted = await asyncio.gather(*[accept(store, "s", f"t{n}") for n in range(30)])
    assert sorted(each.inbox for each in accepted) == list(range(1, 31))
    in_order = [each.turn.id for each in sorted(accepted, key=lambda each: each.inbox) if each.turn]
    found = await store.open_turns(T, "s", epoch=epoch)
    assert found is not None
    assert found[0] == 30
    assert [turn.id for turn in found[1]] == in_order


async def test_the_same_key_at_once_is_one_turn(store: PostgresStore) -> None:
    await own(store, "s")
    accepted = await asyncio.gather(
        *[accept(store, "s", f"t{n}", idempotency_key="k") for n in range(20)]
    )
    assert sorted(each.outcome for each in accepted) == ["accepted"] + ["duplicate"] * 19
    assert len({each.turn.id for each in accepted if each.turn}) == 1


async def test_no_message_slips_between_an_owner_and_its_release(store: PostgresStore) -> None:
    """Either the owner hears of the turn, or whoever accepted it hears that nobody is there."""
    rng = random.Random(7)
    names = [f"s{n}" for n in range(100)]
    epochs = {name: await own(store, name) for name in names}

    async def give_up(name: str) -> str:
        await asyncio.sleep(rng.random() * 0.02)
        return await store.release(T, name, epoch=epochs[name], inbox=0)

    async def send(name: str) -> Accepted:
        await asyncio.sleep(rng.random() * 0.02)
        return await accept(store, name, "t1")

    released = await asyncio.gather(
        *[work for name in names for work in (give_up(name), send(name))]
    )
    seen = set[Any]()
    for name, outcome, accepted in zip(names, released[::2], released[1::2], strict=True):
        assert isinstance(accepted, Accepted)
        assert accepted.outcome == "accepted"
        seen.add(outcome)
        if outcome == "released":
            assert accepted.owner is None
            assert (await row_of(store, name)).owner is None
        else:
            assert outcome == "inbox"
            assert accepted.owner == "me"
            assert (await row_of(store, name)).owner == "me"
    assert seen == {"released", "inbox"}, "the race was no race"


async def test_who_accepts_hears_of_a_release_that_is_under_way(
    store: PostgresStore, other: AsyncConnection[Any]
) -> None:
    await own(store, "s")
    async with other.transaction():
        await other.execute("UPDATE sessions SET owner = NULL WHERE id = 's'")
        accepting = asyncio.ensure_future(accept(store, "s", "t1"))
        await blocked(other, 1)
    accepted = await accepting
    assert (accepted.outcome, accepted.owner) == ("accepted", None)


async def test_a_session_that_was_lost_is_not_released(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    await store.forget_owner("me")
    await claim(store, "s", "new")
    assert await store.release(T, "s", epoch=epoch, inbox=0) == "lost"
    assert await store.release(T, "none", epoch=epoch, inbox=0) == "lost"
    assert (await row_of(store, "s")).owner == "new"


async def test_cancelling_marks_what_is_open(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    await put(store, lines("s", epoch, 1, born=born("t1")))
    await put(store, lines("s", epoch, 2, ended_turn="t1", ended_status="completed"))
    assert await store.request_cancel(T, "s", None) == ([], None)
    await accept(store, "s", "t2")
    await accept(store, "s", "t3")
    assert await store.request_cancel(T, "s", "t3") == (["t3"], "me")
    assert await store.request_cancel(T, "s", "t1") == ([], None)
    assert await store.request_cancel(T, "s", None) == (["t2", "t3"], "me")
