"""Decide which queued tool call runs next, fairly across tenants.

Start-time fair queuing (Goyal, Vin and Cheng, SIGCOMM 1996) on two levels: over the priority
classes, which have fixed weights so that none starves, and within a class over tenants by their
weights. A call moves the tags of both on by cost / weight: by the estimate when it begins, while
it runs if it takes longer, and by the difference at its end. What a tag is, and who is first, is
in :mod:`agentray.tools.tag_order`.

Pure: nothing here knows of time, workers or processes.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from agentray.tools.runner import Priority
from agentray.tools.tag_order import Entrant, TagOrder

__all__ = ["CLASS_WEIGHTS", "Call", "FairQueue", "Standing", "Queue", "Share"]

CLASS_WEIGHTS: dict[Priority, float] = {"interactive": 16.0, "background": 4.0, "batch": 1.0}
"""What each class gets beside the others while all of them wait; most urgent first."""

_MAX_IDLE_FLOWS = 10_000
# A tenth of a microsecond each, of the process that grants the slots.
_MAX_LOOKS = 200_000


class Share(msgspec.Struct, frozen=True):
    """What a tenant gets. No bound on what runs if ``max_running`` is None."""

    weight: float = 1.0
    max_running: int | None = None
    max_queued: int = 1_000


class Call(msgspec.Struct, frozen=True):
    """A call that waits, with what it is expected to need: slot-seconds, and seconds."""

    key: str
    tenant: str
    priority: Priority
    cost: float
    wall_s: float


class Standing(msgspec.Struct, frozen=True):
    """Where a call stands: 1 for the next to begin, and the wait expected."""

    position: int
    wait_s: float


class Queue(Protocol):
    """What the scheduler asks of a queue; :class:`FairQueue` is the one that is used.

    ``charge`` is called for each call with what it has cost beyond its charges so far: less than
    nothing where it cost less.
    """

    def __len__(self) -> int: ...

    def add(self, call: Call) -> Call | None: ...

    def remove(self, key: str) -> Call | None: ...

    def pop(self) -> Call | None: ...

    def began(self, call: Call) -> None: ...

    def charge(self, call: Call, cost: float) -> None: ...

    def ended(self, call: Call) -> None: ...

    def last_place(self, call: Call, slots: int) -> Standing: ...

    def places(self, slots: int, limit: int) -> Iterator[tuple[str, Standing]]: ...

    def runnable_s(self) -> float: ...


class Load(msgspec.Struct, frozen=True):
    """Calls that wait: how many, and what they need together."""

    calls: float = 0
    cost: float = 0.0
    wall_s: float = 0.0

    def __add__(self, more: Load) -> Load:
        return Load(self.calls + more.calls, self.cost + more.cost, self.wall_s + more.wall_s)

    def due(self, cost: float) -> Load:
        """Return the part of it that costs so much."""
        part = min(1.0, max(0.0, cost / self.cost)) if self.cost > 0 else 1.0
        return Load(part * self.calls, part * self.cost, part * self.wall_s)


class _Tenant:
    """What counts for a tenant in all classes together."""

    __slots__ = ("queued", "running", "share")

    def __init__(self, share: Share) -> None:
        self.share = share
        self.queued = self.running = 0

    @property
    def capped(self) -> bool:
        most = self.share.max_running
        return most is not None and self.running >= most

    @property
    def rests(self) -> bool:
        return not self.running and not self.queued


class _Flow(Entrant):
    """A tenant's calls of one class; it waits while it can run one."""

    __slots__ = ("calls", "level", "load", "tenant")

    def __init__(self, level: _Level, tenant: _Tenant) -> None:
        super().__init__()
        self.level = level
        self.tenant = tenant
        self.calls: OrderedDict[str, Call] = OrderedDict()
        self.load = Load()


class _Level(Entrant):
    """A priority class; it waits while one of its flows does."""

    __slots__ = ("flows", "load", "order", "waiting", "weight")

    def __init__(self, rank: int, weight: float) -> None:
        super().__init__(rank)
        self.weight = weight
        self.order: TagOrder[_Flow] = TagOrder()
        self.flows: dict[str, _Flow] = {}
        # Those that have calls: of thousands of tenants a few.
        self.waiting: dict[_Flow, None] = {}
        self.load = Load()


