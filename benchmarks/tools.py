"""Measure what a jailed tool call costs: from the worker's side, and from a session's step.

``python -m benchmarks.tools --json FILE [--quick]``. The program of every call is
``print(sum(range(100)))``. First slots alone, in this process as in a worker's: with a child
parked ahead and without, one call at a time and eight at once; beside them ``bwrap`` with a new
interpreter and ``runsc``, where they are installed. Then whole systems: sessions whose model asks
for the tool again and again, timed from ``tool.called`` to ``tool.finished``, both journaled.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from agentray.tools.sandbox.base import Limits, Outcome, PythonCode, Run, Slot
from agentray.tools.sandbox.opening import open_slot
from benchmarks.cpu import CpuMeter, CpuUse
from benchmarks.report import Report, Series, Target, arguments, percentile, percentiles
from benchmarks.system import AgentRay, Stores, measure, workspace

CODE = "print(sum(range(100)))"
SAYS = b"4950\n"
AT_ONCE = 8
DEADLINE_S = 0.1
# A child is parked while nobody waits; a call that comes at once would find none.
_PAUSE_S = 0.005
_STEPS = 12


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. ``rounds`` are taken in turn, so that all meet the same machine."""

    rounds: int
    calls: int
    firsts: int
    kills: int
    cold: int
    turns: int
    clients: int
    held_s: float
    rest_s: float


FULL = Scale(4, 250, 20, 60, 60, 30, 12, 60.0, 5.0)
QUICK = Scale(1, 40, 3, 8, 5, 3, 6, 4.0, 0.5)


