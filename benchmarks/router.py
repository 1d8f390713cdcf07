"""Measure what agentray's door to models adds to a call, beside the LiteLLM proxy.

``python -m benchmarks.router --json FILE [--quick]``. One run, one simulator for all: asked
directly, through agentray (routing over two models with prices, breaker, cost accounting) and
through LiteLLM (two models with prices, the cost of each request worked out, no database). First
the most that each one does over 32 connections, then a fixed schedule at half of the slower
gateway's most, where latency counts from when a request was due.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.answers import expected_text, scripted_input
from benchmarks.cpu import OTHERS, CpuMeter, CpuUse
from benchmarks.gateways import AGENTRAY, DIRECT, GATEWAYS, LITELLM, Cell, difference
from benchmarks.litellm_proxy import (
    COST_HEADER,
    LiteLLM,
    install_litellm,
    litellm,
    litellm_version,
)
from benchmarks.load import Client, Generator
from benchmarks.model_server import read_counts, server_command
from benchmarks.report import Op, Report, Series, Target, arguments, percentiles
from benchmarks.rows import LOAD, Row, tell_others
from benchmarks.system import AgentRay, Stores, free_port, measure, running, workspace

SIMULATOR = "simulator"
WHOLE, STREAMED = "whole", "20 chunks"
KINDS = {WHOLE: "completion", STREAMED: "chat"}
CONNECTIONS = 32
PROCESSES = max(2, len(os.sched_getaffinity(0)))
"""Session hosts of agentray, and as many workers of LiteLLM."""
AGENT = "assistant"
PATH = "/v1/chat/completions"
PRICES = {"small": {"input": 0.15, "output": 0.6}, "large": {"input": 2.5, "output": 10.0}}
TPS = 1_000_000


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. ``until_s`` bounds the rounds, environments and starts included."""

    rounds: int
    most_s: float
    scheduled_s: float
    warm_turns: int
    pause_s: float
    rest_s: float
    until_s: float
    litellm_workers: int


FULL = Scale(3, 4.0, 17.0, 10, 1.5, 10.0, 600.0, PROCESSES)
# Each of LiteLLM's workers takes ten seconds to import what it is made of.
QUICK = Scale(1, 0.4, 2.0, 1, 0.5, 0.5, 300.0, 1)


def _client(path: str, model: str, kind: str) -> Callable[[int, int], Client]:
    """Return what makes clients that ask a model; each expects another text."""

    def client(clients: int, number: int) -> Client:
        text = expected_text(number)
        said = {"role": "user", "content": scripted_input(text)}
        system = {"role": "system", "content": "You are a helpful assistant."}
        earlier = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]
        body: dict[str, Any] = {"model": model, "messages": [system, *earlier, said]}
        if kind == STREAMED:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Client(expect=text, path=path, body=json.dumps(body))

    return client


