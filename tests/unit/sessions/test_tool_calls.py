"""Tool calls of a step: what is run where, on which files, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from agentray.agents.spec import Agents
from agentray.clock import ManualClock
from agentray.config.settings import AgentSettings
from agentray.errors import StorageError, StorageUnavailableError, ToolError
from agentray.events import Message, ToolCall, TurnAccepted
from agentray.sessions.actor import SessionActor
from agentray.sessions.base import WaitingCall
from agentray.sessions.state import Rules, SessionState
from agentray.sessions.tool_calls import ToolCalls
from agentray.tools.client import OnQueued
from agentray.tools.runner import Ask
from agentray.tools.sandbox.base import PythonCode
from agentray.tools.spec import Toolbox, ToolContext, ToolResult, ToolSpec
from tests.unit.sessions.fence import actor_of

ANYTHING = {"type": "object"}
NUMBERED = {"type": "object", "properties": {"n": {"type": "integer"}}}


async def _shout(arguments: dict[str, Any], context: ToolContext) -> str:
    if arguments.get("fails"):
        raise ValueError("hoarse")
    return f"{arguments['text'].upper()} {context.idempotency_key}"


TOOLS = Toolbox(
    [
        ToolSpec("shout", "Says it loud.", ANYTHING, run=_shout, here=True),
        ToolSpec("ask", "Asks elsewhere.", NUMBERED, run=_shout, timeout_s=7),
        ToolSpec(
            "python", "Runs code.", ANYTHING, program=lambda a: PythonCode(""), keeps_scratch=True
        ),
        ToolSpec("hidden", "Of another agent.", ANYTHING, run=_shout),
    ]
)


class Pool:
    """A pool whose calls leave one more letter in the session's files."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.fenced: list[tuple[str, str, int]] = []
        self.failure: ToolError | None = None
        self.running = 0
        self.most = 0
        self.place: tuple[int, float] | None = None
        self.gets_a_slot = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def call(
        self,
        ask: Ask,
        *,
        on_queued: OnQueued | None = None,
        on_granted: Callable[[], None] | None = None,
    ) -> ToolResult:
        if self.failure is not None:
            raise self.failure
        self.asks.append(ask)
        self.running += 1
        self.most = max(self.most, self.running)
        if self.place is not None and on_queued is not None:
            on_queued(*self.place)
            await self.gets_a_slot.wait()
            assert on_granted is not None
            on_granted()
            await self.goes_on.wait()
        await asyncio.sleep(0)
        self.running -= 1
        letter = chr(ord("a") + len(self.asks) - 1).encode()
        return ToolResult("ok", "done", scratch=ask.scratch + letter, cpu_s=0.5)

    async def fence(self, tenant: str, session_id: str, epoch: int) -> None:
        self.fenced.append((tenant, session_id, epoch))


class Scratch:
    """The files of one session."""

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}
        self.reads = 0
        self.epoch = 1
        self.failure: StorageError | None = None

    async def read_scratch(
        self, tenant: str, session_id: str, *, before_seq: int | None = None
    ) -> bytes | None:
        self.reads += 1
        found = [seq for seq in self.kept if before_seq is None or seq < before_seq]
        return self.kept[max(found)] if found else None

    async def write_scratch(
        self, tenant: str, session_id: str, *, epoch: int, seq: int, body: bytes
    ) -> bool:
        if self.failure is not None:
            raise self.failure
        if epoch == self.epoch:
            self.kept[seq] = body
        return epoch == self.epoch


class Waiting:
    """The places of the calls that wait, with all that was ever told."""

    def __init__(self) -> None:
        self.now: dict[str, bytes] = {}
        self.told: list[WaitingCall] = []
        self.was_told = asyncio.Event()
        self.was_taken_back = asyncio.Event()

    async def put_waiting(
        self, tenant: str, session_id: str, call_id: str, place: bytes | None
    ) -> None:
        if place is None:
            self.now.pop(call_id, None)
            self.was_taken_back.set()
        else:
            self.now[call_id] = place
            self.told.append(msgspec.json.decode(place, type=WaitingCall))
            self.was_told.set()

    async def waiting(self, tenant: str, session_id: str) -> list[bytes]:
        return list(self.now.values())


class World:
    def __init__(self) -> None:
        self.pool = Pool()
        self.waiting = Waiting()
        self.scratch = Scratch()
        self.files = asyncio.Lock()
        agent = AgentSettings(tools=("shout", "ask", "python"))
        self.calls = ToolCalls(
            tools=TOOLS,
            agents=Agents({"assistant": agent}),
            pool=self.pool,
            scratch=self.scratch,
            waiting=self.waiting,
            clock=ManualClock(),
            queue_s=5.0,
        )
        self.actor = self.activate()

    def activate(self) -> SessionActor:
        """Return the session as a process has it that knows nothing but the journal."""
        actor = actor_of(self.scratch.epoch, 0, SessionState(), Rules())
        message = Message("user", "x")
        actor.record(TurnAccepted(seq=1, turn_id="t", at=0.0, input=[message], agent="assistant"))
        return actor

    async def run(self, name: str, arguments: str = "{}", seq: int = 9) -> ToolResult:
        call = ToolCall("c", name, arguments)
        return await self.calls.run(self.actor, call, f"key{seq}", seq, self.files)


@pytest.fixture
def world() -> World:
    return World()


