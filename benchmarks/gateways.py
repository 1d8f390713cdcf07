"""Keep what was measured of one gateway in one way of asking, and work out what it adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cpu import OTHERS, CpuUse
from benchmarks.load import Measured
from benchmarks.report import Series, median, percentiles

__all__ = ["AGENTRAY", "DIRECT", "GATEWAYS", "LITELLM", "Cell", "difference"]

DIRECT = "simulator, asked directly"
AGENTRAY = "agentray"
LITELLM = "LiteLLM"
GATEWAYS: dict[str, tuple[str, ...]] = {
    AGENTRAY: ("session hosts", "HAProxy"),
    LITELLM: (LITELLM,),
}
"""The groups of the processes that pass a request on."""
_NOTHING: Mapping[str, float] = {}


@dataclass(slots=True)
class Cell:
    """One row in one way of asking: its rounds."""

    name: str
    kind: str
    rate: float | None = None
    rounds: list[tuple[Measured, CpuUse]] = field(default_factory=list)

    @property
    def ms(self) -> list[float]:
        return [value for measured, _ in self.rounds for value in measured.ms]

    @property
    def errors(self) -> list[str]:
        return [error for measured, _ in self.rounds for error in measured.errors]

    @property
    def throughput(self) -> float:
        """Requests a second: the median over the rounds."""
        return median([measured.throughput for measured, _ in self.rounds])

    def cpu_s(self) -> Counter[str]:
        """Return the CPU seconds of each group."""
        total: Counter[str] = Counter()
        for _, use in self.rounds:
            total.update(use.groups)
        return total

    def gateway_cpu_s(self, idle: Mapping[str, float] = _NOTHING) -> float | None:
        """Return the CPU seconds of all its gateway's processes, less the cores that are given."""
        groups = GATEWAYS.get(self.name)
        if groups is None:
            return None
        seconds = sum(use.seconds for _, use in self.rounds)
        used = self.cpu_s()
        return sum(used[group] - idle.get(group, 0.0) * seconds for group in groups)

    def per_cpu_s(self, idle: Mapping[str, float] = _NOTHING) -> float | None:
        """Return the requests that a CPU second of the gateway carries."""
        used = self.gateway_cpu_s(idle)
        return len(self.ms) / used if used is not None and used > 0 else None

    def series(self, direct: Cell, idle: Mapping[str, float]) -> Series:
        found, base = percentiles(self.ms), percentiles(direct.ms)
        first_ms = [value for measured, _ in self.rounds for value in measured.first_ms]
        requests = max(1, len(self.ms))
        used = self.cpu_s()
        gateway = self.gateway_cpu_s()
        figures: dict[str, Any] = {
            "asked": "closed loop" if self.rate is None else "on a schedule",
            "rate": None if self.rate is None else round(self.rate, 2),
            "throughput": round(self.throughput, 2),
            "errors": len(self.errors),
            **found,
            "first_text": percentiles(first_ms),
            "added_p50": difference(found, base, "p50"),
            "added_p99": difference(found, base, "p99"),
            "gateway_cpu_s": None if gateway is None else round(gateway, 3),
            "requests_per_cpu_s": _rounded(self.per_cpu_s()),
            "requests_per_cpu_s_less_idle": _rounded(self.per_cpu_s(idle)),
            "cpu_ms_per_request": {
                group: round(seconds / requests * 1000, 3)
                for group, seconds in sorted(used.items())
                if group != OTHERS and seconds / requests >= 5e-6
            },
            "rounds": [
                {
                    **percentiles(measured.ms),
                    "throughput": round(measured.throughput, 2),
                    "others_cpu_share": round(use.other_share, 3),
                }
                for measured, use in self.rounds
            ],
        }
        if self.errors:
            figures["first_errors"] = self.errors[:3]
        way = f"{self.kind}, {figures['asked']}"
        return Series(f"{self.name}: {way}", "ms", figures)


def difference(ours: Mapping[str, float], base: Mapping[str, float], name: str) -> float | None:
    """Return by how much a percentile exceeds another's; none if one of them is of nothing."""
    if name not in ours or name not in base:
        return None
    return round(ours[name] - base[name], 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
