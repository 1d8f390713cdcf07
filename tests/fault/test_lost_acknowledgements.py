"""Appends whose outcome the owner cannot know, and rows that somebody else holds."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
import uvicorn

from agentray.config.settings import Settings, SimulatorSettings
from agentray.errors import StorageUnavailableError
from agentray.events import Message, ToolCalled
from agentray.models.simulator import Simulator
from agentray.sessions.base import TurnInfo
from agentray.sessions.process import OwnerProcess
from agentray.storage.embedded import EmbeddedPostgres, EmbeddedRedis
from agentray.storage.postgres import migrate
from tests.fault.postgres_proxy import PostgresProxy
from tests.followed_turn import echo, script
from tests.journal import Journal
from tests.system import until

TENANT = "default"
APPEND = b"\0append\0"  # the name of the prepared statement in each Bind message
ACCEPT = b"accept_turn("
_WAITING_RELEASE = """
SELECT 1 FROM pg_stat_activity
WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE sessions SET owner = NULL%%'
"""
_ACCEPT_FOR_NOBODY = f"""
SELECT 1 FROM accept_turn(
  'default', 'orphan', '{"0" * 26}', NULL, '', %s, '{{}}', 'enqueue', NULL, 9, 1)
"""
FOUND = script("found")
TWO_TOOLS = script("{tool_results}!", tools=[echo("x"), echo("y")])


class World:
    """One owner in this process, with real stores; PostgreSQL is reached through a proxy."""

    def __init__(self, process: OwnerProcess, proxy: PostgresProxy, postgres: str) -> None:
        self.process = process
        self.sessions = process.sessions
        self.proxy = proxy
        self.postgres = postgres
        self._connection = psycopg.connect(postgres, autocommit=True)

    def close(self) -> None:
        self._connection.close()

    def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement.encode(), params).fetchall()

    def sound(self, session_id: str) -> Journal:
        journal = Journal.read(self.sql, session_id)
        journal.assert_sound()
        return journal

    async def turn(self, session_id: str, said: str, key: str | None = None) -> TurnInfo:
        """Run a turn to its end, in a session that is made if there is none."""
        await self.sessions.create(TENANT, session_id=session_id)
        accepted = await self.submit(session_id, said, key)
        return await self.sessions.wait(TENANT, session_id, accepted.id)

    async def submit(self, session_id: str, said: str, key: str | None = None) -> TurnInfo:
        messages = [Message("user", said)]
        return await self.sessions.submit(TENANT, session_id, messages, idempotency_key=key)

    async def submit_until_answered(self, session_id: str, said: str, key: str) -> TurnInfo:
        """Do as a client does that is told to come back."""
        while True:
            with suppress(StorageUnavailableError):
                return await self.submit(session_id, said, key)


@pytest.fixture(scope="module")
def folder() -> Any:
    # Short, for the sockets' sake.
    folder = Path(tempfile.mkdtemp(prefix="ar-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def simulator() -> AsyncIterator[str]:
    """Serve a simulator; yield the address below which it is served."""
    app = Simulator(SimulatorSettings(tps=2_000))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started, what="the simulator serves")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/models"
        server.should_exit = True
        await serving


async def _no_dedicated(tenant: str, session_id: str) -> None:
    raise AssertionError(f"{tenant}/{session_id} was to be in this process")


@pytest.fixture
async def world(folder: Path) -> AsyncIterator[World]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    postgres = EmbeddedPostgres(
        data_dir=folder / "postgres",
        socket_dir=folder / "pg",
        log_file=folder / "postgres.log",
        environ=environ,
    )
    redis = EmbeddedRedis(
        work_dir=folder / "redis",
        socket_file=folder / "redis.sock",
        log_file=folder / "redis.log",
        environ=environ,
    )
    (folder / "proxy").mkdir(exist_ok=True)
    proxy = PostgresProxy(folder / "proxy", folder / "pg" / ".s.PGSQL.5432", (APPEND, ACCEPT))
    await postgres.start()
    await redis.start()
    try:
        await migrate(postgres.url)
        await proxy.start()
        async with simulator() as url:
            settings = Settings.model_validate(
                {
                    "postgres": {"url": proxy.url},
                    "redis": {"url": redis.url},
                    "sessions": {"beat_s": 0.2, "term_s": 2.0, "sweep_s": 0.2, "idle_s": 0.5},
                }
            )
            process = OwnerProcess(
                settings,
                models_url=url,
                placement="shared",
                address="here/owner/0",
                launch_dedicated=_no_dedicated,
            )
            await process.start()
            world = World(process, proxy, postgres.url)
            yield world
            world.close()
            proxy.cut = None
            await process.stop()
        await proxy.stop()
    finally:
        await redis.stop()
        await postgres.stop()


@pytest.mark.parametrize("lost", ["answer", "request"])
async def test_an_append_that_is_not_acknowledged_is_neither_doubled_nor_lost(
    world: World, lost: Literal["answer", "request"]
) -> None:
    await world.turn(f"calm-{lost}", TWO_TOOLS)
    calm = world.sound(f"calm-{lost}")
    world.proxy.marker, world.proxy.cut = APPEND, lost
    done = await world.turn(f"torn-{lost}", TWO_TOOLS)
    torn = world.sound(f"torn-{lost}")
    # Every append of the turn was lost once: born, two calls, two results, the end.
    assert world.proxy.cuts >= 6
    assert (done.status, done.text) == ("completed", "x, y!")
    assert [type(event) for event in torn.events] == [type(event) for event in calm.events]
    assert {epoch for _, epoch, _ in torn.entries} == {torn.epoch}


async def test_many_sessions_whose_appends_are_torn_all_end_once(world: World) -> None:
    world.proxy.marker, world.proxy.cut = APPEND, "answer"
    ids = [f"many-{number}" for number in range(20)]
    ended = await asyncio.gather(*(world.turn(session_id, TWO_TOOLS) for session_id in ids))
    assert world.proxy.cuts >= 6
    assert {turn.text for turn in ended} == {"x, y!"}
    for session_id in ids:
        world.sound(session_id)


@pytest.mark.parametrize("lost", ["answer", "request"])
async def test_a_message_sent_again_after_a_lost_answer_is_one_turn(
    world: World, lost: Literal["answer", "request"]
) -> None:
    session_id = f"again-{lost}"
    await world.sessions.create(TENANT, session_id=session_id)
    slow = await world.submit(session_id, script("{tool_results}", tools=[echo("slow", 0.5)]))
    # The session is busy: this one is accepted behind the running turn.
    world.proxy.marker, world.proxy.cut = ACCEPT, lost
    first = await world.submit_until_answered(session_id, script("second"), "k1")
    assert world.proxy.cuts >= 1
    world.proxy.cut = None
    assert (await world.submit_until_answered(session_id, script("second"), "k1")).id == first.id
    ended = [await world.sessions.wait(TENANT, session_id, turn.id) for turn in (slow, first)]
    assert [turn.text for turn in ended] == ["slow", "second"]
    assert [turn.id for turn in world.sound(session_id).turns()] == [slow.id, first.id]


async def test_the_fence_stops_an_owner_that_knows_of_no_takeover(world: World) -> None:
    await world.sessions.create(TENANT, session_id="stolen")
    said = script("{tool_results}", tools=[echo("x", 0.3)])
    turn = await world.submit("stolen", said)
    await until(
        lambda: Journal.read(world.sql, "stolen").turn(turn.id).of(ToolCalled), what="a tool runs"
    )
    world.sql(
        "WITH thief AS (INSERT INTO hosts (id, kind, address, beat_at)"
        " VALUES ('thief', 'shared', 'there/thief/0', now() + interval '1h') RETURNING id)"
        " UPDATE sessions SET epoch = epoch + 1, owner = thief.id FROM thief"
        " WHERE sessions.id = 'stolen' RETURNING 1"
    )
    stolen = Journal.read(world.sql, "stolen")
    assert world.process.residents.peek((TENANT, "stolen")) is not None
    # Nothing has told it: it is the append of the tool's result that is refused.
    await until(
        lambda: world.process.residents.peek((TENANT, "stolen")) is None,
        what="it drops the session",
    )
    assert Journal.read(world.sql, "stolen") == stolen
    world.sql("DELETE FROM hosts WHERE id = 'thief' RETURNING 1")
    assert (await world.sessions.wait(TENANT, "stolen", turn.id)).text == "x"
    world.sound("stolen")


async def test_sessions_whose_rows_are_held_stall_no_other(world: World) -> None:
    for session_id in ("held", "idle"):
        await world.turn(session_id, script("first"))
    silent_since = world.sql("SELECT max(beat_at) FROM hosts")
    with psycopg.connect(world.postgres) as holder:
        holder.execute("SELECT 1 FROM sessions WHERE id IN ('held', 'idle') FOR UPDATE")
        held = [asyncio.create_task(world.submit("held", script("second")))]
        # More callers than there are connections.
        held += [asyncio.create_task(world.submit("held", script("more"))) for _ in range(8)]
        async with asyncio.timeout(20):
            for number in range(10):
                turn = await world.turn(f"free-{number}", TWO_TOOLS)
                assert turn.text == "x, y!"
            # Nor does it keep the owner from saying that it lives.
            await until(
                lambda: world.sql("SELECT max(beat_at) FROM hosts") > silent_since,
                what="another beat",
            )
            # Nor from finding turns that nobody runs, while it waits to give one of them up.
            await until(lambda: world.sql(_WAITING_RELEASE), what="it waits")
            await world.sessions.create(TENANT, session_id="orphan")
            world.sql(_ACCEPT_FOR_NOBODY, f'[{{"role":"user","content":{json.dumps(FOUND)}}}]')
            assert (await world.sessions.wait(TENANT, "orphan", "0" * 26)).text == "found"
        assert world.process.ownership.fresh()
        assert not any(task.done() for task in held), "nothing can have been accepted"
    turns = await asyncio.gather(*held)
    for turn in turns:
        assert (await world.sessions.wait(TENANT, "held", turn.id)).status == "completed"
    assert len(world.sound("held").turns()) == 10
