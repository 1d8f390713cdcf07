"""Measure how fairly the tool workers are shared, beside first come, first served and round robin.

``python -m benchmarks.fairness --json FILE [--quick]``. Real workers with jailed calls that sleep.
Four tenants always have calls waiting, of costs from 1 to 10 (in tenths of a slot-second); one of
them floods the queue with 100 times the load of ten light tenants, who call now and then for
200 ms. First the light ones are measured alone, then all together, once with each queue.

The picture of it is written beside FILE, and by a whole run to ``docs/fairness.svg``.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from agentray.config.settings import Settings
from agentray.tools.scheduler import MakeQueue, end_pool, fair_queue, start_pool
from benchmarks.cpu import CpuMeter, CpuUse, descendants
from benchmarks.fair_load import BACKLOGGED, LIGHT, SLOTS, Load, Measured
from benchmarks.fair_picture import picture
from benchmarks.fair_runner import open_sleepers
from benchmarks.plain_queues import first_come, round_robin
from benchmarks.report import Report, Series, Target, arguments, percentiles
from benchmarks.rows import tell_others
from benchmarks.system import measure

FAIR = "fair queue"
QUEUES: Mapping[str, MakeQueue] = {
    "first come, first served": first_come,
    "round robin": round_robin,
    FAIR: fair_queue,
}
_WORKERS = 2
_PICTURE = Path(__file__).parents[1] / "docs" / "fairness.svg"
_READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How long is measured."""

    alone_s: float
    together_s: float
    settle_s: float
    seed: int = 7


FULL = Scale(60.0, 120.0, 5.0)
QUICK = Scale(5.0, 7.0, 1.5)


class Fairness:
    """One run of the benchmark."""

    def __init__(self, report: Report, scale: Scale) -> None:
        self._report = report
        self._scale = scale
        self._uses: list[CpuUse] = []
        self.alone: Measured | None = None
        self.together: dict[str, Measured] = {}

    async def run(self) -> None:
        """Start a cluster, measure with each queue, and end everything."""
        import ray

        untyped = cast(Any, ray)
        untyped.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            with self._report.part("alone"):
                async with pool(fair_queue):
                    self._report.say(f"light tenants alone for {self._scale.alone_s:g} s")
                    self.alone = await self._measured(False, self._scale.alone_s)
            for name, make_queue in QUEUES.items():
                with self._report.part(name):
                    async with pool(make_queue):
                        self._report.say(f"{name} for {self._scale.together_s:g} s")
                        self.together[name] = await self._measured(True, self._scale.together_s)
        finally:
            await asyncio.to_thread(untyped.shutdown)
        self._finish()

    async def _measured(self, backlogs: bool, seconds: float) -> Measured:
        meter = CpuMeter(lambda: dict.fromkeys(descendants([os.getpid()]), "pool"))
        meter.start()
        load = Load(self._scale.seed)
        found = await load.run(backlogs=backlogs, settle_s=self._scale.settle_s, seconds=seconds)
        self._uses.append(meter.stop())
        return found

    def _finish(self) -> None:
        if self.alone is not None:
            self._report.series.append(_light_series("light tenants, alone", self.alone))
        for name, found in self.together.items():
            self._report.series.append(_light_series(f"light tenants, {name}", found))
        for name, found in self.together.items():
            self._report.series.append(_shares_series(name, found))
        fair = self.together.get(FAIR)
        ratio = None
        if fair is not None and self.alone is not None:
            ratio = fair.light_p99() / self.alone.light_p99()
        self._report.targets += [
            Target("weighted Jain index", fair.jain if fair else None, ">=", 0.98, ""),
            Target("light tenants' p99, of what it is alone", ratio, "<=", 2.0, "times"),
            Target("utilisation", fair.utilisation if fair else None, ">=", 0.95, ""),
        ]
        tell_others(self._report, self._uses)


@asynccontextmanager
async def pool(make_queue: MakeQueue) -> AsyncIterator[None]:
    """Run a pool with a queue for as long as the block lasts."""
    workers = {
        "min": _WORKERS,
        "max": _WORKERS,
        "slots": SLOTS // _WORKERS,
        "tenants": {each.name: {"weight": each.weight} for each in BACKLOGGED},
    }
    settings = Settings.model_validate({"tools": {"workers": workers}})
    try:
        await asyncio.to_thread(
            lambda: start_pool(settings, open_sleepers, alone=True, make_queue=make_queue)
        )
        await asyncio.to_thread(_all_ready)
        yield
    finally:
        await asyncio.to_thread(end_pool)


def _all_ready() -> None:
    import time

    import ray

    from agentray.tools.worker import NAMESPACE, SCHEDULER

    untyped = cast(Any, ray)
    scheduler = untyped.get_actor(SCHEDULER, namespace=NAMESPACE)
    until = time.monotonic() + _READY_S
    while untyped.get(scheduler.workers.remote()) < _WORKERS:
        if time.monotonic() >= until:
            raise RuntimeError("not all workers are ready")
        time.sleep(0.05)


def _light_series(name: str, found: Measured) -> Series:
    calls = found.light()
    figures = {
        **percentiles([each.ms for each in calls]),
        "unanswered": sum(not each.answered for each in calls),
        "refused": sum(found.refused[name] for name in LIGHT),
    }
    return Series(name, "ms", figures)


def _shares_series(name: str, found: Measured) -> Series:
    slot_s = {each.name: round(found.slot_s(each.name), 2) for each in BACKLOGGED}
    figures = {
        "n": len(found.samples),
        "jain": round(found.jain, 4),
        "utilisation": round(found.utilisation, 4),
        "slot_s": slot_s,
        "slot_s_by_weight": {
            each.name: round(slot_s[each.name] / each.weight, 2) for each in BACKLOGGED
        },
        "refused": dict(found.refused),
    }
    return Series(f"backlogged tenants, {name}", "slot-seconds", figures)


COLUMNS: dict[str, Callable[[Series], object]] = {
    "calls": lambda series: series.figures.get("n"),
    "p50 ms": lambda series: series.figures.get("p50"),
    "p99 ms": lambda series: series.figures.get("p99"),
    "unanswered": lambda series: series.figures.get("unanswered"),
    "Jain index": lambda series: _text(series.figures.get("jain")),
    "utilisation": lambda series: _text(series.figures.get("utilisation")),
    **{
        f"{each.name} ÷{each.weight:g}": (
            lambda series, name=each.name: series.figures.get("slot_s_by_weight", {}).get(name)
        )
        for each in BACKLOGGED
    },
}


def _text(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def main() -> int:
    """Measure; 0 when all was measured, whether or not targets are met."""
    given = arguments(__doc__ or "")
    scale = QUICK if given.quick else FULL
    report = Report("fairness", quick=given.quick)
    tenants = [asdict(each) for each in BACKLOGGED]
    report.settings = {**asdict(scale), "slots": SLOTS, "workers": _WORKERS, "tenants": tenants}
    run = Fairness(report, scale)
    measure(run.run())
    report.write(Path(given.json))
    if run.alone is not None and len(run.together) == len(QUEUES):
        drawn = picture(run.alone, run.together)
        files = [Path(given.json).with_suffix(".svg"), *([] if given.quick else [_PICTURE])]
        for file in files:
            file.write_text(drawn)
            report.say(f"picture in {file}")
    report.print(COLUMNS)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
