"""The Ray actor that leases the slots of the tool workers, and starts and stops those."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.exceptions import RayError

from agentray.clock import SystemClock
from agentray.config.settings import LogSettings, Settings
from agentray.config.worker_settings import ToolWorkersSettings
from agentray.errors import NotReadyError
from agentray.telemetry.logging import configure_logging, get_logger
from agentray.tools.cost import Estimates, SlotShare
from agentray.tools.dispatch import Dispatch
from agentray.tools.fair_queue import FairQueue, Queue, Share
from agentray.tools.leases import Leases
from agentray.tools.location import Location
from agentray.tools.roster import Roster
from agentray.tools.runner import OpenRunners
from agentray.tools.scaling import Idle, Scaling
from agentray.tools.worker import (
    NAMESPACE,
    SCHEDULER,
    WORKER_PREFIX,
    ToolWorker,
    node_host,
)

__all__ = [
    "MakeQueue",
    "ToolScheduler",
    "end_pool",
    "fair_queue",
    "start_pool",
    "worker_names",
]

log = get_logger(__name__)

MakeQueue = Callable[[ToolWorkersSettings], Queue]

_SETTLE_S = 8.0
_SCALE_S = 1.0
_NODES_EVERY = 10
_POLL_S = 0.05
_CLOSE_S = 5.0


def fair_queue(settings: ToolWorkersSettings) -> Queue:
    """Return the queue that the settings ask for."""

    def share_of(tenant: str) -> Share:
        own = settings.tenants.get(tenant)
        if own is None:
            return Share(max_queued=settings.max_queued_per_tenant)
        most = own.max_queued or settings.max_queued_per_tenant
        return Share(own.weight, own.max_running, most)

    return FairQueue(share_of, max_queued=settings.max_queued)


class ToolScheduler:
    """The actor. Ray starts it anew when it dies: the workers, which it does not own, register
    again with what they run, and hosts ask again for what they wait for."""

    def __init__(
        self,
        settings: ToolWorkersSettings,
        log_settings: LogSettings,
        open_runners: OpenRunners,
        alone: bool,
        make_queue: MakeQueue,
        made_of: str = "",
    ) -> None:
        configure_logging(log_settings)
        self._made_of = made_of
        self._settings = settings
        self._log_settings = log_settings
        self._open_runners = open_runners
        self._alone = alone
        self._clock = SystemClock()
        self._host, self._token = node_host(alone), secrets.token_urlsafe(32)
        slot = SlotShare(settings.cpus / settings.slots, settings.memory_bytes / settings.slots)
        self._names = set(worker_names())
        roster = Roster(self._names, self._clock.monotonic(), settle_s=_SETTLE_S)
        # Leases of a scheduler before this one are told apart by their number.
        first_lease = secrets.randbits(31) << 32
        leases = Leases(make_queue(settings), Estimates(slot), slot, roster, first_lease + 1)
        self._dispatch = Dispatch(leases, self._host, self._token, self._clock)
        self._scaling = Scaling(settings)
        self._listening = asyncio.Event()
        self._work = asyncio.get_running_loop().create_task(self._run())
        self._work.add_done_callback(self._ended)

    async def _run(self) -> None:
        await self._dispatch.start()
        self._listening.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._dispatch.run())
            tasks.create_task(self._scale())

    def _ended(self, work: asyncio.Task[None]) -> None:
        # What must run for ever has ended: Ray starts this process anew.
        log.error("tool_scheduler_failed", error=repr(work.exception()))
        os._exit(1)

    async def location(self) -> Location:
        """Return where hosts and workers connect."""
        await self._listening.wait()
        return Location(self._host, self._dispatch.port, self._token)

    async def made_of(self) -> str:
        """Return the digest of the settings that the pool was started with."""
        return self._made_of

    async def pid(self) -> int:
        """Return the id of the process."""
        return os.getpid()

    async def workers(self) -> int:
        """Return how many workers are connected."""
        return self._dispatch.leases.state().workers

    async def _scale(self) -> None:
        nodes, turn = 1, 0
        leases = self._dispatch.leases
        while True:
            if turn % _NODES_EVERY == 0:
                nodes = await asyncio.to_thread(_node_count)
            turn += 1
            now = self._clock.monotonic()
            for worker in leases.roster.silent(now):
                # It hangs, and so would every call that it is given.
                log.warning("tool_worker_silent", worker=worker.id)
                await self._kill(worker.name, restart=True)
            workers = [
                Idle(worker.name, None if worker.leases else worker.idle_since)
                for worker in leases.roster.workers.values()
                if worker.connected and not worker.draining
            ]
            connected = {each.name for each in leases.roster.workers.values() if each.connected}
            for name in self._scaling.overdue(now, self._names, connected):
                log.warning("tool_worker_did_not_come", name=name)
                self._names.discard(name)
                await self._kill(name, restart=False)
            name = self._scaling.decide(
                now=now,
                nodes=nodes,
                started=len(self._names),
                workers=workers,
                wait_s=leases.queued_s(),
            )
            if name == "add":
                await self._add()
            elif name:
                await self._remove(name)
            await asyncio.sleep(_SCALE_S)

    async def _add(self) -> None:
        number = 1
        while (name := f"{WORKER_PREFIX}{number}") in self._names:
            number += 1
        settings = self._settings
        # Ray's object, made here: detached, so that it does not die with this process.
        start = (
            cast(Any, ray)
            .remote(ToolWorker)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=settings.cpus,
                memory=settings.memory_bytes,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=100,
                scheduling_strategy="SPREAD",
            )
        )
        arguments = (name, settings, self._log_settings, self._open_runners, self._alone)
        try:
            await asyncio.to_thread(start.remote, *arguments)
        except (RayError, ValueError) as error:
            log.warning("tool_worker_not_started", name=name, error=str(error))
            return
        self._names.add(name)
        log.info("tool_worker_added", name=name)

    async def _remove(self, name: str) -> None:
        for worker in self._dispatch.leases.roster.workers.values():
            if worker.name == name:
                # From here on it is given nothing; it has nothing now.
                worker.draining = True
        self._names.discard(name)
        log.info("tool_worker_removed", name=name)
        await self._kill(name, restart=False)

    async def _kill(self, name: str, *, restart: bool) -> None:
        with contextlib.suppress(RayError, ValueError):
            await asyncio.to_thread(_end_actor, name, restart)


def worker_names() -> list[str]:
    """Return the names of the actors of workers in the cluster. Blocks."""
    found: list[dict[str, str]] = cast(Any, ray).util.list_named_actors(all_namespaces=True)
    return [
        actor["name"]
        for actor in found
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(WORKER_PREFIX)
    ]


def _node_count() -> int:
    nodes: list[dict[str, Any]] = cast(Any, ray).nodes()
    return max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in nodes))


def _end_actor(name: str, restart: bool) -> None:
    untyped = cast(Any, ray)
    actor = untyped.get_actor(name, namespace=NAMESPACE)
    if not restart:
        untyped.wait([actor.close.remote()], timeout=_CLOSE_S)
    untyped.kill(actor, no_restart=not restart)


def start_pool(
    settings: Settings,
    open_runners: OpenRunners,
    *,
    alone: bool,
    timeout_s: float = 60.0,
    make_queue: MakeQueue = fair_queue,
    made_of: str = "",
) -> None:
    """Start the scheduler, which starts the workers; return when one is ready. Blocks.

    The process must be connected to the cluster. ``alone``: the cluster is this machine only. A
    pool that is there already stays as it is, unless it was ``made_of`` other settings.

    Raises:
        NotReadyError: if no worker is ready in time.
    """
    untyped = cast(Any, ray)
    ends_at = time.monotonic() + timeout_s
    _end_other_pool(made_of)
    scheduler = (
        untyped.remote(ToolScheduler)
        .options(
            name=SCHEDULER,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1_000,
        )
        .remote(settings.tools.workers, settings.log, open_runners, alone, make_queue, made_of)
    )
    try:
        while not untyped.get(
            scheduler.workers.remote(), timeout=max(0.1, ends_at - time.monotonic())
        ):
            if time.monotonic() >= ends_at:
                raise NotReadyError(
                    f"no tool worker is ready after {timeout_s:.0f} s; one takes "
                    f"{settings.tools.workers.cpus:g} cores and "
                    f"{settings.tools.workers.memory_bytes} bytes of memory of Ray's"
                )
            time.sleep(_POLL_S)
    except RayError as error:
        raise NotReadyError(f"the tool scheduler could not be started: {error}") from error


def _end_other_pool(made_of: str) -> None:
    """End a pool that has other settings: its workers would refuse what hosts offer."""
    untyped = cast(Any, ray)
    try:
        there = untyped.get_actor(SCHEDULER, namespace=NAMESPACE)
        if untyped.get(there.made_of.remote(), timeout=_CLOSE_S) == made_of:
            return
    except ValueError:
        return
    except RayError as error:
        log.warning("tool_pool_unknown", error=str(error))
    log.info("tool_pool_replaced")
    end_pool()


def end_pool() -> None:
    """End the scheduler and all workers, with what they run. Blocks."""
    untyped = cast(Any, ray)
    with contextlib.suppress(ValueError):
        untyped.kill(untyped.get_actor(SCHEDULER, namespace=NAMESPACE), no_restart=True)
    actors: list[Any] = []
    for name in worker_names():
        with contextlib.suppress(ValueError):
            actors.append(untyped.get_actor(name, namespace=NAMESPACE))
    closing = [actor.close.remote() for actor in actors]
    if closing:
        untyped.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
    for actor in actors:
        untyped.kill(actor, no_restart=True)
