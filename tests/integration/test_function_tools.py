"""Operator's functions in real sandboxes, called as a worker calls them."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import agentray
from agentray.tools.functions import load_functions
from agentray.tools.runner import Ask
from agentray.tools.sandbox.base import FunctionCall, Limits, PythonCode, Run, Slot, Tier
from agentray.tools.sandbox.opening import open_slot
from agentray.tools.spec import Toolbox, ToolResult
from agentray.tools.spec_runner import Place, SpecRunner

SOURCE = """
import asyncio
import time
from dataclasses import dataclass

import agentray
from agentray.tools.spec import ToolContext


@dataclass
class Price:
    amount: float
    currency: str = "CHF"


@agentray.tool
def double(price: Price) -> Price:
    print("a function may print")
    return Price(price.amount * 2, price.currency)


@agentray.tool
async def greet(name: str, context: ToolContext) -> str:
    await asyncio.sleep(0)
    return f"Hi {name} of {context.tenant}"


@agentray.tool
def fail(why: str) -> str:
    raise ValueError(why)


@agentray.tool(timeout_s=0.5)
def hang() -> None:
    time.sleep(60)
"""


@pytest.fixture
async def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SpecRunner]:
    (tmp_path / "operators_module.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    toolbox = Toolbox(load_functions(["operators_module"]))
    ceiling = Limits(pids=256, cpu_s=60, wall_s=60)

    async def open_(place: Place) -> Slot:
        return await open_slot(place.tier, ceiling=ceiling, paths=[str(tmp_path)])

    runner = SpecRunner(toolbox, open_)
    yield runner
    await runner.close()


async def call(runner: SpecRunner, tool: str, **arguments: Any) -> ToolResult:
    return await runner.run(Ask("acme", "s", 1, "k", tool, json.dumps(arguments).encode()))


async def test_functions_run_in_a_sandbox_one_after_another(runner: SpecRunner) -> None:
    doubled = await call(runner, "double", price={"amount": 1.5})
    assert (doubled.status, json.loads(doubled.output)) == (
        "ok",
        {"amount": 3.0, "currency": "CHF"},
    )
    greeted = await call(runner, "greet", name="Ann")
    assert (greeted.status, greeted.output) == ("ok", "Hi Ann of acme")
    failed = await call(runner, "fail", why="not today")
    assert (failed.status, failed.reason, failed.output) == (
        "error",
        "exit",
        "ValueError: not today",
    )
    hung = await call(runner, "hang")
    assert (hung.reason, hung.output) == ("timeout", "[killed after 0.5 s; it printed nothing]")
    assert (await call(runner, "greet", name="Bo")).output == "Hi Bo of acme"


@pytest.mark.parametrize("tier", ["process", "jail"])
async def test_a_module_of_tools_can_be_imported_before_the_calls(
    tmp_path: Path, tier: Tier
) -> None:
    (tmp_path / "operators_module.py").write_text(SOURCE, encoding="utf-8")
    paths = [str(tmp_path), str(Path(agentray.__file__).parents[1])]
    paths += [each for each in sys.path if Path(each).name == "site-packages"]
    limits = Limits(pids=256, cpu_s=60, wall_s=60, memory_bytes=1 << 30)
    slot = await open_slot(
        tier, ceiling=limits, paths=paths, libraries=["operators_module"], parked=False
    )
    try:
        target = "operators_module:double.call_json"
        found = await slot.run(Run(FunctionCall(target, b'{"price": {"amount": 2}}'), limits))
        assert found.result == b'{"amount": 4.0, "currency": "CHF"}', found
        # What it imported is the package, and nothing of what made the child.
        look = PythonCode("import agentray, sys; print(agentray.tool, *sys.modules)")
        found = await slot.run(Run(look, limits))
        assert b"agentray.tools.functions" in found.stdout, found
        assert b"agentray.tools.sandbox.zygote" not in found.stdout
    finally:
        await slot.close()