class Tools:
    """One run of the benchmark."""

    def __init__(self, report: Report, scale: Scale) -> None:
        self._report = report
        self._scale = scale
        self._times: dict[str, list[float]] = {}
        self._rate: float | None = None

    async def run(self) -> None:
        """Measure slots, then systems."""
        with self._report.part("slots"):
            await self._slots()
        with self._report.part("first calls"):
            await self._firsts()
        with self._report.part("deadline"):
            await self._kills()
        with self._report.part("others"):
            await self._others()
        with self._report.part("end to end"):
            await self._end_to_end()
        self._finish()

    # Slots

    async def _slots(self) -> None:
        for number in range(self._scale.rounds):
            for parked in (True, False):
                said = "parked" if parked else "not parked"
                self._report.say(f"round {number + 1} of {self._scale.rounds}: {said}")
                async with slots(AT_ONCE, parked=parked) as opened:
                    await _warm(opened)
                    await self._one_at_a_time(f"{said}, one at a time", opened[0])
                    await self._together(f"{said}, {AT_ONCE} at once", opened)

    async def _one_at_a_time(self, name: str, slot: Slot) -> None:
        times = self._times.setdefault(name, [])
        for _ in range(self._scale.calls):
            await asyncio.sleep(_PAUSE_S)
            times.append(await _timed(slot))

    async def _together(self, name: str, opened: Sequence[Slot]) -> None:
        times = self._times.setdefault(name, [])

        async def caller(slot: Slot) -> None:
            for _ in range(self._scale.calls // AT_ONCE):
                times.append(await _timed(slot))

        await asyncio.gather(*(caller(slot) for slot in opened))

    async def _firsts(self) -> None:
        self._report.say("first calls of new slots")
        opened = self._times.setdefault("opening a slot", [])
        times = self._times.setdefault("first call of a new slot", [])
        for _ in range(self._scale.firsts):
            began = time.perf_counter()
            async with slots(1, parked=False) as (slot,):
                opened.append((time.perf_counter() - began) * 1e3)
                times.append(await _timed(slot))

    async def _kills(self) -> None:
        self._report.say(f"kills at a deadline of {DEADLINE_S:g} s")
        limits = Limits(wall_s=DEADLINE_S)
        async with slots(1, parked=True) as (slot,):
            await _warm([slot])
            for code in ("while True: pass", "import time; time.sleep(60)"):
                name = f"behind the deadline: {code.rpartition(' ')[2]}"
                times = self._times.setdefault(name, [])
                for _ in range(self._scale.kills):
                    began = time.perf_counter()
                    outcome = await slot.run(Run(PythonCode(code), limits))
                    took = time.perf_counter() - began
                    _expect(outcome.reason == "timeout", outcome)
                    times.append((took - DEADLINE_S) * 1e3)

    # Others

    async def _others(self) -> None:
        python = sys.base_prefix
        read_only = [(path, path) for path in ("/usr", "/lib", "/lib64", "/bin", python)]
        bound = [word for pair in read_only for word in ("--ro-bind-try", *pair)]
        new = ("--unshare-all", "--proc", "/proc", "--dev", "/dev", "--die-with-parent")
        binary = shutil.which("python3", path=f"{python}/bin") or sys.executable
        commands = {
            "cold bwrap + python -I -S": ("bwrap", *bound, *new, binary, "-I", "-S", "-c", CODE),
            "cold bwrap + python -I": ("bwrap", *bound, *new, binary, "-I", "-c", CODE),
            "runsc do python -I -S": (
                *("runsc", "--rootless", "--network=none", "--ignore-cgroups", "do"),
                *(binary, "-I", "-S", "-c", CODE),
            ),
        }
        for name, command in commands.items():
            if shutil.which(command[0]) is None:
                self._report.note(f"{command[0]} is not installed: no row of it")
                continue
            self._report.say(name)
            with self._report.part(name):
                times = [await _command_ms(command) for _ in range(self._scale.cold)]
                self._times[name] = times

    # End to end

    async def _end_to_end(self) -> None:
        settings = {
            "AGENTRAY_AGENTS": json.dumps({"coder": {"tools": ["python"], "max_steps": 64}}),
            "AGENTRAY_TOOLS__WORKERS__MIN": "1",
            "AGENTRAY_TOOLS__WORKERS__MAX": "1",
        }
        with workspace() as folder:
            async with Stores(folder) as stores, AgentRay(folder / "a", stores, settings) as system:
                self._report.say("a system: warming up")
                await system.settled()
                async with aiohttp.ClientSession(f"http://{system.address}") as http:
                    for number in range(2):
                        await _turn(http, f"warm{number}", [])
                    await asyncio.sleep(self._scale.rest_s)
                    self._report.say("a system: one call at a time")
                    times = self._times.setdefault("end to end, one at a time", [])
                    for _ in range(self._scale.turns):
                        await _turn(http, "one", times)
                    await self._held(http, CpuMeter(lambda: system.groups() | stores.groups()))

    async def _held(self, http: aiohttp.ClientSession, meter: CpuMeter) -> None:
        """Hold as many calls as there are for a while."""
        clients, held_s = self._scale.clients, self._scale.held_s
        self._report.say(f"a system: {clients} sessions for {held_s:g} s")
        times = self._times.setdefault(f"end to end, {clients} sessions", [])
        until = time.perf_counter() + held_s

        async def client(number: int) -> None:
            for turn in itertools.count():
                if time.perf_counter() >= until:
                    return
                # A new session each time: what grows with a history is another benchmark's.
                await _turn(http, f"held{number}-{turn}", times, until=until)

        began = time.perf_counter()
        meter.start()
        await asyncio.gather(*(client(number) for number in range(clients)))
        use: CpuUse = meter.stop()
        took = time.perf_counter() - began
        self._rate = len(times) / took
        self._report.settings["cpu_ms_per_call"] = {
            group: round(1e3 * seconds / len(times), 3) for group, seconds in use.groups.items()
        }
        self._report.note("the jails' own processes are among the others of cpu_ms_per_call")

    # The end

    def _finish(self) -> None:
        for name, times in self._times.items():
            figures: dict[str, Any] = percentiles(times)
            if name.endswith("sessions"):
                figures["calls_per_s"] = self._rate
            self._report.series.append(Series(name, "ms", figures))
        kills = [t for name, times in self._times.items() if "deadline" in name for t in times]
        aims = (
            ("parked p50", self._of("parked, one at a time", 0.5), 3.0),
            ("parked p99", self._of("parked, one at a time", 0.99), 8.0),
            ("not parked p50", self._of("not parked, one at a time", 0.5), 7.0),
            ("first call of a new slot", self._of("first call of a new slot", 1.0), 150.0),
            ("behind the deadline p99", percentile(kills, 0.99) if kills else None, 50.0),
            ("end to end p50", self._of("end to end, one at a time", 0.5), 9.0),
        )
        self._report.targets += [Target(name, value, "<=", aim, "ms") for name, value, aim in aims]
        held = f"end to end, held for {self._scale.held_s:g} s"
        self._report.targets.append(Target(held, self._rate, ">=", 150.0, "calls/s"))

    def _of(self, name: str, share: float) -> float | None:
        times = self._times.get(name)
        return percentile(times, share) if times else None


@asynccontextmanager
async def slots(count: int, *, parked: bool) -> AsyncIterator[list[Slot]]:
    """Open jailed slots for as long as the block lasts."""
    opened: list[Slot] = []
    try:
        for _ in range(count):
            slot = await open_slot("jail", parked=parked)
            opened.append(slot)  # one at a time: the next one may fail
        yield opened
    finally:
        for slot in opened:
            await slot.close()


async def _warm(opened: Sequence[Slot]) -> None:
    for slot in opened:
        for _ in range(3):
            await _timed(slot)


async def _timed(slot: Slot) -> float:
    began = time.perf_counter()
    outcome = await slot.run(Run(PythonCode(CODE), keep_scratch=True))
    took = time.perf_counter() - began
    _expect(outcome.stdout == SAYS, outcome)
    return took * 1e3


def _expect(held: bool, outcome: Outcome) -> None:
    if not held:
        raise RuntimeError(f"a call went wrong: {outcome}")


async def _command_ms(command: Sequence[str]) -> float:
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if out != SAYS:
        raise RuntimeError(err.decode(errors="replace").strip()[-300:] or f"it said {out!r}")
    return (time.perf_counter() - began) * 1e3


async def _turn(
    http: aiohttp.ClientSession, session: str, times: list[float], *, until: float | None = None
) -> None:
    """Run a turn of some tool calls in a session; add what each took, in ms.

    What ends behind ``until`` is not counted.
    """
    call = {"name": "python", "arguments": {"code": CODE}}
    script = "!sim " + json.dumps({"text": "done", "tools": [call] * _STEPS})
    body = {"input": script, "stream": True}
    async with http.post("/v1/sessions", json={"id": session, "agent": "coder"}) as made:
        made.raise_for_status()
    called = 0.0
    async with http.post(f"/v1/sessions/{session}/turns", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            now = time.perf_counter()
            event = json.loads(line[6:])
            if event["type"] == "tool.called":
                called = now
            elif event["type"] == "tool.finished":
                if event["status"] != "ok" or "4950" not in event["output"]:
                    raise RuntimeError(f"a call went wrong: {event}")
                if until is None or now < until:
                    times.append((now - called) * 1e3)


COLUMNS: dict[str, Callable[[Series], object]] = {
    "calls": lambda series: series.figures.get("n"),
    "p50 ms": lambda series: series.figures.get("p50"),
    "p90 ms": lambda series: series.figures.get("p90"),
    "p99 ms": lambda series: series.figures.get("p99"),
    "calls/s": lambda series: series.figures.get("calls_per_s"),
}


def main() -> int:
    """Measure; 0 when all was measured, whether or not targets are met."""
    given = arguments(__doc__ or "")
    scale = QUICK if given.quick else FULL
    report = Report("tools", quick=given.quick)
    report.settings = {**asdict(scale), "program": CODE, "at_once": AT_ONCE}
    measure(Tools(report, scale).run())
    report.write(Path(given.json))
    report.print(COLUMNS)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
