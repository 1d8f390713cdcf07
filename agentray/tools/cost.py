"""Say what a call costs and what it will: dominant share of slot-, CPU- and memory-seconds. Pure.

The dominant resource of Ghodsi et al. (NSDI 2011), in slot-seconds: a call that takes no more than
a slot's part of the CPU and memory of its worker costs the seconds that it holds the slot; one
that takes three times its part of the CPU costs three times that.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

__all__ = ["Estimate", "Estimates", "SlotShare", "call_cost"]

# The younger calls of a tool tell more: the weight of the last one.
_LAST = 0.2
# What nothing is known of is taken to need so long, or its timeout if that is less.
_UNKNOWN_S = 1.0
_MAX_KNOWN = 20_000


class SlotShare(msgspec.Struct, frozen=True):
    """What a slot's part of its worker is: cores and bytes."""

    cpu: float
    memory_bytes: float


class Estimate(msgspec.Struct, frozen=True):
    """What a call is expected to need: seconds of wall time, and its cost in slot-seconds."""

    wall_s: float
    cost: float

    @property
    def rate(self) -> float:
        """Its cost for each second that it runs."""
        return self.cost / self.wall_s if self.wall_s > 0 else 1.0


def call_cost(wall_s: float, cpu_s: float, memory_bytes: float, slot: SlotShare) -> float:
    """Return what a run cost, in slot-seconds: ``memory_bytes`` is its peak."""
    return max(wall_s, cpu_s / slot.cpu, memory_bytes * wall_s / slot.memory_bytes)


class Estimates:
    """What calls will need, by what those of the same tenant and tool did before.

    A tenant's first call of a tool is judged by those of all tenants; a tool's first, by what its
    call was declared to take. The least used are forgotten.
    """

    def __init__(self, slot: SlotShare, *, max_known: int = _MAX_KNOWN) -> None:
        self._slot = slot
        self._max_known = max_known
        self._known: OrderedDict[tuple[str, str], Estimate] = OrderedDict()

    def of(
        self, tenant: str, tool: str, *, cpu: float, memory_bytes: int, timeout_s: float
    ) -> Estimate:
        """Return what the next call will need."""
        for key in ((tenant, tool), ("", tool)):
            if (found := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return found
        wall_s = min(timeout_s, _UNKNOWN_S)
        return Estimate(wall_s, call_cost(wall_s, cpu * wall_s, memory_bytes, self._slot))

    def learn(self, tenant: str, tool: str, *, wall_s: float, cost: float) -> None:
        """Take in what a call needed that ended by itself or at a limit."""
        for key in ((tenant, tool), ("", tool)):
            old = self._known.get(key)
            if old is None:
                self._known[key] = Estimate(wall_s, cost)
            else:
                self._known[key] = Estimate(
                    old.wall_s + _LAST * (wall_s - old.wall_s), old.cost + _LAST * (cost - old.cost)
                )
            self._known.move_to_end(key)
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)
