"""What becomes of a call in a worker: checked, run within its time, and told in words."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from agentray.config.tool_settings import CodeSettings, SandboxSettings
from agentray.errors import ToolError
from agentray.tools.code import ceiling, code_tools
from agentray.tools.runner import Ask
from agentray.tools.sandbox.base import FunctionCall, Limits, Outcome, PythonCode, Run, Tier, Usage
from agentray.tools.spec import Toolbox, ToolContext, ToolSpec
from agentray.tools.spec_runner import Place, SpecRunner

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class PlayedSlot:
    """A sandbox that ends as it is told to."""

    def __init__(self, tier: Tier) -> None:
        self.tier: Tier = tier
        self.outcome = Outcome("ok")
        self.runs: list[Run] = []
        self.closed = False

    async def run(self, run: Run) -> Outcome:
        self.runs.append(run)
        return self.outcome

    async def close(self) -> None:
        self.closed = True


class World:
    def __init__(self, *specs: ToolSpec) -> None:
        self.slots: list[PlayedSlot] = []
        self.outcome = Outcome("ok")
        tools = code_tools(CodeSettings(output_bytes=100), SandboxSettings())
        self.runner = SpecRunner(Toolbox([*tools, *specs]), self.open)

    async def open(self, place: Place) -> PlayedSlot:
        if place.tier == "gvisor":
            raise ToolError("There is no gvisor here.", reason="refused")
        self.slots.append(PlayedSlot(place.tier))
        return self.slots[-1]

    async def run(self, tool: str, arguments: Any, **ask: Any) -> Any:
        body = arguments if isinstance(arguments, bytes) else msgspec.json.encode(arguments)
        for slot in self.slots:
            slot.outcome = self.outcome
        if not self.slots:
            await self.runner.prepare(Place("jail"))
            self.slots[0].outcome = self.outcome
        call = Ask("acme", "s1", 1, ask.pop("key", "k1"), tool, body, **ask)
        return await self.runner.run(call)


def spec(run: Any = None, **fields: Any) -> ToolSpec:
    return ToolSpec("t", "d", SCHEMA, run=run, **fields)


def test_a_tiers_ceiling_is_the_most_of_each_limit_of_its_tools() -> None:
    big, small = Limits(memory_bytes=1 << 40), Limits(memory_bytes=1, pids=999)
    jailed: Any = {"program": lambda _: PythonCode(""), "tier": "jail"}
    specs = [
        spec(limits=big, **jailed),
        spec(limits=small, **jailed),
        spec(limits=Limits(pids=10_000), program=lambda _: PythonCode(""), tier="process"),
        spec(run=len, limits=Limits(wall_s=10_000)),
    ]
    assert ceiling(specs, "jail") == Limits(memory_bytes=1 << 40, pids=999)
    assert ceiling(specs, "process") == Limits(pids=10_000)


async def test_code_runs_in_its_sandbox_with_the_sessions_files() -> None:
    world = World()
    world.outcome = Outcome(
        "ok", stdout=b"hi\n", scratch=b"tar", usage=Usage(cpu_s=0.5, memory_bytes=7), start="parked"
    )
    found = await world.run("python", {"code": "print('hi')"}, scratch=b"old", timeout_s=3)
    (run,) = world.slots[0].runs
    assert run.program == PythonCode("print('hi')")
    assert (run.scratch, run.keep_scratch, run.limits.wall_s) == (b"old", True, 3)
    assert (found.status, found.output, found.reason) == ("ok", "hi", "")
    assert (found.scratch, found.cpu_s, found.memory_bytes) == (b"tar", 0.5, 7)
    assert found.start == "parked"


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome("ok"), "(it printed nothing)"),
        (Outcome("ok", stderr=b"warned"), "[stderr]\nwarned"),
        (Outcome("exit", exit_code=3), "[exit code 3; it printed nothing]"),
        (Outcome("exit", exit_code=3, stdout=b"x"), "[exit code 3; output:]\nx"),
        (
            Outcome("timeout", stdout=b"so far"),
            "[killed after 30 s; output so far:]\nso far",
        ),
        (
            Outcome("ok", stdout=b"x", truncated=True),
            "x\n[cut here: it printed more than 100 bytes]",
        ),
        (Outcome("signal", signal=11), "[killed by signal 11; it printed nothing]"),
        (Outcome("ok", stdout=b"a\xff\0b"), "a\ufffd\ufffdb"),
        (Outcome("failed", error="no fork"), "[the sandbox failed: no fork; it printed nothing]"),
    ],
)
async def test_the_model_is_told_how_a_program_ended(outcome: Outcome, expected: str) -> None:
    world = World()
    world.outcome = outcome
    found = await world.run("shell", {"script": "x"})
    assert found.output == expected
    assert found.reason == ("" if outcome.reason == "ok" else outcome.reason)
    assert found.status == ("ok" if outcome.reason == "ok" else "error")


async def test_a_sandbox_that_failed_is_not_used_again() -> None:
    world = World()
    world.outcome = Outcome("failed", error="x")
    await world.run("shell", {"script": "x"})
    assert world.slots[0].closed
    world.outcome = Outcome("ok", stdout=b"fine")
    assert (await world.run("shell", {"script": "x"})).status == "ok"
    assert len(world.slots) == 2


@pytest.mark.parametrize(
    ("result", "expected"),
    [(b'"text"', "text"), (b'{"a":[1]}', '{"a":[1]}'), (b"null", "null"), (b"NaN", "NaN")],
)
async def test_a_functions_text_is_told_as_it_is_and_all_else_as_json(
    result: bytes, expected: str
) -> None:
    world = World(spec(program=lambda a: FunctionCall("m:f", msgspec.json.encode(a))))
    world.outcome = Outcome("ok", result=result, stdout=b"printed")
    assert (await world.run("t", {"n": 1})).output == expected


async def test_a_functions_exception_is_told_without_its_trace() -> None:
    world = World(spec(program=lambda a: FunctionCall("m:f", b"{}")))
    world.outcome = Outcome("exit", exit_code=1, error="ValueError: no", stderr=b"Traceback")
    found = await world.run("t", {"n": 1})
    assert (found.output, found.reason) == ("ValueError: no", "exit")


async def test_a_function_gets_its_context_whatever_the_model_says() -> None:
    program: Any = lambda a: FunctionCall("m:f", msgspec.json.encode(a))  # noqa: E731
    world = World(spec(program=program, context_argument="context"))
    keys: list[str] = []
    for key in ("k1", "k1", "k2"):
        await world.run("t", {"n": 1, "context": {"tenant": "other"}}, key=key)
        sent: Any = world.slots[0].runs[-1].program
        context = msgspec.json.decode(sent.arguments)["context"]
        assert (context["tenant"], context["session_id"]) == ("acme", "s1")
        keys.append(context["idempotency_key"])
    assert keys[0] == keys[1] != keys[2]
    assert "acme" not in keys[0]


@pytest.mark.parametrize(
    ("tool", "arguments", "reason", "words"),
    [
        ("none", {}, "refused", "There is no tool 'none'"),
        ("t", b"[1]", "invalid", "no JSON object"),
        ("t", b"\xff", "invalid", "no JSON object"),
    ],
)
async def test_what_cannot_be_run_is_not_run(
    tool: str, arguments: Any, reason: str, words: str
) -> None:
    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        pytest.fail("it ran")

    found = await World(spec(run)).run(tool, arguments)
    assert (found.status, found.reason) == ("error", reason)
    assert words in found.output


async def test_a_tier_that_cannot_be_had_refuses_its_calls() -> None:
    found = await World(spec(program=lambda a: PythonCode(""), tier="gvisor")).run("t", {"n": 1})
    assert (found.status, found.reason) == ("error", "refused")
    assert found.output == "There is no gvisor here."


async def test_a_tool_that_takes_too_long_is_ended() -> None:
    ended = asyncio.Event()

    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    found = await World(spec(run)).run("t", {"n": 1}, timeout_s=0.01)
    assert (found.reason, found.output) == ("timeout", "The tool took longer than 0.01 s.")
    assert ended.is_set()


@pytest.mark.parametrize(
    ("error", "reason", "output"),
    [
        (ToolError("HTTP 404", reason="upstream"), "upstream", "HTTP 404"),
        (ToolError("No."), "error", "No."),
        (TimeoutError("of its own"), "error", "TimeoutError: of its own"),
        (KeyError("x"), "error", "KeyError: 'x'"),
    ],
)
async def test_what_a_tool_raises_is_told(error: Exception, reason: str, output: str) -> None:
    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        raise error

    found = await World(spec(run)).run("t", {"n": 1})
    assert (found.status, found.reason, found.output) == ("error", reason, output)


async def test_an_output_is_bounded() -> None:
    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        return "é" * 1_000_000

    found = await World(spec(run)).run("t", {"n": 1})
    assert found.output.startswith("ééé")
    assert "more bytes are not shown" in found.output
    assert len(found.output.encode()) < 270_000


async def test_a_cancellation_goes_on() -> None:
    begun = asyncio.Event()

    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        begun.set()
        await asyncio.Event().wait()
        return ""

    task = asyncio.ensure_future(World(spec(run)).run("t", {"n": 1}))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