class FairQueue:
    """The calls that wait, bounded for each tenant and as a whole.

    When it is full as a whole, the longest queue for its weight in the least urgent class makes
    room: a flood refuses itself, not the others.
    """

    def __init__(self, share_of: Callable[[str], Share], *, max_queued: int) -> None:
        self._share_of = share_of
        self._max_queued = max_queued
        self._levels = {
            name: _Level(rank, weight) for rank, (name, weight) in enumerate(CLASS_WEIGHTS.items())
        }
        self._tenants: dict[str, _Tenant] = {}
        self._resting: OrderedDict[str, None] = OrderedDict()
        self._where: dict[str, _Flow] = {}
        # How often places were told.
        self._turn = 0
        self._order: TagOrder[_Level] = TagOrder()

    def __len__(self) -> int:
        return len(self._where)

    def add(self, call: Call) -> Call | None:
        """Let a call wait. Return the one that is refused for it: itself, another, or none."""
        flow = self._flow(call)
        refused: Call | None = None
        if flow.tenant.queued >= flow.tenant.share.max_queued:
            self._rests(call.tenant)
            return call
        if len(self._where) >= self._max_queued:
            longest = self._longest(flow)
            if longest is flow:
                self._rests(call.tenant)
                return call
            refused = self._take(longest, next(reversed(longest.calls)))
        flow.calls[call.key] = call
        flow.level.waiting[flow] = None
        more = Load(1, call.cost, call.wall_s)
        flow.load += more
        flow.level.load += more
        flow.tenant.queued += 1
        self._where[call.key] = flow
        self._enter(flow)
        if refused is not None:
            self._rests(refused.tenant)
        return refused

    def remove(self, key: str) -> Call | None:
        """Take a call out that waits; return None if it does not."""
        if (flow := self._where.get(key)) is None:
            return None
        call = self._take(flow, key)
        self._rests(call.tenant)
        return call

    def pop(self) -> Call | None:
        """Take the next call out, which begins, and charge its estimate; None if none can run."""
        level = self._order.first()
        if level is None:
            return None
        flow = level.order.first()
        assert flow is not None
        self._order.begin(level)
        level.order.begin(flow)
        call = self._take(flow, next(iter(flow.calls)))
        self.began(call)
        return call

    def began(self, call: Call) -> None:
        """Count and charge a call that runs: one that was popped, or found with a worker."""
        flow = self._flow(call)
        flow.tenant.running += 1
        if flow.tenant.capped:
            for level in self._levels.values():
                if (other := level.flows.get(call.tenant)) is not None:
                    self._leave(other)
        self.charge(call, call.cost)

    def charge(self, call: Call, cost: float) -> None:
        """Charge what a call has cost beyond its charges so far; what is less than nothing is
        given back."""
        flow = self._flow(call)
        flow.level.order.charge(flow, cost / flow.tenant.share.weight)
        self._order.charge(flow.level, cost / flow.level.weight)

    def ended(self, call: Call) -> None:
        """A call that ran has ended, or never began; charge the difference before."""
        tenant = self._flow(call).tenant
        tenant.running -= 1
        for level in self._levels.values():
            if (flow := level.flows.get(call.tenant)) is not None:
                self._enter(flow)
        self._rests(call.tenant)

    def last_place(self, call: Call, slots: int) -> Standing:
        """Return the place behind all that the call's tenant has waiting in its class."""
        flow = self._flow(call)
        before = flow.load + Load(-1, -call.cost) if flow.calls else Load(0, 0.0, call.wall_s)
        place = self._place(flow, before, slots)
        # Also of one that does not wait here.
        self._rests(call.tenant)
        return place

    def places(self, slots: int, limit: int) -> Iterator[tuple[str, Standing]]:
        """Yield where calls stand, at most so many; others the next time, each in its turn."""
        flows = [flow for level in self._levels.values() for flow in level.waiting]
        if not flows:
            return
        # Each place takes a look at all flows.
        limit = max(1, min(limit, _MAX_LOOKS // len(flows)))
        each = max(1, limit // len(flows))
        rounds, first = divmod(self._turn * min(limit, len(flows)), len(flows))
        self._turn += 1
        for flow in (flows[first:] + flows[:first])[:limit]:
            # What was told of in the turns before is in front of it.
            told = rounds * each % len(flow.calls) if len(flow.calls) > each else 0
            before = Load()
            for number, call in enumerate(itertools.islice(flow.calls.values(), told + each)):
                if number >= told:
                    yield call.key, self._place(flow, before + Load(0, 0.0, call.wall_s), slots)
                before += Load(1, call.cost, call.wall_s)

    def runnable_s(self) -> float:
        """Return the seconds that all calls need together which only wait for a slot."""
        seconds, capped = 0.0, dict[_Tenant, int]()
        for level in self._levels.values():
            for flow in level.waiting:
                most = flow.tenant.share.max_running
                if most is None:
                    seconds += flow.load.wall_s
                    continue
                may_begin = capped.setdefault(flow.tenant, max(0, most - flow.tenant.running))
                begin = list(itertools.islice(flow.calls.values(), may_begin))
                capped[flow.tenant] -= len(begin)
                seconds += sum(call.wall_s for call in begin)
        return max(0.0, seconds)

    def _place(self, flow: _Flow, ahead: Load, slots: int) -> Standing:
        """Return the place of a call behind those of its flow; ``ahead`` has its own length too,
        which stands for what those that run still need."""
        # What begins before the virtual time at which it does: of its class, then of the others.
        level = flow.level
        begins = level.order.tag(flow) + ahead.cost / flow.tenant.share.weight
        new_ones = level.order.begins()
        calls, cost, wall_s = ahead.calls, ahead.cost, ahead.wall_s
        # Plain sums: of thousands of tenants all are looked at.
        for other in level.waiting:
            tag = max(other.tag, new_ones) if other.is_new else other.tag
            load = other.load
            if other is flow or (tag >= begins and load.cost > 0):
                continue
            due = (begins - tag) * other.tenant.share.weight
            part = due / load.cost if load.cost > max(0.0, due) else 1.0
            calls += part * load.calls
            cost += part * load.cost
            wall_s += part * load.wall_s
        ahead = Load(calls, cost, wall_s)
        begins = self._order.tag(level) + ahead.cost / level.weight
        for each in self._levels.values():
            if each is not level and each.entry:
                ahead += each.load.due((begins - self._order.tag(each)) * each.weight)
        # What was added and taken away again leaves a rounding error, below nothing too.
        return Standing(1 + max(0, int(ahead.calls)), max(0.0, ahead.wall_s) / max(1, slots))

    def _flow(self, call: Call) -> _Flow:
        level = self._levels[call.priority]
        flow = level.flows.get(call.tenant)
        if flow is None:
            tenant = self._tenants.get(call.tenant)
            if tenant is None:
                tenant = self._tenants[call.tenant] = _Tenant(self._share_of(call.tenant))
            flow = level.flows[call.tenant] = _Flow(level, tenant)
        return flow

    def _take(self, flow: _Flow, key: str) -> Call:
        call = flow.calls.pop(key)
        level = flow.level
        less = Load(-1, -call.cost, -call.wall_s)
        # What is left of nothing is nothing: sums of floats are not exact.
        flow.load = flow.load + less if flow.calls else Load()
        flow.tenant.queued -= 1
        del self._where[key]
        if not flow.calls:
            self._leave(flow)
            del level.waiting[flow]
        level.load = level.load + less if level.waiting else Load()
        return call

    def _enter(self, flow: _Flow) -> None:
        """Let a flow be picked that has a call and may run it."""
        if flow.calls and not flow.tenant.capped:
            flow.level.order.enter(flow)
            self._order.enter(flow.level)

    def _leave(self, flow: _Flow) -> None:
        """Let a flow be picked no longer."""
        level = flow.level
        level.order.leave(flow)
        if level.order.first() is None:
            self._order.leave(level)

    def _longest(self, newcomer: _Flow) -> _Flow:
        def length(flow: _Flow) -> tuple[int, float]:
            waiting = len(flow.calls) + (flow is newcomer)
            return flow.level.rank, waiting / flow.tenant.share.weight

        flows = [flow for level in self._levels.values() for flow in level.waiting]
        return max([newcomer, *flows], key=length)

    def _rests(self, name: str) -> None:
        """Note a tenant that has nothing; where they are many, drop those that owe nothing."""
        if self._tenants[name].rests:
            self._resting[name] = None
        # Two for each that is noted: they become fewer, at a price that does not grow.
        for _ in range(min(2, len(self._tenants) - _MAX_IDLE_FLOWS, len(self._resting))):
            oldest, _ = self._resting.popitem(last=False)
            if not self._tenants[oldest].rests:
                continue
            flows = [level.flows.get(oldest) for level in self._levels.values()]
            if any(flow is not None and flow.level.order.owes(flow) for flow in flows):
                self._resting[oldest] = None
                continue
            for level in self._levels.values():
                level.flows.pop(oldest, None)
            del self._tenants[oldest]
