"""Put together what a tool worker runs calls with: the tools, and a runner for each slot."""

from __future__ import annotations

from collections.abc import Sequence

from agentray.clock import SystemClock
from agentray.config.settings import BreakerSettings, Settings
from agentray.errors import SandboxUnavailableError
from agentray.models.breaker import Breaker
from agentray.models.checks import schema_problem
from agentray.telemetry.logging import get_logger
from agentray.tools.code import ceiling
from agentray.tools.mcp import McpServers
from agentray.tools.runner import Runner
from agentray.tools.sandbox.base import Slot, Tier
from agentray.tools.sandbox.opening import open_slot
from agentray.tools.spec_runner import SpecRunner
from agentray.tools.toolbox import open_toolbox

__all__ = ["WorkerTools"]
