"""The Ray actor that runs tool calls: a process with slots, on some node of the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from typing import Any, cast

import ray
from ray.exceptions import RayError

from agentray.clock import SystemClock
from agentray.config.settings import LogSettings
from agentray.config.worker_settings import ToolWorkersSettings
from agentray.errors import NotReadyError
from agentray.telemetry.logging import configure_logging, get_logger
from agentray.tools.location import Location
from agentray.tools.runner import OpenRunners
from agentray.tools.workplace import Workplace

__all__ = [
    "NAMESPACE",
    "SCHEDULER",
    "WORKER_PREFIX",
    "ToolWorker",
    "find_scheduler",
    "node_host",
    "replace_scheduler",
]

log = get_logger(__name__)

NAMESPACE = "agentray"
SCHEDULER = "agentray/tools"
WORKER_PREFIX = "agentray/tools/"

_FIND_S = 10.0
_CLOSE_S = 10.0


async def find_scheduler() -> Location:
    """Return where the scheduler listens; a ``Locate`` for processes of the cluster.

    Raises:
        NotReadyError: if it is not there now, or does not answer.
    """
    try:
        async with asyncio.timeout(_FIND_S):
            # Looking the name up blocks.
            actor = await asyncio.to_thread(
                cast(Any, ray).get_actor, SCHEDULER, namespace=NAMESPACE
            )
            return await actor.location.remote()
    except (RayError, ValueError, TimeoutError) as error:
        raise NotReadyError(f"the tool scheduler does not answer: {error}") from error


async def replace_scheduler() -> None:
    """Have the scheduler started anew, if its process hangs: Ray sees only those that end."""
    try:
        await find_scheduler()
    except NotReadyError as error:
        if not isinstance(error.__cause__, TimeoutError):
            return
        log.warning("tool_scheduler_hangs")
        with contextlib.suppress(RayError, ValueError):
            await asyncio.to_thread(_restart_scheduler)


def _restart_scheduler() -> None:
    untyped = cast(Any, ray)
    untyped.kill(untyped.get_actor(SCHEDULER, namespace=NAMESPACE), no_restart=False)


def node_host(alone: bool) -> str:
    """Return the address to listen at: loopback where everything is on this machine."""
    return "127.0.0.1" if alone else str(cast(Any, ray).util.get_node_ip_address())


class ToolWorker:
    """The actor. Ray starts it anew when its process dies; it registers with the scheduler."""

    def __init__(
        self,
        name: str,
        settings: ToolWorkersSettings,
        log_settings: LogSettings,
        open_runners: OpenRunners,
        alone: bool,
    ) -> None:
        configure_logging(log_settings)
        self._name = name
        self._slots = settings.slots
        self._open_runners = open_runners
        self._host = node_host(alone)
        self._workplace: Workplace | None = None
        self._work = asyncio.get_running_loop().create_task(self._run())
        self._work.add_done_callback(self._ended)

    async def _run(self) -> None:
        runners = await self._open_runners(self._slots)
        self._workplace = Workplace(
            *(self._name, self._host, secrets.token_urlsafe(32)),
            *(runners, find_scheduler, SystemClock()),
            replace=replace_scheduler,
        )
        await self._workplace.start()
        await self._workplace.run()

    def _ended(self, work: asyncio.Task[None]) -> None:
        if not work.cancelled():
            # What must run for ever has ended: Ray starts this process anew.
            log.error("tool_worker_failed", error=repr(work.exception()))
            os._exit(1)

    async def pid(self) -> int:
        """Return the id of the process."""
        return os.getpid()

    async def close(self) -> None:
        """End all calls and whatever the runners hold."""
        self._work.cancel()
        if self._workplace is not None:
            async with asyncio.timeout(_CLOSE_S):
                await self._workplace.close()
