"""Group commit on a store that misbehaves on purpose."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from agentray.errors import OwnershipLostError, StorageError, StorageUnavailableError
from agentray.sessions import journal as journal_module
from agentray.sessions.journal import Journal
from agentray.storage.base import Append, AppendResult, DurableStore

AWAY = StorageUnavailableError("away")
REFUSED = StorageError("refused")


class ShakyStore:
    """Journals with a fence. ``plans`` say, in order, what is to go wrong with each statement."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}
        self.journals: dict[str, list[bytes]] = {}
        self.statements: list[list[str]] = []
        self.plans: deque[Callable[[Sequence[Append]], None]] = deque()
        self.locked: set[str] = set()
        self.spoiling: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        self.statements.append([append.session_id for append in appends])
        await asyncio.sleep(0)
        await self.gate.wait()
        plan = self.plans.popleft() if self.plans else None
        if plan is not None and plan is not lose_the_answer:
            plan(appends)
        if self.spoiling & {append.session_id for append in appends}:
            raise REFUSED
        results = [self._one(append) for append in appends]
        if plan is lose_the_answer:
            raise AWAY
        return results

    def _one(self, append: Append) -> AppendResult:
        key = append.session_id
        epoch = self.epochs.setdefault(key, 1)
        written = self.journals.setdefault(key, [])
        if key in self.locked:
            return AppendResult("locked")
        if epoch != append.epoch or append.first_seq != len(written) + 1:
            return AppendResult("stale", epoch, len(written))
        written += append.events
        return AppendResult("landed", epoch, len(written))


def be_away(appends: Sequence[Append]) -> None:
    raise AWAY


def lose_the_answer(appends: Sequence[Append]) -> None:
    """Commit, then lose the acknowledgement."""


def lines(session: str, first_seq: int = 1, *, count: int = 1, epoch: int = 1) -> Append:
    return Append(
        tenant="t",
        session_id=session,
        epoch=epoch,
        first_seq=first_seq,
        events=tuple(f"{session}{first_seq + i}".encode() for i in range(count)),
    )


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> ShakyStore:
    monkeypatch.setattr(journal_module, "_AWAY_PAUSE_S", (0.0,))
    monkeypatch.setattr(journal_module, "_LOCKED_PAUSE_S", 0.0)
    return ShakyStore()


@pytest.fixture
def journal(store: ShakyStore) -> Journal:
    return Journal(cast(DurableStore, store))


def put(journal: Journal, append: Append) -> asyncio.Task[AppendResult]:
    return asyncio.get_running_loop().create_task(journal.append(append))


