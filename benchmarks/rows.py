"""Measure rows side by side: round after round, so that noise hits all of them alike."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cpu import OTHERS, CpuMeter, CpuUse
from benchmarks.load import Client, Generator, Measured, Round
from benchmarks.report import Report, Series, median, percentiles

__all__ = ["LOAD", "Cell", "Row", "Rows", "tell_others"]

LOAD = "load generator"


@dataclass(frozen=True, slots=True)
class Row:
    """What is compared: who asks whom, and what. ``client`` makes the asker of a number."""

    name: str
    generator: Generator
    kind: str
    address: str
    client: Callable[[int, int], Client]
    warm_turns: int | None = None

    def round(self, clients: int, **bounds: Any) -> Round:
        return Round(
            kind=self.kind,
            address=self.address,
            clients=[self.client(clients, number) for number in range(clients)],
            **bounds,
        )


@dataclass(slots=True)
class Cell:
    """A row at a number of clients: its rounds."""

    name: str
    clients: int
    idle: Mapping[str, float] = field(default_factory=dict)
    rounds: list[tuple[Measured, CpuUse]] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        """Return throughput, or a percentile of the latencies, of each round."""
        if figure == "throughput":
            return [measured.throughput for measured, _ in self.rounds]
        return [percentiles(measured.ms).get(figure, math.inf) for measured, _ in self.rounds]

    def value(self, figure: str) -> float:
        """Return a figure's median over the rounds."""
        return median(self.values(figure))

    @property
    def turns(self) -> int:
        return sum(measured.turns for measured, _ in self.rounds)

    def cpu_ms(self) -> dict[str, float]:
        """Return the CPU of a turn by group in milliseconds, less what the group takes idle."""
        total: Counter[str] = Counter()
        for _, use in self.rounds:
            total.update(use.groups)
            total.subtract({group: cores * use.seconds for group, cores in self.idle.items()})
        turns = max(1, self.turns)
        return {
            group: round(seconds / turns * 1000, 3)
            for group, seconds in sorted(total.items())
            if group != OTHERS and seconds / turns >= 5e-6
        }

    def series(self) -> Series:
        ms = [value for measured, _ in self.rounds for value in measured.ms]
        first_ms = [value for measured, _ in self.rounds for value in measured.first_ms]
        errors = [error for measured, _ in self.rounds for error in measured.errors]
        cpu = self.cpu_ms()
        figures: dict[str, Any] = {
            "clients": self.clients,
            "n": len(ms),
            "errors": len(errors),
            **{name: round(self.value(name), 3) for name in ("throughput", "p50", "p90", "p99")},
            "first_text": percentiles(first_ms),
            "all_rounds": percentiles(ms),
            "cpu_ms_per_turn": cpu,
            "system_cpu_ms_per_turn": round(
                sum(value for group, value in cpu.items() if group != LOAD), 3
            ),
            "rounds": [
                {
                    **percentiles(measured.ms),
                    "throughput": round(measured.throughput, 1),
                    "seconds": round(measured.seconds, 2),
                    "others_cpu_share": round(use.other_share, 3),
                }
                for measured, use in self.rounds
            ],
        }
        if errors:
            figures["first_errors"] = errors[:3]
        return Series(self.name, "ms", figures)


class Rows:
    """Runs rounds of rows, and finds the figures of a cell."""

    def __init__(
        self, report: Report, classify: Callable[[], Mapping[int, str]], *, seconds: float
    ) -> None:
        self._report = report
        self._classify = classify
        self._seconds = seconds
        self._cells: dict[tuple[str, int], Cell] = {}
        self._idle: dict[str, float] = {}

    def cell(self, name: str, clients: int) -> Cell:
        """Return a row's cell; its rounds may be none yet."""
        return self._cells.setdefault((name, clients), Cell(name, clients, self._idle))

    async def rest(self, name: str) -> None:
        """Measure what all processes take while nobody asks anything, for the rows that follow."""
        meter = CpuMeter(self._classify)
        meter.start()
        await asyncio.sleep(self._seconds)
        use = meter.stop()
        cores = {
            group: round(seconds / use.seconds, 4)
            for group, seconds in sorted(use.groups.items())
            if group != OTHERS
        }
        self._idle = {group: max(0.0, share) for group, share in cores.items()}
        self._report.series.append(Series(name, "cores", {"n": 1, "cores": cores}))

    async def warm(self, rows: Sequence[Row], counts: Sequence[int], *, turns: int) -> None:
        """Let every client of every row have so many turns before it counts."""
        for row in rows:
            for clients in counts:
                own = turns if row.warm_turns is None else min(turns, row.warm_turns)
                if own:
                    measured = await row.generator.run(row.round(clients, turns=own))
                    # A proxy that reloads closes connections: a few may fail here, not many.
                    if len(measured.errors) > 0.1 * own * clients:
                        raise RuntimeError(f"{row.name}: {measured.errors[0]}")

    async def round(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """Measure each row once at each number of clients."""
        for clients in counts:
            for row in rows:
                cell = self.cell(row.name, clients)
                meter = CpuMeter(self._classify)
                used: list[CpuUse] = []
                measured = await row.generator.run(
                    row.round(clients, seconds=self._seconds),
                    before=meter.start,
                    after=lambda meter=meter, used=used: used.append(meter.stop()),
                )
                cell.rounds.append((measured, used[0]))
                if measured.errors:
                    self._report.note(
                        f"{row.name}, {clients} clients: {len(measured.errors)} turns failed: "
                        f"{measured.errors[0]}"
                    )

    def ratio(
        self, figure: str, clients: int, name: str, to: str, *, to_clients: int | None = None
    ) -> float | None:
        """Return how many times one row's figure is another's: the median over the rounds, each
        against the other's of the same round."""
        ours = self.cell(name, clients).values(figure)
        theirs = self.cell(to, to_clients or clients).values(figure)
        pairs = [
            (a, b) for a, b in zip(ours, theirs, strict=False) if b > 0 and math.isfinite(a + b)
        ]
        return median(a / b for a, b in pairs) if pairs else None

    def finish(self) -> None:
        """Put all that was measured into the report."""
        self._report.series += [cell.series() for cell in self._cells.values() if cell.rounds]
        tell_others(self._report, [use for cell in self._cells.values() for _, use in cell.rounds])


def tell_others(report: Report, uses: Sequence[CpuUse]) -> None:
    """Put into the report what processes took, over all rounds, that are not measured."""
    if not uses:
        return
    shares = [use.other_share for use in uses]
    named: Counter[str] = Counter()
    for use in uses:
        named.update(use.others)
    seconds = sum(use.seconds for use in uses)
    report.other_cpu = {
        "share_of_all_cores": {
            "median": round(median(shares), 4),
            "most": round(max(shares), 4),
        },
        "cores_by_process": {
            command: round(used / seconds, 3) for command, used in named.most_common(5)
        },
    }
    if median(shares) > 0.05:
        report.note(
            f"other processes took {median(shares):.0%} of the cores (median over the "
            f"rounds; at most {max(shares):.0%}): not a quiet machine"
        )
