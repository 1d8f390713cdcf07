"""Run the tool calls of a step: what is small here, the rest in the pool of tool workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from agentray.agents.spec import Agents
from agentray.clock import Clock
from agentray.errors import AgentRayError, StorageError, ToolError
from agentray.events import ToolCall
from agentray.models.checks import arguments_problem
from agentray.sessions.actor import SessionActor
from agentray.sessions.base import WaitingCall
from agentray.storage.base import ScratchStore, WaitingStore
from agentray.telemetry.logging import get_logger
from agentray.tools.client import OnQueued
from agentray.tools.runner import Ask, Priority
from agentray.tools.spec import Toolbox, ToolContext, ToolResult, ToolSpec

__all__ = ["SharedResults", "ToolCalls", "ToolPool"]

log = get_logger(__name__)

# A session's files are kept in memory up to this size: most have none, or few.
_REMEMBERED_BYTES = 64 * 1024
_KEEP_S = 30.0
_AGAIN_S = 0.2


class ToolPool(Protocol):
    """The pool of tool workers: see ``ToolClient``."""

    async def call(
        self,
        ask: Ask,
        *,
        on_queued: OnQueued | None = None,
        on_granted: Callable[[], None] | None = None,
    ) -> ToolResult: ...

    async def fence(self, tenant: str, session_id: str, epoch: int) -> None: ...


class SharedResults(Protocol):
    """Results that equal calls share: see ``ResultCache``."""

    async def get(
        self,
        spec: ToolSpec,
        tenant: str,
        arguments: dict[str, Any],
        run: Callable[[], Awaitable[ToolResult]],
    ) -> ToolResult: ...


class ToolCalls:
    """Runs tool calls for the sessions of this process; what a tool does is always a result.

    Calls that are given the same ``files`` lock see the session's files one after another.
    """

    def __init__(
        self,
        *,
        tools: Toolbox,
        agents: Agents,
        pool: ToolPool | None,
        scratch: ScratchStore,
        waiting: WaitingStore,
        clock: Clock,
        queue_s: float,
    ) -> None:
        self._tools = tools
        self._agents = agents
        self._pool = pool
        self.shared: SharedResults | None = None
        """Where results are shared, if any tool has its results shared."""
        self._scratch = scratch
        self._waiting = waiting
        self._clock = clock
        self._queue_s = queue_s

    async def fence(self, actor: SessionActor) -> None:
        """End what earlier owners of a session had begun: nothing of it may take effect later."""
        if self._pool is None:
            return
        try:
            await self._pool.fence(actor.tenant, actor.id, actor.epoch)
        except ToolError as error:
            # Calls of this epoch end those of older ones wherever they meet them.
            log.warning("fence_failed", session=actor.id, error=error.message)

    async def run(
        self, actor: SessionActor, call: ToolCall, key: str, seq: int, files: asyncio.Lock
    ) -> ToolResult:
        """Run one call: ``key`` is its idempotency key, ``seq`` is of its first ``tool.called``."""
        spec = self._tools.get(call.name)
        if spec is None or not self._tools.offers(self._agents.get(actor.agent).tools, call.name):
            return _refused(f"There is no tool {call.name!r}.")
        if (problem := arguments_problem(call, spec.parameters)) is not None:
            return _refused(f"Not run: {problem}.", "invalid")
        if spec.here:
            return await self._run_here(spec, call, ToolContext(actor.tenant, actor.id, key))
        if self._pool is None:
            return _refused("Not run: there are no tool workers.", "failed")
        try:
            if spec.keeps_scratch:
                async with files:
                    return await self._run_on_files(self._pool, actor, spec, call, key, seq)
            ask, pool = self._ask(actor, spec, call, key), self._pool
            if spec.cache_s and self.shared is not None:
                arguments = msgspec.json.decode(ask.arguments, type=dict[str, Any])
                return await self.shared.get(
                    spec, actor.tenant, arguments, lambda: self._in_pool(pool, call, ask)
                )
            return await self._in_pool(pool, call, ask)
        except AgentRayError as error:
            log.warning("tool_not_run", tool=call.name, code=error.code, error=error.message)
            return ToolResult("error", f"Not run: {error.message}.", "failed")

    async def _run_here(self, spec: ToolSpec, call: ToolCall, context: ToolContext) -> ToolResult:
        if spec.run is None:
            raise AssertionError(f"{spec.name} cannot run here")
        arguments = msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
        deadline = asyncio.timeout(spec.timeout_s)
        try:
            async with deadline:
                return ToolResult("ok", await spec.run(arguments, context))
        except Exception as error:  # noqa: BLE001 - its own failure is a result for the model
            log.info("tool_failed", tool=call.name, error=type(error).__name__)
            if deadline.expired():
                said = f"The tool took longer than {spec.timeout_s:g} s."
                return ToolResult("error", said, "timeout")
            return ToolResult("error", f"{type(error).__name__}: {error}", "error")

    async def _run_on_files(
        self,
        pool: ToolPool,
        actor: SessionActor,
        spec: ToolSpec,
        call: ToolCall,
        key: str,
        seq: int,
    ) -> ToolResult:
        """Run a call in the session's working directory, and keep what it leaves there."""
        found = await self._files(actor, seq)
        result = await self._in_pool(pool, call, self._ask(actor, spec, call, key, found))
        left, output = result.scratch, result.output
        if left is not None and left != found and not await self._keep(actor, seq, left):
            output += "\n[its files could not be kept]"
        return msgspec.structs.replace(result, output=output, scratch=None)

    async def _keep(self, actor: SessionActor, seq: int, left: bytes) -> bool:
        """Keep the files of a call that ran; its result stands whatever becomes of them."""
        gives_up_at = self._clock.monotonic() + _KEEP_S
        while True:
            try:
                kept = await self._scratch.write_scratch(
                    actor.tenant, actor.id, epoch=actor.epoch, seq=seq, body=left
                )
            except StorageError as error:
                log.warning("files_not_kept", session=actor.id, error=error.message)
                if not error.retryable or self._clock.monotonic() >= gives_up_at:
                    actor.files = None
                    return False
                await asyncio.sleep(_AGAIN_S)
                continue
            if kept:
                actor.files = (seq, left) if len(left) <= _REMEMBERED_BYTES else None
            # Else another process owns the session: what this one says of it counts no more.
            return True

    async def _in_pool(self, pool: ToolPool, call: ToolCall, ask: Ask) -> ToolResult:
        """Run a call in the pool; where it waits is to be seen until it has a slot."""
        told = _Told(self._waiting, ask, call, self._clock)
        try:
            return await pool.call(ask, on_queued=told.queued, on_granted=told.granted)
        finally:
            told.granted()
            await told.written()

    async def _files(self, actor: SessionActor, seq: int) -> bytes:
        """Return what the call in front of ``seq`` left."""
        if actor.files is not None and actor.files[0] < seq:
            return actor.files[1]
        found = await self._scratch.read_scratch(actor.tenant, actor.id, before_seq=seq) or b""
        if len(found) <= _REMEMBERED_BYTES:
            actor.files = (seq - 1, found)
        return found

    def _ask(
        self, actor: SessionActor, spec: ToolSpec, call: ToolCall, key: str, scratch: bytes = b""
    ) -> Ask:
        priority: Priority = "background" if actor.turn.options.background else "interactive"
        return Ask(
            tenant=actor.tenant,
            session_id=actor.id,
            epoch=actor.epoch,
            call_key=key,
            tool=spec.name,
            arguments=(call.arguments or "{}").encode(),
            timeout_s=spec.timeout_s,
            deadline=self._clock.now() + self._queue_s,
            priority=priority,
            cpu=spec.cpu,
            memory_bytes=spec.limits.memory_bytes if spec.program is not None else 0,
            scratch=scratch,
            on_crash=spec.on_crash,
        )


class _Told:
    """What the store is told of a call that waits: its newest place, until it has a slot."""

    def __init__(self, store: WaitingStore, ask: Ask, call: ToolCall, clock: Clock) -> None:
        self._store = store
        self._ask = ask
        self._call = call
        self._clock = clock
        self._place: WaitingCall | None = None
        self._writing: asyncio.Task[None] | None = None

    def queued(self, position: int, wait_s: float) -> None:
        call, now = self._call, self._clock.now()
        self._place = WaitingCall(call.call_id, call.name, position, wait_s, now)
        self._write()

    def granted(self) -> None:
        if self._place is not None:
            self._place = None
            self._write()

    async def written(self) -> None:
        """Return when the store has it all."""
        if self._writing is not None:
            await self._writing

    def _write(self) -> None:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write_newest())

    async def _write_newest(self) -> None:
        while True:
            place = self._place
            body = None if place is None else msgspec.json.encode(place)
            ask = self._ask
            await self._store.put_waiting(ask.tenant, ask.session_id, self._call.call_id, body)
            if self._place is place:
                return


def _refused(said: str, reason: str = "refused") -> ToolResult:
    return ToolResult("error", said, reason)
