"""Decide which queued tool call runs next, fairly across tenants.

Start-time fair queuing (Goyal, Vin and Cheng, SIGCOMM 1996) on two levels: over the priority
classes, which have fixed weights so that none starves, and within a class over tenants by their
weights. A flow's tag is the virtual time at which its next call begins: it moves on by cost /
weight, by the estimate when a call is dispatched, while it runs if it takes longer, and by the
difference at its end. The flow with the least tag is next. One that had nothing to run begins at
the virtual time of now: nobody saves up. While nothing waits, time goes on to the greatest tag:
nobody owes for slots that others did not want.

Pure: nothing here knows of time, workers or processes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from agentray.tools.runner import Priority

__all__ = ["CLASS_WEIGHTS", "Call", "FairQueue", "Place", "Queue", "Share"]

CLASS_WEIGHTS: dict[Priority, float] = {"interactive": 16.0, "background": 4.0, "batch": 1.0}
"""What each class gets beside the others while all of them wait; most urgent first."""

_MAX_IDLE_FLOWS = 10_000


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


class Place(msgspec.Struct, frozen=True):
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

    def last_place(self, call: Call, slots: int) -> Place: ...

    def places(self, slots: int, limit: int) -> Iterator[tuple[str, Place]]: ...


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


class _Flow:
    """A tenant's calls of one class."""

    __slots__ = ("calls", "entry", "level", "load", "tag", "tenant")

    def __init__(self, level: _Level, tenant: _Tenant) -> None:
        self.level = level
        self.tenant = tenant
        self.calls: OrderedDict[str, Call] = OrderedDict()
        self.tag = 0.0
        self.load = Load()
        # The number of its entry in the heap that counts; 0 while it cannot run anything.
        self.entry = 0


