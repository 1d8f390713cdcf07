"""The pool of tool workers, real: actors of Ray, connections between them, and kills."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from agentray.clock import SystemClock
from agentray.config.settings import Settings
from agentray.tools import worker as worker_module
from agentray.tools.client import ToolClient
from agentray.tools.spec import ToolResult
from agentray.tools.worker import (
    SCHEDULER,
    WORKER_PREFIX,
    find_scheduler,
    replace_scheduler,
)
from tests.tool_pool import Pool, ask, running_pool

WORKERS, SLOTS = 2, 4
SETTINGS: dict[str, Any] = {
    "min": WORKERS,
    "max": WORKERS,
    "slots": SLOTS,
    # One for each test that fills a queue: none meets what another one left.
    "tenants": {
        name: {"max_running": 1, "max_queued": 3} for name in ("bounded", "late", "cut", "shown")
    },
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    untyped = cast(Any, ray)
    untyped.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        untyped.shutdown()


@pytest.fixture(scope="module")
def started(cluster: None) -> Iterator[Pool]:
    with running_pool(Settings(tools={"workers": SETTINGS})) as pool:  # pyright: ignore[reportArgumentType]
        yield pool


@pytest.fixture
async def pool(started: Pool) -> Pool:
    """A pool with all its workers, whatever the test before did to them."""
    await until(lambda: started.connected() == WORKERS, 30)
    return started


@pytest.fixture
async def client() -> AsyncIterator[ToolClient]:
    async with opened("host") as client:
        yield client


@asynccontextmanager
async def opened(owner: str) -> AsyncIterator[ToolClient]:
    client = ToolClient(owner, find_scheduler, clock=SystemClock())
    try:
        yield client
    finally:
        await client.close()


class Notes:
    """What the runners wrote down."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def lines(self, what: str) -> list[list[str]]:
        path = Path(self.file)
        text = path.read_text() if path.exists() else ""
        return [line.split()[1:] for line in text.splitlines() if line.split()[0] == what]

    def keys(self, what: str) -> Counter[str]:
        return Counter(key for key, _ in self.lines(what))

    def pid(self, key: str) -> int:
        """Return the process where a call began last."""
        return [int(pid) for own, pid in self.lines("begun") if own == key][-1]


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


