"""A flood, three more backlogs and ten light tenants on 16 slots, simulated without a clock."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable

import pytest

from agentray.tools.cost import Estimate, Estimates, SlotShare
from agentray.tools.fair_queue import Call, FairQueue, Queue, Share
from benchmarks.fair_load import BACKLOGGED, LIGHT, weighted_jain
from benchmarks.report import percentile

SLOTS = 16
LIGHT_S = 0.2
UNIT_S = 0.1
WEIGHTS = {each.name: each.weight for each in BACKLOGGED}
COSTS = {each.name: each.costs for each in BACKLOGGED}


class Simulation:
    """Every backlogged tenant has 100 calls waiting at all times; the flood as many as it may."""

    def __init__(self, seed: int, queue: Queue) -> None:
        self.queue = queue
        self.chance = random.Random(seed)
        self.estimates = Estimates(SlotShare(0.125, 1e9))
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.now = 0.0
        self.free = SLOTS
        self.needs: dict[str, float] = {}
        self.asked_at: dict[str, float] = {}
        self.running: dict[str, tuple[Call, float]] = {}
        self.charged: dict[str, float] = {}
        self.slot_s: defaultdict[str, float] = defaultdict(float)
        self.light_s: list[float] = []

    def run(self, seconds: float) -> None:
        for tenant in COSTS:
            for _ in range(1_000 if tenant == "flood" else 100):
                self.ask(tenant)
        for tenant in LIGHT:
            self.later(self.chance.expovariate(0.5), lambda tenant=tenant: self.comes(tenant))
        self.later(0.1, self.sweep)
        while self.now < seconds:
            while self.free and (call := self.queue.pop()) is not None:
                self.begin(call)
            self.now, _, happens = heapq.heappop(self.events)
            happens()

    def later(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), happens))

    def ask(self, tenant: str) -> None:
        key = f"{tenant} {next(self.numbers)}"
        seconds = UNIT_S * self.chance.choice(COSTS[tenant]) if tenant in COSTS else LIGHT_S
        # Or else the slots would be free all at once.
        seconds *= self.chance.uniform(0.97, 1.03)
        # Nobody knows beforehand how long a call takes: only what calls like it took.
        expected = self.expected(tenant)
        self.needs[key] = seconds
        call = Call(key, tenant, "interactive", expected.cost, expected.wall_s)
        refused = self.queue.add(call)
        assert refused is None or refused.tenant == "flood"
        self.asked_at[key] = self.now

    def expected(self, tenant: str) -> Estimate:
        return self.estimates.of(tenant, "sleep", cpu=0.0, memory_bytes=0, timeout_s=30.0)

    def comes(self, tenant: str) -> None:
        self.ask(tenant)
        self.later(self.chance.expovariate(0.5), lambda: self.comes(tenant))

    def begin(self, call: Call) -> None:
        self.free -= 1
        if call.tenant in LIGHT:
            self.light_s.append(self.now - self.asked_at[call.key] + LIGHT_S)
        self.running[call.key] = call, self.now
        expected = self.expected(call.tenant)
        self.queue.charge(call, expected.cost - call.cost)
        self.charged[call.key] = expected.cost
        self.later(self.needs[call.key], lambda: self.end(call.key))

    def end(self, key: str) -> None:
        call, _ = self.running.pop(key)
        needed = self.needs.pop(key)
        self.queue.charge(call, needed - self.charged.pop(key))
        self.queue.ended(call)
        self.estimates.learn(call.tenant, "sleep", wall_s=needed, cost=needed)
        self.slot_s[call.tenant] += needed
        self.free += 1
        if call.tenant in COSTS:
            self.ask(call.tenant)
        if call.tenant == "short":
            # The flood does not wait for its calls to end.
            self.ask("flood")

    def sweep(self) -> None:
        for key, (call, began_at) in self.running.items():
            more = self.now - began_at - self.charged[key]
            if more > 0:
                self.queue.charge(call, more)
                self.charged[key] += more
        self.later(0.1, self.sweep)


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_takes_nothing_from_others(seed: int) -> None:
    queue = FairQueue(lambda tenant: Share(WEIGHTS.get(tenant, 1.0)), max_queued=2_000)
    simulation = Simulation(seed, queue)
    simulation.run(60.0)
    assert weighted_jain(WEIGHTS, simulation.slot_s.__getitem__) > 0.999
    light_s = simulation.light_s
    assert len(light_s) > 200
    assert percentile(light_s, 0.5) < 1.25 * LIGHT_S
    assert percentile(light_s, 0.99) < 2 * LIGHT_S
    # What is left over is shared: no slot was empty while calls waited.
    assert sum(simulation.slot_s.values()) > 0.98 * 60.0 * SLOTS
