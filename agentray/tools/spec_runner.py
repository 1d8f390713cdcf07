"""Carry out one call after another in a worker: find the tool, run it, and tell how it went."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from agentray.errors import ToolError
from agentray.telemetry.logging import get_logger
from agentray.tools.code import printed
from agentray.tools.runner import Ask
from agentray.tools.sandbox.base import FunctionCall, Limits, Outcome, Run, Slot, Tier
from agentray.tools.spec import Toolbox, ToolContext, ToolResult, ToolSpec

__all__ = ["OpenSlot", "Place", "SpecRunner"]

log = get_logger(__name__)


class Place(NamedTuple):
    """Which sandboxes a tool's calls run in: those of the operator's code see its libraries."""

    tier: Tier
    operator: bool = False


OpenSlot = Callable[[Place], Awaitable[Slot]]
"""Opens a sandbox's slot; raises ``ToolError`` where the tier cannot be had."""


# JSON of a journal and of a database cannot have it.
_NUL = {0: "\N{REPLACEMENT CHARACTER}"}


class SpecRunner:
    """A worker's slot: runs one call at a time, in its own process or in its sandboxes. Its host
    has seen that the arguments fit the tool's schema.

    A sandbox of each place is opened when it is first needed, and kept. ``late`` finds what runs
    a tool that is not in the toolbox yet, but was listed to others before.
    """

    def __init__(
        self,
        toolbox: Toolbox,
        open_slot: OpenSlot,
        *,
        late: Callable[[str], Callable[..., Awaitable[str]] | None] = lambda name: None,
    ) -> None:
        self._toolbox = toolbox
        self._open_slot = open_slot
        self._late = late
        self._slots: dict[Place, Slot] = {}
        self._opening = asyncio.Lock()

    async def prepare(self, place: Place) -> None:
        """Open a sandbox ahead of its first call.

        Raises:
            ToolError: the tier cannot be had.
        """
        async with self._opening:
            if place not in self._slots:
                self._slots[place] = await self._open_slot(place)

    async def run(self, call: Ask) -> ToolResult:
        """Run a call; whatever becomes of it is a result. A cancellation ends it and goes on."""
        spec = self._toolbox.get(call.tool)
        if spec is None and (run := self._late(call.tool)) is not None:
            spec = ToolSpec(call.tool, "", {"type": "object"}, run, timeout_s=call.timeout_s)
        if spec is None:
            return _error(f"There is no tool {call.tool[:80]!r}.", "refused")
        try:
            arguments = msgspec.json.decode(call.arguments or b"{}", type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _error(f"Not run: the arguments are no JSON object: {error}.", "invalid")
        context = ToolContext(call.tenant, call.session_id, _idempotency_key(call))
        if spec.context_argument:
            arguments[spec.context_argument] = msgspec.to_builtins(context)
        try:
            if spec.run is not None:
                return await self._here(spec, arguments, context, call)
            if spec.program is not None:
                return await self._sandboxed(spec, arguments, call)
            return _error(f"The tool {spec.name} has nothing that runs.", "refused")
        except ToolError as error:
            return _error(error.message, str(error.fields.get("reason", "error")))
        except Exception as error:  # noqa: BLE001 - its own failure is a result for the model
            log.info("tool_failed", tool=spec.name, error=type(error).__name__)
            return _error(f"{type(error).__name__}: {error}", "error")

    async def close(self) -> None:
        """End whatever runs and give everything back."""
        while self._slots:
            _, slot = self._slots.popitem()
            await slot.close()

    async def _here(
        self, spec: ToolSpec, arguments: dict[str, Any], context: ToolContext, call: Ask
    ) -> ToolResult:
        assert spec.run is not None
        timeout_s = min(spec.timeout_s, call.timeout_s)
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                output = await spec.run(arguments, context)
        except TimeoutError:
            if not limit.expired():
                raise
            return _error(f"The tool took longer than {timeout_s:g} s.", "timeout")
        return ToolResult("ok", _bounded(output, spec.limits))

    async def _sandboxed(self, spec: ToolSpec, arguments: dict[str, Any], call: Ask) -> ToolResult:
        assert spec.program is not None
        program = spec.program(arguments)
        place = Place(spec.tier, spec.operator)
        limits = spec.limits
        if call.timeout_s < limits.wall_s:
            limits = msgspec.structs.replace(limits, wall_s=max(0.001, call.timeout_s))
        try:
            await self.prepare(place)
        except ToolError as error:
            return _error(error.message, str(error.fields.get("reason", "refused")))
        slot = self._slots[place]
        scratch = call.scratch if spec.keeps_scratch else b""
        network = spec.network and spec.network(call.tenant, limits.wall_s)
        keep = spec.keeps_scratch
        outcome = await slot.run(Run(program, limits, scratch, keep_scratch=keep, network=network))
        if outcome.reason == "failed":
            # Whatever broke it must not break the next call: that gets a new one.
            log.warning("sandbox_failed", tool=spec.name, tier=spec.tier)
            del self._slots[place]
            await slot.close()
        returned = isinstance(program, FunctionCall)
        output = _returned(outcome, limits) if returned else printed(outcome, limits)
        return ToolResult(
            status="ok" if outcome.reason == "ok" else "error",
            output=_bounded(output, limits),
            reason="" if outcome.reason == "ok" else outcome.reason,
            scratch=outcome.scratch if spec.keeps_scratch else None,
            start=outcome.start,
            cpu_s=outcome.usage.cpu_s,
            memory_bytes=outcome.usage.memory_bytes,
        )


def _returned(outcome: Outcome, limits: Limits) -> str:
    if outcome.reason != "ok" or outcome.result is None:
        if outcome.reason == "exit" and outcome.error:
            return outcome.error
        return printed(outcome, limits)
    text = outcome.result.decode(errors="replace")
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return found if isinstance(found, str) else text


def _bounded(output: str, limits: Limits) -> str:
    output = output.translate(_NUL)
    encoded = output.encode(errors="replace")
    # A reason and two marks come on top of what was printed.
    most = limits.output_bytes + 1024
    if len(encoded) <= most:
        return encoded.decode()
    kept = encoded[:most].decode(errors="ignore")
    return f"{kept}\n[cut here: {len(encoded) - most} more bytes are not shown]"


def _idempotency_key(call: Ask) -> str:
    # Other services see it: whose call it is, is not theirs to know.
    return hashlib.sha256(call.key.encode(errors="replace")).hexdigest()[:32]


def _error(output: str, reason: str) -> ToolResult:
    # Nor can texts of the wire have what no encoding has.
    return ToolResult("error", output.translate(_NUL).encode(errors="replace").decode(), reason)
