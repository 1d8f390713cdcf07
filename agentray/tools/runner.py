"""What a worker is given: a call as it was asked for, and runners that carry calls out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

import msgspec

from agentray.tools.spec import OnCrash, ToolResult

__all__ = ["Ask", "OpenRunners", "Priority", "Runner"]

Priority = Literal["interactive", "background", "batch"]
"""How urgent a call is. Each class has its share while others wait too, so none starves."""


class Ask(msgspec.Struct, frozen=True):
    """A call of a tool.

    ``call_key`` is its idempotency key within the session: a call that is asked for again with
    the same key is the same call, and is not run twice while its result is known. ``epoch`` is
    that of the session's owner; calls of older epochs are fenced. ``arguments`` is JSON.

    ``timeout_s`` bounds its run. ``deadline`` is a time of the wall clock: one that still waits
    for a slot then is dropped; 0 for none. ``cpu`` (cores) and ``memory_bytes`` are what it is
    expected to take, for its cost before anything is known of the tool. ``scratch`` is the tar of
    the files that it finds.
    """

    tenant: str
    session_id: str
    epoch: int
    call_key: str
    tool: str
    arguments: bytes = b"{}"
    timeout_s: float = 60.0
    deadline: float = 0.0
    priority: Priority = "interactive"
    cpu: float = 0.0
    memory_bytes: int = 0
    scratch: bytes = b""
    on_crash: OnCrash = "report"

    @property
    def key(self) -> str:
        """The call's name among those of all tenants and sessions."""
        # Neither a tenant's name nor a session's id can hold this separator.
        return f"{self.tenant}\0{self.session_id}\0{self.call_key}"


class Runner(Protocol):
    """A slot of a worker: runs one call at a time."""

    async def run(self, call: Ask) -> ToolResult:
        """Run a call to its end or its limits. Whatever the tool does is a result.

        Cancelling ends whatever runs before ``CancelledError`` goes on; the runner can be used
        again then.
        """
        ...

    async def close(self) -> None:
        """End whatever runs and give everything back."""
        ...


OpenRunners = Callable[[int], Awaitable[Sequence[Runner]]]
"""Opens so many runners, in the worker's process; picklable, as it is sent there."""
