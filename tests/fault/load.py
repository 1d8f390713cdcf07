"""Turns of all kinds, one after another in many sessions, and what must be true of them all."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Iterator, Sequence
from typing import Literal

import aiohttp
import msgspec

from tests.fault.attacks import WORDS, create_session
from tests.followed_turn import FollowedTurn, echo, script
from tests.journal import Journal
from tests.system import System

__all__ = ["Load", "assert_turns_whole"]


class Load:
    """Workers that run turn after turn, each in a session of its own, until ``enough`` is set."""

    def __init__(self, system: System, http: aiohttp.ClientSession) -> None:
        self._system = system
        self._http = http
        self.enough = asyncio.Event()
        self.turns: list[tuple[FollowedTurn, str]] = []

    async def work(self, number: int, placement: Literal["shared", "dedicated"] = "shared") -> None:
        """Work in a session of the placement; ``number`` draws the turns."""
        rng = random.Random(number)
        session_id = f"load-{number}-{uuid.uuid4().hex[:6]}"
        await create_session(self._http, self._system.url, session_id, placement)
        while not self.enough.is_set():
            said, text = _drawn(rng)
            turn = FollowedTurn(
                self._http,
                self._system.url,
                session_id,
                said,
                route="responses" if rng.random() < 0.3 else "turns",
                background=rng.random() < 0.2,
            )
            self.turns.append((turn, text))
            await turn.run()

    def journals(self) -> Iterator[Journal]:
        """Yield the journals of the sessions."""
        for session_id in {turn.session_id for turn, _ in self.turns}:
            yield self._system.journal(session_id)

    def assert_whole(self) -> None:
        """Assert what :func:`assert_turns_whole` does."""
        assert_turns_whole(self._system, self.turns)


def _drawn(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(["short", "tool", "parallel", "long"])
    if kind == "short":
        return script("one two three", tps=6), "one two three"
    if kind == "tool":
        return script("{tool_results}!", tools=[echo("x", 0.6)]), "x!"
    if kind == "parallel":
        calls = [echo("x", 0.1), echo("y", 0.8), echo("z")]
        return script("{tool_results}!", tools=calls, parallel=True), "x, y, z!"
    return script(WORDS, tps=25), WORDS


def assert_turns_whole(system: System, turns: Sequence[tuple[FollowedTurn, str]]) -> None:
    """Assert that every turn ended once and well, that its client saw exactly what the journal
    has, that the journals are sound, and that no other turn is there."""
    posted: dict[str, set[str]] = {}
    for turn, text in turns:
        assert turn.status == "completed", (str(turn), turn.events[-1])
        assert turn.text == text, str(turn)
        turn_id = turn.turn_id if turn.route == "turns" else turn.turn_id[5:31]
        posted.setdefault(turn.session_id, set()).add(turn_id)
    for session_id, ids in posted.items():
        journal = system.assert_journal_sound(session_id)
        assert {turn.id for turn in journal.turns()} == ids
        for turn, _ in turns:
            if turn.session_id == session_id and turn.route == "turns":
                seen = [event for event in turn.events if event["type"] != "model.delta"]
                events = journal.turn(turn.turn_id).events
                assert seen == [msgspec.to_builtins(event) for event in events], str(turn)
