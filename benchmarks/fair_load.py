"""Put tenants to a pool of tool workers: some always have more to run, some come now and then."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from agentray.clock import SystemClock
from agentray.tools.client import ToolClient
from agentray.tools.runner import Ask
from agentray.tools.worker import find_scheduler
from benchmarks.fair_runner import Ran
from benchmarks.report import percentile

__all__ = ["BACKLOGGED", "LIGHT", "SLOTS", "Light", "Load", "Measured", "Tenant", "weighted_jain"]

SLOTS = 16
UNIT_S = 0.1
"""Slot-seconds of a call of cost 1."""

LIGHT_TENANTS = 10
LIGHT_CALL_S = 0.2
_LIGHT_PER_S = 0.5
LIGHT = tuple(f"light{number}" for number in range(LIGHT_TENANTS))

_FLOOD_TIMES = 100
_OUTSTANDING = 64
_TICK_S = 0.01


@dataclass(frozen=True, slots=True)
class Tenant:
    """One that always has calls waiting: their costs, of which each call has one."""

    name: str
    weight: float
    costs: tuple[int, ...]
    floods: bool = False


BACKLOGGED = (
    Tenant("short", 1.0, (1,)),
    Tenant("long", 1.0, (10,)),
    Tenant("heavy", 2.0, tuple(range(1, 11))),
    Tenant("flood", 1.0, tuple(range(1, 11)), floods=True),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A call that was answered, by the machine's monotonic clock."""

    tenant: str
    asked: float
    answered: float
    ran: Ran


@dataclass(frozen=True, slots=True)
class Light:
    """A call of a light tenant: when it was asked for, in seconds from the begin, and how long it
    took; one that was not answered, until nobody waited any longer."""

    at_s: float
    ms: float
    answered: bool


@dataclass(slots=True)
class Measured:
    """What became of the calls between two moments."""

    since: float
    until: float
    watched_until: float
    samples: list[Sample]
    pending: Sequence[tuple[str, float]]
    refused: Counter[str]

    @property
    def seconds(self) -> float:
        return self.until - self.since

    def slot_s(self, tenant: str | None = None, *, until: float | None = None) -> float:
        """Return for how long slots were busy, with calls of one tenant or of all."""
        ends = self.until if until is None else until
        return sum(
            max(0.0, min(ends, each.ran.ended) - max(self.since, each.ran.began))
            for each in self.samples
            if tenant in (None, each.tenant)
        )

    @property
    def utilisation(self) -> float:
        return self.slot_s() / (SLOTS * self.seconds)

    @property
    def jain(self) -> float:
        return weighted_jain({t.name: t.weight for t in BACKLOGGED}, self.slot_s)

    def light(self) -> list[Light]:
        """Return the calls of the light tenants."""
        found = [(each.tenant, each.asked, each.answered, True) for each in self.samples]
        found += [(tenant, asked, self.watched_until, False) for tenant, asked in self.pending]
        return [
            Light(asked - self.since, 1e3 * (end - asked), answered)
            for tenant, asked, end, answered in found
            if tenant in LIGHT and self.since <= asked < self.until
        ]

    def light_p99(self) -> float:
        """Return the p99 of wait and run of the light tenants' calls, in ms."""
        return percentile([each.ms for each in self.light()], 0.99)


def weighted_jain(weights: Mapping[str, float], slot_s: Callable[[str], float]) -> float:
    """Return Jain's index (1984) of what tenants got for their weights: 1 is fair, 1/n is not."""
    got = [slot_s(name) / weight for name, weight in weights.items()]
    squares = sum(each**2 for each in got)
    return sum(got) ** 2 / (len(got) * squares) if squares else 0.0


