"""kill -9 of tool workers and of their scheduler, while sessions call tools five hundred times."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agentray.events import ToolCalled, ToolFinished
from tests.fault.attacks import create_session
from tests.fault.conftest import HOSTS
from tests.followed_turn import FollowedTurn, script
from tests.system import System, kill, until

SESSIONS = 25
CALLS = 20
STEPS = 4
VICTIMS = ("tool_worker", "tool_scheduler", "tool_worker", "tool_worker", "tool_scheduler")


@dataclass(frozen=True)
class Marks:
    """When the tools of a call began, as the tools themselves say."""

    began: dict[str, list[float]]

    @classmethod
    def read(cls, file: Path) -> Marks:
        began: dict[str, list[float]] = defaultdict(list)
        for line in file.read_text().splitlines():
            name, what, at = line.split()
            if what == "began":
                began[name].append(float(at))
        return cls(began)


class Calls:
    """A session with turn after turn of calls, each of which has a name of its own."""

    def __init__(
        self, system: System, http: aiohttp.ClientSession, number: int, file: Path
    ) -> None:
        self._system = system
        self._http = http
        self._rng = random.Random(number)
        self._file = file
        self.session_id = f"tools-{number}-{uuid.uuid4().hex[:6]}"
        self.turns: list[FollowedTurn] = []

    async def run(self) -> None:
        await create_session(self._http, self._system.url, self.session_id, agent="marker")
        for number in range(CALLS // STEPS):
            calls = [self._call(number * STEPS + step) for step in range(STEPS)]
            said = script("{tool_results}", tools=calls, parallel=number % 2 == 0)
            turn = FollowedTurn(self._http, self._system.url, self.session_id, said, timeout_s=180)
            self.turns.append(turn)
            await turn.run()

    def _call(self, number: int) -> dict[str, Any]:
        tool = self._rng.choice(["once", "repeatable"])
        name = f"{self.session_id}/{number}/{tool}"
        takes_s = round(self._rng.uniform(0.1, 0.6), 2)
        arguments = {"file": str(self._file), "name": name, "takes_s": takes_s}
        return {"name": tool, "arguments": arguments}

    def settled(self) -> Iterator[tuple[str, ToolFinished]]:
        """Yield the calls' names with their ends, once the session is at rest."""
        journal = self._system.assert_journal_sound(self.session_id)
        for turn, followed in zip(journal.turns(), self.turns, strict=True):
            assert followed.status == "completed", followed.events[-1]
            names = {
                event.call_id: json.loads(event.arguments)["name"] for event in turn.of(ToolCalled)
            }
            ends = turn.of(ToolFinished)
            assert sorted(end.call_id for end in ends) == sorted(names)
            assert len(names) == STEPS
            for end in ends:
                yield names[end.call_id], end


def marks_in(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "marks"


async def test_no_call_is_lost_and_no_settled_one_is_run_again(
    system: System, http: aiohttp.ClientSession, file: Path
) -> None:
    await system.until_hosts(HOSTS)
    sessions = [Calls(system, http, number, file) for number in range(SESSIONS)]
    running = asyncio.gather(*(session.run() for session in sessions))
    for part in VICTIMS:
        before = marks_in(file)
        # In the middle of calls: many have begun since the last kill.
        await until(lambda before=before: marks_in(file) >= before + 2 * SESSIONS, what="calls run")
        assert not running.done(), f"all calls were over before a {part} was killed"
        there = system.pids(part)
        victim = random.choice(there)
        kill(victim)
        await until(
            lambda part=part, victim=victim, there=there: (
                victim not in (found := system.pids(part)) and len(found) == len(there)
            ),
            what=f"a {part} is back",
        )
    await asyncio.wait_for(running, 240)
    marks = Marks.read(file)
    outcomes: dict[str, list[ToolFinished]] = defaultdict(list)
    for session in sessions:
        for name, ended in session.settled():
            tool = name.rpartition("/")[2]
            began = marks.began[name]
            outcomes[tool].append(ended)
            # Its worker had it and died: whether it had begun, nobody can tell.
            assert began or ended.reason == "died", f"{name} never ran: {ended}"
            assert max(began, default=0.0) <= ended.at, (
                f"{name} ran after it was settled: {began}, {ended}"
            )
            if tool == "once":
                assert len(began) <= 1, f"{name} ran {len(began)} times"
            if ended.status == "ok":
                assert ended.output == name
    assert sum(map(len, outcomes.values())) == SESSIONS * CALLS
    # Whoever asks for it gets it, as often as that takes; of the others it is said.
    assert {ended.status for ended in outcomes["repeatable"]} == {"ok"}
    lost = [ended for ended in outcomes["once"] if ended.status != "ok"]
    assert {ended.reason for ended in lost} <= {"died"}
    again = [name for name, began in marks.began.items() if len(began) > 1]
    assert lost or again, "no kill met a call"
    # A worker that is killed takes what it ran with it, and the others go on.
    assert len(lost) + len(again) < SESSIONS * CALLS / 4
