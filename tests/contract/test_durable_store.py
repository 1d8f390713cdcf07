"""Journals in PostgreSQL: appends behind the fence, a schema that is made once, a deadline."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from agentray.config.settings import PostgresSettings
from agentray.errors import StorageUnavailableError
from agentray.storage.base import (
    Append,
    AppendResult,
)
from agentray.storage.postgres import PostgresStore, migrate
from agentray.storage.schema import MIGRATIONS
from tests.contract.durable import (
    TERM_S,
    T,
    accept,
    born,
    claim,
    create,
    journal,
    lines,
    own,
    put,
    row_of,
)
from tests.services import Services, until


async def test_an_append_lands_whole_and_moves_the_session(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    [result] = await store.append([lines("s", epoch, 1, 3, born=born("t1"), inbox=0)])
    assert result == AppendResult("landed", epoch, 3)
    assert await journal(store, "s") == [b'{"n":1}', b'{"n":2}', b'{"n":3}']
    row = await row_of(store, "s")
    assert (row.last_seq, row.turns, row.open_turns, row.latest_turn) == (3, 1, 1, "t1")
    turn = await store.turn(T, "s", "t1")
    assert turn is not None
    assert (turn.state, turn.first_seq, turn.last_seq, turn.input) == ("running", 1, None, None)


async def test_an_append_ends_its_turn(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    await put(store, lines("s", epoch, 1, 2, born=born("t1")))
    end = lines("s", epoch, 3, 2, ended_turn="t1", ended_status="completed")
    assert await put(store, end) == ["landed"]
    turn = await store.turn(T, "s", "t1")
    assert turn is not None
    assert (turn.state, turn.status, turn.first_seq, turn.last_seq) == ("done", "completed", 1, 4)
    assert turn.finished_at is not None
    assert (await row_of(store, "s")).open_turns == 0


async def test_an_append_starts_an_accepted_turn_and_takes_its_input_over(
    store: PostgresStore,
) -> None:
    epoch = await own(store, "s")
    await accept(store, "s", "t1", input=b'[{"role":"user","content":"hi"}]')
    assert await put(store, lines("s", epoch, 1, 2, started_turn="t1")) == ["landed"]
    turn = await store.turn(T, "s", "t1")
    assert turn is not None
    assert (turn.state, turn.first_seq, turn.input) == ("running", 1, None)
    assert (await row_of(store, "s")).turns == 1


@pytest.mark.parametrize(
    ("epoch_off", "first_seq"), [(-1, 3), (1, 3), (0, 2), (0, 4), (0, 1)], ids=str
)
async def test_the_fence_refuses_what_does_not_fit(
    store: PostgresStore, epoch_off: int, first_seq: int
) -> None:
    epoch = await own(store, "s")
    await put(store, lines("s", epoch, 1, 2))
    [result] = await store.append([lines("s", epoch + epoch_off, first_seq, born=born("t"))])
    assert result == AppendResult("stale", epoch, 2)
    assert len(await journal(store, "s")) == 2
    assert await store.turn(T, "s", "t") is None
    assert (await row_of(store, "s")).turns == 0


async def test_what_is_refused_in_a_batch_hurts_nobody_else(store: PostgresStore) -> None:
    a, b = await own(store, "a"), await own(store, "b")
    outcomes = await put(
        store,
        lines("a", a, 1, 2),
        lines("gone", 1, 1),
        lines("b", b - 1, 1),
    )
    assert outcomes == ["landed", "gone", "stale"]
    assert len(await journal(store, "a")) == 2
    assert await journal(store, "b") == []


async def test_a_row_that_somebody_holds_stalls_nobody_else(
    store: PostgresStore, other: AsyncConnection[Any]
) -> None:
    a, b = await own(store, "a"), await own(store, "b")
    async with other.transaction():
        await other.execute("SELECT 1 FROM sessions WHERE id = 'a' FOR UPDATE")
        async with asyncio.timeout(5):
            assert await put(store, lines("a", a, 1), lines("b", b, 1)) == ["locked", "landed"]
    assert await put(store, lines("a", a, 1)) == ["landed"]


async def test_a_key_that_exists_refuses_its_own_append_only(store: PostgresStore) -> None:
    a, b = await own(store, "a"), await own(store, "b")
    await put(store, lines("a", a, 1, born=born("t1", "k")))
    again = lines("a", a, 2, born=born("t2", "k"), started_turn="t1")
    assert await put(store, again, lines("b", b, 1, born=born("t1", "k"))) == [
        "duplicate",
        "landed",
    ]
    assert await store.turn(T, "a", "t2") is None
    assert (await row_of(store, "a")).last_seq == 1
    assert await put(store, lines("a", a, 2, born=born("t2", "other"))) == ["landed"]


async def test_a_turn_is_not_born_in_front_of_mail_that_its_owner_has_not_seen(
    store: PostgresStore,
) -> None:
    epoch = await own(store, "s")
    await accept(store, "s", "t1")
    assert await put(store, lines("s", epoch, 1, born=born("t2"), inbox=0)) == ["mail"]
    assert await store.turn(T, "s", "t2") is None
    assert await put(store, lines("s", epoch, 1, born=born("t2"), inbox=1)) == ["landed"]


async def test_appends_of_old_and_new_owners_in_one_batch_have_one_winner(
    store: PostgresStore,
) -> None:
    old = await own(store, "s")
    claimed = await claim(store, "s", "me")
    assert claimed is not None
    new = claimed.row.epoch
    assert await put(store, lines("s", old, 1), lines("s", new, 1)) == ["stale", "landed"]


async def test_racing_owners_leave_no_gap_and_no_overlap(
    store: PostgresStore, services: Services
) -> None:
    """A stale owner appends as fast as it can while another one takes the session."""
    epochs = [await own(store, "s")]
    stale = PostgresStore(services.postgres.url, PostgresSettings(), term_s=TERM_S)
    await stale.open()

    async def write(through: PostgresStore, epoch: int, first_seq: int) -> int:
        landed = 0
        while True:
            [outcome] = await put(through, lines("s", epoch, first_seq + landed))
            if outcome == "stale":
                return landed
            landed += outcome == "landed"

    writing = asyncio.ensure_future(write(stale, epochs[0], 1))

    async def has_begun() -> bool:
        return (await row_of(store, "s")).last_seq >= 20

    await until(has_begun, "the stale owner writes")
    claimed = await claim(store, "s", "me")
    assert claimed is not None
    [outcome] = await put(store, lines("s", claimed.row.epoch, claimed.row.last_seq + 1))
    assert outcome == "landed"
    async with asyncio.timeout(10):
        landed = await writing
    assert landed == claimed.row.last_seq
    assert await journal(store, "s") == [b'{"n":%d}' % (n + 1) for n in range(landed + 1)]
    await stale.close()


async def test_an_owner_of_a_deleted_session_cannot_write_into_a_new_one_of_its_id(
    store: PostgresStore,
) -> None:
    old = await own(store, "s")
    await store.delete_session(T, "s")
    new = await own(store, "s")
    assert new > old
    assert await put(store, lines("s", old, 1)) == ["stale"]


async def test_odd_text_comes_back_as_it_was(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    odd = '{"text":"\\u0000 \\"quoted\\" \\\\ {,} NULL ☃"}'.encode()
    append = Append(tenant=T, session_id="s", epoch=epoch, first_seq=1, events=(odd, b"{}"))
    assert await put(store, append) == ["landed"]
    assert await journal(store, "s") == [odd, b"{}"]


async def test_eight_that_migrate_at_once_migrate_once(services: Services) -> None:
    with psycopg.connect(services.postgres.url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS fresh")
        connection.execute("CREATE DATABASE fresh")
    url = services.postgres.url.replace("/postgres?", "/fresh?")
    await asyncio.gather(*[migrate(url) for _ in range(8)])
    await migrate(url)
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT version FROM schema_version").fetchall()
    assert found == [(n + 1,) for n in range(len(MIGRATIONS))]


async def test_a_server_that_is_not_there_is_an_error_of_ours(services: Services) -> None:
    url = services.postgres.url + "/nowhere"
    store = PostgresStore(url, PostgresSettings(connect_timeout_s=0.2), term_s=TERM_S)
    with pytest.raises(StorageUnavailableError):
        await store.open()
    with pytest.raises(StorageUnavailableError):
        await store.append([lines("s", 1, 1)])
    with pytest.raises(StorageUnavailableError):
        await migrate(url)
    await store.close()


async def test_a_statement_that_takes_too_long_is_an_error_of_ours(
    services: Services, other: AsyncConnection[Any]
) -> None:
    settings = PostgresSettings(statement_timeout_s=0.2)
    store = PostgresStore(services.postgres.url, settings, term_s=TERM_S)
    await store.open()
    await create(store, "s")
    async with other.transaction():
        await other.execute("SELECT 1 FROM sessions WHERE id = 's' FOR UPDATE")
        with pytest.raises(StorageUnavailableError):
            await accept(store, "s", "t1")
        with pytest.raises(StorageUnavailableError):
            await store.delete_session(T, "s")
    assert (await accept(store, "s", "t1")).outcome == "accepted"
    await store.close()
