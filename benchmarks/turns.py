"""Compare a turn on agentray with the hand-written floor and with an actor for each session.

``python -m benchmarks.turns --json FILE [--quick]``. One run, one simulator, one PostgreSQL and
one Redis for all; twenty chunks a turn, histories of twenty turns; rows take turns, round after
round, and the figures are medians over the rounds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentray.app.environment import find_haproxy
from benchmarks.actor_per_session import PREFIX, actor_name
from benchmarks.answers import expected_text, scripted_input
from benchmarks.load import Client, Generator, Round
from benchmarks.report import Report, Series, Target, arguments
from benchmarks.rows import LOAD, Row, Rows
from benchmarks.second_door import find_config, without_affinity
from benchmarks.system import AgentRay, Stores, free_port, measure, running, workspace

FLOOR = "floor"
SIMULATOR = "simulator alone"
HTTP = "agentray, HTTP"
NO_KEY = "agentray, HTTP, every second at the wrong host"
OPENAI_KEY = "agentray, openai client, x-session-id"
OPENAI = "agentray, openai client, no key of its own"
OPENAI_NO_KEY = "agentray, openai client, every second at the wrong host"
SEND = "agentray, Python handle, send"
STREAM = "agentray, Python handle, stream"
PACED_FLOOR = "floor, a chunk each ms"
PACED = "agentray, HTTP, a chunk each ms"
BESIDE = "agentray, HTTP, beside the actors"
ACTORS = "session actors, HAProxy"
ACTORS_GATHER = "session actors, HAProxy, an item a read"
ACTORS_PROXY = "session actors, default proxy"

ONE, MANY = 1, 64
PACED_TPS = 1000.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    rounds: int
    seconds: float
    warm_turns: int
    actors: int
    actor_rounds: int
    rounds_until_s: float
    actor_rounds_until_s: float


FULL = Scale(6, 2.5, 20, 64, 4, 430.0, 640.0)
QUICK = Scale(1, 0.4, 2, 4, 1, 300.0, 300.0)


def _turn_body(text: str, *, tps: float | None = None, **more: Any) -> str:
    return json.dumps({"input": scripted_input(text, tps=tps), **more})


def _session_client(
    row: str, path: str, *, tps: float | None = None, **more: Any
) -> Callable[[int, int], Client]:
    """Return what makes clients of a service of sessions; each row has sessions of its own."""

    def client(clients: int, number: int) -> Client:
        session = f"{row}-{clients}-{number}"
        text = expected_text(number)
        return Client(
            expect=text,
            session=session,
            path=path.format(session=session, number=number),
            body=_turn_body(text, tps=tps, **more),
        )

    return client


def _prompt_client(row: str) -> Callable[[int, int], Client]:
    """Return what makes clients of drivers that build their requests themselves."""

    def client(clients: int, number: int) -> Client:
        text = expected_text(number)
        return Client(expect=text, session=f"{row}-{clients}-{number}", body=scripted_input(text))

    return client


def _chat_client(clients: int, number: int) -> Client:
    """Ask the simulator as a session asks it whose window is full."""
    text = expected_text(number)
    said = {"role": "user", "content": scripted_input(text)}
    turn = [said, {"role": "assistant", "content": text}]
    system = {"role": "system", "content": "You are a helpful assistant."}
    body = {
        "model": "simulator",
        "messages": [system, *turn * 20, said],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    session = {"x-session-id": f"chat-{clients}-{number}"}
    return Client(
        expect=text,
        path="/models/simulator/v1/chat/completions",
        body=json.dumps(body),
        headers=session,
    )


class Turns:
    """One run of the benchmark."""

    def __init__(self, report: Report, scale: Scale) -> None:
        self._report = report
        self._scale = scale
        self._began = time.monotonic()
        self._pids: dict[int, str] = {}

    async def run(self) -> None:
        """Start everything, measure, and end everything."""
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(workspace())
            self._stores = await stack.enter_async_context(Stores(folder))
            self._report.say("starting agentray")
            self._system = await stack.enter_async_context(AgentRay(folder, self._stores, {}))
            self._folder = folder
            rows = Rows(self._report, self._classify, seconds=self._scale.seconds)
            lean = await stack.enter_async_context(self._generator("benchmarks.load"))
            with self._report.part("agentray and the floor"):
                await self._compare(rows, lean)
            with self._report.part("an actor for each session"):
                await self._compare_actors(rows, lean)
            rows.finish()
            self._report.targets += _targets(rows)
            self._report.say("ending everything")

    def _classify(self) -> Mapping[int, str]:
        return {**self._system.groups(), **self._stores.groups(), **self._pids}

    @asynccontextmanager
    async def _generator(self, module: str, *args: str) -> AsyncIterator[Generator]:
        generator = await Generator.start(module, *args)
        self._pids[generator.pid] = LOAD
        try:
            yield generator
        finally:
            await generator.stop()

    @asynccontextmanager
    async def _running(self, group: str, *command: str, **ready: Any) -> AsyncIterator[None]:
        log_file = self._folder / f"{group.replace(' ', '-')}.log"
        async with running(*command, log_file=log_file, **ready) as process:
            self._pids[process.pid] = group
            yield

    # Floor, simulator and agentray

    async def _compare(self, rows: Rows, lean: Generator) -> None:
        system, stores = self._system, self._stores
        floor_port, door_port = free_port(), free_port()
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            await enter(
                self._running(
                    FLOOR,
                    *(sys.executable, "-m", "benchmarks.floor", "--port", str(floor_port)),
                    *("--postgres", stores.postgres.url, "--redis", stores.redis.url),
                    *("--model-url", system.simulator_url),
                    port=floor_port,
                )
            )
            await system.settled()
            config = self._folder / "second-door.cfg"
            first = find_config(system.layout.runtime_dir).read_text()
            config.write_text(without_affinity(first, door_port))
            await enter(
                self._running("HAProxy", find_haproxy(), "-db", "-f", str(config), port=door_port)
            )
            openai = await enter(self._generator("benchmarks.openai_load"))
            handles = await enter(self._generator("benchmarks.handles_load", str(system.data_dir)))
            door, floor = system.address, f"127.0.0.1:{floor_port}"
            wrong_door = f"127.0.0.1:{door_port}"
            path = "/v1/sessions/{session}/turns"
            compared = [
                Row(SIMULATOR, lean, "chat", door, _chat_client, warm_turns=1),
                Row(FLOOR, lean, "session", floor, _session_client("floor", path, stream=True)),
                Row(HTTP, lean, "session", door, _session_client("http", path, stream=True)),
                Row(NO_KEY, lean, "session", wrong_door, _session_client("nk", path, stream=True)),
                Row(OPENAI_KEY, openai, "header", door, _prompt_client("header")),
                Row(OPENAI, openai, "plain", door, _prompt_client("plain")),
                Row(OPENAI_NO_KEY, openai, "plain", wrong_door, _prompt_client("wrong")),
                Row(SEND, handles, "send", door, _prompt_client("send")),
                Row(STREAM, handles, "stream", door, _prompt_client("stream")),
                Row(
                    PACED_FLOOR,
                    *(lean, "session", floor),
                    _session_client("floor-paced", path, tps=PACED_TPS, stream=True),
                ),
                Row(
                    PACED,
                    *(lean, "session", door),
                    _session_client("paced", path, tps=PACED_TPS, stream=True),
                ),
            ]
            self._report.say("making sessions, and giving them a history")
            for row in compared:
                if row.kind == "session" and row.address != floor:
                    await self._make_sessions(lean, row)
            await rows.warm(compared, (ONE, MANY), turns=self._scale.warm_turns)
            await rows.rest("idle, beside the floor and agentray")
            await self._rounds(
                rows, compared, (ONE, MANY), self._scale.rounds, self._scale.rounds_until_s
            )

    async def _rounds(
        self, rows: Rows, compared: list[Row], counts: tuple[int, ...], rounds: int, until_s: float
    ) -> None:
        for number in range(rounds):
            began = time.monotonic()
            self._report.say(f"round {number + 1} of {rounds}: {len(compared)} rows at {counts}")
            # Forwards and backwards: what one row leaves behind meets another one next.
            order = compared if number % 2 == 0 else compared[::-1]
            await rows.round(order, counts)
            spent = time.monotonic() - began
            if number + 1 < rounds and time.monotonic() - self._began + spent > until_s:
                self._report.note(f"time allowed {number + 1} rounds of {rounds}")
                break

    async def _make_sessions(self, lean: Generator, row: Row) -> None:
        for clients in (ONE, MANY):
            makers = [
                Client(
                    expect="",
                    path="/v1/sessions",
                    body=json.dumps({"id": row.client(clients, number).session}),
                )
                for number in range(clients)
            ]
            made = await lean.run(
                Round(kind="any", address=self._system.address, clients=makers, turns=1)
            )
            if made.errors:
                raise RuntimeError(f"sessions could not be made: {made.errors[0]}")

    # One actor for each session

    async def _compare_actors(self, rows: Rows, lean: Generator) -> None:
        system, stores, actors = self._system, self._stores, self._scale.actors
        state = system.state
        assert state is not None
        self._report.say(f"starting {actors} session actors, a process each")
        began = time.monotonic()
        command = (
            *(sys.executable, "-m", "benchmarks.actor_per_session", "--count", str(actors)),
            *("--address", state.ray_address, "--replicas", str(state.hosts)),
            *("--postgres", stores.postgres.url, "--redis", stores.redis.url),
            *("--model-url", system.simulator_url),
        )
        async with self._running("actors' driver", *command, says=b"ready"):
            seconds = time.monotonic() - began
            self._report.series.append(
                Series("session actors, start", "s", {"n": actors, "seconds": round(seconds, 1)})
            )
            await system.settled()
            proxy = f"127.0.0.1:{system.fallback_port()}"

            def naive(*, gather: bool) -> Callable[[int, int], Client]:
                def client(clients: int, number: int) -> Client:
                    text = expected_text(number)
                    return Client(
                        expect=text,
                        path=f"{PREFIX}/sessions/{actor_name(number % actors)}/turns",
                        body=_turn_body(text, gather=gather),
                    )

                return client

            path = "/v1/sessions/{session}/turns"
            one_by_one, gathered = naive(gather=False), naive(gather=True)
            compared = [
                Row(
                    BESIDE,
                    lean,
                    "session",
                    system.address,
                    _session_client("http", path, stream=True),
                ),
                Row(ACTORS, lean, "session", system.address, one_by_one),
                Row(ACTORS_GATHER, lean, "session", system.address, gathered, warm_turns=0),
                Row(ACTORS_PROXY, lean, "session", proxy, one_by_one, warm_turns=2),
            ]
            await rows.warm(compared, (MANY,), turns=self._scale.warm_turns)
            await rows.rest("idle, beside agentray and the actors")
            await self._rounds(
                rows,
                compared,
                (ONE, MANY),
                self._scale.actor_rounds,
                self._scale.actor_rounds_until_s,
            )


def _targets(rows: Rows) -> list[Target]:
    share, times, ms = "of the floor's", "times the floor's", "ms"
    floor_cpu = rows.cell(FLOOR, MANY).cpu_ms().get(FLOOR)
    return [
        Target("floor: its CPU of a turn, 64 clients", floor_cpu, "<=", 2.3, ms),
        Target(
            "simulator alone: turns/s, 64 clients",
            rows.ratio("throughput", MANY, SIMULATOR, FLOOR),
            *(">=", 3.0, times),
        ),
        Target(
            "throughput, HTTP, 64 clients",
            rows.ratio("throughput", MANY, HTTP, FLOOR),
            *(">=", 0.7, share),
        ),
        Target("p50, HTTP, 1 client", rows.ratio("p50", ONE, HTTP, FLOOR), "<=", 1.4, times),
        Target("p99, HTTP, 1 client", rows.ratio("p99", ONE, HTTP, FLOOR), "<=", 3.0, times),
        Target(
            "throughput without a key, openai client, 64 clients",
            rows.ratio("throughput", MANY, OPENAI, OPENAI_KEY),
            *(">=", 0.5, "of that with it"),
        ),
        Target(
            "throughput at the wrong host every second time, openai client, 64 clients",
            rows.ratio("throughput", MANY, OPENAI_NO_KEY, OPENAI_KEY),
            *(">=", 0.5, "of that with a key"),
        ),
        Target(
            "throughput at the wrong host every second time, lean client, 64 clients",
            rows.ratio("throughput", MANY, NO_KEY, HTTP),
            *(">=", 0.5, "of that with a key"),
        ),
        Target(
            "throughput, HTTP, 64 clients, against an actor for each session on HAProxy",
            rows.ratio("throughput", MANY, BESIDE, ACTORS),
            *(">=", 4.0, "times theirs"),
        ),
        Target(
            "the same, with an item a read instead of an item a chunk",
            rows.ratio("throughput", MANY, BESIDE, ACTORS_GATHER),
            *(">=", 4.0, "times theirs"),
        ),
    ]


def _cpu(*groups: str) -> Callable[[Series], object]:
    def cell(series: Series) -> object:
        cpu: dict[str, float] = series.figures.get("cpu_ms_per_turn", {})
        found = [cpu[group] for group in groups if group in cpu]
        return round(sum(found), 2) if found else None

    return cell


def _figure(name: str) -> Callable[[Series], object]:
    return lambda series: series.figures.get(name)


COLUMNS: dict[str, Callable[[Series], object]] = {
    "clients": _figure("clients"),
    "turns/s": _figure("throughput"),
    "p50 ms": _figure("p50"),
    "p90": _figure("p90"),
    "p99": _figure("p99"),
    "CPU/turn": _figure("system_cpu_ms_per_turn"),
    "sessions": _cpu("session hosts", FLOOR, "session actors", "actors' Serve replicas"),
    "HAProxy": _cpu("HAProxy"),
    "PG": _cpu("PostgreSQL"),
    "Redis": _cpu("Redis"),
    "sim": _cpu("simulator"),
    "Ray": _cpu("rest of Ray", "supervisor", "actors' driver"),
    "client": _cpu(LOAD),
}


def main() -> int:
    """Measure; 0 when all was measured, whether or not targets are met."""
    given = arguments(__doc__ or "")
    scale = QUICK if given.quick else FULL
    report = Report("turns", quick=given.quick)
    report.settings = {
        **asdict(scale),
        "chunks": 20,
        "clients": [ONE, MANY],
        "simulator_tps": 1_000_000,
        "paced_tps": PACED_TPS,
        "postgresql": "embedded, fsync on, synchronous_commit on",
        "default_proxy": "Ray Serve's Python proxy, which runs beside HAProxy on its own port",
    }
    measure(Turns(report, scale).run())
    report.write(Path(given.json))
    report.print(COLUMNS)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
