"""Run AI-agent sessions as actors, on Ray.

The public names are loaded when they are first used, so that ``import agentray`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentray.client import AsyncClient, Client, connect
    from agentray.errors import AgentRayError
    from agentray.tools.functions import tool

__all__ = ["AgentRayError", "AsyncClient", "Client", "__version__", "connect", "tool"]

__version__ = "0.1.0"

_HOMES = {
    "AgentRayError": "agentray.errors",
    "AsyncClient": "agentray.client",
    "Client": "agentray.client",
    "connect": "agentray.client",
    "tool": "agentray.tools.functions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
