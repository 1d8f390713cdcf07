"""Count the turns that end well while the models under them die, and what their clients wait.

``python -m benchmarks.failover --json FILE [--quick]``. Three model servers serve the same text;
one at a time dies: its streams are cut, or the next ones in front of their first token, or its
process is killed and started again. A turn ends well if it completes, its stream is one
well-formed stream, what the client put together is what the journal has, and its answer is the
text that the models serve.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from agentray.ids import split_response_id
from benchmarks.answers import expected_text, scripted_input
from benchmarks.model_server import Counts
from benchmarks.mortal_models import Deaths, ModelServer
from benchmarks.report import Report, Series, Target, arguments, percentiles
from benchmarks.response_stream import ResponseStream, message_texts
from benchmarks.system import AgentRay, Stores, measure, workspace

CHUNKS = 24
TPS = 100.0
TTFT_MS = 20.0
TURN_S = 60.0
SEED = 3
ATTEMPTS = 6
"""Calls that a step may make: a server dies here every second, and a turn may meet several."""
MODELS: dict[str, dict[str, Any]] = {
    "a": {"continues_text": True, "card": {"tier": "small"}},
    "b": {"continues_text": False, "card": {"tier": "small"}},
    "c": {"continues_text": True, "card": {"tier": "large"}},
}
CALM, BEFORE, AFTER, ANY = (
    "turns without a death",
    "turns with one, before text alone",
    "turns with one after text",
    "turns with a death",
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; one model dies each ``every`` turns, at least and at most."""

    turns: int
    clients: int
    every: tuple[int, int]


FULL = Scale(1_000, 8, (8, 18))
QUICK = Scale(120, 8, (8, 18))


@dataclass(frozen=True, slots=True)
class Voided:
    """An attempt of a turn that ended without an answer; ``had_text`` says that it said some."""

    had_text: bool
    continues: bool


@dataclass(slots=True)
class Turn:
    """A turn as its client saw it, and as the journal has it."""

    expect: str
    seconds: float = 0.0
    gap_s: float = 0.0
    stream: ResponseStream | None = None
    problems: list[str] = field(default_factory=list)
    voided: list[Voided] = field(default_factory=list)
    models: list[str] = field(default_factory=list)

    @property
    def met(self) -> str:
        """What it met, as the journal tells."""
        if any(attempt.had_text for attempt in self.voided):
            return AFTER
        return BEFORE if self.voided or len(self.models) > 1 else CALM


