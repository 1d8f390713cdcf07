"""A session with a Ray actor process to itself: the same runtime, one session, a name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayError

from agentray.config.settings import Settings
from agentray.errors import BackpressureError, NotReadyError
from agentray.events import AnyEvent, Message
from agentray.sessions.base import Cursor, StreamItem, TurnInfo
from agentray.sessions.calls import SessionCalls
from agentray.sessions.process import OwnerProcess
from agentray.telemetry.logging import configure_logging, get_logger
from agentray.tools.worker import find_scheduler

__all__ = ["NAMESPACE", "DedicatedSession", "actor_name", "end_all", "launcher"]

log = get_logger(__name__)

NAMESPACE = "agentray"
_PREFIX = "session/"
_IDLE_POLL_S = 1.0
_END_POLL_S = 0.1
_STOP_S = 15.0
# Calls whose turn has ended get their answer; then answers get out of the process.
_ANSWER_S = 1.0
_GOODBYE_S = 0.5
_RETRY_S = 5


def actor_name(tenant: str, session_id: str) -> str:
    """Return the name of a dedicated session's actor."""
    return f"{_PREFIX}{session_id}" if tenant == "default" else f"{_PREFIX}{tenant}/{session_id}"


class DedicatedSession:
    """The Ray actor. Ray restarts it when it dies and calls again what was under way.

    A call is accepted with its Ray task id as the idempotency key: the second call of the same
    task finds the turn of the first. After ``sessions.idle_s`` without a call or a turn the
    actor gives its session up and ends; ``agentray.connect().session()`` starts it again.

    Once it begins to leave, calls raise ``NotReadyError`` before they accept anything; one that
    is under way and whose turn does not end in time raises it too.
    """

    def __init__(self, settings: Settings, models_url: str, tenant: str, session_id: str) -> None:
        configure_logging(settings.log)
        self._settings = settings
        self._models_url = models_url
        self._tenant = tenant
        self._id = session_id
        self._lock = asyncio.Lock()
        self._process: OwnerProcess | None = None
        self._calls: set[_Call] = set()
        self._idle: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._exiting: asyncio.Task[None] | None = None

    async def _ready(self) -> SessionCalls:
        async with self._lock:
            if self._process is None and self._leaving is None:
                process = OwnerProcess(
                    self._settings,
                    models_url=self._models_url,
                    placement="dedicated",
                    address=(
                        f"{cast(Any, ray).util.get_node_ip_address()}/"
                        f"{actor_name(self._tenant, self._id)}/{os.getpid()}"
                    ),
                    launch_dedicated=None,
                    locate=find_scheduler,
                )
                await process.start()
                self._process = process
                self._idle = asyncio.get_running_loop().create_task(self._leave_when_idle())
        if self._process is None or self._leaving is not None:
            raise self.left()
        return SessionCalls(self._process.sessions)

    @property
    def is_leaving(self) -> bool:
        return self._leaving is not None

    def left(self) -> NotReadyError:
        """Return what calls of a session get that leaves this process."""
        return NotReadyError(
            f"the process of session {self._id} stops; a turn that it accepted goes on elsewhere",
            retry_after_s=1,
        )

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

    async def drain(self) -> None:
        """Let the running turn end, for at most ``sessions.drain_s``, and give the session up.

        Nothing is accepted from here on, and this process ends soon after.
        """
        # Whoever calls may go: it is left all the same.
        await asyncio.shield(self._leave())

    def _leave(self) -> asyncio.Task[None]:
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(self._give_up())
        return self._leaving

    async def _give_up(self) -> None:
        try:
            async with asyncio.timeout(self._settings.sessions.drain_s + _STOP_S):
                async with self._lock:
                    process = self._process
                if process is not None:
                    await process.drain()
                    await self._end_calls()
                    await process.stop()
        except TimeoutError:
            # Whatever holds it: as long as this process lives nobody else can run the session.
            log.error("dedicated_session_stuck", session=self._id)
        except Exception as error:  # the outer wall: the process must end
            log.exception("dedicated_stop_failed", error=type(error).__name__)
        log.info("dedicated_session_left", session=self._id)
        self._exiting = asyncio.get_running_loop().create_task(_exit())

    async def _end_calls(self) -> None:
        if tasks := {call.task for call in self._calls}:
            _, left = await asyncio.wait(tasks, timeout=_ANSWER_S)
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=_ANSWER_S)

    def _with_key(self, how: dict[str, Any]) -> dict[str, Any]:
        key = how.get("idempotency_key") or f"ray:{_task_id()}"
        return {**how, "idempotency_key": key, "tenant": self._tenant}

    def _call(self) -> _Call:
        return _Call(self, self._calls)

    async def _leave_when_idle(self) -> None:
        process = self._process
        assert process is not None
        key = (self._tenant, self._id)
        idle_s, quiet_s = self._settings.sessions.idle_s, 0.0
        while quiet_s < idle_s:
            await asyncio.sleep(_IDLE_POLL_S)
            actor = process.residents.peek(key)
            busy = self._calls or (actor is not None and actor.busy)
            quiet_s = 0.0 if busy else quiet_s + _IDLE_POLL_S
        # Nothing runs between the last look and this: no call is accepted in between.
        self._leave()


