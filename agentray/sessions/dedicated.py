"""A session with a Ray actor process to itself: the same runtime, one session, a name."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayError

from agentray.config.settings import Settings
from agentray.errors import NotReadyError
from agentray.events import AnyEvent, Message
from agentray.sessions.base import Cursor, StreamItem, TurnInfo
from agentray.sessions.calls import SessionCalls
from agentray.sessions.process import OwnerProcess
from agentray.telemetry.logging import configure_logging, get_logger

__all__ = ["NAMESPACE", "DedicatedSession", "actor_name", "launcher"]

log = get_logger(__name__)

NAMESPACE = "agentray"
_IDLE_POLL_S = 1.0
_STOP_S = 15.0


def actor_name(tenant: str, session_id: str) -> str:
    """Return the name of a dedicated session's actor."""
    return f"session/{session_id}" if tenant == "default" else f"session/{tenant}/{session_id}"


class DedicatedSession:
    """The Ray actor. Ray restarts it when it dies and calls again what was under way.

    A call is accepted with its Ray task id as the idempotency key: the second call of the same
    task finds the turn of the first. After ``sessions.idle_s`` without a call or a turn the
    actor gives its session up and ends; ``agentray.connect().session()`` starts it again.
    """

    def __init__(
        self, settings: Settings, simulator_url: str | None, tenant: str, session_id: str
    ) -> None:
        configure_logging(settings.log)
        self._settings = settings
        self._simulator_url = simulator_url
        self._tenant = tenant
        self._id = session_id
        self._lock = asyncio.Lock()
        self._process: OwnerProcess | None = None
        self._calls_running = 0
        self._idle: asyncio.Task[None] | None = None

    async def _ready(self) -> SessionCalls:
        async with self._lock:
            if self._process is None:
                process = OwnerProcess(
                    self._settings,
                    simulator_url=self._simulator_url,
                    placement="dedicated",
                    address=(
                        f"{cast(Any, ray).util.get_node_ip_address()}/"
                        f"{actor_name(self._tenant, self._id)}/{os.getpid()}"
                    ),
                    launch_dedicated=None,
                )
                await process.start()
                self._process = process
                self._idle = asyncio.get_running_loop().create_task(self._leave_when_idle())
        return SessionCalls(self._process.sessions)

    async def activate(self) -> None:
        """Take the session and run what waits in it."""
        await self._ready()
        assert self._process is not None
        await self._process.residents.activate((self._tenant, self._id))

    async def send(self, input: str | Sequence[Message], **how: Any) -> TurnInfo:
        """Accept a turn and return it when it is done."""
        async with self._call():
            return await (await self._ready()).send(self._id, input, **self._with_key(how))

    async def submit(self, input: str | Sequence[Message], **how: Any) -> TurnInfo:
        """Accept a turn and return at once."""
        async with self._call():
            return await (await self._ready()).submit(self._id, input, **self._with_key(how))

    async def stream(self, input: str | Sequence[Message], **how: Any) -> AsyncIterator[StreamItem]:
        """Accept a turn and yield its events and deltas."""
        async with self._call():
            calls = await self._ready()
            async for item in calls.stream(self._id, input, **self._with_key(how)):
                yield item

    async def follow(self, *, after: Cursor = Cursor(0)) -> AsyncIterator[StreamItem]:
        """Yield what comes after the cursor, endlessly."""
        async with self._call():
            calls = await self._ready()
            async for item in calls.follow(self._id, tenant=self._tenant, after=after):
                yield item

    async def events(self, *, after: int = 0, limit: int = 100) -> list[AnyEvent]:
        """Return events of the session's journal."""
        async with self._call():
            calls = await self._ready()
            return await calls.events(self._id, tenant=self._tenant, after=after, limit=limit)

    async def cancel(self, turn_id: str | None = None) -> list[str]:
        """Request the end of a turn, or of all that run or wait."""
        async with self._call():
            calls = await self._ready()
            return await calls.cancel(self._id, turn_id, tenant=self._tenant)

    def _with_key(self, how: dict[str, Any]) -> dict[str, Any]:
        key = how.get("idempotency_key") or f"ray:{_task_id()}"
        return {**how, "idempotency_key": key, "tenant": self._tenant}

    def _call(self) -> _Call:
        return _Call(self)

    async def _leave_when_idle(self) -> None:
        process = self._process
        assert process is not None
        key = (self._tenant, self._id)
        idle_s, quiet_s = self._settings.sessions.idle_s, 0.0
        while quiet_s < idle_s:
            await asyncio.sleep(_IDLE_POLL_S)
            actor = process.residents.peek(key)
            busy = self._calls_running or (actor is not None and actor.busy)
            quiet_s = 0.0 if busy else quiet_s + _IDLE_POLL_S
        try:
            async with asyncio.timeout(_STOP_S):
                await process.stop()
        except TimeoutError:
            # Whatever holds it: as long as this process lives nobody else can run the session.
            log.error("dedicated_session_stuck", session=self._id)
        log.info("dedicated_session_left", session=self._id)
        # Not exit_actor: this is no actor call. Without restart, or Ray would bring it back.
        own = cast(Any, ray.get_runtime_context()).current_actor
        await asyncio.to_thread(cast(Any, ray).kill, own, no_restart=True)


class _Call:
    """Counts a call as long as it runs."""

    def __init__(self, session: DedicatedSession) -> None:
        self._session = session

    async def __aenter__(self) -> None:
        self._session._calls_running += 1  # pyright: ignore[reportPrivateUsage]

    async def __aexit__(self, *_: object) -> None:
        self._session._calls_running -= 1  # pyright: ignore[reportPrivateUsage]


def _task_id() -> str:
    return str(cast(Any, ray.get_runtime_context()).get_task_id())


def launcher(
    settings: Settings, simulator_url: str | None
) -> Callable[[str, str], Awaitable[None]]:
    """Return a function that sees that a dedicated session's actor lives and has its session."""
    remote = cast(Any, ray).remote(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1_000
    )(DedicatedSession)

    def start(tenant: str, session_id: str) -> Any:
        actor = remote.options(
            name=actor_name(tenant, session_id),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
        ).remote(settings, simulator_url, tenant, session_id)
        return actor.activate.remote()

    async def launch(tenant: str, session_id: str) -> None:
        try:
            # Looking the name up blocks; the answer of the call itself is not waited for.
            activated = await asyncio.to_thread(start, tenant, session_id)
        except (RayError, ValueError) as error:
            raise NotReadyError(
                f"the process of session {session_id} could not be started: {error}"
            ) from error
        task = asyncio.ensure_future(_watch(activated, session_id))
        _watched.add(task)
        task.add_done_callback(_watched.discard)

    return launch


_watched: set[asyncio.Future[None]] = set()


async def _watch(activated: Any, session_id: str) -> None:
    try:
        await activated
    except RayError as error:
        log.warning("dedicated_activation_failed", session=session_id, error=str(error))
