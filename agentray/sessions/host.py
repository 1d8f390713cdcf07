"""A session host: a Ray Serve replica, hence a Ray actor, in which many sessions live."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import ray
from ray import serve

from agentray.config.settings import Settings
from agentray.events import AnyEvent, Message
from agentray.sessions.base import SessionInfo, StreamItem, TurnInfo
from agentray.sessions.calls import SessionCalls
from agentray.sessions.dedicated import launcher
from agentray.sessions.process import OwnerProcess
from agentray.telemetry.logging import configure_logging, get_logger
from agentray.tools.worker import find_scheduler

__all__ = ["DEPLOYMENT", "SessionHost"]

log = get_logger(__name__)

DEPLOYMENT = "SessionHost"
_DRAIN_POLL_S = 0.5
_COLLECT_AFTER = 10_000


class SessionHost:
    """The deployment. ``open_door`` serves the process's HTTP requests; ``is_draining`` tells
    that Serve stops this replica, which it does not tell user code by itself."""

    async def __init__(
        self,
        settings: Settings,
        models_url: str,
        open_door: Callable[[OwnerProcess], None],
        is_draining: Callable[[], Awaitable[bool]],
    ) -> None:
        configure_logging(settings.log)
        context = serve.get_replica_context()
        node_ip: str = cast(Any, ray).util.get_node_ip_address()
        self._is_draining = is_draining
        self._process = OwnerProcess(
            settings,
            models_url=models_url,
            placement="shared",
            address=f"{node_ip}/{context.replica_tag}/{os.getpid()}",
            launch_dedicated=launcher(settings, models_url),
            locate=find_scheduler,
            hint=context.replica_tag,
        )
        self._calls = SessionCalls(self._process.sessions)
        await self._process.start()
        open_door(self._process)
        self._watching = asyncio.get_running_loop().create_task(self._watch())
        _tune_collector()

    async def _watch(self) -> None:
        """Begin to drain as soon as Serve does; streams still reach us while it deregisters."""
        while not await self._is_draining():  # noqa: ASYNC110 - Serve offers no event
            await asyncio.sleep(_DRAIN_POLL_S)
        await self._process.drain()

    async def check_health(self) -> None:
        """Let Serve replace this replica when a part of it ended that must run for ever.

        Stores that are away are not its fault.
        """
        if (failure := self._process.failure) is not None:
            raise RuntimeError("a part of this session host ended") from failure

    async def __call__(self, request: Any) -> Any:
        # HTTP never comes here: the ingress hands it to the door.
        raise RuntimeError(f"no door for {request!r}")

    async def __del__(self) -> None:
        # Serve awaits this, but nothing before it for turns without a connection. Only the
        # polling is cancelled: the drain that it began goes on, and stop waits for its end.
        self._watching.cancel()
        await self._process.stop()

    # What Python handles call

    async def send(self, session_id: str, input: str | Sequence[Message], **how: Any) -> TurnInfo:
        """Accept a turn and return it when it is done."""
        return await self._calls.send(session_id, input, **how)

    async def stream(
        self, session_id: str, input: str | Sequence[Message], **how: Any
    ) -> AsyncIterator[StreamItem]:
        """Accept a turn and yield its events and deltas."""
        async for item in self._calls.stream(session_id, input, **how):
            yield item

    async def submit(self, session_id: str, input: str | Sequence[Message], **how: Any) -> TurnInfo:
        """Accept a turn and return at once."""
        return await self._calls.submit(session_id, input, **how)

    async def events(
        self, session_id: str, *, tenant: str = "default", after: int = 0, limit: int = 100
    ) -> list[AnyEvent]:
        """Return events of the session's journal."""
        return await self._calls.events(session_id, tenant=tenant, after=after, limit=limit)

    async def cancel(
        self, session_id: str, turn_id: str | None = None, *, tenant: str = "default"
    ) -> list[str]:
        """Request the end of a turn, or of all that run or wait."""
        return await self._calls.cancel(session_id, turn_id, tenant=tenant)

    async def activate(self, session_id: str, **how: Any) -> SessionInfo:
        """Make a session if there is none and, if it is dedicated, start its process."""
        info = await self._calls.ensure(session_id, **how)
        if info.placement == "dedicated":
            await self._process.launch(info.tenant, info.id)
        return info


def _tune_collector() -> None:
    """Let the garbage collector look seldom, and never at what was imported: Ray's and Serve's
    modules are hundreds of thousands of objects, and a turn makes hundreds that die young."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)
