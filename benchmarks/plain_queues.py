"""Queues to compare with: first come, first served, and round robin over tenants, call by call.

Both keep the bounds of the fair one; neither knows of weights, costs or classes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator

from agentray.config.worker_settings import ToolWorkersSettings
from agentray.tools.fair_queue import Call, Standing

__all__ = ["FirstCome", "RoundRobin", "first_come", "round_robin"]


class FirstCome:
    """Calls in the order in which they came."""

    def __init__(self, settings: ToolWorkersSettings) -> None:
        self._settings = settings
        self._calls: OrderedDict[str, Call] = OrderedDict()
        self._queued: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> Call | None:
        settings = self._settings
        if len(self._calls) >= settings.max_queued:
            return call
        if self._queued[call.tenant] >= settings.max_queued_per_tenant:
            return call
        self._calls[call.key] = call
        self._queued[call.tenant] += 1
        return None

    def remove(self, key: str) -> Call | None:
        call = self._calls.pop(key, None)
        if call is not None:
            self._queued[call.tenant] -= 1
        return call

    def pop(self) -> Call | None:
        return self.remove(self._next()) if self._calls else None

    def _next(self) -> str:
        return next(iter(self._calls))

    def began(self, call: Call) -> None:
        pass

    def charge(self, call: Call, cost: float) -> None:
        pass

    def ended(self, call: Call) -> None:
        pass

    def last_place(self, call: Call, slots: int) -> Standing:
        return Standing(len(self._calls), len(self._calls) * call.wall_s / max(1, slots))

    def places(self, slots: int, limit: int) -> Iterator[tuple[str, Standing]]:
        return iter(())

    def runnable_s(self) -> float:
        return sum(call.wall_s for call in self._calls.values())


class RoundRobin(FirstCome):
    """One call of each tenant in turn."""

    def __init__(self, settings: ToolWorkersSettings) -> None:
        super().__init__(settings)
        self._own: dict[str, OrderedDict[str, None]] = {}
        self._turns: deque[str] = deque()

    def add(self, call: Call) -> Call | None:
        refused = super().add(call)
        if refused is None:
            own = self._own.setdefault(call.tenant, OrderedDict())
            own[call.key] = None
            if len(own) == 1:
                self._turns.append(call.tenant)
        return refused

    def remove(self, key: str) -> Call | None:
        call = super().remove(key)
        if call is not None:
            own = self._own[call.tenant]
            del own[key]
            if not own:
                self._turns.remove(call.tenant)
        return call

    def _next(self) -> str:
        self._turns.rotate(-1)
        return next(iter(self._own[self._turns[-1]]))


def first_come(settings: ToolWorkersSettings) -> FirstCome:
    """Return a queue for ``start_pool``."""
    return FirstCome(settings)


def round_robin(settings: ToolWorkersSettings) -> RoundRobin:
    """Return a queue for ``start_pool``."""
    return RoundRobin(settings)
