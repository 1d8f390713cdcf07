"""kill -9 of each process but the session hosts, and of everything at once, while turns run."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tests.fault.attacks import WORDS, create_session
from tests.fault.conftest import HOSTS
from tests.followed_turn import FollowedTurn, echo, script
from tests.system import System, kill, until


class Turns:
    """Sessions in each of which a turn runs: a long stream here, a slow tool there."""

    def __init__(
        self,
        system: System,
        http: aiohttp.ClientSession,
        count: int,
        *,
        tail_may_be_lost: bool = False,
    ) -> None:
        self._system = system
        self._tail_may_be_lost = tail_may_be_lost
        self._http = http
        self._ids = [f"part-{uuid.uuid4().hex[:8]}" for _ in range(count)]
        self.turns: list[tuple[FollowedTurn, str]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run them until they all have ended; within the block they are under way."""
        for session_id in self._ids:
            await create_session(self._http, self._system.url, session_id)
        async with asyncio.TaskGroup() as group:
            for number, session_id in enumerate(self._ids):
                group.create_task(self._turn(session_id, slow_tool=number % 3 == 0).run())
            await until(self._all_in_the_middle, what="all turns run")
            yield

    def _turn(self, session_id: str, *, slow_tool: bool) -> FollowedTurn:
        if slow_tool:
            said, text = script("got {tool_results}", tools=[echo("b", 4)]), "got b"
        else:
            said, text = script(WORDS, tps=15), WORDS
        turn = FollowedTurn(
            self._http,
            self._system.url,
            session_id,
            said,
            timeout_s=180,
            tail_may_be_lost=self._tail_may_be_lost,
        )
        self.turns.append((turn, text))
        return turn

    def _all_in_the_middle(self) -> bool:
        return all(
            any(event["type"] in ("model.delta", "tool.called") for event in turn.events)
            for turn, _ in self.turns
        )

    async def assert_whole(self, *, owners_died: bool) -> None:
        """Assert that all ended well, taken over if and only if their owners died, that the
        journals are sound, and that the sessions go on."""
        for turn, text in self.turns:
            assert turn.status == "completed", turn.events[-1]
            assert turn.text == text
            taken_over = any(event["type"] == "turn.resumed" for event in turn.events)
            assert taken_over == owners_died, str(turn)
        for session_id in self._ids:
            again = FollowedTurn(self._http, self._system.url, session_id, script("again"))
            assert (await again.run()).text == "again"
            journal = self._system.assert_journal_sound(session_id)
            assert len(journal.turns()) == 2


@pytest.mark.parametrize("part", ["redis", "haproxy", "postgres", "controller", "gcs"])
async def test_turns_outlive_the_death_of_any_other_process(
    system: System, http: aiohttp.ClientSession, part: str
) -> None:
    await system.until_hosts(HOSTS)
    turns = Turns(system, http, 9)
    async with turns.running():
        victims = system.pids(part)
        assert victims
        for pid in victims:
            kill(pid)
        await until(
            lambda: (found := system.pids(part)) and not set(found) & set(victims),
            what=f"{part} is back",
        )
    await turns.assert_whole(owners_died=part == "gcs")


async def test_after_the_death_of_everything_the_next_start_ends_what_had_begun(
    system: System, http: aiohttp.ClientSession
) -> None:
    await system.until_hosts(HOSTS)
    turns = Turns(system, http, 9, tail_may_be_lost=True)
    async with turns.running():
        await asyncio.to_thread(system.kill_everything)
        await asyncio.to_thread(system.restart)
    await turns.assert_whole(owners_died=True)
