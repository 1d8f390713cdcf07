"""Whether arguments fit a tool's schema, as a session's process looks at them."""

from __future__ import annotations

import json
from typing import Any

from agentray.events import ToolCall
from agentray.models import checks


def arguments_problem(arguments: dict[str, Any], schema: dict[str, Any]) -> str | None:
    """Return why arguments do not fit, or None if they do."""
    return checks.arguments_problem(ToolCall("c", "tool", json.dumps(arguments)), schema)
