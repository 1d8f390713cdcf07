"""The built-in tool that proves the loop: it says back what it is told."""

from __future__ import annotations

import asyncio
from typing import Any

from agentray.tools.spec import ToolContext, ToolSpec

__all__ = ["ECHO"]

_MAX_DELAY_S = 30.0


async def _echo(arguments: dict[str, Any], context: ToolContext) -> str:
    delay_s = arguments.get("delay_s", 0)
    if not isinstance(delay_s, int | float) or not 0 <= delay_s <= _MAX_DELAY_S:
        raise ValueError(f"delay_s must be a number from 0 to {_MAX_DELAY_S:g}")
    if delay_s:
        await asyncio.sleep(delay_s)
    return str(arguments.get("text", ""))


ECHO = ToolSpec(
    name="echo",
    description="Says the text back, after delay_s seconds if given.",
    parameters={
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "delay_s": {"type": "number", "minimum": 0, "maximum": _MAX_DELAY_S},
        },
        "required": ["text"],
    },
    run=_echo,
    here=True,
    on_crash="retry",
)
