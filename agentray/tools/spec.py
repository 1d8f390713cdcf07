"""What a tool is to a session: a name, a schema, and what a crash means for its calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec

__all__ = ["ToolOutcome", "ToolSpec", "Toolbox"]


class ToolOutcome(msgspec.Struct, frozen=True):
    """A settled call; its own failure is a result that the model is told."""

    status: Literal["ok", "error"]
    output: str


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool. ``run`` gets the decoded arguments and the call's idempotency key.

    ``on_crash`` decides what becomes of a call that had begun when its session's owner died:
    ``retry`` runs it again with the same idempotency key, ``report`` tells the model that the
    outcome is unknown.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[[dict[str, Any], str], Awaitable[str]]
    on_crash: Literal["retry", "report"] = "report"
    timeout_s: float = 60.0


class Toolbox:
    """The tools of a process, by name."""

    def __init__(self, specs: Iterable[ToolSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        # Asked for with every model call, and the same for each agent.
        self._wires: dict[tuple[str, ...], bytes | None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def get(self, name: str) -> ToolSpec | None:
        return self._specs.get(name)

    def on_crash(self, name: str) -> Literal["retry", "report"]:
        """Return what a crash means for a tool's calls; for an unknown tool, ``report``."""
        spec = self._specs.get(name)
        return spec.on_crash if spec else "report"

    def wire(self, names: Sequence[str]) -> bytes | None:
        """Return the elements of ``tools`` in a chat request as JSON, or None for no tools."""
        key = tuple(names)
        if key not in self._wires:
            self._wires[key] = self._encoded(key)
        return self._wires[key]

    def _encoded(self, names: Sequence[str]) -> bytes | None:
        found = [self._specs[name] for name in names if name in self._specs]
        if not found:
            return None
        return b",".join(
            msgspec.json.encode(
                {
                    "type": "function",
                    "function": {
                        "name": spec.name,
                        "description": spec.description,
                        "parameters": spec.parameters,
                    },
                }
            )
            for spec in found
        )
