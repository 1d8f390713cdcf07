"""A function of an operator's, for the whole system."""

from __future__ import annotations

import agentray


@agentray.tool(memory="512MiB", timeout_s=20)
def greet(name: str) -> str:
    """Greets somebody.

    Args:
        name: Who it is.
    """
    return f"Hello, {name}!"