async def all_of(*tasks: asyncio.Task[AppendResult]) -> list[Any]:
    async with asyncio.timeout(5):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def turns_of_the_loop(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_comes_while_a_batch_is_under_way_is_the_next_batch(
    store: ShakyStore, journal: Journal
) -> None:
    store.gate.clear()
    first = put(journal, lines("a"))
    await turns_of_the_loop()
    rest = [put(journal, lines(name)) for name in "bcd"]
    await turns_of_the_loop()
    store.gate.set()
    results = await all_of(first, *rest)
    assert [result.outcome for result in results] == ["landed"] * 4
    assert store.statements == [["a"], ["b", "c", "d"]]


async def test_a_batch_has_a_bound(store: ShakyStore, journal: Journal) -> None:
    store.gate.clear()
    tasks = [put(journal, lines(f"s{i}")) for i in range(600)]
    await turns_of_the_loop()
    store.gate.set()
    await all_of(*tasks)
    assert sum(map(len, store.statements)) == 600
    assert max(map(len, store.statements)) == journal_module._MAX_BATCH


async def test_a_locked_row_does_not_stall_the_others(store: ShakyStore, journal: Journal) -> None:
    store.locked.add("a")
    stuck, free = put(journal, lines("a")), put(journal, lines("b"))
    [result] = await all_of(free)
    assert result.outcome == "landed"
    [result] = await all_of(put(journal, lines("b", 2)))
    assert result.outcome == "landed"
    assert not stuck.done()
    store.locked.clear()
    [result] = await all_of(stuck)
    assert result.outcome == "landed"
    assert store.journals["a"] == [b"a1"]


async def test_an_append_whose_acknowledgement_is_lost_is_neither_doubled_nor_lost(
    store: ShakyStore, journal: Journal
) -> None:
    store.plans.append(lose_the_answer)
    results = await all_of(put(journal, lines("a", count=3)), put(journal, lines("b")))
    assert [result.outcome for result in results] == ["landed"] * 2
    assert store.journals == {"a": [b"a1", b"a2", b"a3"], "b": [b"b1"]}
    assert len(store.statements) == 2
    [result] = await all_of(put(journal, lines("a", 4)))
    assert result.outcome == "landed"


async def test_an_append_that_never_arrived_is_sent_again(
    store: ShakyStore, journal: Journal
) -> None:
    store.plans += [be_away, be_away, be_away]
    task = put(journal, lines("a"))
    later = put(journal, lines("b"))
    await turns_of_the_loop(4)
    assert not journal.available
    assert [result.outcome for result in await all_of(task, later)] == ["landed"] * 2
    assert journal.available
    assert store.journals == {"a": [b"a1"], "b": [b"b1"]}


async def test_a_lost_acknowledgement_is_no_excuse_for_a_stale_owner(
    store: ShakyStore, journal: Journal
) -> None:
    """The new owner wrote as much as we would have: only the epoch tells."""

    def be_taken_over(appends: Sequence[Append]) -> None:
        store.epochs["a"] = 2
        store.journals["a"] = [b"of another"]
        raise AWAY

    store.plans.append(be_taken_over)
    [error] = await all_of(put(journal, lines("a")))
    assert isinstance(error, OwnershipLostError)
    assert store.journals["a"] == [b"of another"]


async def test_a_stale_append_that_was_sent_once_is_refused(
    store: ShakyStore, journal: Journal
) -> None:
    """Whoever says that this landed invents an event: the journal is at that seq by another."""
    await all_of(put(journal, lines("a")))
    [error] = await all_of(put(journal, lines("a")))
    assert isinstance(error, OwnershipLostError)
    assert error.fields["outcome"] == "stale"


async def test_an_append_that_spoils_its_batch_hurts_no_other(
    store: ShakyStore, journal: Journal
) -> None:
    store.spoiling.add("b")
    store.gate.clear()
    tasks = [put(journal, lines(name)) for name in "abc"]
    await turns_of_the_loop()
    store.gate.set()
    good, error, fine = await all_of(*tasks)
    assert (good.outcome, fine.outcome) == ("landed", "landed")
    assert error is REFUSED
    assert store.journals == {"a": [b"a1"], "c": [b"c1"]}


async def test_the_store_may_go_away_while_a_spoiling_append_is_looked_for(
    store: ShakyStore, journal: Journal
) -> None:
    store.spoiling.add("b")
    store.plans += [lambda _: None, be_away, lambda _: None, lose_the_answer]
    results = await all_of(*[put(journal, lines(name)) for name in "abcd"])
    assert [getattr(result, "outcome", result) for result in results] == [
        "landed",
        REFUSED,
        "landed",
        "landed",
    ]
    assert store.journals == {name: [f"{name}1".encode()] for name in "acd"}


async def test_a_caller_that_leaves_withdraws_nothing(store: ShakyStore, journal: Journal) -> None:
    store.gate.clear()
    task = put(journal, lines("a"))
    await turns_of_the_loop()
    task.cancel()
    store.gate.set()
    [result] = await all_of(put(journal, lines("b")))
    assert result.outcome == "landed"
    assert store.journals["a"] == [b"a1"]


async def test_stopping_writes_what_is_queued_and_takes_no_more(
    store: ShakyStore, journal: Journal
) -> None:
    store.gate.clear()
    tasks = [put(journal, lines(name)) for name in "ab"]
    await turns_of_the_loop()
    stopping = asyncio.get_running_loop().create_task(journal.stop())
    await turns_of_the_loop()
    store.gate.set()
    async with asyncio.timeout(5):
        await stopping
    assert [result.outcome for result in await all_of(*tasks)] == ["landed"] * 2
    with pytest.raises(OwnershipLostError):
        await journal.append(lines("c"))


async def test_stopping_does_not_wait_for_a_store_that_is_away(
    store: ShakyStore, journal: Journal
) -> None:
    store.plans += [be_away] * 10_000
    task = put(journal, lines("a"))
    await turns_of_the_loop()
    async with asyncio.timeout(5):
        await journal.stop()
    assert "a" not in store.journals
    task.cancel()
