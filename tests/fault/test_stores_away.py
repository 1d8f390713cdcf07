"""Redis is away and comes back; PostgreSQL is restarted under load."""

from __future__ import annotations

import asyncio
import signal
import uuid

import aiohttp

from agentray.clock import SystemClock
from agentray.config.settings import RedisSettings
from agentray.config.state import read_state
from agentray.events import TurnResumed
from agentray.storage.base import HotCopy
from agentray.storage.redis import RedisStore
from tests.fault.attacks import WORDS, create_session
from tests.fault.conftest import HOSTS
from tests.fault.load import Load
from tests.followed_turn import FollowedTurn, echo, script
from tests.system import System, kill, paused, until


async def hot_copies(system: System, session_ids: list[str]) -> dict[str, HotCopy | None]:
    """Return what Redis has of sessions."""
    state = read_state(system.data_dir)
    assert state is not None
    store = RedisStore(state.redis, RedisSettings(), window_turns=20, clock=SystemClock())
    try:
        return {session_id: await store.load("default", session_id) for session_id in session_ids}
    finally:
        await store.close()


async def until_healed(system: System, http: aiohttp.ClientSession, session_ids: list[str]) -> None:
    """Run turns until Redis has each session as its journal is."""

    async def hot(session_id: str) -> bool:
        last_seq = system.journal(session_id).last_seq
        copy = (await hot_copies(system, [session_id]))[session_id]
        return copy is not None and copy.seq == last_seq

    async def healed(session_id: str) -> bool:
        if await hot(session_id):
            return True
        # A copy that could not be stored is made good by the next turn's.
        await FollowedTurn(http, system.url, session_id, script("again")).run()
        return await hot(session_id)

    for session_id in session_ids:
        await until(
            lambda session_id=session_id: healed(session_id), what=f"Redis has {session_id} whole"
        )


async def test_without_redis_turns_go_on_and_nobody_is_declared_dead(
    system: System, http: aiohttp.ClientSession
) -> None:
    hosts = {host.id for host in await system.until_hosts(HOSTS)}
    ids = [f"cold-{uuid.uuid4().hex[:8]}" for _ in range(9)]
    for session_id in ids:
        await create_session(http, system.url, session_id)
    running = [FollowedTurn(http, system.url, ids[n], script(WORDS, tps=30)) for n in range(3)]
    running += [
        FollowedTurn(http, system.url, ids[n], script("{tool_results}", tools=[echo("x", 2)]))
        for n in range(3, 6)
    ]
    async with asyncio.TaskGroup() as group:
        for turn in running:
            group.create_task(turn.run())
        await until(lambda: all(turn.events for turn in running), what="turns run")
        with paused(*system.pids("redis")):
            # It hangs, which is worse than a refused connection. Turns begin as well as end.
            begun = [FollowedTurn(http, system.url, ids[n], script("new")) for n in range(6, 9)]
            for turn in begun:
                group.create_task(turn.run())
            await until(lambda: all(t.done for t in running + begun), what="they end without it")
            assert {host.id for host in system.hosts()} == hosts
    for turn in running + begun:
        assert turn.status == "completed"
        journal = system.assert_journal_sound(turn.session_id)
        assert not journal.turn(turn.turn_id).of(TurnResumed)
    # Redis is back with what it had, then it comes back with nothing.
    for emptied in (False, True):
        if emptied:
            [old] = system.pids("redis")
            kill(old)
            await until(
                lambda old=old: system.pids("redis") not in ([], [old]), what="Redis is back"
            )
        await until_healed(system, http, ids)


async def test_postgresql_restarted_under_load_stalls_turns_and_loses_no_message(
    system: System, http: aiohttp.ClientSession
) -> None:
    hosts = {host.id for host in await system.until_hosts(HOSTS)}
    load = Load(system, http)
    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(load.work(number))
        for _ in range(2):
            begun = len(load.turns)
            await until(lambda begun=begun: len(load.turns) > begun + 8, what="turns come and go")
            [old] = system.pids("postgres")
            kill(old, signal.SIGINT)
            await until(
                lambda old=old: system.pids("postgres") not in ([], [old]), what="it is back"
            )
        begun = len(load.turns)
        await until(lambda: len(load.turns) > begun + 8, what="turns go on")
        load.enough.set()
    assert {host.id for host in system.hosts()} == hosts
    load.assert_whole()
    for journal in load.journals():
        assert not [event for event in journal.events if isinstance(event, TurnResumed)]