@dataclass(slots=True)
class Load:
    """Tenants at work. All that is random comes from the seed."""

    seed: int
    _samples: list[Sample] = field(default_factory=list[Sample])
    _pending: dict[int, tuple[str, float]] = field(default_factory=dict[int, tuple[str, float]])
    _refused: Counter[str] = field(default_factory=Counter[str])
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _calls: set[asyncio.Task[None]] = field(default_factory=set["asyncio.Task[None]"])
    _over: bool = False

    async def run(self, *, backlogs: bool, settle_s: float, seconds: float) -> Measured:
        """Have tenants ask for some time, and measure what is behind the first part of it."""
        client = ToolClient("benchmark", find_scheduler, clock=SystemClock())
        tenants: list[asyncio.Task[None]] = [
            asyncio.create_task(self._comes(client, name, number))
            for number, name in enumerate(LIGHT)
        ]
        if backlogs:
            tenants += [
                asyncio.create_task(self._floods(client, each))
                if each.floods
                else asyncio.create_task(self._has_more(client, each))
                for each in BACKLOGGED
            ]
        try:
            since = time.monotonic() + settle_s
            await _ends(tenants, settle_s)
            self._refused.clear()
            await _ends(tenants, seconds)
            until = time.monotonic()
            refused = self._refused.copy()
            self._over = True
            # Until all that runs now has ended: what is cut off tells nothing of its slot.
            await asyncio.sleep(UNIT_S * 10 + 0.5)
            watched = time.monotonic()
            pending = [*self._pending.values()]
            return Measured(since, until, watched, self._samples, pending, refused)
        finally:
            await _cancelled([*tenants, *self._calls])
            await client.close()

    async def _comes(self, client: ToolClient, name: str, number: int) -> None:
        """Ask now and then, whether or not what was asked for before has been answered."""
        chance = random.Random(self.seed + number)
        while not self._over:
            await asyncio.sleep(chance.expovariate(_LIGHT_PER_S))
            self._ask(client, name, LIGHT_CALL_S)

    async def _has_more(self, client: ToolClient, tenant: Tenant) -> None:
        """Keep so many calls waiting or running."""
        chance = random.Random(f"{self.seed} {tenant.name}")

        async def one_after_the_other() -> None:
            while not self._over:
                await self._call(client, tenant.name, UNIT_S * chance.choice(tenant.costs))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(_OUTSTANDING):
                tasks.create_task(one_after_the_other())

    async def _floods(self, client: ToolClient, tenant: Tenant) -> None:
        """Ask for so many times what all light tenants do; what is refused is not asked again."""
        chance = random.Random(f"{self.seed} {tenant.name}")
        mean_s = UNIT_S * sum(tenant.costs) / len(tenant.costs)
        rate = _FLOOD_TIMES * LIGHT_TENANTS * _LIGHT_PER_S * LIGHT_CALL_S / mean_s
        began, asked = time.monotonic(), 0
        while not self._over:
            while asked < rate * (time.monotonic() - began):
                asked += 1
                self._ask(client, tenant.name, UNIT_S * chance.choice(tenant.costs))
            await asyncio.sleep(_TICK_S)

    def _ask(self, client: ToolClient, tenant: str, seconds: float) -> None:
        task = asyncio.create_task(self._call(client, tenant, seconds))
        self._calls.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            # A call that went wrong ends the benchmark: the loop tells of it.
            task.result()

    async def _call(self, client: ToolClient, tenant: str, seconds: float) -> None:
        number, asked = next(self._numbers), time.monotonic()
        self._pending[number] = tenant, asked
        ask = Ask(
            *(tenant, f"s{number}", 1, f"c{number}", "sleep", msgspec.json.encode(seconds)),
            timeout_s=30.0,
        )
        try:
            result = await client.call(ask)
        finally:
            del self._pending[number]
        if result.status == "ok":
            ran = msgspec.json.decode(result.output, type=Ran)
            self._samples.append(Sample(tenant, asked, time.monotonic(), ran))
        elif result.reason == "queue_full":
            self._refused[tenant] += 1
        else:
            raise RuntimeError(f"a call of {tenant} went wrong: {result.output}")


async def _ends(tasks: Sequence[asyncio.Task[None]], seconds: float) -> None:
    """Wait so long; raise what a task raises meanwhile."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
