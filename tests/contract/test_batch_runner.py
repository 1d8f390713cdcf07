"""Runners of batches on real PostgreSQL, with models that the tests answer for."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from psycopg import AsyncConnection

from agentray.clock import SystemClock
from agentray.config.settings import BatchSettings, PostgresSettings
from agentray.errors import StorageError, StorageUnavailableError
from agentray.ids import new_batch_id, new_file_id
from agentray.models.batch import BatchRunner, Reply
from agentray.storage.batches import BatchRow, ClaimedLine
from agentray.storage.postgres_batches import PostgresBatches
from tests.services import Services, until

T = "tenant"
CHAT = "/v1/chat/completions"
SETTINGS = {"sweep_s": 0.02, "lease_s": 1.0, "concurrency": 4}

Answer = Callable[[dict[str, Any]], Awaitable[Reply]]


@pytest.fixture
async def batches(services: Services) -> AsyncIterator[PostgresBatches]:
    store = PostgresBatches(services.postgres.url, PostgresSettings())
    yield store
    await store.close()


async def well(body: dict[str, Any]) -> Reply:
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    return Reply(200, json.dumps({"said": body["n"], "usage": usage}).encode())


def error(status: int, code: str, retry_after_s: float | None = None) -> Reply:
    return Reply(status, json.dumps({"error": {"code": code}}).encode(), retry_after_s)


def runner_of(
    store: PostgresBatches,
    answer: Answer = well,
    *,
    name: str = "me",
    idle: Callable[[], bool] = lambda: True,
    **settings: Any,
) -> BatchRunner:
    async def call(path: str, body: bytes) -> Reply:
        assert path == CHAT
        return await answer(json.loads(body))

    return BatchRunner(
        store=store,
        call=call,
        idle=idle,
        settings=BatchSettings(**{**SETTINGS, **settings}),
        name=name,
        clock=SystemClock(),
    )


@asynccontextmanager
async def running(
    store: PostgresBatches, answer: Answer = well, **how: Any
) -> AsyncIterator[BatchRunner]:
    runner = runner_of(store, answer, **how)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
        assert not task.done()
    finally:
        await end(task)
        await runner.close()


async def end(task: asyncio.Task[None]) -> None:
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.5)
    with suppress(asyncio.CancelledError):
        task.result()


async def order(
    store: PostgresBatches, count: int = 0, *, text: bytes | None = None, **body: Any
) -> str:
    lines = [
        {"custom_id": f"c{n}", "method": "POST", "url": CHAT, "body": {"n": n, **body}}
        for n in range(count)
    ]
    if text is None:
        text = "\n".join(map(json.dumps, lines)).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(text), 100):
            yield text[at : at + 100]

    file = await store.create_file(
        T, new_file_id(), pieces(), purpose="batch", filename="in", ttl_s=None
    )
    row = await store.create_batch(
        T,
        new_batch_id(),
        input_file_id=file.id,
        endpoint=CHAT,
        metadata=None,
        window_s=3_600.0,
        output_ttl_s=3_600.0,
    )
    return row.id


async def row_of(store: PostgresBatches, batch_id: str) -> BatchRow:
    row = await store.batch(T, batch_id)
    assert row is not None
    return row


async def becomes(store: PostgresBatches, batch_id: str, *statuses: str) -> BatchRow:
    async def there() -> bool:
        return (await row_of(store, batch_id)).status in statuses

    await until(there, f"the batch is {statuses}")
    return await row_of(store, batch_id)


async def lines_of(store: PostgresBatches, file_id: str | None) -> dict[str, Any]:
    """Return the lines of a file by their custom_id; each is there once."""
    if file_id is None:
        return {}
    text = b""
    number = 0
    while (piece := await store.read_piece(T, file_id, number)) is not None:
        text, number = text + piece, number + 1
    found = [json.loads(line) for line in text.splitlines()]
    counts = Counter(line["custom_id"] for line in found)
    assert set(counts.values()) <= {1}
    return {line["custom_id"]: line for line in found}


async def ended(store: PostgresBatches, row: BatchRow) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what was answered and what was not; no line is in both."""
    output = await lines_of(store, row.output_file_id)
    errors = await lines_of(store, row.error_file_id)
    assert not set(output) & set(errors)
    assert (len(output), len(errors)) == (row.completed, row.failed)
    assert len(output) + len(errors) == row.total
    return output, errors


async def test_a_batch_is_read_run_and_written(batches: PostgresBatches) -> None:
    async with running(batches):
        batch_id = await order(batches, 50)
        row = await becomes(batches, batch_id, "completed")
    output, errors = await ended(batches, row)
    assert (len(output), errors, row.error_file_id) == (50, {}, None)
    assert output["c7"]["response"]["body"]["said"] == 7
    assert output["c7"]["response"]["status_code"] == 200
    assert (row.input_tokens, row.output_tokens) == (50, 100)