class _Level:
    """A priority class: its flows, those that can run a call ordered by tag."""

    __slots__ = (
        *("flows", "floor", "heap", "load", "now", "rank", "tag", "top", "waiting", "waits"),
        "weight",
    )

    def __init__(self, rank: int, weight: float) -> None:
        self.rank = rank
        self.weight = weight
        self.tag = self.now = 0.0
        # The greatest tag of a flow so far, and what it was when nothing waited last.
        self.top = self.floor = 0.0
        self.flows: dict[str, _Flow] = {}
        # Those that have calls: of thousands of tenants a few.
        self.waiting: dict[_Flow, None] = {}
        self.heap: list[tuple[float, int, _Flow]] = []
        self.load = Load()
        self.waits = False

    def first(self) -> _Flow | None:
        """Return the flow whose call is next."""
        heap = self.heap
        while heap and heap[0][2].entry != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][2] if heap else None


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
        self._now = self._floor = 0.0
        self._entries = 0

    def __len__(self) -> int:
        return len(self._where)

    def add(self, call: Call) -> Call | None:
        """Let a call wait. Return the one that is refused for it: itself, another, or none."""
        flow = self._flow(call)
        refused: Call | None = None
        if flow.tenant.queued >= flow.tenant.share.max_queued:
            return call
        if len(self._where) >= self._max_queued:
            longest = self._longest(flow)
            if longest is flow:
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
        levels = [level for level in self._levels.values() if self._can_run(level)]
        if not levels:
            return None
        level = min(levels, key=lambda each: (each.tag, each.rank))
        flow = level.first()
        assert flow is not None
        self._now = max(self._now, level.tag)
        level.now = max(level.now, flow.tag)
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
                    other.entry = 0
        self.charge(call, call.cost)

    def charge(self, call: Call, cost: float) -> None:
        """Charge what a call has cost beyond its charges so far; what is less than nothing is
        given back."""
        flow = self._flow(call)
        level = flow.level
        # What is not owed any more cannot be given back.
        flow.tag = max(flow.tag + cost / flow.tenant.share.weight, level.floor)
        level.top = max(level.top, flow.tag)
        level.tag = max(level.tag + cost / level.weight, self._floor)
        if flow.entry:
            self._push(flow)

    def ended(self, call: Call) -> None:
        """A call that ran has ended, or never began; charge the difference before."""
        tenant = self._flow(call).tenant
        tenant.running -= 1
        for level in self._levels.values():
            if (flow := level.flows.get(call.tenant)) is not None:
                self._enter(flow)
        self._rests(call.tenant)

    def last_place(self, call: Call, slots: int) -> Place:
        """Return the place behind all that the call's tenant has waiting in its class."""
        flow = self._flow(call)
        before = flow.load + Load(-1, -call.cost) if flow.calls else Load(0, 0.0, call.wall_s)
        return self._place(flow, before, slots)

    def places(self, slots: int, limit: int) -> Iterator[tuple[str, Place]]:
        """Yield where calls stand, at most so many: those at the head of each flow."""
        flows = [flow for level in self._levels.values() for flow in level.waiting]
        each = max(1, limit // max(1, len(flows)))
        for flow in flows[:limit]:
            before = Load()
            for call in itertools.islice(flow.calls.values(), each):
                yield call.key, self._place(flow, before + Load(0, 0.0, call.wall_s), slots)
                before += Load(1, call.cost, call.wall_s)

    def _place(self, flow: _Flow, ahead: Load, slots: int) -> Place:
        """Return the place of a call behind those of its flow; ``ahead`` has its own length too,
        which stands for what those that run still need."""
        # What begins before the virtual time at which it does: of its class, then of the others.
        level = flow.level
        begins = flow.tag + ahead.cost / flow.tenant.share.weight
        for other in level.waiting:
            if other is not flow:
                ahead += other.load.due((begins - other.tag) * other.tenant.share.weight)
        others = [each for each in self._levels.values() if each is not level]
        self._can_run(level)
        begins = level.tag + ahead.cost / level.weight
        for each in others:
            if self._can_run(each):
                ahead += each.load.due((begins - each.tag) * each.weight)
        # What was added and taken away again leaves a rounding error, below nothing too.
        return Place(1 + max(0, int(ahead.calls)), max(0.0, ahead.wall_s) / max(1, slots))

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
            flow.entry = 0
            del level.waiting[flow]
        level.load = level.load + less if level.waiting else Load()
        return call

    def _can_run(self, level: _Level) -> bool:
        waits = level.first() is not None
        if waits and not level.waits:
            others = (each.tag for each in self._levels.values() if each.waits and each.first())
            level.tag = max(level.tag, min([self._now, *others]))
        level.waits = waits
        return waits

    def _enter(self, flow: _Flow) -> None:
        """Let a flow be picked that has a call and may run it."""
        if not flow.calls or flow.entry or flow.tenant.capped:
            return
        level = flow.level
        first = level.first()
        if first is None:
            level.now = level.floor = level.top
            levels = self._levels.values()
            if not any(each.first() for each in levels):
                self._now = self._floor = max(each.tag for each in levels)
                for each in levels:
                    each.waits = False
        # Who was given something back is behind: who comes does not wait until it has caught up.
        begins = level.now if first is None else min(level.now, first.tag)
        flow.tag = max(flow.tag, begins)
        self._push(flow)

    def _push(self, flow: _Flow) -> None:
        self._entries += 1
        flow.entry = self._entries
        heap = flow.level.heap
        heapq.heappush(heap, (flow.tag, flow.entry, flow))
        if len(heap) > 64 + 4 * len(flow.level.flows):
            # Each charge leaves an entry behind that no longer counts.
            heap[:] = [entry for entry in heap if entry[2].entry == entry[1]]
            heapq.heapify(heap)

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
            if any(flow is not None and flow.tag > flow.level.now for flow in flows):
                self._resting[oldest] = None
                continue
            for level in self._levels.values():
                level.flows.pop(oldest, None)
            del self._tenants[oldest]