class Router:
    """One run of the benchmark."""

    def __init__(self, report: Report, scale: Scale) -> None:
        self._report = report
        self._scale = scale
        self._began = time.monotonic()
        self._pids: dict[int, str] = {}
        self._cells: dict[tuple[str, str, bool], Cell] = {}
        self._idle: dict[str, float] = {}
        self._asked = 0

    async def run(self) -> None:
        """Start everything, measure, and end everything."""
        self._report.say("looking for LiteLLM's environment; made anew, it takes some minutes")
        program = await asyncio.to_thread(install_litellm)
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(workspace())
            self._stores = await stack.enter_async_context(Stores(folder))
            await self._start(stack, folder, program)
            self._check()
            rows = {kind: self._rows(kind) for kind in KINDS}
            self._report.say("warming up")
            for kind in KINDS:
                await self._warm(rows[kind])
            await self._system.settled()
            await self._rest()
            for kind in KINDS:
                with self._report.part(kind):
                    await self._compare(kind, rows[kind])
            self._check_calls()
            self._finish()
            self._report.say("ending everything")

    # What is compared

    async def _start(self, stack: AsyncExitStack, folder: Path, program: Path) -> None:
        port = free_port()
        self._counts = folder / "counts"
        command = server_command(sys.executable, port, self._counts, tps=TPS)
        simulator = await stack.enter_async_context(running(*command, port=port))
        self._pids[simulator.pid] = SIMULATOR
        self._simulator = f"127.0.0.1:{port}"
        self._generator = await Generator.start("benchmarks.open_load")
        stack.push_async_callback(self._generator.stop)
        self._pids[self._generator.pid] = LOAD
        urls = dict.fromkeys(PRICES, f"http://{self._simulator}/v1")
        self._system = AgentRay(folder, self._stores, _settings(urls))
        self._report.say("starting agentray and LiteLLM")
        theirs = litellm(
            program, folder, workers=self._scale.litellm_workers, urls=urls, prices=PRICES
        )
        async with asyncio.TaskGroup() as starts:
            starts.create_task(stack.enter_async_context(self._system))
            proxy = starts.create_task(stack.enter_async_context(theirs))
        self._litellm: LiteLLM = proxy.result()

    def _classify(self) -> Mapping[int, str]:
        theirs = dict.fromkeys(self._litellm.processes(), LITELLM)
        return {**self._system.groups(), **self._stores.groups(), **theirs, **self._pids}

    def _rows(self, kind: str) -> list[Row]:
        asked = {
            DIRECT: (self._simulator, "small"),
            AGENTRAY: (self._system.address, AGENT),
            LITELLM: (self._litellm.address, AGENT),
        }
        return [
            Row(name, self._generator, KINDS[kind], address, _client(PATH, model, kind))
            for name, (address, model) in asked.items()
        ]

    def _check(self) -> None:
        """Ask each gateway once: agentray has to pick a model, LiteLLM to know the cost."""
        made = _client(PATH, AGENT, WHOLE)(1, 0)
        model, _ = _ask(self._system.address, made)
        if model not in PRICES:
            raise RuntimeError(f"agentray's answer is of model {model!r}, which is no endpoint's")
        _, headers = _ask(self._litellm.address, made)
        if not float(headers.get(COST_HEADER) or 0) > 0:
            raise RuntimeError(f"LiteLLM does not work out costs: {COST_HEADER} is missing or 0")
        self._routed_to = model
        self._asked += 2

    # Rounds

    async def _warm(self, rows: Sequence[Row]) -> None:
        for row in rows:
            measured = await self._generator.run(
                row.round(CONNECTIONS, turns=self._scale.warm_turns)
            )
            self._asked += measured.turns + len(measured.errors)
            if len(measured.errors) > 0.1 * self._scale.warm_turns * CONNECTIONS:
                raise RuntimeError(f"{row.name}: {measured.errors[0]}")

    async def _rest(self) -> None:
        """Measure what all processes take while nobody asks anything."""
        await asyncio.sleep(self._scale.pause_s)
        meter = CpuMeter(self._classify)
        meter.start()
        await asyncio.sleep(self._scale.rest_s)
        use = meter.stop()
        self._idle = {
            group: round(seconds / use.seconds, 4)
            for group, seconds in sorted(use.groups.items())
            if group != OTHERS
        }
        self._report.series.append(Series("idle", "cores", {"n": 1, "cores": self._idle}))

    async def _compare(self, kind: str, rows: Sequence[Row]) -> None:
        scale = self._scale
        for number in range(scale.rounds):
            self._report.say(f"{kind}: the most of each, round {number + 1} of {scale.rounds}")
            for row in _turned(rows, number):
                await self._round(row, kind, scale.most_s, None)
        gateways = [self._cell(name, kind, None) for name in GATEWAYS]
        rate = min(cell.throughput for cell in gateways) / 2
        # The two kinds share the time that is left.
        left_s = scale.until_s - (time.monotonic() - self._began)
        share_s = left_s if kind == list(KINDS)[-1] else left_s / 2
        end = time.monotonic() + share_s
        for number in range(scale.rounds):
            began = time.monotonic()
            self._report.say(
                f"{kind}: {rate:.1f} requests/s on a schedule, round {number + 1} of {scale.rounds}"
            )
            for row in _turned(rows, number):
                await self._round(row, kind, scale.scheduled_s, rate)
            now = time.monotonic()
            if number + 1 < scale.rounds and now + (now - began) > end:
                self._report.note(f"{kind}: time allowed {number + 1} rounds of {scale.rounds}")
                break

    async def _round(self, row: Row, kind: str, seconds: float, rate: float | None) -> None:
        cell = self._cell(row.name, kind, rate)
        meter = CpuMeter(self._classify)
        used: list[CpuUse] = []
        measured = await self._generator.run(
            row.round(CONNECTIONS, seconds=seconds, rate=rate),
            before=meter.start,
            after=lambda: used.append(meter.stop()),
        )
        self._asked += measured.turns + len(measured.errors)
        cell.rounds.append((measured, used[0]))
        # LiteLLM works on behind its answers: the next row is not to meet that.
        await asyncio.sleep(self._scale.pause_s)
        if measured.errors:
            self._report.note(
                f"{row.name}, {kind}: {len(measured.errors)} requests failed: {measured.errors[0]}"
            )

    def _cell(self, name: str, kind: str, rate: float | None) -> Cell:
        key = (name, kind, rate is None)
        return self._cells.setdefault(key, Cell(name, kind, rate))

    # What came out

    def _check_calls(self) -> None:
        """See that each request reached the simulator: nothing came from a cache."""
        calls = read_counts(self._counts).calls
        figures = {"n": self._asked, "calls": calls, "model_of_agentrays_first": self._routed_to}
        self._report.series.append(Series("requests, and calls of the simulator", "", figures))
        if abs(calls - self._asked) > 0.005 * self._asked:
            self._report.note(f"{self._asked} requests made {calls} calls of the simulator")

    def _finish(self) -> None:
        cells = [cell for cell in self._cells.values() if cell.rounds]
        for cell in cells:
            direct = self._cell(DIRECT, cell.kind, cell.rate)
            self._report.series.append(cell.series(direct, self._idle))
        tell_others(self._report, [use for cell in cells for _, use in cell.rounds])
        for kind in KINDS:
            self._report.targets += self._targets(kind)

    def _targets(self, kind: str) -> list[Target]:
        cells = {name: self._cell(name, kind, 1.0) for name in (DIRECT, *GATEWAYS)}
        most = {name: self._cell(name, kind, None) for name in GATEWAYS}
        found = {name: percentiles(cell.ms) for name, cell in cells.items()}
        answered = "streamed" if kind == STREAMED else "whole"

        def times(of: Mapping[str, Cell], idle: Mapping[str, float]) -> float | None:
            ours, theirs = of[AGENTRAY].per_cpu_s(idle), of[LITELLM].per_cpu_s(idle)
            return ours / theirs if ours and theirs else None

        at_least: tuple[Op, float, str] = (">=", 15.0, "times LiteLLM's")
        return [
            Target(
                f"p50 that agentray adds, {answered}",
                difference(found[AGENTRAY], found[DIRECT], "p50"),
                *("<=", 3.0, "ms"),
            ),
            Target(
                f"p99 that agentray adds, {answered}",
                difference(found[AGENTRAY], found[DIRECT], "p99"),
                *("<=", 12.0, "ms"),
            ),
            # On a schedule this slow, most of agentray's CPU is what it takes idle.
            *(
                Target(f"requests per CPU-second, {answered}, {how}", value, *at_least)
                for how, value in (
                    ("at the most of each", times(most, {})),
                    ("on the schedule, less what each takes idle", times(cells, self._idle)),
                    ("on the schedule, all of it", times(cells, {})),
                )
            ),
        ]