async def test_what_is_wrong_with_a_file_ends_its_batch(batches: PostgresBatches) -> None:
    async with running(batches):
        row = await becomes(batches, await order(batches, text=b"{}\n\nbroken"), "failed")
        empty = await becomes(batches, await order(batches, text=b"\n"), "failed")
    assert row.errors is not None
    assert [(fault.code, fault.line) for fault in row.errors] == [
        ("missing_required_parameter", 1),
        ("invalid_json_line", 3),
    ]
    assert empty.errors is not None
    assert empty.errors[0].code == "empty_file"


async def test_a_file_that_was_deleted_ends_its_batch(batches: PostgresBatches) -> None:
    batch_id = await order(batches, 1)
    await batches.delete_file(T, (await row_of(batches, batch_id)).input_file_id)
    async with running(batches):
        row = await becomes(batches, batch_id, "failed")
    assert row.errors is not None
    assert row.errors[0].code == "file_not_found"


async def test_lasting_errors_are_results_and_passing_ones_are_tried_again(
    batches: PostgresBatches,
) -> None:
    asked: Counter[int] = Counter()

    async def answer(body: dict[str, Any]) -> Reply:
        n = body["n"]
        asked[n] += 1
        if n == 1:
            return error(400, "model_error")
        if n in (2, 3) and asked[n] == 1:
            return error(429, "model_rate_limited", 0.01) if n == 2 else error(502, "away")
        return await well(body)

    async with running(batches, answer):
        row = await becomes(batches, await order(batches, 5), "completed")
    output, errors = await ended(batches, row)
    assert set(output) == {"c0", "c2", "c3", "c4"}
    assert errors["c1"]["response"]["status_code"] == 400
    assert errors["c1"]["response"]["body"] == {"error": {"code": "model_error"}}
    assert asked == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1}


async def test_a_line_that_asks_for_a_stream_is_refused_without_a_call(
    batches: PostgresBatches,
) -> None:
    async def answer(body: dict[str, Any]) -> Reply:
        raise AssertionError(body)

    async with running(batches, answer):
        row = await becomes(batches, await order(batches, 2, stream=True), "completed")
    _, errors = await ended(batches, row)
    assert [line["response"]["body"]["error"]["param"] for line in errors.values()] == [
        "stream",
        "stream",
    ]


async def test_no_more_lines_run_at_once_than_may_and_none_while_others_work(
    batches: PostgresBatches,
) -> None:
    idle = False
    asked = now = most = 0

    def is_idle() -> bool:
        nonlocal asked
        asked += 1
        return idle

    async def answer(body: dict[str, Any]) -> Reply:
        nonlocal now, most
        assert idle
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.005)
        now -= 1
        return await well(body)

    batch_id = await order(batches, 20)
    async with running(batches, answer, idle=is_idle) as runner:

        async def swept() -> bool:
            return asked > 3

        await until(swept, "some sweeps in which nothing may begin")
        assert (await row_of(batches, batch_id)).status == "validating"
        idle = True
        await becomes(batches, batch_id, "completed")
        assert runner.running == 0
    assert most == 4


async def test_batches_share_what_is_free(batches: PostgresBatches) -> None:
    gate = asyncio.Semaphore(0)
    waiting = answered = 0

    async def answer(body: dict[str, Any]) -> Reply:
        nonlocal waiting, answered
        if body.get("long"):
            waiting += 1
            await gate.acquire()
            waiting -= 1
            answered += 1
        return await well(body)

    async with running(batches, answer, concurrency=2):
        long = await order(batches, 30, long=True)

        async def held() -> bool:
            return waiting == 2

        await until(held, "two of the long one's lines hold both places")
        short = await order(batches, 3)
        await becomes(batches, short, "in_progress")

        async def done() -> bool:
            # Those that hold both places go on one at a time.
            if waiting == 2:
                gate.release()
            return (await row_of(batches, short)).status == "completed"

        try:
            await until(done, "the short one is done")
            # It did not wait for all of the long one: each had every other place.
            assert answered <= 15
        finally:
            for _ in range(30):
                gate.release()
        await becomes(batches, long, "completed")


