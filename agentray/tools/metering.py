"""Charge calls for what they use: expected when they begin, then as they run, and at their end."""

from __future__ import annotations

from agentray.tools.call_book import Entry
from agentray.tools.cost import Estimate, Estimates, SlotShare, call_cost
from agentray.tools.fair_queue import Queue
from agentray.tools.messages import Finished, Want

__all__ = ["Metering"]


class Metering:
    """Tells the queue what calls cost, and learns from it what others will. Pure."""

    def __init__(self, queue: Queue, estimates: Estimates, slot: SlotShare) -> None:
        self._queue = queue
        self._estimates = estimates
        self._slot = slot

    def expected(self, want: Want) -> Estimate:
        """Return what a call is expected to need."""
        return self._estimates.of(
            want.tenant,
            want.tool,
            cpu=want.cpu,
            memory_bytes=want.memory_bytes,
            timeout_s=want.timeout_s,
        )

    def began(self, entry: Entry) -> None:
        """A call begins, whose queue has charged what was expected when it was asked for."""
        entry.charged = entry.call.cost
        # It may have waited for long: by now more is known of calls like it.
        entry.estimate = self.expected(entry.want)
        self._charge(entry, entry.estimate.cost)

    def runs(self, entry: Entry, now: float) -> None:
        """A call runs still; it is charged if that is longer than expected."""
        cost = (now - entry.granted_at) * entry.estimate.rate
        if cost > entry.charged:
            self._charge(entry, cost)

    def ended(self, entry: Entry, used: Finished) -> None:
        """A call has ended, and its worker says what it used."""
        cost = call_cost(used.wall_s, used.cpu_s, used.memory_bytes, self._slot)
        if used.killed:
            # Nobody has told what it used until then: as much as calls like it.
            cost = max(cost, used.wall_s * entry.estimate.rate)
        self._charge(entry, cost)
        if not used.killed:
            tenant, tool = entry.call.tenant, entry.want.tool
            self._estimates.learn(tenant, tool, wall_s=used.wall_s, cost=cost)

    def never_began(self, entry: Entry) -> None:
        """A call's lease is void, and it has used nothing."""
        self._charge(entry, 0.0)

    def _charge(self, entry: Entry, cost: float) -> None:
        self._queue.charge(entry.call, cost - entry.charged)
        entry.charged = cost
