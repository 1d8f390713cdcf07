"""Files and batches on real PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from psycopg import AsyncConnection

from agentray.config.settings import PostgresSettings
from agentray.errors import StorageUnavailableError
from agentray.ids import new_batch_id, new_file_id
from agentray.storage.batches import BatchFault, BatchRow, ClaimedLine, LineUsage, NewLine
from agentray.storage.postgres_batches import PIECE_BYTES, PostgresBatches
from tests.services import Services, until

T = "tenant"
ME, OTHER = "me", "other"
LEASE_S = 30.0


@pytest.fixture
async def batches(services: Services) -> AsyncIterator[PostgresBatches]:
    store = PostgresBatches(services.postgres.url, PostgresSettings())
    yield store
    await store.close()


async def pieces(*found: bytes) -> AsyncIterator[bytes]:
    for piece in found:
        yield piece


async def upload(store: PostgresBatches, *found: bytes, **facts: Any) -> str:
    facts = {"purpose": "batch", "filename": "in.jsonl", "ttl_s": None, **facts}
    return (await store.create_file(T, new_file_id(), pieces(*found), **facts)).id


async def content(store: PostgresBatches, file_id: str) -> bytes:
    found: list[bytes] = []
    while (piece := await store.read_piece(T, file_id, len(found))) is not None:
        found.append(piece)
    return b"".join(found)


async def order(store: PostgresBatches, *, window_s: float = 3_600.0) -> str:
    row = await store.create_batch(
        T,
        new_batch_id(),
        input_file_id="file-x",
        endpoint="/v1/chat/completions",
        metadata={"a": "b"},
        window_s=window_s,
        output_ttl_s=60.0,
    )
    assert row.status == "validating"
    return row.id


def lines(count: int, first: int = 1) -> list[NewLine]:
    return [NewLine(n, b'{"id":"%d"' % n, b'{"n":%d}' % n) for n in range(first, first + count)]


async def begin(store: PostgresBatches, count: int, **how: Any) -> str:
    batch_id = await order(store, **how)
    assert await store.claim_batch(T, batch_id, ME, lease_s=LEASE_S)
    assert await store.add_lines(T, batch_id, ME, lines(count), lease_s=LEASE_S)
    assert await store.begin_batch(T, batch_id, ME, total=count)
    return batch_id


async def claim(
    store: PostgresBatches, batch_id: str, by: str = ME, *, limit: int = 100, lease_s: float = 30.0
) -> list[ClaimedLine]:
    return await store.claim_lines(T, batch_id, by, limit=limit, lease_s=lease_s)


async def record(store: PostgresBatches, line: ClaimedLine, *, succeeded: bool = True) -> bool:
    result = b',"of":%d}\n' % line.number
    usage = LineUsage(5, 1, 3, 2)
    return await store.record(line, succeeded=succeeded, result=result, usage=usage)


async def finish(store: PostgresBatches, batch_id: str, status: Any) -> bool:
    return await store.finish_batch(
        T,
        batch_id,
        status,
        unfinished=b',"of":null}\n',
        output_file_id=new_file_id(),
        error_file_id=new_file_id(),
    )


async def row_of(store: PostgresBatches, batch_id: str) -> BatchRow:
    row = await store.batch(T, batch_id)
    assert row is not None
    return row


async def numbers(store: PostgresBatches, file_id: str | None) -> list[int | None]:
    if file_id is None:
        return []
    return [json.loads(line)["of"] for line in (await content(store, file_id)).splitlines()]


async def expire(other: AsyncConnection[Any], batch_id: str) -> None:
    await other.execute("UPDATE batches SET expires_at = now() WHERE id = %s", [batch_id])


# Files


async def test_a_file_comes_back_piece_by_piece_as_it_was_given(batches: PostgresBatches) -> None:
    file_id = await upload(batches, b"one", b"\0\xff", ttl_s=60.0)
    row = await batches.file(T, file_id)
    assert row is not None
    assert (row.size_bytes, row.filename, row.purpose) == (5, "in.jsonl", "batch")
    assert row.expires_at is not None
    assert row.expires_at - row.created_at == pytest.approx(60.0)
    assert await batches.read_piece(T, file_id, 0) == b"one"
    assert await content(batches, file_id) == b"one\0\xff"
    assert await batches.file("another tenant", file_id) is None
    assert await batches.read_piece("another tenant", file_id, 0) is None


async def test_a_file_whose_upload_breaks_off_is_not_there(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await batches.create_file(
            T, new_file_id(), broken(), purpose="batch", filename="f", ttl_s=None
        )
    cursor = await other.execute("SELECT count(*) FROM file_pieces")
    assert await cursor.fetchone() == (0,)


async def test_files_on_their_way_leave_a_connection_for_everything_else(
    services: Services,
) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        begun.set()
        yield b"x"
        await go.wait()

    store = PostgresBatches(services.postgres.url, PostgresSettings(), 2)
    facts: dict[str, Any] = {"purpose": "batch", "filename": "f", "ttl_s": None}
    try:
        names = [new_file_id() for _ in range(3)]
        making = [asyncio.create_task(store.create_file(T, n, slow(), **facts)) for n in names]
        await begun.wait()
        assert await store.file(T, names[0]) is None
        go.set()
        assert [row.id for row in await asyncio.gather(*making)] == names
    finally:
        await store.close()


async def test_files_are_listed_by_age_and_purpose(batches: PostgresBatches) -> None:
    made = sorted([await upload(batches), await upload(batches), await upload(batches)])
    output = await upload(batches, purpose="batch_output")

    async def listed(**how: Any) -> list[str]:
        how = {"purpose": "batch", "after": None, "limit": 10, "newest_first": True, **how}
        return [row.id for row in await batches.files(T, **how)]

    assert await listed() == made[::-1]
    assert await listed(newest_first=False, after=made[0], limit=1) == [made[1]]
    assert await listed(after=made[1]) == [made[0]]
    assert await listed(purpose="batch_output") == [output]
    assert len(await listed(purpose=None)) == 4


async def test_a_deleted_file_leaves_nothing(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    file_id = await upload(batches, b"x")
    assert await batches.delete_file(T, file_id)
    assert not await batches.delete_file(T, file_id)
    assert await batches.file(T, file_id) is None
    cursor = await other.execute("SELECT count(*) FROM file_pieces")
    assert await cursor.fetchone() == (0,)


async def test_a_file_whose_time_is_over_is_gone(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    over, kept = await upload(batches, b"x", ttl_s=60.0), await upload(batches, ttl_s=60.0)
    await other.execute("UPDATE files SET expires_at = now() WHERE id = %s", [over])
    assert await batches.file(T, over) is None
    assert await batches.delete_expired_files() == 1
    assert await content(batches, over) == b""
    assert await batches.file(T, kept) is not None


# Validation


async def test_one_runner_at_a_time_validates_a_batch(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    batch_id = await order(batches)
    assert await batches.claim_batch(T, batch_id, ME, lease_s=LEASE_S)
    assert not await batches.claim_batch(T, batch_id, OTHER, lease_s=LEASE_S)
    await other.execute("UPDATE batches SET leased_until = now()")
    assert await batches.claim_batch(T, batch_id, OTHER, lease_s=LEASE_S)
    assert not await batches.add_lines(T, batch_id, ME, lines(1), lease_s=LEASE_S)
    assert not await batches.begin_batch(T, batch_id, ME, total=1)
    assert not await batches.fail_batch(T, batch_id, ME, [])


async def test_lines_that_are_added_again_are_there_once(batches: PostgresBatches) -> None:
    batch_id = await order(batches)
    await batches.claim_batch(T, batch_id, ME, lease_s=LEASE_S)
    for _ in range(2):
        assert await batches.add_lines(T, batch_id, ME, lines(3), lease_s=LEASE_S)
    assert not await claim(batches, batch_id)  # it has not begun
    await batches.begin_batch(T, batch_id, ME, total=3)
    claimed = await claim(batches, batch_id)
    assert [(line.number, line.body) for line in claimed] == [
        (n, b'{"n":%d}' % n) for n in (1, 2, 3)
    ]


async def test_a_batch_that_cannot_run_says_why_and_keeps_no_lines(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    batch_id = await order(batches)
    await batches.claim_batch(T, batch_id, ME, lease_s=LEASE_S)
    await batches.add_lines(T, batch_id, ME, lines(3), lease_s=LEASE_S)
    faults = [BatchFault(code="empty_file", message="why", line=4)]
    assert await batches.fail_batch(T, batch_id, ME, faults)
    row = await row_of(batches, batch_id)
    assert (row.status, row.errors, row.failed_at is not None) == ("failed", faults, True)
    cursor = await other.execute("SELECT count(*) FROM batch_lines")
    assert await cursor.fetchone() == (0,)
    assert await batches.open_batches(10) == []


async def test_no_batch_waits_behind_those_that_have_nothing_to_do(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    taken, validating = await order(batches), await order(batches)
    assert await batches.claim_batch(T, taken, ME, lease_s=LEASE_S)
    busy, away, due = [await begin(batches, 1) for _ in range(3)]
    await claim(batches, busy)
    done, over = await begin(batches, 1), await begin(batches, 1)
    for line in await claim(batches, done):
        await record(batches, line)
    cancelled = await begin(batches, 1)
    await batches.cancel_batch(T, cancelled)

    async def opened(limit: int) -> set[str]:
        return {row.id for row in await batches.open_batches(limit, resting=[away])}

    assert await opened(1) == {validating, due, done, cancelled}
    await expire(other, over)
    assert await opened(2) == {validating, due, done, over, cancelled}
    await other.execute("UPDATE batch_lines SET due_at = now()")
    assert await opened(2) == {validating, busy, due, done, over, cancelled}


# Lines


async def test_a_line_is_one_runners_until_its_lease_ends(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    batch_id = await begin(batches, 3)
    mine = await claim(batches, batch_id, limit=2)
    assert [line.number for line in mine] == [1, 2]
    assert [line.number for line in await claim(batches, batch_id, OTHER)] == [3]
    assert await claim(batches, batch_id, OTHER) == []
    theirs = msgspec.structs.replace(mine[0], number=3)
    await batches.renew_lines(ME, [mine[1], theirs], lease_s=3_600.0)
    cursor = await other.execute(
        "SELECT array_agg(number) FROM batch_lines WHERE due_at > now() + interval '1000 s'"
    )
    assert await cursor.fetchone() == ([2],)
    await other.execute("UPDATE batch_lines SET due_at = now() WHERE claimed_by = %s", [ME])
    again = await claim(batches, batch_id, OTHER)
    assert [(line.number, line.attempts) for line in again] == [(1, 2), (2, 2)]


async def test_what_a_runner_gives_back_is_taken_at_once(batches: PostgresBatches) -> None:
    batch_id, validating = await begin(batches, 2), await order(batches)
    await batches.claim_batch(T, validating, ME, lease_s=LEASE_S)
    await claim(batches, batch_id)
    await batches.give_back(ME)
    assert len(await claim(batches, batch_id, OTHER)) == 2
    assert await batches.claim_batch(T, validating, OTHER, lease_s=LEASE_S)


async def test_a_line_that_was_put_off_waits_behind_the_others(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    batch_id = await begin(batches, 2)
    [first] = await claim(batches, batch_id, limit=1)
    await batches.put_off(first, ME, 60.0)
    assert [line.number for line in await claim(batches, batch_id)] == [2]
    await other.execute("UPDATE batch_lines SET due_at = now() WHERE number = 1")
    [again] = await claim(batches, batch_id)
    assert (again.number, again.attempts) == (1, 2)
    await batches.put_off(again, ME, 0.0, counts=False)
    [again] = await claim(batches, batch_id)
    assert (again.number, again.attempts) == (1, 2)


async def test_the_first_result_of_a_line_counts_and_is_counted_once(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    batch_id = await begin(batches, 2)
    first, second = await claim(batches, batch_id)
    await other.execute("UPDATE batch_lines SET due_at = now()")
    again, _ = await claim(batches, batch_id, OTHER)
    assert await record(batches, again)
    assert not await record(batches, first, succeeded=False)
    await batches.put_off(first, ME, 0.0)
    assert await record(batches, second, succeeded=False)
    row = await row_of(batches, batch_id)
    assert (row.total, row.completed, row.failed) == (2, 1, 1)
    assert (row.input_tokens, row.cached_tokens) == (10, 2)
    assert (row.output_tokens, row.reasoning_tokens) == (6, 4)
    assert await claim(batches, batch_id) == []


# Ends


async def test_a_batch_is_finalized_when_all_lines_have_a_result(batches: PostgresBatches) -> None:
    batch_id = await begin(batches, 3)
    claimed = await claim(batches, batch_id)
    for line in claimed[:2]:
        await record(batches, line, succeeded=line.number == 1)
    await batches.finalize_batch(T, batch_id)
    assert (await row_of(batches, batch_id)).status == "in_progress"
    assert not await finish(batches, batch_id, "completed")
    await record(batches, claimed[2])
    await batches.finalize_batch(T, batch_id)
    assert (await row_of(batches, batch_id)).status == "finalizing"
    assert await finish(batches, batch_id, "completed")
    assert not await finish(batches, batch_id, "completed")
    row = await row_of(batches, batch_id)
    assert (row.status, row.completed, row.failed) == ("completed", 2, 1)
    assert None not in (row.in_progress_at, row.finalizing_at, row.completed_at)
    assert await numbers(batches, row.output_file_id) == [1, 3]
    assert await numbers(batches, row.error_file_id) == [2]
    assert row.output_file_id is not None
    file = await batches.file(T, row.output_file_id)
    assert file is not None
    assert (file.purpose, file.filename) == ("batch_output", f"{batch_id}_output.jsonl")
    assert file.size_bytes == len(await content(batches, file.id))
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == pytest.approx(60.0)


async def test_a_large_output_is_cut_into_pieces_between_lines(batches: PostgresBatches) -> None:
    batch_id = await begin(batches, 40)
    for line in await claim(batches, batch_id):
        result = b',"of":%d,"x":"%b"}\n' % (line.number, b"x" * (PIECE_BYTES // 10))
        await batches.record(line, succeeded=True, result=result, usage=LineUsage())
    await batches.finalize_batch(T, batch_id)
    assert await finish(batches, batch_id, "completed")
    output = (await row_of(batches, batch_id)).output_file_id
    assert output is not None
    assert await numbers(batches, output) == list(range(1, 41))
    pieces = [await batches.read_piece(T, output, n) for n in range(4)]
    assert all(piece and piece.endswith(b"\n") and len(piece) < 2 * PIECE_BYTES for piece in pieces)
    assert (await row_of(batches, batch_id)).error_file_id is None


async def test_a_cancel_stops_new_lines_and_waits_for_those_that_run(
    batches: PostgresBatches,
) -> None:
    batch_id = await begin(batches, 5)
    first, second = await claim(batches, batch_id, limit=2)
    await record(batches, first)
    row = await batches.cancel_batch(T, batch_id)
    assert row is not None
    assert (row.status, row.running) == ("cancelling", True)
    assert await claim(batches, batch_id) == []
    assert not await finish(batches, batch_id, "cancelled")
    assert await record(batches, second)
    assert not (await row_of(batches, batch_id)).running
    assert await finish(batches, batch_id, "cancelled")
    row = await row_of(batches, batch_id)
    assert (row.status, row.completed, row.failed) == ("cancelled", 2, 3)
    assert await numbers(batches, row.output_file_id) == [1, 2]
    assert await numbers(batches, row.error_file_id) == [None, None, None]


async def test_a_batch_that_is_cancelled_before_it_begins_has_no_files(
    batches: PostgresBatches,
) -> None:
    batch_id = await order(batches)
    await batches.claim_batch(T, batch_id, ME, lease_s=LEASE_S)
    await batches.add_lines(T, batch_id, ME, lines(3), lease_s=LEASE_S)
    await batches.cancel_batch(T, batch_id)
    assert not await batches.begin_batch(T, batch_id, ME, total=3)
    assert await finish(batches, batch_id, "cancelled")
    row = await row_of(batches, batch_id)
    assert (row.status, row.output_file_id, row.error_file_id) == ("cancelled", None, None)


async def test_a_batch_that_is_overdue_keeps_what_is_done(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    batch_id = await begin(batches, 3)
    first, second = await claim(batches, batch_id, limit=2)
    await record(batches, first)
    assert not await finish(batches, batch_id, "expired")
    await expire(other, batch_id)
    assert await claim(batches, batch_id) == []
    assert (await row_of(batches, batch_id)).running
    assert not await finish(batches, batch_id, "expired")
    await batches.put_off(second, ME, 60.0)
    assert await finish(batches, batch_id, "expired")
    row = await row_of(batches, batch_id)
    assert (row.status, row.completed, row.failed) == ("expired", 1, 2)
    assert await numbers(batches, row.output_file_id) == [1]
    assert len(await numbers(batches, row.error_file_id)) == 2
    assert not await record(batches, second)


async def test_what_has_ended_is_not_cancelled(batches: PostgresBatches) -> None:
    batch_id = await begin(batches, 1)
    for line in await claim(batches, batch_id):
        await record(batches, line)
    await batches.finalize_batch(T, batch_id)
    row = await batches.cancel_batch(T, batch_id)
    assert row is not None
    assert row.status == "finalizing"
    assert await batches.cancel_batch("another tenant", batch_id) is None


async def test_batches_are_listed_newest_first(batches: PostgresBatches) -> None:
    made = sorted([await order(batches) for _ in range(3)], reverse=True)
    assert [row.id for row in await batches.batches(T, after=None, limit=10)] == made
    assert [row.id for row in await batches.batches(T, after=made[0], limit=1)] == [made[1]]
    assert await batches.batches("another tenant", after=None, limit=10) == []
    assert (await row_of(batches, made[0])).metadata == {"a": "b"}


async def test_it_says_when_the_server_is_away_and_goes_on_when_it_is_back(
    batches: PostgresBatches, services: Services
) -> None:
    batch_id = await order(batches)
    await services.aside(services.postgres.stop(hurry=True))
    with pytest.raises(StorageUnavailableError):
        await batches.batch(T, batch_id)
    await services.aside(services.postgres.start())

    async def back() -> bool:
        try:
            return await batches.batch(T, batch_id) is not None
        except StorageUnavailableError:
            return False

    await until(back, "the batch is found again")