class _Call:
    """A call as long as it runs."""

    def __init__(self, session: DedicatedSession, calls: set[_Call]) -> None:
        self._session = session
        self._calls = calls

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[Any] = task
        self._calls.add(self)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._calls.discard(self)
        if kind is asyncio.CancelledError and self._session.is_leaving:
            raise self._session.left()


async def _exit() -> None:
    await asyncio.sleep(_GOODBYE_S)
    # Not exit_actor: this is no actor call. Without restart, or Ray would bring it back.
    own = cast(Any, ray.get_runtime_context()).current_actor
    await asyncio.to_thread(cast(Any, ray).kill, own, no_restart=True)


def _task_id() -> str:
    return str(cast(Any, ray.get_runtime_context()).get_task_id())


def _active() -> list[str]:
    """Return the names of the actors of dedicated sessions in the cluster. Blocks."""
    found: list[dict[str, str]] = cast(Any, ray).util.list_named_actors(all_namespaces=True)
    return [
        actor["name"]
        for actor in found
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_PREFIX)
    ]


def end_all(*, timeout_s: float) -> None:
    """Let every dedicated session of the cluster drain, and end its process. Blocks.

    What has not drained within the time is killed; its turns are left to recovery.
    """
    untyped = cast(Any, ray)
    deadline = time.monotonic() + timeout_s
    while (names := _active()) and (left_s := deadline - time.monotonic()) > 0:
        actors: list[Any] = []
        for name in names:
            with contextlib.suppress(ValueError):
                actors.append(untyped.get_actor(name, namespace=NAMESPACE))
        drained = [actor.drain.remote() for actor in actors]
        if drained:
            untyped.wait(drained, num_returns=len(drained), timeout=left_s)
        for actor in actors:
            untyped.kill(actor, no_restart=True)
        time.sleep(_END_POLL_S)


def launcher(settings: Settings, models_url: str) -> Callable[[str, str], Awaitable[None]]:
    """Return a function that sees that a dedicated session's actor lives and has its session."""
    remote = cast(Any, ray).remote(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1_000
    )(DedicatedSession)

    # One after the other: each counts those before it. Hosts that launch at the same moment may
    # exceed the limit by one each.
    launching = asyncio.Lock()

    def find(name: str) -> Any:
        try:
            return cast(Any, ray).get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None

    def start(tenant: str, session_id: str) -> Any:
        name = actor_name(tenant, session_id)
        actor = find(name)
        if actor is None:
            most = settings.sessions.max_dedicated
            if len(_active()) >= most:
                raise BackpressureError(
                    f"{most} dedicated sessions are active, which is all that may be",
                    retry_after_s=_RETRY_S,
                )
            actor = remote.options(
                name=name, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
            ).remote(settings, models_url, tenant, session_id)
        return actor.activate.remote()

    async def launch(tenant: str, session_id: str) -> None:
        try:
            # Looking the name up blocks; the answer of the call itself is not waited for.
            async with launching:
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