async def test_a_small_tool_runs_here(world: World) -> None:
    result = await world.run("shout", '{"text": "hey"}')
    assert (result.status, result.output) == ("ok", "HEY key9")
    assert world.pool.asks == []


async def test_a_failure_here_is_a_result(world: World) -> None:
    result = await world.run("shout", '{"fails": true}')
    assert (result.status, result.output, result.reason) == ("error", "ValueError: hoarse", "error")


async def test_another_tool_is_asked_for_with_all_that_is_known(world: World) -> None:
    result = await world.run("ask", '{"a": 1}')
    assert result.output == "done"
    (ask,) = world.pool.asks
    assert (ask.session_id, ask.epoch, ask.call_key) == (world.actor.id, 1, "key9")
    assert (ask.tool, ask.arguments, ask.timeout_s) == ("ask", b'{"a": 1}', 7)
    assert ask.deadline == ManualClock().now() + 5.0


@pytest.mark.parametrize(
    ("name", "arguments", "reason", "said"),
    [
        ("none", "{}", "refused", "There is no tool 'none'."),
        ("hidden", "{}", "refused", "There is no tool 'hidden'."),
        ("ask", "[]", "invalid", "Not run: the arguments of ask are no JSON object."),
        (
            "ask",
            '{"n": "x"}',
            "invalid",
            "Not run: arguments of ask: n: 'x' is not of type 'integer'.",
        ),
    ],
)
async def test_what_cannot_be_run_is_told_to_the_model(
    world: World, name: str, arguments: str, reason: str, said: str
) -> None:
    result = await world.run(name, arguments)
    assert (result.status, result.output, result.reason) == ("error", said, reason)
    assert world.pool.asks == []


async def test_a_pool_that_is_away_is_a_result_too(world: World) -> None:
    world.pool.failure = ToolError("no worker answers")
    result = await world.run("ask")
    assert (result.status, result.output) == ("error", "Not run: no worker answers.")


async def test_each_call_finds_what_the_last_one_left(world: World) -> None:
    for seq in (3, 6, 9):
        assert (await world.run("python", seq=seq)).scratch is None
    assert [ask.scratch for ask in world.pool.asks] == [b"", b"a", b"ab"]
    assert world.scratch.kept == {3: b"a", 6: b"ab", 9: b"abc"}
    # The session was in memory all the time.
    assert world.scratch.reads == 1
    world.actor = world.activate()
    await world.run("python", seq=12)
    assert world.pool.asks[-1].scratch == b"abc"


async def test_a_call_that_is_run_again_finds_what_it_found_before(world: World) -> None:
    await world.run("python", seq=3)
    await world.run("python", seq=6)
    world.actor = world.activate()
    await world.run("python", seq=6)
    assert [ask.scratch for ask in world.pool.asks] == [b"", b"a", b"a"]


async def test_calls_of_a_step_share_the_files_one_after_another(world: World) -> None:
    await asyncio.gather(*(world.run("python", seq=seq) for seq in (3, 4, 5)))
    assert world.pool.most == 1
    assert [ask.scratch for ask in world.pool.asks] == [b"", b"a", b"ab"]
    await asyncio.gather(*(world.run("ask", seq=seq) for seq in (6, 7)))
    assert world.pool.most == 2


async def test_what_a_stale_owner_ran_leaves_nothing(world: World) -> None:
    world.scratch.epoch = 2
    await world.run("python", seq=3)
    assert world.scratch.kept == {}


async def test_a_takeover_ends_calls_of_the_owner_before(world: World) -> None:
    await world.calls.fence(world.actor)
    assert world.pool.fenced == [(world.actor.tenant, world.actor.id, 1)]


async def test_a_background_turn_waits_behind_those_that_somebody_waits_for(world: World) -> None:
    turn = world.actor.turn
    options = replace(turn.options, background=True)
    world.actor.state = replace(world.actor.state, turn=replace(turn, options=options))
    await world.run("ask")
    assert world.pool.asks[0].priority == "background"


@pytest.mark.parametrize("ends", ["with a slot", "cancelled"])
async def test_where_a_call_waits_is_to_be_seen_until_it_has_a_slot(ends: str) -> None:
    world = World()
    world.pool.place = (3, 1.5)
    call = ToolCall("c1", "ask", "{}")
    running = asyncio.create_task(world.calls.run(world.actor, call, "turn/c1", 5, world.files))
    await asyncio.wait_for(world.waiting.was_told.wait(), 5)
    assert [(p.call_id, p.tool, p.position, p.wait_s) for p in world.waiting.told] == [
        ("c1", "ask", 3, 1.5)
    ]
    if ends == "cancelled":
        running.cancel()
    world.pool.gets_a_slot.set()
    await asyncio.wait_for(world.waiting.was_taken_back.wait(), 5)
    assert not world.waiting.now
    assert running.done() == (ends == "cancelled")
    world.pool.goes_on.set()
    await asyncio.wait({running})


async def test_a_result_stands_even_if_its_files_cannot_be_kept() -> None:
    world = World()
    world.scratch.failure = StorageError("too large")
    result = await world.run("python")
    assert result.status == "ok"
    assert result.output == "done\n[its files could not be kept]"


async def test_files_are_kept_when_the_store_is_back() -> None:
    world = World()
    world.scratch.failure = StorageUnavailableError("away")
    asyncio.get_running_loop().call_soon(lambda: setattr(world.scratch, "failure", None))
    assert (await world.run("python")).output == "done"
    assert world.scratch.kept