async def test_a_cancel_lets_what_runs_end_and_keeps_it(batches: PostgresBatches) -> None:
    go = asyncio.Event()
    asked: set[int] = set()

    async def answer(body: dict[str, Any]) -> Reply:
        asked.add(body["n"])
        if body["n"] >= 4:
            await go.wait()
        return await well(body)

    async with running(batches, answer):
        batch_id = await order(batches, 20)

        async def held() -> bool:
            return len(asked) == 8

        await until(held, "four have ended and four run")
        await batches.cancel_batch(T, batch_id)
        assert (await row_of(batches, batch_id)).status == "cancelling"
        go.set()
        row = await becomes(batches, batch_id, "cancelled")
    output, errors = await ended(batches, row)
    assert (row.total, len(asked), len(output)) == (20, 8, 8)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}


async def test_what_is_overdue_is_kept_and_the_rest_is_named(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    async def answer(body: dict[str, Any]) -> Reply:
        return await well(body) if body["n"] < 3 else error(503, "not_ready", 60.0)

    async with running(batches, answer):
        batch_id = await order(batches, 5)

        async def tried() -> bool:
            cursor = await other.execute("SELECT count(result), count(claimed_by) FROM batch_lines")
            return await cursor.fetchone() == (3, 0)

        await until(tried, "three lines were answered, and one was put off")
        await other.execute("UPDATE batches SET expires_at = now()")
        row = await becomes(batches, batch_id, "expired")
    output, errors = await ended(batches, row)
    assert set(output) == {"c0", "c1", "c2"}
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}


async def test_lines_of_a_runner_that_died_are_run_by_another_and_are_there_once(
    batches: PostgresBatches,
) -> None:
    begun = asyncio.Event()

    async def never(body: dict[str, Any]) -> Reply:
        begun.set()
        return await asyncio.Future()

    dead = runner_of(batches, never, name="dies", lease_s=0.3)
    task = asyncio.create_task(dead.run())
    batch_id = await order(batches, 30)
    await begun.wait()
    # As kill -9: it renews nothing and gives nothing back.
    await end(task)
    for child in dead._tasks:
        child.cancel()
    async with running(batches, name="lives"):
        row = await becomes(batches, batch_id, "completed")
    output, _ = await ended(batches, row)
    assert len(output) == 30


async def test_leases_are_renewed_while_a_line_takes_its_time(batches: PostgresBatches) -> None:
    asked: Counter[int] = Counter()

    async def slow(body: dict[str, Any]) -> Reply:
        asked[body["n"]] += 1
        await asyncio.sleep(1.0)  # longer than the lease
        return await well(body)

    async with (
        running(batches, slow, name="me", lease_s=0.3),
        running(batches, slow, name="other", lease_s=0.3),
    ):
        row = await becomes(batches, await order(batches, 8), "completed")
    await ended(batches, row)
    assert set(asked.values()) == {1}


async def test_a_runner_that_is_closed_gives_its_lines_back(batches: PostgresBatches) -> None:
    begun = asyncio.Event()

    async def never(body: dict[str, Any]) -> Reply:
        begun.set()
        return await asyncio.Future()

    async with running(batches, never, lease_s=3_600.0):
        batch_id = await order(batches, 5)
        await begun.wait()
    async with running(batches):
        row = await becomes(batches, batch_id, "completed")
    await ended(batches, row)


async def test_a_result_waits_for_a_store_that_is_away(
    batches: PostgresBatches, services: Services
) -> None:
    begun, go = asyncio.Event(), asyncio.Event()
    asked: Counter[int] = Counter()

    async def answer(body: dict[str, Any]) -> Reply:
        asked[body["n"]] += 1
        begun.set()
        await go.wait()
        return await well(body)

    async with running(batches, answer, lease_s=60.0):
        batch_id = await order(batches, 2)
        await begun.wait()
        await services.aside(services.postgres.stop(hurry=True))
        go.set()
        await services.aside(services.postgres.start())
        row = await becomes_after_outage(batches, batch_id)
    await ended(batches, row)
    assert asked == {0: 1, 1: 1}


class Lossy(PostgresBatches):
    """A store that fails as a test tells it to."""

    claims_lost = 0
    unending: str | None = None
    pieces_left: int | None = None

    async def claim_lines(self, *about: Any, **how: Any) -> list[ClaimedLine]:
        lines = await super().claim_lines(*about, **how)
        if lines and self.claims_lost:
            self.claims_lost -= 1
            raise StorageUnavailableError("it took them, and its answer was lost")
        return lines

    async def finish_batch(self, tenant: str, batch_id: str, *about: Any, **how: Any) -> bool:
        if batch_id == self.unending:
            raise StorageError("it refused")
        return await super().finish_batch(tenant, batch_id, *about, **how)

    async def read_piece(self, tenant: str, file_id: str, number: int) -> bytes | None:
        if self.pieces_left is not None and number >= self.pieces_left:
            return None
        return await super().read_piece(tenant, file_id, number)