async def until(holds: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < deadline, "it did not come to that in time"
        await asyncio.sleep(0.02)


def kill(pid: int) -> None:
    assert pid > 1
    os.kill(pid, signal.SIGKILL)


async def test_a_call_runs_at_a_worker_and_its_result_comes_back(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    result = await client.call(ask("a", output="42", file=notes.file))
    assert result == ToolResult("ok", "42")
    workers = [pool.pid(name) for name in pool.workers()]
    assert notes.pid("a") in workers


async def test_calls_run_at_once_in_all_slots_of_all_workers(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    count = WORKERS * SLOTS
    calls = [
        asyncio.create_task(client.call(ask(f"at-once{n}", wait_s=30, file=notes.file)))
        for n in range(count + 1)
    ]
    await until(lambda: len(notes.lines("begun")) == count)
    assert Counter(pid for _, pid in notes.lines("begun")).most_common()[-1][1] == SLOTS
    await cancelled(*calls)


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_call_whose_worker_is_killed_runs_again_if_it_may(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    call = asyncio.create_task(
        client.call(ask("again", wait_s=1.5, file=notes.file, on_crash="retry"))
    )
    await until(lambda: notes.keys("begun") == {"again": 1})
    kill(notes.pid("again"))
    assert (await call).status == "ok"
    assert notes.keys("begun") == {"again": 2}
    assert notes.keys("ended") == {"again": 1}


async def test_a_call_whose_worker_is_killed_is_reported_and_not_run_again_if_it_must_not(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    call = asyncio.create_task(client.call(ask("once", wait_s=30, file=notes.file)))
    await until(lambda: notes.keys("begun") == {"once": 1})
    kill(notes.pid("once"))
    result = await call
    assert (result.status, result.reason) == ("error", "died")
    await until(lambda: pool.connected() == WORKERS, 30)
    assert notes.keys("begun") == {"once": 1}


async def test_a_scheduler_that_is_killed_loses_no_call_and_has_none_run_twice(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    before = pool.pid(SCHEDULER)
    calls = [
        asyncio.create_task(
            client.call(
                ask(
                    *(f"k{n}",),
                    wait_s=0.5,
                    file=notes.file,
                    on_crash="retry" if n % 2 else "report",
                )
            )
        )
        for n in range(4 * WORKERS * SLOTS)
    ]
    await until(lambda: len(notes.lines("ended")) >= 4)
    kill(before)
    results = await asyncio.gather(*calls)
    assert [result.status for result in results] == ["ok"] * len(calls)
    assert notes.keys("begun") == notes.keys("ended") == {f"k{n}": 1 for n in range(len(calls))}
    assert pool.pid(SCHEDULER) != before


async def test_a_scheduler_that_hangs_is_replaced_and_one_that_answers_is_not(
    pool: Pool, client: ToolClient, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_FIND_S", 2.0)
    before = pool.pid(SCHEDULER)
    await replace_scheduler()
    assert pool.pid(SCHEDULER) == before
    running = asyncio.create_task(client.call(ask("hung", wait_s=3.0, file=notes.file)))
    await until(lambda: notes.keys("begun") == {"hung": 1})
    os.kill(before, signal.SIGSTOP)
    try:
        asked = asyncio.create_task(client.call(ask("asked", file=notes.file)))
        await replace_scheduler()
        results = await asyncio.wait_for(asyncio.gather(running, asked), 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(before, signal.SIGCONT)
    assert [result.status for result in results] == ["ok", "ok"]
    assert pool.pid(SCHEDULER) != before
    assert notes.keys("begun") == {"hung": 1, "asked": 1}


async def test_kills_during_500_calls_lose_none_and_have_no_settled_one_run_twice(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    settled: dict[str, tuple[ToolResult, int]] = {}

    async def call(number: int) -> None:
        key = f"c{number}"
        on_crash = "retry" if number % 2 else "report"
        given = ask(key, session=f"s{number % 20}", wait_s=0.08, file=notes.file, on_crash=on_crash)
        result = await client.call(given)
        settled[key] = result, notes.keys("begun")[key]

    async with asyncio.TaskGroup() as tasks:
        for number in range(500):
            tasks.create_task(call(number))
        for target, share in (("1", 50), (SCHEDULER, 150), ("2", 250), (SCHEDULER, 350)):
            await until(lambda share=share: len(settled) >= share, 60)
            name = target if target == SCHEDULER else f"{WORKER_PREFIX}{target}"
            kill(await asyncio.to_thread(pool.pid, name))
    assert len(settled) == 500
    begun = notes.keys("begun")
    for key, (result, begun_then) in settled.items():
        assert begun[key] == begun_then, f"{key} began again after it was settled"
        if int(key[1:]) % 2:
            assert result.status == "ok"
        else:
            assert result.status == "ok" or result.reason == "died"
            assert begun[key] == 1
    died = sum(result.reason == "died" for result, _ in settled.values())
    again = sum(begun.values()) - 500
    # The kills met calls, and only what ran at the two workers then.
    assert 1 <= died + again <= 2 * SLOTS


async def test_a_tenants_queue_is_bounded_and_says_when_to_try_again(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    calls = [
        asyncio.create_task(client.call(ask(f"n{n}", tenant="bounded", wait_s=30, file=notes.file)))
        for n in range(5)
    ]
    (refused,), _ = await asyncio.wait(calls, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert refused is calls[4]
    assert refused.result().reason == "queue_full"
    assert "tried again" in refused.result().output
    await until(lambda: notes.keys("begun") == {"n0": 1})
    assert (await client.call(ask("other", tenant="wide"))).status == "ok"
    await cancelled(*calls)


async def test_a_call_that_still_waits_at_its_deadline_is_dropped(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    first = asyncio.create_task(
        client.call(ask("first", tenant="late", wait_s=30, file=notes.file))
    )
    await until(lambda: notes.keys("begun") == {"first": 1})
    began = time.monotonic()
    late = ask("late", tenant="late", file=notes.file, deadline=time.time() + 0.5)
    result = await client.call(late)
    assert result.reason == "expired"
    assert 0.4 <= time.monotonic() - began < 5
    await cancelled(first)
    assert (await client.call(ask("next", tenant="late", file=notes.file))).status == "ok"
    assert notes.keys("begun") == {"first": 1, "next": 1}


async def test_cancelling_a_call_kills_it_and_frees_its_slot(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    call = asyncio.create_task(client.call(ask("cut", tenant="cut", wait_s=60, file=notes.file)))
    await until(lambda: notes.keys("begun") == {"cut": 1})
    await cancelled(call)
    result = await client.call(ask("next", tenant="cut", file=notes.file))
    assert result.status == "ok"
    assert notes.keys("killed") == {"cut": 1}


async def test_a_fence_returns_when_what_an_older_owner_ran_has_ended(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    async with opened("old") as old:
        runs = asyncio.create_task(
            old.call(ask("runs", session="fenced", wait_s=60, file=notes.file))
        )
        await until(lambda: notes.keys("begun") == {"runs": 1})
        await client.fence("acme", "fenced", 2)
        assert notes.keys("killed") == {"runs": 1}
        assert (await runs).reason == "cancelled"
        late = await old.call(ask("late", session="fenced", file=notes.file))
        assert late.reason == "refused"
    assert notes.keys("begun") == {"runs": 1}


async def test_a_newer_owner_gets_the_result_of_a_call_that_runs_or_has_run(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    async with opened("old") as old:
        runs = asyncio.create_task(
            old.call(ask("taken", session="over", wait_s=1.0, output="7", file=notes.file))
        )
        await until(lambda: notes.keys("begun") == {"taken": 1})
        again = ask("taken", session="over", epoch=2, wait_s=1.0, output="7", file=notes.file)
        assert (await client.call(again)).output == "7"
        assert (await client.call(again)).output == "7"
        await cancelled(runs)
    assert notes.keys("begun") == notes.keys("ended") == {"taken": 1}


async def test_a_host_that_died_finds_its_call_running(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    async with opened("dies") as dies:
        lost = asyncio.create_task(
            dies.call(ask("left", session="behind", wait_s=1.0, file=notes.file))
        )
        await until(lambda: notes.keys("begun") == {"left": 1})
        for link in [dies._scheduler, *dies._doors.links()]:
            assert link is not None
            link.abort()
        again = ask("left", session="behind", epoch=2, wait_s=1.0, file=notes.file)
        assert (await client.call(again)).status == "ok"
        await cancelled(lost)
    assert notes.keys("begun") == notes.keys("ended") == {"left": 1}


async def test_position_and_expected_wait_are_visible(
    pool: Pool, client: ToolClient, notes: Notes
) -> None:
    told: dict[str, list[tuple[int, float]]] = {"second": [], "third": []}
    first = asyncio.create_task(
        client.call(ask("first", tenant="shown", wait_s=3, file=notes.file))
    )
    await until(lambda: notes.keys("begun") == {"first": 1})
    others: list[asyncio.Task[ToolResult]] = []
    for key, heard in told.items():
        others.append(
            asyncio.create_task(
                client.call(
                    ask(key, tenant="shown", file=notes.file),
                    on_queued=lambda *place, heard=heard: heard.append(place),
                )
            )
        )
        await until(lambda heard=heard: bool(heard))
    assert [heard[0][0] for heard in told.values()] == [1, 2]
    assert 0 < told["second"][0][1] <= told["third"][0][1]
    # And again, as it changes.
    await until(lambda: len(told["third"]) >= 2)
    assert [result.status for result in await asyncio.gather(first, *others)] == ["ok"] * 3


async def test_workers_are_added_while_calls_wait_long_and_removed_when_idle(
    cluster: None, started: Pool, client: ToolClient, notes: Notes
) -> None:
    # The last test of the module: its pool takes the place of the others', as it is made of other
    # settings.
    settings = {
        "min": 1,
        "max": 2,
        "slots": 2,
        "up_after_wait_s": 0.3,
        "up_delay_s": 0.3,
        "down_after_idle_s": 2.0,
    }
    small = Settings(tools={"workers": settings})  # pyright: ignore[reportArgumentType]
    with running_pool(small, made_of="other settings") as pool:
        await until(lambda: pool.connected() == 1)
        assert len(pool.workers()) == 1
        calls = [
            asyncio.create_task(client.call(ask(f"up{n}", wait_s=1.0, file=notes.file)))
            for n in range(24)
        ]
        await until(lambda: pool.connected() == 2, 20)
        results = await asyncio.gather(*calls)
        assert [result.status for result in results] == ["ok"] * 24
        assert len({pid for _, pid in notes.lines("begun")}) == 2
        await until(lambda: len(pool.workers()) == 1, 20)
        assert (await client.call(ask("after", file=notes.file))).status == "ok"
    assert set(notes.keys("begun").values()) == {1}