def _settings(urls: Mapping[str, str]) -> dict[str, str]:
    """Return agentray's settings: two models that it picks from, an agent that adds nothing."""
    endpoints = {
        name: {"url": url, "card": {"tier": name, "price": PRICES[name]}}
        for name, url in urls.items()
    }
    return {
        "AGENTRAY_MODELS__ENDPOINTS": json.dumps(endpoints),
        # Its speed is set in every system of the benchmarks, which would switch it on.
        "AGENTRAY_MODELS__SIMULATOR__ENABLED": "false",
        "AGENTRAY_SESSIONS__HOSTS": str(PROCESSES),
        "AGENTRAY_AGENTS": json.dumps({AGENT: {"instructions": "", "tools": []}}),
    }


def _ask(address: str, client: Client) -> tuple[str, Mapping[str, str]]:
    """Return the model that an answer names, and the answer's headers."""
    request = urllib.request.Request(
        f"http://{address}{client.path}",
        client.body.encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["model"], {k.lower(): v for k, v in answer.headers.items()}


def _turned(rows: Sequence[Row], number: int) -> Sequence[Row]:
    """Return the rows forwards and backwards: what one leaves behind meets another one next."""
    return rows if number % 2 == 0 else rows[::-1]


def _figure(name: str) -> Callable[[Series], object]:
    return lambda series: series.figures.get(name)


COLUMNS: dict[str, Callable[[Series], object]] = {
    "rate": _figure("rate"),
    "n": _figure("n"),
    "errors": _figure("errors"),
    "requests/s": _figure("throughput"),
    "p50 ms": _figure("p50"),
    "p90": _figure("p90"),
    "p99": _figure("p99"),
    "added p50": _figure("added_p50"),
    "added p99": _figure("added_p99"),
    "CPU s": _figure("gateway_cpu_s"),
    "req/CPU s": _figure("requests_per_cpu_s"),
    "less idle": _figure("requests_per_cpu_s_less_idle"),
}


def main() -> int:
    """Measure; 0 when all was measured, whether or not targets are met."""
    given = arguments(__doc__ or "")
    scale = QUICK if given.quick else FULL
    report = Report("router", quick=given.quick)
    report.settings = {
        **asdict(scale),
        "connections": CONNECTIONS,
        "chunks": 20,
        "simulator_tps": TPS,
        "prices": PRICES,
        "agentray_hosts": PROCESSES,
        "litellm": litellm_version(),
    }
    measure(Router(report, scale).run())
    report.write(Path(given.json))
    report.print(COLUMNS)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
