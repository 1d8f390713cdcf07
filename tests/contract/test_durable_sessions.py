"""Sessions in PostgreSQL: made, listed, copied and deleted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from psycopg import AsyncConnection

from agentray.storage.base import (
    SessionRow,
)
from agentray.storage.postgres import PostgresStore
from tests.contract.durable import (
    T,
    accept,
    born,
    claim,
    create,
    expire,
    journal,
    lines,
    own,
    put,
    row_of,
    session_row,
)


async def test_creating_again_returns_what_there_is(store: PostgresStore) -> None:
    made, new = await store.create_session(
        session_row("s", user="u", metadata={"a": "1"}), ttl_s=60.0
    )
    assert new
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == pytest.approx(60.0)
    again, new = await store.create_session(session_row("s", user="v"), ttl_s=None)
    assert not new
    assert again == made
    both = await asyncio.gather(
        *[store.create_session(session_row("r"), ttl_s=None) for _ in range(10)]
    )
    assert sum(new for _, new in both) == 1


async def test_tenants_do_not_see_each_other(store: PostgresStore) -> None:
    await create(store, "s")
    assert await store.session("other", "s") is None
    made, new = await store.create_session(session_row("s", tenant="other"), ttl_s=None)
    assert new
    assert await store.delete_session("other", "s") == made
    assert await store.session(T, "s") is not None


async def test_metadata_is_replaced(store: PostgresStore) -> None:
    await create(store, "s", metadata={"a": "1", "b": "2"})
    row = await store.update_metadata(T, "s", {"c": "ü"})
    assert row is not None
    assert row.metadata == {"c": "ü"}
    assert await store.update_metadata(T, "none", {}) is None


async def test_pages_of_sessions_hold_each_once_newest_first(store: PostgresStore) -> None:
    names = [f"s{n:02}" for n in range(25)]
    await asyncio.gather(*[create(store, name) for name in names])
    found: list[SessionRow] = []
    before: tuple[float, str] | None = None
    while True:
        page = await store.sessions(T, user=None, agent=None, status=None, before=before, limit=4)
        if not page:
            break
        found += page
        before = (page[-1].created_at, page[-1].id)
    assert sorted(row.id for row in found) == names
    order = [(row.created_at, row.id) for row in found]
    assert order == sorted(order, reverse=True)


async def test_sessions_are_filtered(store: PostgresStore) -> None:
    epoch = await own(store, "busy")
    await accept(store, "busy", "t1")
    await create(store, "idle", user="ann")
    await expire(store, "closed")
    parked = await own(store, "parked")
    await store.park(T, "parked", epoch=parked, reason="why")
    await create(store, "agents", agent="other")

    async def ids(**filters: Any) -> Sequence[str]:
        what = {"user": None, "agent": None, "status": None, "before": None, "limit": 10}
        return sorted(row.id for row in await store.sessions(T, **{**what, **filters}))

    assert await ids(user="ann") == ["idle"]
    assert await ids(agent="other") == ["agents"]
    assert await ids(status="running") == ["busy"]
    assert await ids(status="closed") == ["closed"]
    assert await ids(status="parked") == ["parked"]
    assert await ids(status="idle") == ["agents", "idle"]
    assert epoch


async def test_a_fork_has_all_up_to_its_place_and_goes_its_own_way(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    for n in range(3):
        first = 1 + 3 * n
        await put(store, lines("s", epoch, first, 2, born=born(f"t{n}", f"k{n}")))
        end = lines("s", epoch, first + 2, ended_turn=f"t{n}", ended_status="completed", cost=0.25)
        await put(store, end)
    fork = await store.fork_session(T, "s", "f", 6)
    assert fork is not None
    assert (fork.last_seq, fork.turns, fork.latest_turn, fork.owner) == (6, 2, "t1", None)
    assert fork.epoch >= fork.first_epoch
    assert await journal(store, "f") == (await journal(store, "s"))[:6]
    assert await store.turn(T, "f", "t2") is None
    copied, source = await store.turn(T, "f", "t1"), await store.turn(T, "s", "t1")
    assert copied is not None
    assert source is not None
    assert (copied.first_seq, copied.last_seq, copied.status) == (4, 6, "completed")
    claimed = await claim(store, "f", "me")
    assert claimed is not None
    assert await put(store, lines("f", claimed.row.epoch, 7, born=born("n", "k0"))) == ["landed"]
    source = await row_of(store, "s")
    assert (source.last_seq, source.cost) == (9, 0.75)
    # What it was made from is not paid for twice.
    assert (await row_of(store, "f")).cost == 0.0
    assert await store.fork_session(T, "none", "g", 3) is None


async def test_a_call_that_is_run_again_finds_the_files_that_it_found_before(
    store: PostgresStore,
) -> None:
    epoch = await own(store, "s")
    scratch = store.scratch
    assert await scratch.read_scratch(T, "s") is None
    for seq in (3, 7, 9):
        body = b"left by %d" % seq
        assert await scratch.write_scratch(T, "s", epoch=epoch, seq=seq, body=body)
    assert await scratch.read_scratch(T, "s") == b"left by 9"
    assert await scratch.read_scratch(T, "s", before_seq=9) == b"left by 7"
    assert await scratch.write_scratch(T, "s", epoch=epoch, seq=9, body=b"again")
    assert await scratch.read_scratch(T, "s") == b"again"
    # Older ones are of no call that can be run again.
    assert await scratch.read_scratch(T, "s", before_seq=7) is None
    assert await scratch.read_scratch("other", "s") is None


async def test_a_stale_owner_leaves_no_files(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    write = store.scratch.write_scratch
    assert not await write(T, "s", epoch=epoch - 1, seq=3, body=b"stale")
    assert not await write(T, "none", epoch=epoch, seq=3, body=b"of nobody")
    assert await store.scratch.read_scratch(T, "s") is None


async def test_a_fork_has_the_files_of_its_place(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    await put(store, lines("s", epoch, 1, 3, born=born("t0")))
    await put(store, lines("s", epoch, 4, ended_turn="t0", ended_status="completed"))
    for seq in (2, 6):
        await store.scratch.write_scratch(T, "s", epoch=epoch, seq=seq, body=b"%d" % seq)
    assert await store.fork_session(T, "s", "f", 4) is not None
    assert await store.scratch.read_scratch(T, "f") == b"2"


async def test_recent_events_begin_at_a_turn(store: PostgresStore) -> None:
    epoch = await own(store, "s")
    for n in range(4):
        await put(store, lines("s", epoch, 1 + 2 * n, 2, born=born(f"t{n}")))
    assert await store.recent_events(T, "s", turns=2) == (await journal(store, "s"))[4:]
    assert len(await store.recent_events(T, "s", turns=10)) == 8
    assert await store.events(T, "s", after=2, limit=3, up_to=4) == [b'{"n":3}', b'{"n":4}']


async def test_deleting_leaves_nothing(store: PostgresStore, other: AsyncConnection[Any]) -> None:
    epoch = await own(store, "s")
    await put(store, lines("s", epoch, 1, born=born("t1", "k")))
    assert await store.scratch.write_scratch(T, "s", epoch=epoch, seq=1, body=b"tar")
    deleted = await store.delete_session(T, "s")
    assert deleted is not None
    assert deleted.owner == "me"
    assert await store.delete_session(T, "s") is None
    assert await put(store, lines("s", epoch, 2)) == ["gone"]
    for table in ("sessions", "turns", "events", "scratch"):
        cursor = await other.execute(f"SELECT count(*) FROM {table}".encode())
        assert await cursor.fetchone() == (0,)
