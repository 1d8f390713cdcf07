"""Put together what a tool worker runs calls with: the tools, and a runner for each slot."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from agentray.clock import SystemClock
from agentray.config.settings import BreakerSettings, McpSettings, Settings
from agentray.config.tool_settings import SandboxSettings
from agentray.errors import SandboxUnavailableError
from agentray.models.breaker import Breaker
from agentray.models.checks import schema_problem
from agentray.telemetry.logging import get_logger
from agentray.tools.code import ceiling
from agentray.tools.listing import listing_tool
from agentray.tools.mcp import McpServers
from agentray.tools.mcp_launch import Launcher, ProcessLauncher
from agentray.tools.runner import Runner
from agentray.tools.sandbox.base import Slot, Tier
from agentray.tools.sandbox.launch import JailLauncher
from agentray.tools.sandbox.opening import open_slot
from agentray.tools.spec import Toolbox, ToolSpec
from agentray.tools.spec_runner import Place, SpecRunner
from agentray.tools.toolbox import check_agents, open_toolbox

__all__ = ["WorkerTools", "check_tools", "sandbox_trouble"]

log = get_logger(__name__)

_INSTALLED = ("site-packages", "dist-packages")


class WorkerTools:
    """Opens a worker's runners, in its process; picklable. See ``OpenRunners``."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.tools

    async def __call__(self, slots: int) -> Sequence[Runner]:
        """Open so many runners; the tools of MCP servers have been asked for when it returns.

        Raises:
            ConfigError: the settings cannot be used.
        """
        settings = self._settings
        box = Toolbox([])
        servers = McpServers(
            settings.mcp,
            launchers=_launcher,
            schema_problem=schema_problem,
            changed=lambda specs, instead_of: box.put(specs, instead_of=instead_of),
        )
        local = await open_toolbox(
            settings,
            breaker=lambda host: Breaker(BreakerSettings()),
            clock=SystemClock(),
            # Each has its part of what the gateway allows all together; there is one on each node.
            share=1 / max(settings.workers.max, await asyncio.to_thread(_nodes)),
            sources=[servers],
        )
        box.put([*local.specs, listing_tool(servers.known, servers.specs)])
        await servers.start()
        slots_of = _Slots(settings.sandbox.weakest, settings.code.cpus, settings.functions, box)
        runners = [SpecRunner(box, slots_of.open, late=servers.run) for _ in range(slots)]
        # One is ready before the first call, the others soon after.
        place = Place(settings.sandbox.tier)
        opening: asyncio.Task[None] | None = None
        if await _prepared(runners[0], place):
            opening = asyncio.create_task(_prepare(runners[1:], place))
        return [*runners[:-1], _Last(runners[-1], local, opening)]


class _Slots:
    """Opens sandboxes as large as the tools need them."""

    def __init__(
        self,
        weakest: Tier | None,
        code_cpus: float,
        functions: Sequence[str],
        box: Toolbox,
    ) -> None:
        self._weakest: Tier | None = weakest
        self._functions = functions
        self._code_cpus = code_cpus
        self._box = box
        self._told = False

    async def open(self, place: Place) -> Slot:
        specs = [spec for spec in self._box.specs if _runs_at(spec, place)]
        slot = await open_slot(
            place.tier,
            ceiling=ceiling(specs, place.tier),
            # A model's code sees nothing of the operator's.
            paths=_libraries(self._functions) if place.operator else (),
            cpu_share=max(1.0, *(s.cpu for s in specs)) if place.operator else self._code_cpus,
            proxied=any(spec.network is not None for spec in specs),
            weakest=self._weakest,
        )
        if slot.tier != place.tier and not self._told:
            self._told = True
            log.warning("sandbox_weaker", asked=place.tier, had=slot.tier)
        return slot


class _Last:
    """The last runner of a worker, which closes with itself what all of them share."""

    def __init__(
        self, runner: SpecRunner, box: Toolbox, opening: asyncio.Task[None] | None
    ) -> None:
        self._runner = runner
        self._box = box
        self._opening = opening

    async def run(self, call: Any) -> Any:
        return await self._runner.run(call)

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        await self._runner.close()
        await self._box.close()


def _nodes() -> int:
    # Not by those who only look at the settings.
    import ray

    nodes: list[dict[str, Any]] = cast(Any, ray).nodes()
    return sum(node["Alive"] for node in nodes)


async def _prepare(runners: Sequence[SpecRunner], place: Place) -> None:
    for runner in runners:
        await _prepared(runner, place)


async def _prepared(runner: SpecRunner, place: Place) -> bool:
    try:
        await runner.prepare(place)
    except SandboxUnavailableError as error:
        log.warning("sandbox_unavailable", reason=error.message)
        return False
    return True


def _runs_at(spec: ToolSpec, place: Place) -> bool:
    return spec.program is not None and spec.tier == place.tier and spec.operator == place.operator


def _launcher(server: McpSettings) -> Launcher:
    if server.sandbox == "process":
        return ProcessLauncher()
    return JailLauncher(paths=server.paths, network=server.network)


def _libraries(functions: Sequence[str]) -> list[str]:
    """Return the folders that functions are imported from: their own, agentray's and what is
    installed. The rest of this process's path, the folder that it was started in among it, is
    nothing that they have to see."""
    installed = [each for each in sys.path if Path(each).name in _INSTALLED]
    modules = [entry.partition(":")[0] for entry in functions]
    roots = [root for root in map(_root, ["agentray", *modules]) if root]
    return list(dict.fromkeys([*roots, *installed]))


def _root(module: str) -> str:
    """Return the folder that a module is imported from."""
    found = sys.modules[module].__file__
    if found is None:
        return ""
    file = Path(found)
    return str(file.parents[module.count(".") + (file.name == "__init__.py")])


async def check_tools(settings: Settings) -> None:
    """See that the tools can be had, and that agents name those that are there.

    Raises:
        ConfigError: the message names the key.
    """
    box = await open_toolbox(
        settings.tools, breaker=lambda host: Breaker(BreakerSettings()), clock=SystemClock()
    )
    try:
        check_agents(settings.agents, box, late=settings.tools.mcp)
    finally:
        await box.close()


async def sandbox_trouble(settings: SandboxSettings) -> str:
    """Return in a line why models' code is not contained on this machine as the settings say, or
    nothing."""
    try:
        slot = await open_slot(settings.tier, parked=False, weakest=settings.weakest)
    except SandboxUnavailableError as error:
        return f"python and shell are refused: {error.message.splitlines()[0]}"
    await slot.close()
    weaker = f"python and shell run in the weaker tier {slot.tier!r}, not {settings.tier!r}"
    return "" if slot.tier == settings.tier else weaker
