"""What a tool is to a session: a name, a schema, quotas, and what a crash means for its calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec

from agentray.tools.sandbox.base import Limits, Program, Serve, Tier

__all__ = ["GROUP", "OnCrash", "ToolContext", "ToolResult", "ToolSpec", "Toolbox"]

OnCrash = Literal["retry", "report"]

GROUP = ".*"
"""The end of what stands for all tools of a group."""


class ToolContext(msgspec.Struct, frozen=True):
    """Whose call it is. ``idempotency_key`` is the same when a crash has it run again."""

    tenant: str
    session_id: str
    idempotency_key: str


class ToolResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """A settled call; its own failure is a result that the model is told.

    ``reason`` says in one word of the metrics why a call failed: timeout, memory, cpu, exit,
    signal, output, scratch, refused, upstream, invalid, error, failed, died, queue_full, expired.
    ``scratch`` is the tar of the files that a sandboxed program left. ``start`` is how its sandbox
    began (parked, warm, cold). ``cached``: another call's result.
    """

    status: Literal["ok", "error"]
    output: str
    reason: str = ""
    scratch: bytes | None = None
    start: str = ""
    cpu_s: float = 0.0
    memory_bytes: int = 0
    cached: bool = False


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool, run by one of two: ``run`` in a worker's own process, with the decoded arguments;
    ``program`` returns what a sandbox of ``tier`` runs.

    ``run`` raises ``ToolError`` with what the model is told, and with the ``reason`` of a
    ``ToolResult`` in its fields; what else it raises is an ``error`` by its name and message.

    ``here``: ``run`` is so small that the session's process runs it itself. ``on_crash`` decides
    what becomes of a call that had begun when its owner or worker died: ``retry`` runs it again
    with the same idempotency key, ``report`` tells the model that the outcome is unknown.
    ``cache_s``: results of equal calls of a tenant are shared for so long; ``version`` tells
    apart what another version computed. ``cpu`` (cores) is what a call is expected to use, for
    its cost while it is queued. ``keeps_scratch``: files of the session are there and are kept.
    ``operator``: the program is the operator's own, and sees the libraries that this process sees.
    ``network`` returns, for a tenant's program and as long as it may run, what serves its way out;
    without it there is none.
    ``context_argument`` is the argument that the call's ``ToolContext`` comes under, whatever the
    model says; none if it is empty.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[[dict[str, Any], ToolContext], Awaitable[str]] | None = None
    program: Callable[[dict[str, Any]], Program] | None = None
    here: bool = False
    on_crash: OnCrash = "report"
    timeout_s: float = 60.0
    cache_s: float = 0.0
    version: str = "1"
    tier: Tier = "jail"
    limits: Limits = Limits()
    cpu: float = 1.0
    keeps_scratch: bool = False
    operator: bool = False
    network: Callable[[str, float], Serve] | None = None
    context_argument: str = ""


class Toolbox:
    """The tools of a process, by name, and what has to be closed with them.

    Where the tools of an agent are said, ``GROUP.*`` stands for all whose name begins with
    ``GROUP__``: an OpenAPI document's, an MCP server's.
    """

    def __init__(
        self,
        specs: Iterable[ToolSpec],
        *,
        closers: Iterable[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._closers = list(closers)
        # Asked for with every model call, and the same for each agent.
        self._wires: dict[tuple[str, ...], bytes | None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(self._specs.values())

    def get(self, name: str) -> ToolSpec | None:
        return self._specs.get(name)

    def put(self, specs: Iterable[ToolSpec], *, instead_of: Iterable[str] = ()) -> None:
        """Add tools, or have them in the place of others: those of a server that changed."""
        for name in instead_of:
            self._specs.pop(name, None)
        self._specs.update({spec.name: spec for spec in specs})
        self._wires.clear()

    def offered(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the tools that an agent has, where it names these."""
        found: dict[str, None] = {}
        for name in names:
            if name.endswith(GROUP):
                prefix = name.removesuffix(GROUP) + "__"
                found.update(dict.fromkeys(own for own in self._specs if own.startswith(prefix)))
            elif name in self._specs:
                found[name] = None
        return tuple(found)

    def offers(self, names: Iterable[str], name: str) -> bool:
        """Return whether a tool is one of those that an agent has, where it names these."""
        return name in self._specs and any(
            name == said or (said.endswith(GROUP) and name.startswith(said[: -len(GROUP)] + "__"))
            for said in names
        )

    async def close(self) -> None:
        """Close what the tools had open, the last that was opened first."""
        while self._closers:
            await self._closers.pop()()

    def on_crash(self, name: str) -> OnCrash:
        """Return what a crash means for a tool's calls; for an unknown tool, ``report``."""
        spec = self._specs.get(name)
        return spec.on_crash if spec else "report"

    def wire(self, names: Sequence[str]) -> bytes | None:
        """Return the elements of ``tools`` in a chat request as JSON, or None for no tools.

        ``names`` are those that an agent has, with groups.
        """
        key = tuple(names)
        if key not in self._wires:
            self._wires[key] = self._encoded(key)
        return self._wires[key]

    def _encoded(self, names: Sequence[str]) -> bytes | None:
        found = [self._specs[name] for name in self.offered(names)]
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