class Failover:
    """One run of the benchmark."""

    def __init__(self, report: Report, scale: Scale) -> None:
        self._report = report
        self._scale = scale
        self._turns: list[Turn] = []
        self._left = scale.turns

    async def run(self) -> None:
        """Start everything, measure, and end everything."""
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(workspace())
            stores = await stack.enter_async_context(Stores(folder))
            servers = [ModelServer(name, folder, tps=TPS, ttft_ms=TTFT_MS) for name in MODELS]
            for server in servers:
                await stack.enter_async_context(server)
            endpoints = {s.name: {"url": s.url, **MODELS[s.name]} for s in servers}
            settings = {
                "AGENTRAY_MODELS__ENDPOINTS": json.dumps(endpoints),
                # Its speed is set in every system of the benchmarks, which would switch it on.
                "AGENTRAY_MODELS__SIMULATOR__ENABLED": "false",
                "AGENTRAY_MODELS__ATTEMPTS": str(ATTEMPTS),
                "AGENTRAY_AGENTS": json.dumps({"assistant": {"tools": []}}),
            }
            self._report.say("starting agentray")
            system = await stack.enter_async_context(AgentRay(folder, stores, settings))
            connector = aiohttp.TCPConnector(limit=0)
            http = await stack.enter_async_context(
                aiohttp.ClientSession(f"http://{system.address}", connector=connector)
            )
            deaths = Deaths(servers, random.Random(SEED), self._scale.every)
            self._report.say(f"{self._scale.turns} turns of {self._scale.clients} clients")
            await self._all_turns(http, deaths)
            self._report.say("comparing them with the journal")
            await self._compare(http)
            counts = [server.counts for server in servers]
            self._finish(counts, deaths)
            self._report.say("ending everything")

    # Turns

    async def _all_turns(self, http: aiohttp.ClientSession, deaths: Deaths) -> None:
        for number in range(self._scale.clients):
            async with http.post("/v1/sessions", json={"id": f"client-{number}"}) as made:
                made.raise_for_status()
        async with asyncio.TaskGroup() as group:
            group.create_task(deaths.run())
            clients = [
                group.create_task(self._client(http, number, deaths))
                for number in range(self._scale.clients)
            ]
            await asyncio.wait(clients)
            deaths.stop()

    async def _client(self, http: aiohttp.ClientSession, number: int, deaths: Deaths) -> None:
        while self._left > 0:
            self._left -= 1
            turn = Turn(expected_text(self._left, chunks=CHUNKS))
            self._turns.append(turn)
            try:
                async with asyncio.timeout(TURN_S):
                    await _ask(http, f"client-{number}", turn)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                turn.problems.append(f"{type(error).__name__}: {error}")
            deaths.turn_ended()

    async def _compare(self, http: aiohttp.ClientSession) -> None:
        waiting = iter(self._turns)

        async def some() -> None:
            for turn in waiting:
                await _compare(http, turn)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._scale.clients):
                group.create_task(some())

    # What came out

    def _finish(self, counts: Sequence[Counts], deaths: Deaths) -> None:
        turns = self._turns
        bad = [turn for turn in turns if turn.problems]
        for turn in bad[:5]:
            self._report.note(f"{turn.met}: one does not end well: {turn.problems[0]}")
        by_met = {
            CALM: [turn for turn in turns if turn.met == CALM],
            ANY: [turn for turn in turns if turn.met != CALM],
            BEFORE: [turn for turn in turns if turn.met == BEFORE],
            AFTER: [turn for turn in turns if turn.met == AFTER],
        }
        calm_ms = percentiles([turn.seconds * 1000 for turn in by_met[CALM]]).get("p50")
        self._report.series += [_series(name, met, calm_ms) for name, met in by_met.items()]
        died_after = sum(count.died_after for count in counts)
        died_before = sum(count.died_before for count in counts)
        voided = [attempt for turn in turns for attempt in turn.voided]
        with_text = [attempt for attempt in voided if attempt.had_text]
        if abs(len(with_text) - died_after) > 0.05 * died_after:
            self._report.note(
                f"the servers count {died_after} deaths after the first token, the journals "
                f"{len(with_text)} attempts that were voided with text"
            )
        self._report.series.append(
            Series(
                "deaths of streams",
                "deaths",
                {
                    "n": died_after + died_before,
                    "after_first_token": died_after,
                    "before_first_token": died_before,
                    "voided_with_text": len(with_text),
                    "voided_and_continued": sum(attempt.continues for attempt in with_text),
                    "voided_without_text": len(voided) - len(with_text),
                    "of_servers": dict(sorted(deaths.happened.items())),
                    "calls_by_model": dict(Counter(m for turn in turns for m in turn.models)),
                },
            )
        )
        self._report.targets += [
            Target(
                "turns that end well",
                100.0 * (len(turns) - len(bad)) / len(turns) if turns else None,
                *(">=", 100.0, "%"),
            ),
            Target("deaths after the first token", died_after, ">=", 300, "deaths"),
        ]


def _series(name: str, turns: Sequence[Turn], calm_ms: float | None) -> Series:
    ms = [turn.seconds * 1000 for turn in turns]
    added: dict[str, float] = {}
    if calm_ms is not None and name != CALM:
        added = percentiles([max(0.0, value - calm_ms) for value in ms])
    gaps = percentiles([turn.gap_s * 1000 for turn in turns])
    figures = {
        **percentiles(ms),
        "not_well": sum(bool(turn.problems) for turn in turns),
        "added": added,
        "longest_gap": gaps,
        "longest_gap_of_all": round(max((t.gap_s * 1000 for t in turns), default=0.0), 1),
    }
    return Series(name, "ms", figures)


