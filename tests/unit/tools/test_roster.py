"""Which workers there are, and what is known of those that are lost."""

from __future__ import annotations

from agentray.tools import roster as roster_module
from agentray.tools.messages import Register
from agentray.tools.roster import LOST_S, SILENT_S, Roster


def register(worker: str, *, name: str = "", slots: int = 2) -> Register:
    return Register(worker, name or worker, "127.0.0.1", 1, "token", slots, [], [])


def roster_of(*workers: str, expected: tuple[str, ...] = ()) -> Roster:
    roster = Roster(expected, 0.0, settle_s=8.0)
    for worker in workers:
        roster.register(register(worker), 0.0)
    return roster


def test_it_is_settled_when_all_that_were_there_have_come_or_time_is_up() -> None:
    assert roster_of().settled(0.0)
    roster = roster_of("one", expected=("one", "two"))
    assert not roster.settled(7.9)
    roster.register(register("new-id", name="two"), 5.0)
    assert roster.settled(5.0)
    assert roster_of("one", expected=("one", "two")).settled(8.0)


def test_once_settled_it_stays_so() -> None:
    roster = roster_of(expected=("one",))
    assert roster.settled(8.0)
    assert roster.settled(1.0)


def test_a_lost_worker_is_given_up_when_it_stays_away() -> None:
    roster = roster_of("a", "b")
    roster.lost(roster.workers["a"], 10.0)
    assert roster.given_up(10.0 + LOST_S - 0.1) == []
    assert [worker.id for worker in roster.given_up(10.0 + LOST_S)] == ["a"]
    roster.register(register("a"), 11.0)
    assert roster.given_up(100.0) == []


def test_a_worker_that_says_nothing_is_silent_only_while_it_is_connected() -> None:
    roster = roster_of("a", "b")
    roster.workers["b"].seen_at = 10.0
    assert [worker.id for worker in roster.silent(SILENT_S)] == ["a"]
    roster.lost(roster.workers["a"], SILENT_S)
    assert roster.silent(SILENT_S) == []


def test_slots_of_workers_that_are_away_or_leave_are_not_counted_nor_chosen() -> None:
    roster = roster_of("away", "leaves", "there")
    roster.lost(roster.workers["away"], 0.0)
    roster.workers["leaves"].draining = True
    assert roster.slots == 2
    chosen = roster.choose()
    assert chosen is not None
    assert chosen.id == "there"
    chosen.leases.update({1, 2})
    assert roster.choose() is None


def test_what_a_dead_worker_kept_is_gone() -> None:
    roster = roster_of("a", "b")
    a, b = roster.workers["a"], roster.workers["b"]
    roster.keep(a, ["one", "two"])
    roster.keep(b, ["two"])
    roster.died(a)
    assert roster.keeper("one") is None
    assert roster.keeper("two") is b
    assert roster.is_dead("a")
    assert not roster.is_dead("b")


def test_the_dead_are_remembered_up_to_a_bound() -> None:
    roster = roster_of()
    for number in range(roster_module._MAX_DEAD + 1):
        roster.register(register(str(number)), 0.0)
        roster.died(roster.workers[str(number)])
    assert not roster.is_dead("0")
    assert roster.is_dead("1")
