"""Kill the owner of a session at a chosen moment, and prove from the journal that it was then.

The moment is seen in the journal, or made with a lock: the test holds what an append or a release
needs, so that it waits in the server; the owner is killed; the lock is let go.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import psycopg

from agentray.events import ModelVoided, ToolCalled, TurnResumed
from tests.followed_turn import FollowedTurn, echo, script
from tests.journal import TurnEvents
from tests.system import Lock, Owner, System, kill, until

__all__ = ["PHASES", "Attack", "Hit", "Phase", "create_session"]

Phase = Literal["before_first_token", "streaming", "tools", "journaling", "releasing"]
PHASES: tuple[Phase, ...] = (
    "before_first_token",
    "streaming",
    "tools",
    "journaling",
    "releasing",
)
WORDS = " ".join(f"word{i}" for i in range(60))
# The server shows the beginning of a statement only.
_APPEND = "%append_events%"
_RELEASE = "UPDATE sessions SET owner = NULL%"


async def create_session(
    http: aiohttp.ClientSession,
    url: str,
    session_id: str,
    placement: str = "shared",
    agent: str = "assistant",
) -> None:
    """Make a session, however often that takes: with a given id it is idempotent."""

    async def made() -> bool:
        try:
            body = {"id": session_id, "placement": placement, "agent": agent}
            async with http.post(f"{url}/v1/sessions", json=body) as response:
                return response.status in (200, 201)
        except (aiohttp.ClientError, OSError):
            return False

    await until(made, what=f"session {session_id} is made")


@dataclass(frozen=True)
class Hit:
    """A kill: of whom, when the journal was at ``last_seq``, with how many turns running there."""

    phase: Phase
    session_id: str
    owner: Owner
    epoch: int
    last_seq: int
    turns_there: int


class Attack:
    """One session of its own, one kill, and what came of it."""

    def __init__(
        self,
        system: System,
        http: aiohttp.ClientSession,
        phase: Phase,
        variant: int,
        placement: str = "shared",
    ) -> None:
        self._system = system
        self._http = http
        self._phase: Phase = phase
        self._variant = variant
        self._placement = placement
        self.session_id = f"{phase}-{uuid.uuid4().hex[:8]}"
        self.turns: list[tuple[FollowedTurn, str]] = []
        self.hit: Hit | None = None
        self.ok = False

    async def run(self) -> bool:
        """Return whether the journal proves that the owner died in the phase."""
        await create_session(self._http, self._system.url, self.session_id, self._placement)
        await getattr(self, f"_{self._phase}")()
        self.ok = self.hit is not None and await self._proven(self.hit)
        return self.ok

    # The five moments

    async def _before_first_token(self) -> None:
        turn = self._turn(script("late but whole", ttft_ms=1_500), "late but whole")
        await self._when(turn, lambda at: at[2] == "model.called")
        await turn

    async def _streaming(self) -> None:
        turn = self._turn(script(WORDS, tps=40), WORDS)
        followed = self.turns[-1][0]
        await self._when(turn, lambda at: at[2] == "model.called" and followed.text_so_far > 40)
        await turn

    async def _tools(self) -> None:
        # One call, or two at once of which the first is settled when the owner dies.
        calls = [echo("a"), echo("b", 1.5)] if self._variant % 2 else [echo("b", 1.5)]
        text = "got a, b" if self._variant % 2 else "got b"
        turn = self._turn(script("got {tool_results}", tools=calls, parallel=True), text)
        last = "tool.finished" if self._variant % 2 else "tool.called"
        await self._when(turn, lambda at: at[2] == last)
        await turn

    async def _journaling(self) -> None:
        if self._variant % 3 == 0:  # the answer and the turn's end
            turn = self._turn(script(WORDS, tps=60), WORDS)
            last = "model.called"
        elif self._variant % 3 == 1:  # the answer and the call of a tool
            calls = [echo("b", 0.2)]
            turn = self._turn(script("got {tool_results}", tools=calls, ttft_ms=500), "got b")
            last = "model.called"
        else:  # a tool's result
            turn = self._turn(script("got {tool_results}", tools=[echo("b", 0.7)]), "got b")
            last = "tool.called"
        lock: Lock | None = await self._until(
            turn, lambda: self._lock_append(last), "its append can be held"
        )
        if lock is not None:
            try:
                await self._until(
                    turn, lambda: self._system.waiting_for(lock, _APPEND), "an append is held"
                )
                # If another attack was faster, this one has not hit.
                self._kill_now()
            finally:
                lock.let_go()
        await turn

    def _lock_append(self, last: str) -> Lock | None:
        at = self._system.last_event(self.session_id)
        if at is None or at[2] != last:
            return None
        try:
            return self._system.lock_append(self.session_id)
        except psycopg.errors.UniqueViolation:
            return None  # an append was faster

    async def _releasing(self) -> None:
        await self._turn(script("hello"), "hello")
        lock: Lock = await until(
            lambda: self._system.lock_row(self.session_id), what=f"the row of {self.session_id}"
        )
        try:
            # Another attack may hit the same host first: then there is nothing to kill.
            await until(
                lambda: (
                    self._system.waiting_for(lock, _RELEASE)
                    or not self._system.owner_of(self.session_id)
                ),
                what=f"{self.session_id}: its release is held",
            )
            waiting = self._system.waiting_for(lock, _RELEASE)
            if waiting is None or not self._kill_now():
                return
            if self._variant % 2:
                # The release dies with its owner; else it lands behind its back.
                self._system.sql("SELECT pg_terminate_backend(%s)", waiting)
        finally:
            lock.let_go()
        assert self.hit is not None
        left = self.hit.owner.id if self._variant % 2 else None
        await until(
            lambda: self._system.sql(
                "SELECT 1 FROM sessions WHERE id = %s AND epoch = %s"
                " AND owner IS NOT DISTINCT FROM %s",
                self.session_id,
                self.hit and self.hit.epoch,
                left,
            ),
            what=f"{self.session_id} has the owner {left}",
        )

    # The kill

    def _turn(self, said: str, text: str) -> asyncio.Task[FollowedTurn]:
        followed = FollowedTurn(self._http, self._system.url, self.session_id, said)
        self.turns.append((followed, text))
        return asyncio.create_task(followed.run())

    async def _until(self, turn: asyncio.Task[Any], condition: Callable[[], Any], what: str) -> Any:
        """Return what the condition returns when that is true; None if the turn ends first."""

        def or_over() -> Any:
            return (None,) if turn.done() else (found := condition()) and (found,)

        return (await until(or_over, what=f"{self.session_id}: {what}"))[0]

    async def _when(
        self, turn: asyncio.Task[Any], moment: Callable[[tuple[int, int, str]], bool]
    ) -> None:
        """Kill the owner when the journal's last event says so."""

        def killed() -> bool:
            at = self._system.last_event(self.session_id)
            return at is not None and moment(at) and self._kill_now()

        await self._until(turn, killed, "its moment comes")

    def _kill_now(self) -> bool:
        found = self._system.owner_of(self.session_id)
        if found is None:
            return False
        owner, epoch = found
        kill(owner.pid)
        [(last_seq,)] = self._system.sql(
            "SELECT last_seq FROM sessions WHERE id = %s", self.session_id
        )
        [(turns,)] = self._system.sql(
            "SELECT count(*) FROM turns t JOIN sessions s ON s.id = t.session_id"
            " WHERE s.owner = %s AND t.state <> 'done'",
            owner.id,
        )
        self.hit = Hit(self._phase, self.session_id, owner, epoch, last_seq, turns)
        return True

    # The proof

    async def _proven(self, hit: Hit) -> bool:
        if hit.phase == "releasing":
            # Nothing ran, and the session goes on: with the next epoch, behind the same events.
            before = self._system.assert_journal_sound(self.session_id)
            assert before.last_seq == hit.last_seq
            await self._turn(script("again"), "again")
            after = self._system.journal(self.session_id).turns()[-1]
            return after.entries[0][0] > hit.epoch and not after.of(TurnResumed)
        turn = self._system.assert_journal_sound(self.session_id).turns()[-1]
        if hit.phase == "journaling":
            # What the dead owner had sent landed when nobody was left to hear of it.
            landed = [e for epoch, e in turn.entries if epoch == hit.epoch and e.seq > hit.last_seq]
            return bool(landed)
        resumed = self._resumed(turn, hit)
        if resumed is None:
            return False
        behind = turn.events[turn.events.index(resumed) + 1]
        if hit.phase == "tools":
            begun = isinstance(behind, ToolCalled) and behind.attempt == 2
            return resumed.phase == "tools" and begun
        if not isinstance(behind, ModelVoided) or behind.reason != "owner_lost":
            return False
        if hit.phase == "streaming":
            return resumed.phase == "streaming" and bool(behind.text)
        return resumed.phase == "model" and not behind.text

    def _resumed(self, turn: TurnEvents, hit: Hit) -> TurnResumed | None:
        """Return the takeover that followed the kill directly."""
        for epoch, event in turn.entries:
            if event.seq == hit.last_seq + 1 and epoch > hit.epoch:
                return event if isinstance(event, TurnResumed) else None
        return None
