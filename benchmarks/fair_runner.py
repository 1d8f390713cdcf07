"""What the workers of the fairness benchmark run: a jailed program that sleeps as it is told."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from agentray.tools.runner import Ask, Runner
from agentray.tools.sandbox.base import Limits, PythonCode, Run, Slot
from agentray.tools.sandbox.opening import open_slot
from agentray.tools.spec import ToolResult

__all__ = ["Ran", "open_sleepers"]

_LIMITS = Limits(wall_s=30.0)


class Ran(msgspec.Struct):
    """When a call's slot was busy with it, by the machine's monotonic clock."""

    began: float
    ended: float


class Sleeper:
    """A jailed slot whose programs sleep; the output says when it was busy."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    async def run(self, call: Ask) -> ToolResult:
        seconds = msgspec.json.decode(call.arguments, type=float)
        began = time.monotonic()
        outcome = await self._slot.run(
            Run(PythonCode(f"import time; time.sleep({seconds!r})"), _LIMITS)
        )
        ran = Ran(began, time.monotonic())
        used = outcome.usage
        if outcome.reason != "ok":
            return ToolResult("error", f"{outcome.reason}: {outcome.error}", "error")
        return ToolResult(
            "ok",
            msgspec.json.encode(ran).decode(),
            start=outcome.start,
            cpu_s=used.cpu_s,
            memory_bytes=used.memory_bytes,
        )

    async def close(self) -> None:
        await self._slot.close()


async def open_sleepers(count: int) -> Sequence[Runner]:
    """Open jailed slots, in a worker's process."""
    return [Sleeper(await open_slot("jail")) for _ in range(count)]