@pytest.fixture
async def lossy(services: Services) -> AsyncIterator[Lossy]:
    store = Lossy(services.postgres.url, PostgresSettings())
    yield store
    await store.close()


async def test_lines_whose_claim_was_lost_are_run_while_others_are_renewed(lossy: Lossy) -> None:
    go = asyncio.Event()
    asked: set[int] = set()

    async def answer(body: dict[str, Any]) -> Reply:
        asked.add(body["n"])
        if body["n"] == 4:
            await go.wait()
        return await well(body)

    lossy.claims_lost = 1
    async with running(lossy, answer, lease_s=0.3):
        batch_id = await order(lossy, 5)

        async def all_asked() -> bool:
            return asked == set(range(5))

        await until(all_asked, "lines of the lost claim are run beside the one that takes long")
        go.set()
        await ended(lossy, await becomes(lossy, batch_id, "completed"))


async def test_a_line_that_breaks_its_runner_is_tried_again_and_not_for_ever(
    batches: PostgresBatches, other: AsyncConnection[Any]
) -> None:
    asked: Counter[int] = Counter()

    async def answer(body: dict[str, Any]) -> Reply:
        asked[body["n"]] += 1
        if body["n"] == 0:
            raise RuntimeError
        if body["n"] == 1:
            return Reply(200, b"<html>")
        return await well(body)

    # No lease ends here in time.
    async with running(batches, answer, lease_s=3_600.0):
        batch_id = await order(batches, 3)

        async def put_off() -> bool:
            cursor = await other.execute(
                "UPDATE batch_lines SET attempts = 9 WHERE number = 1 AND attempts = 1"
                " AND claimed_by IS NULL RETURNING 1"
            )
            return await cursor.fetchone() is not None

        await until(put_off, "the line that breaks is put off")
        row = await becomes(batches, batch_id, "completed")
    output, errors = await ended(batches, row)
    assert set(output) == {"c1", "c2"}
    assert output["c1"]["response"]["body"] == "<html>"
    assert errors["c0"]["response"]["body"]["error"]["code"] == "internal_error"
    assert asked[0] == 2


async def test_a_model_that_is_away_is_asked_by_few_lines(batches: PostgresBatches) -> None:
    asked = looks = 0

    def is_idle() -> bool:
        nonlocal looks
        looks += 1
        return True

    async def away(body: dict[str, Any]) -> Reply:
        nonlocal asked
        asked += 1
        return error(502, "model_unavailable")

    batch_id = await order(batches, 500)
    async with running(batches, away, idle=is_idle):

        async def tried() -> bool:
            return asked > 0

        await until(tried, "lines were put off")
        # Longer than 500 lines that are refused at once would take.
        for _ in range(20):
            await row_of(batches, batch_id)
            await asyncio.sleep(0.02)
        # A rest is half a second or more, and only then four may be asked again.
        assert asked <= 8


async def test_a_batch_rests_while_another_ones_model_answers(batches: PostgresBatches) -> None:
    refused = 0

    async def answer(body: dict[str, Any]) -> Reply:
        nonlocal refused
        if not body.get("away"):
            return await well(body)
        refused += 1
        return error(429, "model_rate_limited", 60.0)

    async with running(batches, answer, concurrency=1):
        resting = await order(batches, 10, away=True)
        await becomes(batches, resting, "in_progress")
        await becomes(batches, await order(batches, 10), "completed")
        assert (await row_of(batches, resting)).completed == 0
    assert refused == 1


async def test_a_batch_never_begins_with_a_part_of_its_input(lossy: Lossy) -> None:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"n": 0}}
    first = json.dumps(line).ljust(99).encode() + b"\n"  # one piece, and whole lines
    second = json.dumps({**line, "custom_id": "b"}).encode()
    # As if the file was deleted between two pieces.
    lossy.pieces_left = 1
    async with running(lossy):
        row = await becomes(lossy, await order(lossy, text=first + second), "failed")
    assert row.errors is not None
    assert [fault.code for fault in row.errors] == ["file_not_found"]


async def test_a_batch_that_cannot_be_ended_holds_up_no_other(lossy: Lossy) -> None:
    async with running(lossy):
        lossy.unending = await order(lossy, 1)
        await becomes(lossy, lossy.unending, "finalizing")
        await becomes(lossy, await order(lossy, 5), "completed")
        assert (await row_of(lossy, lossy.unending)).status == "finalizing"


async def becomes_after_outage(store: PostgresBatches, batch_id: str) -> BatchRow:
    async def there() -> bool:
        with suppress(Exception):
            return (await row_of(store, batch_id)).status == "completed"
        return False

    await until(there, "the batch is completed")
    return await row_of(store, batch_id)
