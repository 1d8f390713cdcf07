"""An owner that is stopped past its term and wakes behind its takeover."""

from __future__ import annotations

import asyncio
import uuid

import aiohttp

from agentray.events import ToolCalled, TurnResumed
from tests.fault.attacks import WORDS, create_session
from tests.fault.conftest import HOSTS
from tests.followed_turn import FollowedTurn, echo, script
from tests.system import Owner, System, paused, until


async def sessions_of_one_host(
    system: System, http: aiohttp.ClientSession, count: int
) -> tuple[Owner, list[str]]:
    """Return a host and idle sessions that it owns; HAProxy says which sessions those are."""
    owned: dict[str, list[str]] = {}
    while True:
        session_id = f"paused-{uuid.uuid4().hex[:8]}"
        await create_session(http, system.url, session_id)
        await FollowedTurn(http, system.url, session_id, "hello").run()
        found = system.owner_of(session_id)
        assert found is not None
        owner, _ = found
        ids = owned.setdefault(owner.id, [])
        ids.append(session_id)
        if len(ids) == count:
            return owner, ids


async def test_a_paused_owner_wakes_to_append_nothing_and_to_show_nothing_stale(
    system: System, http: aiohttp.ClientSession
) -> None:
    await system.until_hosts(HOSTS)
    owner, [talking, working] = await sessions_of_one_host(system, http, 2)
    door = system.door_of(owner)
    stream = FollowedTurn(http, door, talking, script(WORDS, tps=10))
    tool = FollowedTurn(
        http, door, working, script("got {tool_results}", tools=[echo("x", 1.5), echo("y", 1)])
    )
    turns = (stream, tool)
    connected = [asyncio.create_task(turn.run()) for turn in turns]
    await until(lambda: stream.text_so_far > 30, what="text is streamed")
    await until(
        lambda: any(event["type"] == "tool.called" for event in tool.events), what="a tool runs"
    )
    with paused(owner.pid):
        seen = [len(turn.events) for turn in turns]
        for turn in turns:
            await until(
                lambda turn=turn: (
                    system.journal(turn.session_id).turn(turn.turn_id).of(TurnResumed)
                ),
                what=f"{turn} is taken over",
            )
        assert seen == [len(turn.events) for turn in turns]
        beat = system.lock_beat(owner)
    # It wakes in the middle of the model's answer, and with the tool's result in its hands. As
    # long as it has not asked whether it still owns anything, it must not go on.
    try:
        for turn in turns:
            await until(
                lambda turn=turn: (
                    (at := system.last_event(turn.session_id)) and at[2] == "turn.finished"
                ),
                what=f"{turn} is ended by others",
            )
    finally:
        beat.let_go()
    for task in connected:
        await task
    await until(lambda: owner.id in {host.id for host in system.hosts()}, what="it beats again")

    async def dropped() -> bool:
        async with http.get(f"{door}/readyz") as response:
            facts = await response.json()
        return facts["owner_id"] == owner.id and not facts["resident"] and not facts["running"]

    await until(dropped, what="it has dropped the sessions")
    for turn in turns:
        # run() has checked that what was shown of each attempt is what the journal says of it.
        assert turn.breaks == [], "its connection was meant to last"
        journal = system.assert_journal_sound(turn.session_id)
        assert journal.owner != owner.id
        events = journal.turn(turn.turn_id)
        [resumed] = events.of(TurnResumed)
        assert resumed.owner != owner.id
        shown = [event["seq"] for event in turn.events if event["type"] != "model.delta"]
        assert shown == [event.seq for event in events.events]
        assert (turn.status, turn.text) == ("completed", events.text)
    assert stream.text == WORDS
    assert [called.attempt for called in events.of(ToolCalled)] == [1, 2, 1]
    # It is a host like any other again, also for these sessions.
    again = await FollowedTurn(http, door, talking, script("again")).run()
    assert again.text == "again"
    system.assert_journal_sound(talking)
