"""Session hosts are taken away, replaced and added while clients read long streams."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from agentray.events import TurnResumed
from tests.fault.attacks import WORDS, create_session
from tests.fault.conftest import HOSTS
from tests.fault.load import Load, assert_turns_whole
from tests.fault.serve_driver import ServeDriver
from tests.followed_turn import FollowedTurn, script
from tests.system import System, until


@pytest.fixture(scope="module")
def driver(system: System) -> Iterator[ServeDriver]:
    driver = ServeDriver(system)
    try:
        yield driver
        asyncio.run(driver.scale(HOSTS))
    finally:
        driver.close()


@asynccontextmanager
async def streams(
    system: System, http: aiohttp.ClientSession, count: int
) -> AsyncIterator[list[tuple[FollowedTurn, str]]]:
    """Within the block that many clients read streams that have begun; behind it all have ended
    with the whole text."""
    ids = [f"leave-{uuid.uuid4().hex[:8]}" for _ in range(count)]
    await asyncio.gather(*(create_session(http, system.url, session_id) for session_id in ids))
    said = script(WORDS, tps=8)
    turns = [(FollowedTurn(http, system.url, session_id, said), WORDS) for session_id in ids]
    async with asyncio.TaskGroup() as group:
        for turn, _ in turns:
            group.create_task(turn.run())
        await until(lambda: all(turn.text_so_far for turn, _ in turns), what="all streams begin")
        yield turns
    assert_turns_whole(system, turns)


def takeovers(system: System, turns: list[tuple[FollowedTurn, str]]) -> int:
    return sum(
        len(system.journal(turn.session_id).turn(turn.turn_id).of(TurnResumed)) for turn, _ in turns
    )


async def test_hosts_drain_with_fifty_open_streams_and_each_ends_where_it_is(
    system: System, http: aiohttp.ClientSession, driver: ServeDriver
) -> None:
    before = {host.id for host in await system.until_hosts(HOSTS)}
    async with streams(system, http, 50) as turns:
        owners = [system.owner_of(turn.session_id) for turn, _ in turns]
        assert {found[0].id for found in owners if found is not None} == before
        await driver.scale(HOSTS - 2)
        # They say goodbye when their last turn has ended, not before.
        await until(lambda: len(known(system, before)) == HOSTS - 2, what="two hosts have left")
    assert {host.id for host in system.hosts()} == known(system, before)
    assert takeovers(system, turns) == 0


def known(system: System, among: set[str]) -> set[str]:
    """Return which of these owners have a row."""
    return {host.id for host in system.owners()} & among


async def test_hosts_run_turns_to_their_ends_that_nobody_is_connected_for(
    system: System, http: aiohttp.ClientSession, driver: ServeDriver
) -> None:
    """Serve waits for connections, and ends a host that has none after three seconds."""
    await driver.scale(3)
    before = {host.id for host in await system.until_hosts(3)}
    ids: list[str] = []
    busy: set[str] = set()
    while not (len(ids) >= 12 and busy >= before):
        assert len(ids) < 60, f"of {before} only {busy} have a turn"
        ids.append(session_id := f"leave-{uuid.uuid4().hex[:8]}")
        await create_session(http, system.url, session_id)
        body = {"input": script(WORDS, tps=8), "background": True}
        async with http.post(f"{system.url}/v1/sessions/{session_id}/turns", json=body) as response:
            assert response.status == 202
        if (found := system.owner_of(session_id)) is not None:
            busy.add(found[0].id)
    await driver.scale(1)
    await until(lambda: len(known(system, before)) == 1, what="two hosts have left")
    for session_id in ids:
        await until(lambda s=session_id: system.journal(s).turns()[0].status, what="it ends")
        [turn] = system.assert_journal_sound(session_id).turns()
        assert (turn.status, turn.text) == ("completed", WORDS)
        assert not turn.of(TurnResumed), "it was cut although it had time"


async def test_a_rolling_restart_of_the_hosts_costs_no_client_a_word(
    system: System, http: aiohttp.ClientSession, driver: ServeDriver
) -> None:
    await driver.scale(2)
    before = {host.id for host in await system.until_hosts(2)}
    load = Load(system, http)
    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(load.work(number))
        async with streams(system, http, 10):
            await driver.restart(2)
        load.enough.set()
    load.assert_whole()
    after = {host.id for host in await system.until_hosts(2)}
    assert not after & before


async def test_a_stream_outlives_the_reload_of_haproxy_on_its_connection(
    system: System, http: aiohttp.ClientSession, driver: ServeDriver
) -> None:
    await driver.scale(2)
    await until(lambda: len(system.pids("haproxy")) == 1, what="the last reload is over")
    [old] = system.pids("haproxy")
    async with streams(system, http, 10) as turns:
        await driver.scale(3)
        await until(lambda: len(system.pids("haproxy")) > 1, what="HAProxy is reloaded")
        assert old in system.pids("haproxy"), "it serves the streams that it has"
        assert not any(turn.done for turn, _ in turns)
    assert [turn.breaks for turn, _ in turns if turn.breaks] == []
