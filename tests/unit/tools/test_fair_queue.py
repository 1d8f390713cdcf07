"""Which call is next: shares by weight and cost, classes, caps, bounds, and where a call stands."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentray.tools import fair_queue
from agentray.tools.fair_queue import CLASS_WEIGHTS, Call, FairQueue, Share
from agentray.tools.runner import Priority

TENANTS = ("ada", "bob", "eve")
CLASSES: tuple[Priority, ...] = ("interactive", "background", "batch")


def queue_of(shares: Mapping[str, Share] | None = None, *, max_queued: int = 10_000) -> FairQueue:
    known = shares or {}
    return FairQueue(lambda tenant: known.get(tenant, Share()), max_queued=max_queued)


def call(
    key: str, tenant: str = "ada", *, cost: float = 1.0, priority: Priority = "interactive"
) -> Call:
    return Call(key, tenant, priority, cost, cost)


def fill(queue: FairQueue, tenant: str, count: int, **how: Any) -> None:
    for number in range(count):
        assert queue.add(call(f"{tenant}{number}", tenant, **how)) is None


def popped(queue: FairQueue, count: int) -> list[Call]:
    """Run so many calls, one after the other, each as long as it was expected to."""
    found: list[Call] = []
    for _ in range(count):
        next_call = queue.pop()
        assert next_call is not None
        queue.ended(next_call)
        found.append(next_call)
    return found


def served(calls: list[Call]) -> Mapping[str, float]:
    costs: defaultdict[str, float] = defaultdict(float)
    for each in calls:
        costs[each.tenant] += each.cost
    return costs


# Shares


def test_calls_of_one_tenant_begin_in_the_order_they_came() -> None:
    queue = queue_of()
    fill(queue, "ada", 20)
    assert [each.key for each in popped(queue, 20)] == [f"ada{n}" for n in range(20)]
    assert queue.pop() is None


def test_who_asks_for_long_calls_gets_as_many_seconds_as_who_asks_for_short_ones() -> None:
    queue = queue_of()
    fill(queue, "ada", 100, cost=10.0)
    fill(queue, "bob", 1_000, cost=1.0)
    costs = served(popped(queue, 440))
    assert abs(costs["ada"] - costs["bob"]) <= 10.0


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 8.0]), min_size=2, max_size=5),
    costs=st.lists(st.floats(0.1, 10.0), min_size=5, max_size=5),
    slots=st.integers(1, 8),
)
def test_backlogged_tenants_get_time_by_their_weights(
    weights: list[float], costs: list[float], slots: int
) -> None:
    shares = {f"t{n}": Share(weight=weight) for n, weight in enumerate(weights)}
    queue = queue_of(shares)
    for tenant, cost in zip(shares, costs, strict=False):
        fill(queue, tenant, 400, cost=cost)
    running: list[Call] = []
    got: defaultdict[str, float] = defaultdict(float)
    for _ in range(300):
        begun = queue.pop()
        assert begun is not None
        got[begun.tenant] += begun.cost
        running.append(begun)
        if len(running) >= slots:
            queue.ended(running.pop(0))
    # Goyal et al.: two backlogged flows are never further apart than a call of each.
    for one, left in shares.items():
        for other, right in shares.items():
            apart = abs(got[one] / left.weight - got[other] / right.weight)
            most = costs[int(one[1])] / left.weight + costs[int(other[1])] / right.weight
            assert apart <= most + 1e-6


def test_who_had_nothing_to_run_has_saved_nothing_up() -> None:
    queue = queue_of()
    fill(queue, "ada", 500)
    popped(queue, 300)
    fill(queue, "bob", 200)
    costs = served(popped(queue, 100))
    assert abs(costs["ada"] - costs["bob"]) <= 1


def test_who_comes_back_pays_for_what_still_counts_against_it() -> None:
    queue = queue_of()
    fill(queue, "bob", 50)
    queue.add(call("long", "ada", cost=1.0))
    long = next(each for each in iter(queue.pop, None) if each.key == "long")
    queue.charge(long, 9.0)
    queue.ended(long)
    fill(queue, "ada", 50)
    keys = [each.tenant for each in popped(queue, 20)]
    assert "ada" not in keys[:5]


def test_a_call_that_takes_longer_than_expected_is_charged_while_it_runs() -> None:
    queue = queue_of()
    fill(queue, "ada", 10)
    fill(queue, "bob", 10)
    first = queue.pop()
    assert first is not None
    assert first.tenant == "ada"
    queue.charge(first, 5.0)
    assert [each.tenant for each in popped(queue, 5)] == ["bob"] * 5


def test_what_a_call_did_not_use_is_given_back() -> None:
    queue = queue_of()
    fill(queue, "ada", 20, cost=10.0)
    fill(queue, "bob", 20, cost=1.0)
    tenants: list[str] = []
    for _ in range(10):
        begun = queue.pop()
        assert begun is not None
        tenants.append(begun.tenant)
        # Ada's calls need a tenth of what is expected of them.
        queue.charge(begun, 1.0 - begun.cost)
        queue.ended(begun)
    assert abs(tenants.count("ada") - tenants.count("bob")) <= 1


def test_nobody_owes_for_slots_that_nobody_else_wanted() -> None:
    queue = queue_of()
    fill(queue, "ada", 1)
    (night,) = popped(queue, 1)
    queue.charge(night, 3_600.0)
    fill(queue, "ada", 20)
    fill(queue, "bob", 20)
    assert abs(served(popped(queue, 10))["ada"] - 5) <= 1


def test_a_class_does_not_owe_for_slots_that_no_other_one_wanted() -> None:
    queue = queue_of()
    fill(queue, "ada", 1, priority="batch")
    (night,) = popped(queue, 1)
    fill(queue, "bob", 1)
    popped(queue, 1)
    queue.charge(night, 3_600.0)
    fill(queue, "bob", 200)
    fill(queue, "ada", 20, priority="batch")
    assert served(popped(queue, 40))["ada"] >= 2


def test_what_is_not_owed_any_more_is_not_given_back_either() -> None:
    queue = queue_of()
    queue.add(call("long", "ada", cost=100.0))
    long = queue.pop()
    assert long is not None
    fill(queue, "ada", 50)
    fill(queue, "bob", 50)
    queue.charge(long, -99.0)
    queue.ended(long)
    assert abs(served(popped(queue, 20))["ada"] - 10) <= 1


@pytest.mark.parametrize("priority", ["interactive", "batch"])
def test_who_comes_does_not_wait_for_others_to_use_what_they_were_given_back(
    priority: Priority,
) -> None:
    queue = queue_of()
    fill(queue, "ada", 500, cost=10.0, priority=priority)
    begun = [queue.pop() for _ in range(16)]
    for each in begun:
        assert each is not None
        # A hundredth of what was expected.
        queue.charge(each, 0.1 - each.cost)
        queue.ended(each)
    queue.add(call("new", "bob"))
    assert "new" in [each.key for each in popped(queue, 2)]


# Classes


def test_classes_share_by_their_weights_and_none_starves() -> None:
    queue = queue_of()
    for priority in CLASSES:
        for number in range(500):
            assert queue.add(call(f"{priority}{number}", priority, priority=priority)) is None
    begun = Counter(each.priority for each in popped(queue, 420))
    total = sum(CLASS_WEIGHTS.values())
    for priority in CLASSES:
        assert begun[priority] == pytest.approx(420 * CLASS_WEIGHTS[priority] / total, abs=2)


def test_an_urgent_call_does_not_wait_behind_a_class_that_was_alone_for_long() -> None:
    queue = queue_of()
    fill(queue, "ada", 500, priority="batch")
    popped(queue, 400)
    queue.add(call("urgent", "bob"))
    assert popped(queue, 1)[0].key == "urgent"


def test_a_class_that_comes_back_does_not_catch_up_on_what_it_did_not_ask_for() -> None:
    queue = queue_of()
    fill(queue, "bob", 1, priority="batch")
    popped(queue, 1)
    fill(queue, "ada", 900)
    popped(queue, 400)
    fill(queue, "bob", 100, priority="batch")
    assert sum(each.priority == "batch" for each in popped(queue, 34)) <= 3


# Bounds


def test_no_more_calls_of_a_tenant_run_than_its_cap_and_others_go_on() -> None:
    queue = queue_of({"ada": Share(max_running=2)})
    fill(queue, "ada", 5)
    fill(queue, "ada2", 3, priority="batch")
    begun = [queue.pop() for _ in range(6)]
    assert Counter(each.tenant for each in begun if each) == {"ada": 2, "ada2": 3}
    first = begun[0]
    assert first is not None
    queue.ended(first)
    last = queue.pop()
    assert last is not None
    assert last.tenant == "ada"
    assert queue.pop() is None


def test_a_cap_counts_over_all_classes() -> None:
    queue = queue_of({"ada": Share(max_running=1)})
    for priority in CLASSES:
        queue.add(call(priority, "ada", priority=priority))
    begun = queue.pop()
    assert begun is not None
    assert queue.pop() is None
    queue.ended(begun)
    assert queue.pop() is not None


def test_a_tenants_queue_is_bounded() -> None:
    queue = queue_of({"ada": Share(max_queued=3)})
    fill(queue, "ada", 3)
    refused = queue.add(call("more"))
    assert refused is not None
    assert refused.key == "more"
    assert queue.add(call("other", "bob")) is None
    queue.pop()
    assert queue.add(call("again")) is None


def test_a_full_queue_makes_room_at_the_expense_of_who_filled_it() -> None:
    queue = queue_of(max_queued=10)
    fill(queue, "eve", 10)
    refused = queue.add(call("ada", "ada"))
    assert refused is not None
    assert refused.key == "eve9"
    again = queue.add(call("eve10", "eve"))
    assert again is not None
    assert again.key == "eve10"
    assert len(queue) == 10


def test_a_full_queue_sheds_the_least_urgent_class_first() -> None:
    queue = queue_of(max_queued=10)
    fill(queue, "eve", 9)
    queue.add(call("nightly", "bob", priority="batch"))
    refused = queue.add(call("now", "ada"))
    assert refused is not None
    assert refused.key == "nightly"


def test_a_heavier_tenant_may_have_more_waiting_before_it_makes_room() -> None:
    queue = queue_of({"ada": Share(weight=4.0)}, max_queued=10)
    fill(queue, "ada", 7)
    fill(queue, "bob", 3)
    refused = queue.add(call("light", "eve"))
    assert refused is not None
    assert refused.tenant == "bob"


def test_a_call_that_was_taken_out_neither_runs_nor_counts() -> None:
    queue = queue_of({"ada": Share(max_queued=2)})
    fill(queue, "ada", 2)
    assert queue.remove("ada0") == call("ada0")
    assert queue.remove("ada0") is None
    assert queue.add(call("more")) is None
    assert [each.key for each in popped(queue, 2)] == ["ada1", "more"]


def test_tenants_that_are_at_rest_are_forgotten_when_they_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fair_queue, "_MAX_IDLE_FLOWS", 10)
    asked: Counter[str] = Counter()

    def share_of(tenant: str) -> Share:
        asked[tenant] += 1
        return Share()

    queue = FairQueue(share_of, max_queued=1_000)
    for number in range(50):
        queue.add(call(str(number), f"t{number}"))
        if number % 2:
            queue.remove(str(number))
        else:
            popped(queue, 1)
    for number in range(50):
        queue.add(call(str(number), f"t{number}"))
    assert sum(count > 1 for count in asked.values()) >= 30


@pytest.mark.parametrize("what", ["refused", "no room", "evicted", "asked for"])
def test_tenants_whose_calls_never_ran_are_forgotten_too(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(fair_queue, "_MAX_IDLE_FLOWS", 10)
    own = Share(max_queued=0 if what == "refused" else 5)
    queue = FairQueue(lambda tenant: own if tenant[0] == "t" else Share(), max_queued=10)
    fill(queue, "ada", 10 if what == "no room" else 9)
    for number in range(100):
        new = call(str(number), f"t{number}", priority="batch")
        match what:
            case "asked for":
                queue.last_place(new, slots=1)
            case "evicted":
                assert queue.add(new) is None
                assert queue.add(call("urgent", "bob")) == new
                queue.remove("urgent")
            case _:
                assert queue.add(new) == new
    assert len(queue._tenants) <= 14
    assert sum(len(level.flows) for level in queue._levels.values()) <= 14


# Places


def test_a_call_behind_others_of_its_tenant_waits_for_them() -> None:
    queue = queue_of()
    fill(queue, "ada", 4, cost=2.0)
    place = queue.last_place(call("ada3", cost=2.0), slots=2)
    assert (place.position, place.wait_s) == (4, 4.0)


def test_the_first_call_of_a_tenant_stands_before_the_queue_of_a_flood() -> None:
    queue = queue_of()
    fill(queue, "eve", 1_000)
    popped(queue, 1)
    queue.add(call("ada", "ada"))
    place = queue.last_place(call("ada", "ada"), slots=1)
    assert place.position <= 2
    assert place.wait_s <= 2.0


def test_the_wait_of_a_class_counts_what_the_others_get() -> None:
    queue = queue_of()
    fill(queue, "ada", 10, priority="batch")
    alone = queue.last_place(call("ada9", priority="batch"), slots=1).wait_s
    fill(queue, "bob", 100)
    beside_few = queue.last_place(call("ada9", priority="batch"), slots=1)
    fill(queue, "eve", 500)
    beside_many = queue.last_place(call("ada9", priority="batch"), slots=1)
    assert (alone, beside_few.wait_s, beside_many.wait_s) == (10, 110, 10 + 9 * 16)
    assert (beside_few.position, beside_many.position) == (110, 10 + 9 * 16)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=4, max_size=4),
    costs=st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=4, max_size=4),
)
def test_a_call_begins_about_where_it_stood(
    lengths: list[int], weights: list[float], costs: list[float]
) -> None:
    queue = queue_of({f"t{n}": Share(weight=weight) for n, weight in enumerate(weights)})
    for number, length in enumerate(lengths):
        fill(queue, f"t{number}", length, cost=costs[number])
    places = dict(queue.places(slots=1, limit=1_000))
    assert len(places) == len(queue)
    order = [each.key for each in popped(queue, len(queue))]
    # A call of each other tenant may be on either side.
    slack = 1 + sum(8.0 for _ in lengths[1:])
    for position, key in enumerate(order, 1):
        note(f"{key}: {places[key]}")
        assert abs(places[key].position - position) <= slack


def test_places_are_told_to_the_heads_of_all_queues_first() -> None:
    queue = queue_of()
    for tenant in TENANTS:
        fill(queue, tenant, 50)
    told = Counter(key.rstrip("0123456789") for key, _ in queue.places(slots=4, limit=12))
    assert told == {"ada": 4, "bob": 4, "eve": 4}


@pytest.mark.parametrize(("tenants", "calls"), [(30, 3), (2, 50), (1, 100), (7, 1)])
def test_all_calls_are_told_where_they_stand_in_turns_that_are_short(
    monkeypatch: pytest.MonkeyPatch, tenants: int, calls: int
) -> None:
    monkeypatch.setattr(fair_queue, "_MAX_LOOKS", 300)
    queue = queue_of()
    for number in range(tenants):
        fill(queue, f"t{number}-", calls)
    told: set[str] = set()
    for _ in range(60):
        turn = dict(queue.places(slots=1, limit=20))
        assert 0 < len(turn) <= max(1, min(20, 300 // tenants))
        told |= turn.keys()
    assert len(told) == len(queue)


# Whatever happens


class Queueing(RuleBasedStateMachine):
    """Calls come, begin, cost more or less, end, and are taken out, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.caps = {"ada": None, "bob": 2, "eve": 1}
        shares = {
            "ada": Share(max_queued=8),
            "bob": Share(weight=3.0, max_running=2, max_queued=8),
            "eve": Share(weight=0.5, max_running=1, max_queued=8),
        }
        self.queue = FairQueue(shares.__getitem__, max_queued=12)
        self.waiting: dict[str, Call] = {}
        self.running: list[Call] = []
        self.number = 0

    @rule(
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from(CLASSES),
        cost=st.floats(0, 10),
    )
    def add(self, tenant: str, priority: Priority, cost: float) -> None:
        self.number += 1
        new = call(str(self.number), tenant, priority=priority, cost=cost)
        self.waiting[new.key] = new
        refused = self.queue.add(new)
        if refused is not None:
            assert self.waiting.pop(refused.key) == refused

    @rule()
    def pop(self) -> None:
        ours = [each for each in self.waiting.values() if self._may_run(each.tenant)]
        begun = self.queue.pop()
        # Work conservation: a slot is left empty only if no call may run.
        assert (begun is not None) == bool(ours)
        if begun is not None:
            assert begun in ours
            before = [
                each.key
                for each in ours
                if (each.tenant, each.priority) == (begun.tenant, begun.priority)
            ]
            assert before[0] == begun.key
            del self.waiting[begun.key]
            self.running.append(begun)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0), cost=st.floats(-5, 5))
    def charge(self, which: int, cost: float) -> None:
        self.queue.charge(self.running[which % len(self.running)], cost)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0))
    def end(self, which: int) -> None:
        self.queue.ended(self.running.pop(which % len(self.running)))

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0))
    def remove(self, which: int) -> None:
        key = list(self.waiting)[which % len(self.waiting)]
        assert self.queue.remove(key) == self.waiting.pop(key)

    @rule(tenant=st.sampled_from(TENANTS), priority=st.sampled_from(CLASSES))
    def found_running(self, tenant: str, priority: Priority) -> None:
        self.number += 1
        found = call(str(self.number), tenant, priority=priority)
        self.queue.began(found)
        self.running.append(found)

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.queue) == len(self.waiting) <= 12
        places = dict(self.queue.places(slots=2, limit=100))
        assert places.keys() == self.waiting.keys()
        assert all(place.position >= 1 and place.wait_s >= 0 for place in places.values())

    def _may_run(self, tenant: str) -> bool:
        most = self.caps[tenant]
        return most is None or sum(each.tenant == tenant for each in self.running) < most


TestQueueing = Queueing.TestCase


@given(st.data())
def test_every_call_begins_however_many_others_come(data: st.DataObject) -> None:
    """No starvation: a call begins after a number of others that its own place bounds."""
    queue = queue_of({"eve": Share(weight=100.0)})
    priority: Priority = data.draw(st.sampled_from(CLASSES))
    fill(queue, "eve", 50)
    queue.add(call("mine", "ada", priority=priority))
    draw: Callable[[], float] = lambda: data.draw(st.floats(0.1, 1.0))  # noqa: E731
    for number in range(2_200):
        begun = queue.pop()
        assert begun is not None
        if begun.key == "mine":
            return
        queue.ended(begun)
        queue.add(call(f"more{number}", "eve", cost=draw() if number < 5 else 1.0))
    pytest.fail("the call did not begin")
