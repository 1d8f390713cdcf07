"""Owners in PostgreSQL: claims, terms, and turns that nobody runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from psycopg import AsyncConnection

from agentray.config.settings import PostgresSettings
from agentray.errors import StorageUnavailableError
from agentray.storage.postgres import PostgresStore, forget_hosts
from tests.contract.durable import (
    TERM_S,
    T,
    accept,
    blocked,
    claim,
    create,
    fall_silent,
    lines,
    own,
    put,
    row_of,
)
from tests.services import Services, until

PATIENT_S = 60.0


async def test_one_of_many_claimants_wins(services: Services, store: PostgresStore) -> None:
    stores = [
        PostgresStore(services.postgres.url, PostgresSettings(pool_size=1), term_s=TERM_S)
        for _ in range(4)
    ]
    for each in stores:
        await each.open()
    for round_ in range(5):
        name = f"s{round_}"
        await create(store, name)
        before = (await row_of(store, name)).epoch
        owners = [f"o{n}" for n in range(20)]
        for owner in owners:
            await store.beat(owner, kind="shared", address="here")
        claims = await asyncio.gather(
            *[claim(stores[n % 4], name, owner) for n, owner in enumerate(owners)]
        )
        won = [owner for owner, each in zip(owners, claims, strict=True) if each is not None]
        row = await row_of(store, name)
        assert [row.owner] == won
        assert row.epoch == before + 1
    for each in stores:
        await each.close()


async def test_claimants_that_saw_the_same_epoch_have_one_winner(
    services: Services, store: PostgresStore, other: AsyncConnection[Any]
) -> None:
    """Even if each takes the others for dead."""
    await create(store, "s")
    stores = [
        PostgresStore(services.postgres.url, PostgresSettings(pool_size=1), term_s=TERM_S)
        for _ in range(3)
    ]
    for each in stores:
        await each.open()
    async with other.transaction():
        await other.execute("SELECT 1 FROM sessions WHERE id = 's' FOR UPDATE")
        claiming = [
            asyncio.ensure_future(claim(each, "s", f"o{n}")) for n, each in enumerate(stores)
        ]
        await blocked(other, 3)
    claims = await asyncio.gather(*claiming)
    assert [each is None for each in claims].count(False) == 1
    for each in stores:
        await each.close()


async def test_a_claim_brings_all_that_is_open_in_order(store: PostgresStore) -> None:
    epoch = await own(store, "s", "old")
    for turn_id in ("t1", "t2", "t3", "t4"):
        await accept(store, "s", turn_id)
    await put(store, lines("s", epoch, 1, 2, started_turn="t1"))
    await put(store, lines("s", epoch, 3, ended_turn="t1", ended_status="completed"))
    await put(store, lines("s", epoch, 4, started_turn="t2"))
    await store.request_cancel(T, "s", "t3")
    await store.forget_owner("old")
    claimed = await claim(store, "s", "new")
    assert claimed is not None
    assert claimed.previous_owner == "old"
    assert [(turn.id, turn.state, turn.cancel_requested) for turn in claimed.turns] == [
        ("t2", "running", False),
        ("t3", "accepted", True),
        ("t4", "accepted", False),
    ]
    assert (claimed.row.last_seq, claimed.row.inbox) == (4, 4)


async def test_only_owners_of_the_right_placement_may_claim(store: PostgresStore) -> None:
    await create(store, "s", placement="dedicated")
    assert await claim(store, "s", "me") is None
    assert await claim(store, "s", "me", placement="dedicated") is not None
    assert await claim(store, "nowhere", "me") is None


@pytest.mark.usefixtures("long_up")
async def test_an_owner_is_robbed_only_behind_its_term(
    store: PostgresStore, other: AsyncConnection[Any]
) -> None:
    await own(store, "s", "old")
    await fall_silent(other, "old", TERM_S - 1)
    assert (await row_of(store, "s")).owner_alive
    assert await claim(store, "s", "new") is None
    await fall_silent(other, "old", TERM_S + 0.1)
    assert not (await row_of(store, "s")).owner_alive
    assert await claim(store, "s", "new") is not None


async def test_nobody_is_dead_right_after_the_store_came_back(
    services: Services, store: PostgresStore, other: AsyncConnection[Any]
) -> None:
    await own(store, "s", "old")
    await fall_silent(other, "old", 3_600)
    await services.aside(services.postgres.stop(hurry=True))
    await services.aside(services.postgres.start())

    async def answers() -> bool:
        try:
            return bool(await store.session(T, "s"))
        except StorageUnavailableError:
            return False  # not all dead connections are weeded out

    await until(answers, "the store has noticed that its connections are dead")
    # A term that is not over yet on a slow machine.
    patient = PostgresStore(services.postgres.url, PostgresSettings(), term_s=PATIENT_S)
    await patient.open()
    assert (await row_of(patient, "s")).owner_alive
    assert await claim(patient, "s", "new", term_s=PATIENT_S) is None
    assert await patient.orphans(term_s=PATIENT_S, limit=10) == []
    await patient.close()


async def test_owners_that_are_forgotten_are_dead(store: PostgresStore, services: Services) -> None:
    await own(store, "a", "old")
    await own(store, "b", "old")
    await store.forget_owner("old")
    assert await claim(store, "a", "new") is not None
    await store.beat("old", kind="shared", address="here")
    assert await claim(store, "b", "new") is None
    await forget_hosts(services.postgres.url)
    assert await claim(store, "b", "new") is not None


async def test_epochs_of_sessions_that_exist(store: PostgresStore) -> None:
    a = await own(store, "a")
    await create(store, "b")
    found = await store.epochs([(T, "a"), (T, "b"), (T, "none"), ("other", "a")])
    assert found == {(T, "a"): a, (T, "b"): (await row_of(store, "b")).epoch}


@pytest.mark.usefixtures("long_up")
async def test_orphans_are_open_turns_without_a_living_owner(
    store: PostgresStore, other: AsyncConnection[Any]
) -> None:
    for name, owner in (("alive", "me"), ("dead", "gone"), ("silent", "quiet")):
        await own(store, name, owner)
        await accept(store, name, "t1")
    await own(store, "idle", "gone")
    await create(store, "nobodys")
    await accept(store, "nobodys", "t1")
    await create(store, "alone", placement="dedicated")
    await accept(store, "alone", "t1")
    await store.forget_owner("gone")
    await fall_silent(other, "quiet", TERM_S + 1)
    found = await store.orphans(term_s=TERM_S, limit=10)
    assert sorted(found) == [
        (T, "alone", "dedicated"),
        (T, "dead", "shared"),
        (T, "nobodys", "shared"),
        (T, "silent", "shared"),
    ]
    assert len(await store.orphans(term_s=TERM_S, limit=2)) == 2


async def test_a_parked_session_is_left_alone_until_the_next_message(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    await accept(store, "s", "t1")
    await store.park(T, "s", epoch=epoch - 1, reason="stale")
    assert (await row_of(store, "s")).parked_reason is None
    await store.park(T, "s", epoch=epoch, reason="why")
    row = await row_of(store, "s")
    assert (row.parked_reason, row.owner) == ("why", None)
    assert await store.orphans(term_s=TERM_S, limit=10) == []
    await accept(store, "s", "t2")
    assert (await row_of(store, "s")).parked_reason is None
    assert len(await store.orphans(term_s=TERM_S, limit=10)) == 1


async def test_an_owner_beats_while_callers_hold_every_connection(
    services: Services, store: PostgresStore
) -> None:
    small = PostgresStore(services.postgres.url, PostgresSettings(pool_size=1), term_s=TERM_S)
    await small.open()
    await create(small, "held")
    async with await AsyncConnection.connect(services.postgres.url) as holder:
        await holder.execute("SELECT 1 FROM sessions WHERE id = 'held' FOR UPDATE")
        waiting = asyncio.create_task(small.update_metadata(T, "held", {"a": "b"}))
        await blocked(holder, 1)
        async with asyncio.timeout(2):
            await small.beat("me", kind="shared", address="here")
            assert await small.epochs([(T, "held")])
        assert not waiting.done()
    assert await waiting is not None
    await small.close()