async def _ask(http: aiohttp.ClientSession, session: str, turn: Turn) -> None:
    """Send a turn and read its stream to the end of the connection's answer."""
    body = {
        "conversation": session,
        "input": scripted_input(turn.expect, chunks=CHUNKS),
        "stream": True,
    }
    began = time.perf_counter()
    stream = ResponseStream(began)
    async with http.post("/v1/responses", json=body) as answer:
        if answer.status != 200:
            said = (await answer.read())[:300]
            turn.problems.append(f"status {answer.status}: {said!r}")
            return
        turn.stream = stream
        try:
            async for read in answer.content.iter_any():
                stream.feed(read, time.perf_counter())
        finally:
            stream.close()
            turn.seconds = (stream.ended_at or time.perf_counter()) - began
            turn.gap_s = stream.gap_s
            turn.problems += stream.problems
    if stream.status != "completed":
        turn.problems.append(f"the turn is {stream.status}: {stream.response.get('error')}")


async def _compare(http: aiohttp.ClientSession, turn: Turn) -> None:
    """Compare what the client put together with what the journal tells."""
    stream = turn.stream
    if stream is None or not stream.id:
        return
    async with http.get(f"/v1/responses/{stream.id}") as answer:
        response = await answer.json()
    told, texts = message_texts(response.get("output", [])), stream.texts()
    if told != texts or response.get("status") != stream.status:
        turn.problems.append(f"the journal has {told}, the client {texts}")
    whole = [text for text, status in texts.values() if status == "completed"]
    if whole != [turn.expect]:
        turn.problems.append(f"the models serve {turn.expect!r}, the client has {texts}")
    session, turn_id = split_response_id(stream.id)
    path = f"/v1/sessions/{session}/events"
    async with http.get(path, params={"turn_id": turn_id, "limit": 1000}) as answer:
        events: list[dict[str, Any]] = (await answer.json())["data"]
    turn.voided = list(_voided(events))
    turn.models = [event["model"] for event in events if event["type"] == "model.called"]
    endings = [event["type"] for event in events].count("turn.finished")
    if endings != 1:
        turn.problems.append(f"the journal has {endings} ends of the turn")


def _voided(events: Sequence[dict[str, Any]]) -> Iterator[Voided]:
    """Return the attempts that were voided; the text of those before them is not theirs."""
    begins = 0
    for event in events:
        if event["type"] == "model.called":
            begins = event.get("continued_from", 0)
        elif event["type"] == "model.voided":
            had_text = len(event.get("text", "")) > begins
            yield Voided(had_text, bool(event.get("continues")))


def _figure(name: str) -> Callable[[Series], object]:
    return lambda series: series.figures.get(name)


def _within(name: str, figure: str) -> Callable[[Series], object]:
    return lambda series: (series.figures.get(name) or {}).get(figure)


COLUMNS: dict[str, Callable[[Series], object]] = {
    "n": _figure("n"),
    "not well": _figure("not_well"),
    "p50 ms": _figure("p50"),
    "p99": _figure("p99"),
    "added p50": _within("added", "p50"),
    "added p99": _within("added", "p99"),
    "gap p50": _within("longest_gap", "p50"),
    "gap p99": _within("longest_gap", "p99"),
    "longest": _figure("longest_gap_of_all"),
    "after text": _figure("after_first_token"),
    "before": _figure("before_first_token"),
    "continued": _figure("voided_and_continued"),
}


def main() -> int:
    """Measure; 0 when all was measured, whether or not targets are met."""
    given = arguments(__doc__ or "")
    scale = QUICK if given.quick else FULL
    report = Report("failover", quick=given.quick)
    report.settings = {
        **asdict(scale),
        "chunks": CHUNKS,
        "tokens_per_s": TPS,
        "ttft_ms": TTFT_MS,
        "attempts": ATTEMPTS,
        "models": MODELS,
        "seed": SEED,
    }
    measure(Failover(report, scale).run())
    report.write(Path(given.json))
    report.print(COLUMNS)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
