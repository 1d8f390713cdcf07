"""Measure what a session costs: its memory, coming back to memory, a long history, a process.

``python -m benchmarks.sessions --json FILE [--quick]``. Two systems run after each other on the
same stores: one whose sessions leave memory at once, one whose sessions stay.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from psycopg import AsyncConnection
from redis.asyncio import Redis

from benchmarks.answers import expected_text, scripted_input
from benchmarks.cpu import CpuMeter, CpuUse, pss_bytes
from benchmarks.load import Client, Generator, Measured, Round
from benchmarks.report import Report, Series, Target, arguments, median, percentiles
from benchmarks.system import AgentRay, Stores, measure, workspace

HOSTS = "session hosts"
DEDICATED = "dedicated sessions"
_ACTIVATIONS = re.compile(r"^agentray_activations_total\{(.*)\} (\S+)$", re.MULTILINE)
_SETTLE_S = 3.0
_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    resident_from: int
    resident_to: int
    step: int
    resident_turns: int
    resident_until_s: float
    activated: int
    activated_turns: int
    long_history: int
    short_history: int
    history_sessions: int
    history_rounds: int
    dedicated: int
    together: int = 64
    idle_s: float = 2.0


FULL = Scale(1_000, 20_000, 1_000, 10, 600.0, 400, 10, 1_000, 20, 16, 6, 3)
QUICK = Scale(50, 250, 50, 10, 300.0, 40, 3, 60, 20, 8, 1, 1)


class Sessions:
    """One run of the benchmark."""

    def __init__(self, report: Report, scale: Scale) -> None:
        self._report = report
        self._scale = scale
        self._began = time.monotonic()
        self._made = 0
        self._found: dict[str, float] = {}

    async def run(self) -> None:
        """Start everything, measure, and end everything."""
        with workspace() as folder:
            async with Stores(folder) as self._stores:
                self._lean = await Generator.start()
                try:
                    idle = {"AGENTRAY_SESSIONS__IDLE_S": str(self._scale.idle_s)}
                    async with self._system_of(folder / "a", idle):
                        with self._report.part("activation"):
                            await self._activation()
                        with self._report.part("histories"):
                            await self._history()
                    stay = {"AGENTRAY_SESSIONS__IDLE_S": "7200"}
                    async with self._system_of(folder / "b", stay):
                        with self._report.part("memory"):
                            await self._memory()
                        with self._report.part("placements"):
                            await self._placements()
                finally:
                    await self._lean.stop()
        self._report.targets += self._targets()

    @asynccontextmanager
    async def _system_of(self, folder: Path, settings: dict[str, str]) -> AsyncIterator[None]:
        self._report.say(f"starting agentray with {settings}")
        async with AgentRay(folder, self._stores, settings) as self._system:
            yield

    # Sessions and their turns

    async def _run(self, kind: str, clients: Sequence[Client], **bounds: Any) -> Measured:
        spec = Round(
            kind=kind, address=self._system.address, clients=list(clients), timeout_s=60, **bounds
        )
        measured = await self._lean.run(spec)
        if measured.errors:
            raise RuntimeError(f"{len(measured.errors)} turns failed: {measured.errors[0]}")
        return measured

    async def _make(self, count: int, **options: Any) -> list[Client]:
        """Make sessions; return who sends a turn to each."""
        names = [f"s{self._made + number}" for number in range(count)]
        self._made += count
        makers = [
            Client(expect="", path="/v1/sessions", body=json.dumps({"id": name, **options}))
            for name in names
        ]
        await self._run("any", makers, turns=1, together=self._scale.together)
        return [_turns_of(name, number) for number, name in enumerate(names)]

    async def _give_turns(self, clients: Sequence[Client], turns: int) -> Measured:
        together = self._scale.together
        return await self._run("json", clients, turns=turns, together=together)

    # Activation

    async def _activation(self) -> None:
        count = self._scale.activated
        self._report.say(f"activation: {count} sessions of {self._scale.activated_turns} turns")
        clients = await self._make(count)
        await self._give_turns(clients, self._scale.activated_turns)
        for tier, name in (("hot", "the hot tier"), ("durable", "PostgreSQL")):
            await self._until_none_is_resident()
            if tier == "durable":
                await self._forget_hot_copies()
            before = self._activations()
            # One after the other, the first message and at once a second one.
            found = await self._run("json", clients, turns=2, together=1)
            first, warm = found.ms[0::2], found.ms[1::2]
            costs = [a - b for a, b in zip(first, warm, strict=True)]
            for what, values in (
                (f"first message, session from {name}", first),
                (f"second message, session from {name}", warm),
                (f"activation from {name}", costs),
            ):
                self._report.series.append(Series(what, "ms", percentiles(values)))
            self._found[tier] = percentiles(costs)["p50"]
            await self._check_tier(tier, before)

    async def _until_none_is_resident(self) -> None:
        """Wait until every session has left memory, as PostgreSQL has it."""
        url = self._stores.postgres.url
        async with await AsyncConnection.connect(url, autocommit=True) as connection:
            deadline = time.monotonic() + _DEADLINE_S
            while time.monotonic() < deadline:
                cursor = await connection.execute(
                    "SELECT count(*) FROM sessions WHERE owner IS NOT NULL"
                )
                row = await cursor.fetchone()
                if row is not None and row[0] == 0:
                    return
                await asyncio.sleep(0.1)
        raise RuntimeError("sessions do not leave memory")

    async def _forget_hot_copies(self) -> None:
        redis = Redis.from_url(self._stores.redis.url)
        keys = [key async for key in redis.scan_iter("ar:hot:*", count=1_000)]
        if not keys:
            raise RuntimeError("Redis has no hot copies under ar:hot:")
        await redis.unlink(*keys)
        await redis.aclose()

    def _activations(self) -> dict[str, float]:
        """Return how many sessions came to memory from each tier, on all hosts."""
        connection = HTTPConnection("127.0.0.1", self._system.port, timeout=10)
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
        connection.close()
        found = {"hot": 0.0, "durable": 0.0}
        for labels, value in re.findall(
            r"^agentray_activations_total\{(.*)\} (\S+)$", page, re.MULTILINE
        ):
            tier = re.search(r'tier="(\w+)"', labels)
            if tier is not None:
                found[tier[1]] += float(value)
        return found

    async def _check_tier(self, tier: str, before: dict[str, float]) -> None:
        """See in the hosts' own metrics that the sessions came from the tier that was meant."""
        deadline = time.monotonic() + 15
        while True:
            after = self._activations()
            grown = {name: after[name] - before[name] for name in after}
            if sum(grown.values()) >= self._scale.activated or time.monotonic() > deadline:
                break
            # Each host posts its metrics every two seconds.
            await asyncio.sleep(0.2)
        if grown[tier] < 0.99 * self._scale.activated:
            self._report.note(f"activations from the {tier} tier were to be counted, not {grown}")

    # Histories

    async def _history(self) -> None:
        scale = self._scale
        count, long, short = scale.history_sessions, scale.long_history, scale.short_history
        self._report.say(f"histories of {long} turns: {count} sessions")
        old = await self._make(count)
        await self._give_turns(old, long)
        ratios: list[float] = []
        cpu_ms: dict[int, list[float]] = {long: [], short: []}
        for number in range(scale.history_rounds):
            young = await self._make(count)
            await self._give_turns(young, short)
            pair = [(long, old), (short, young)]
            for history, clients in pair if number % 2 else pair[::-1]:
                cpu_ms[history].append(await self._hosts_cpu_ms(clients))
            ratios.append(cpu_ms[long][-1] / cpu_ms[short][-1])
        for history, values in cpu_ms.items():
            name = f"hosts' CPU of a turn, behind {history} turns"
            self._report.series.append(
                Series(name, "ms", {**percentiles(values), "rounds": [round(v, 3) for v in values]})
            )
        self._found["history"] = median(ratios)

    async def _hosts_cpu_ms(self, clients: Sequence[Client]) -> float:
        """Return the CPU of a turn in the session hosts, in milliseconds."""
        meter = CpuMeter(self._system.groups)
        used: list[CpuUse] = []
        spec = Round(
            kind="json",
            address=self._system.address,
            clients=list(clients),
            turns=self._scale.short_history,
        )
        measured = await self._lean.run(
            spec, before=meter.start, after=lambda: used.append(meter.stop())
        )
        return used[0].groups.get(HOSTS, 0.0) / measured.turns * 1000

    # Memory

    async def _memory(self) -> None:
        """Grow the number of resident sessions, and see what each one takes."""
        scale = self._scale
        self._report.say(
            f"memory: up to {scale.resident_to} resident sessions of {scale.resident_turns} turns"
        )
        points: list[tuple[int, int]] = []
        redis_bytes = await self._redis_bytes()
        resident = 0
        while resident < scale.resident_to:
            clients = await self._make(scale.step)
            measured = await self._give_turns(clients, scale.resident_turns)
            resident += scale.step
            if resident >= scale.resident_from:
                # Only the ends count, and have to settle; the rest shows how it grows.
                ends = resident in (scale.resident_from, scale.resident_to)
                await asyncio.sleep(_SETTLE_S if ends else 0.0)
                points.append((resident, self._pss()))
            if resident % (5 * scale.step) == 0:
                rate = measured.throughput
                self._report.say(f"{resident} sessions are resident ({rate:.0f} turns/s)")
            if len(points) > 1 and time.monotonic() - self._began > scale.resident_until_s:
                self._report.note(f"time allowed {resident} resident sessions")
                await asyncio.sleep(_SETTLE_S)
                points[-1] = (resident, self._pss())
                break
        (few, low), (many, high) = points[0], points[-1]
        grown = (high - low) / (many - few)
        redis_grown = (await self._redis_bytes() - redis_bytes) / resident
        self._report.series += [
            Series(
                "memory of a resident session",
                "KB",
                {
                    "n": many - few,
                    "value": round(grown / 1000, 2),
                    "pss_mb": {str(count): round(size / 1e6, 1) for count, size in points},
                    "hosts": len(self._system.hosts()),
                },
            ),
            Series(
                "its hot copy in Redis",
                "KB",
                {"n": resident, "value": round(redis_grown / 1000, 2)},
            ),
        ]
        self._found["memory"] = grown / 1000

    def _pss(self) -> int:
        return sum(pss_bytes(pid) for pid in self._system.hosts())

    async def _redis_bytes(self) -> int:
        redis = Redis.from_url(self._stores.redis.url)
        info: dict[str, Any] = await redis.info("memory")
        await redis.aclose()
        return info["used_memory"]

    # Placements

    async def _placements(self) -> None:
        """Compare a session in a host with one in a process of its own."""
        count = self._scale.dedicated
        self._report.say(f"placements: {count} dedicated sessions, one after the other")
        for placement in ("shared", "dedicated"):
            starts: list[float] = []
            warm: list[float] = []
            for _ in range(count if placement == "dedicated" else 10 * count):
                began = time.perf_counter()
                clients = await self._make(1, placement=placement)
                made_ms = (time.perf_counter() - began) * 1000
                first = await self._run("json", clients, turns=1)
                starts.append(made_ms + first.ms[0])
                warm += (await self._run("json", clients, turns=20)).ms
            size = self._found.get("memory")
            if placement == "dedicated":
                pids = [p for p, group in self._system.groups().items() if group == DEDICATED]
                if len(pids) != count:
                    self._report.note(f"{count} dedicated sessions run in {len(pids)} processes")
                size = sum(map(pss_bytes, pids)) / 1000 / max(1, len(pids))
            self._report.series += [
                Series(f"{placement}: made and first turn", "ms", percentiles(starts)),
                Series(f"{placement}: a warm turn over HTTP", "ms", percentiles(warm)),
                Series(f"{placement}: memory", "KB", {"n": count, "value": size}),
            ]

    def _targets(self) -> list[Target]:
        found, scale = self._found, self._scale
        return [
            Target("activation from the hot tier, p50", found.get("hot"), "<=", 5.0, "ms"),
            Target("activation from PostgreSQL, p50", found.get("durable"), "<=", 10.0, "ms"),
            Target(
                f"hosts' CPU of a turn behind {scale.long_history} turns, against "
                f"{scale.short_history}",
                found.get("history"),
                *("<=", 1.2, "times"),
            ),
            Target(
                f"memory of a resident session, from {scale.resident_from} to {scale.resident_to}",
                found.get("memory"),
                *("<=", 20.0, "KB"),
            ),
        ]


def _turns_of(session: str, number: int) -> Client:
    text = expected_text(number)
    return Client(
        expect=text,
        session=session,
        path=f"/v1/sessions/{session}/turns",
        body=json.dumps({"input": scripted_input(text)}),
    )


def main() -> int:
    """Measure; 0 when all was measured, whether or not targets are met."""
    given = arguments(__doc__ or "")
    scale = QUICK if given.quick else FULL
    report = Report("sessions", quick=given.quick)
    report.settings = {**asdict(scale), "simulator_tps": 1_000_000, "chunks": 20}
    measure(Sessions(report, scale).run())
    report.write(Path(given.json))
    report.print(
        {
            "unit": lambda series: series.unit,
            "n": lambda series: series.figures.get("n"),
            "value": lambda series: series.figures.get("value"),
            "p50": lambda series: series.figures.get("p50"),
            "p90": lambda series: series.figures.get("p90"),
            "p99": lambda series: series.figures.get("p99"),
        }
    )
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
