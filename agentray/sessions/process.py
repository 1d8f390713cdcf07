"""Put an owner process together: stores, heartbeat, residents, recovery, and the way out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, cast

import msgspec

from agentray.agents.spec import Agents
from agentray.clock import Clock, SystemClock
from agentray.config.settings import Settings
from agentray.errors import AgentRayError
from agentray.models.cache import ResponseCache
from agentray.models.calls import ModelCalls
from agentray.models.catalog import Catalog
from agentray.models.client import ModelClient
from agentray.models.completions import Completions
from agentray.models.embeddings import Embeddings
from agentray.models.router import Router
from agentray.models.serving import ServedModels
from agentray.sessions.base import Placement
from agentray.sessions.drain import drain
from agentray.sessions.following import Following
from agentray.sessions.journal import Journal
from agentray.sessions.owner_tools import OwnerTools
from agentray.sessions.ownership import Ownership
from agentray.sessions.patience import PatientModels
from agentray.sessions.recovery import Recovery
from agentray.sessions.residents import Key, Residents
from agentray.sessions.runtime import SessionRuntime
from agentray.sessions.service import SessionService
from agentray.sessions.state import Rules
from agentray.sessions.stream import Hub, TailWriter, WireMessage
from agentray.storage.postgres import PostgresStore
from agentray.storage.redis import RedisStore
from agentray.storage.redis_answers import RedisAnswers
from agentray.telemetry.exposition import Exposition
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics
from agentray.tools.location import Locate

__all__ = ["OwnerProcess"]

log = get_logger(__name__)

_CANCEL_AGAIN_S = 0.5

_messages = msgspec.json.Decoder(WireMessage)


class OwnerProcess:
    """Everything of one owner: a session host, or the process of a dedicated session."""

    def __init__(
        self,
        settings: Settings,
        *,
        models_url: str,
        placement: Placement,
        address: str,
        launch_dedicated: Callable[[str, str], Awaitable[None]] | None,
        locate: Locate | None = None,
        hint: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        if settings.postgres.url is None or settings.redis.url is None:
            raise ValueError("an owner process needs the addresses of PostgreSQL and Redis")
        clock = clock or SystemClock()
        sessions = settings.sessions
        self.settings = settings
        self.metrics = Metrics()
        self.catalog = Catalog(settings.models, models_url)
        self._client = ModelClient(self.catalog, settings.models)
        # A process for each dedicated session would ask Serve's one controller too often; there, a
        # model that does not answer is found out by calling it.
        self._served = ServedModels(settings.models) if placement == "shared" else None
        self.router = Router(
            self.catalog,
            settings.models,
            clock=clock,
            metrics=self.metrics,
            served_health=self._served.health if self._served is not None else None,
        )
        self.store = PostgresStore(
            settings.postgres.url.get_secret_value(), settings.postgres, term_s=sessions.term_s
        )
        self.redis = RedisStore(
            settings.redis.url.get_secret_value(),
            settings.redis,
            window_turns=sessions.window_turns,
            clock=clock,
        )
        self.ownership = Ownership(self.store, sessions, clock, kind=placement, address=address)
        self.agents = Agents(settings.agents)
        self._tails = TailWriter(self.redis, self.ownership.confirm)
        self._journal = Journal(self.store)
        self._hubs: dict[Key, Hub] = {}
        self._hint = hint
        self.tools = OwnerTools(
            settings,
            owner_id=self.ownership.owner_id,
            agents=self.agents,
            locate=locate,
            scratch=self.store.scratch,
            waiting=self.redis,
            clock=clock,
            metrics=self.metrics,
        )
        self._answers = RedisAnswers(
            settings.redis.url.get_secret_value(),
            settings.redis,
            settings.models.cache,
            clock=clock,
        )
        self._cache = ResponseCache(
            self._answers,
            settings.models.cache,
            clock,
            self.metrics,
            owner=self.ownership.owner_id,
        )
        patient = PatientModels(self._client, clock)
        self.completions = Completions(self.router, self._client, settings.models, self._cache)
        self.embeddings = Embeddings(self.router, self._client, settings.models)
        runtime = SessionRuntime(
            owner_id=self.ownership.owner_id,
            journal=self._journal,
            hot=self.redis,
            wire=self.redis,
            tails=self._tails,
            confirm=self.ownership.confirm,
            router=self.router,
            models=ModelCalls(self.router, patient, settings.models, self._cache),
            agents=self.agents,
            tools=self.tools.box,
            tool_calls=self.tools.calls,
            clock=clock,
            metrics=self.metrics,
        )
        self.residents = Residents(
            store=self.store,
            hot=self.redis,
            runtime=runtime,
            ownership=self.ownership,
            settings=sessions,
            placement=placement,
            rules=self._rules,
            hubs=self._hubs,
            clock=clock,
            metrics=self.metrics,
        )
        self.following = Following(
            store=self.store,
            tails=self._tails,
            owner_id=self.ownership.owner_id,
            hubs=self._hubs,
            clock=clock,
        )
        self.sessions = SessionService(
            store=self.store,
            scratch=self.store.scratch,
            waiting=self.redis,
            hot=self.redis,
            wire=self.redis,
            ownership=self.ownership,
            residents=self.residents,
            following=self.following,
            tails=self._tails,
            agents=self.agents,
            check_model=self.catalog.resolve,
            settings=sessions,
            clock=clock,
            launch_dedicated=launch_dedicated or _cannot_launch,
        )
        self._stopped = False
        self._recovery = Recovery(
            store=self.store,
            ownership=self.ownership,
            residents=self.residents,
            settings=sessions,
            launch_dedicated=launch_dedicated,
        )
        self.ownership.verify = self.residents.verify
        self.residents.on_claim = self._claimed
        self._exposition = Exposition(
            self.metrics.registry,
            self.ownership.owner_id,
            self.redis,
            self._observe,
            # Processes of dedicated sessions come and go by the thousand.
            keep_counts_s=86_400.0 if placement == "shared" else 3_600.0,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self.failure: BaseException | None = None
        """What ended a part that must run for ever: this process is to be replaced."""
        self._beside: set[asyncio.Task[None]] = set()
        self.launch = launch_dedicated or _cannot_launch
        self.stopping = asyncio.Event()
        """Set when this process begins to drain: endless streams end with a cursor."""
        self._draining: asyncio.Task[None] | None = None

    def _rules(self, agent: str) -> Rules:
        sessions = self.settings.sessions
        return Rules(
            window_turns=sessions.window_turns,
            max_steps=self.agents.get(agent).max_steps,
            model_attempts=self.settings.models.attempts,
            recovery_attempts=sessions.recovery_attempts,
            step_timeout_s=self.settings.models.step_timeout_s,
            step_cost_cap=self.settings.models.routing.step_cost_cap,
            session_budget=self.settings.models.routing.session_budget,
        )

    async def start(self) -> None:
        """Connect and begin to own sessions.

        Raises:
            StorageUnavailableError: PostgreSQL cannot be reached.
            ConfigError: the settings of tools cannot be used.
        """
        await self.tools.start()
        if self.tools.lists:
            self._run_beside(self.tools.run())
            # Turns that are taken over may be in the middle of a call of such a tool.
            await self.tools.known()
        await self.store.open()
        await self.ownership.beat()
        for loop_body in (
            self.ownership.run(),
            self._recovery.run(),
            self._listen(),
            self._exposition.run(),
            *([self._served.run()] if self._served is not None else []),
        ):
            self._run_beside(loop_body)
        log.info("owner_started", owner=self.ownership.owner_id)

    def _run_beside(self, loop_body: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(loop_body)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("owner_task_ended", error=repr(error))
            self.failure = error

    def attach(
        self, run: Coroutine[Any, Any, None], *closers: Callable[[], Awaitable[None]]
    ) -> None:
        """Run something for as long as this process runs; ``closers`` are called, in order, when
        it was cancelled. If it ends by itself, the process is to be replaced."""
        self._run_beside(run)
        self._closers += closers

    async def drain(self) -> None:
        """End endless streams and release sessions as their turns end; nothing is taken over.

        What still runs after ``sessions.drain_s`` is left to recovery by others. There is one
        drain, and every caller waits for its end; cancelling a caller does not cancel it.
        """
        self.stopping.set()
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(
                drain(self.residents, self.store, timeout_s=self.settings.sessions.drain_s)
            )
        await asyncio.shield(self._draining)

    async def stop(self) -> None:
        """Drain, say goodbye and close everything."""
        if self._stopped:
            return
        self._stopped = True
        await self.drain()
        left = set(self._tasks)
        while left:
            # Again and again: the pool's wait_for loses a cancellation when the connection that
            # it waits for comes at the same moment (Python 3.11).
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)
        for close in self._closers:
            await close()
        await self.tools.close()
        await self._journal.stop()
        await self._tails.stop()
        await self.following.close()
        await self.ownership.leave()
        await self._cache.close()
        await self._answers.close()
        await self.redis.close()
        await self._client.close()
        await self.store.close()
        log.info("owner_stopped", owner=self.ownership.owner_id)

    async def metrics_page(self) -> bytes:
        """Return the metrics of all hosts together, in Prometheus' text format."""
        return await self._exposition.page()

    def _claimed(self, key: Key) -> None:
        if self._hint is not None:
            self._keep(self.redis.hint_owner(key[0], key[1], self._hint))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside; it handles its own errors."""
        task = asyncio.get_running_loop().create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def _observe(self) -> None:
        self.metrics.resident.set(len(self.residents))
        self.metrics.running.set(self.residents.running)
        self.metrics.cache_failures.set(self.redis.failures + self._answers.failures)

    async def _listen(self) -> None:
        async with contextlib.aclosing(
            cast("AsyncGenerator[bytes]", self.redis.listen(self.ownership.owner_id))
        ) as messages:
            async for body in messages:
                try:
                    await self._receive(_messages.decode(body))
                except Exception as error:  # the outer wall: one message must not end the rest
                    log.exception("wire_message_failed", error=type(error).__name__)

    async def _receive(self, message: WireMessage) -> None:
        key = (message.tenant, message.session_id)
        if message.kind == "live":
            self.following.receive(message)
            return
        actor = self.residents.find(key)
        if actor is None:
            return
        if message.kind == "deleted":
            self.residents.lose(actor)
            # A copy that was on its way here may have come behind the deletion.
            self.redis.drop(*key)
            return
        if message.sender:
            hub = self._hubs.setdefault(key, Hub(actor.state.seq))
            hub.local = True
            self.following.add_follower(hub, message.sender)
            if message.kind == "follow":
                self._tails.send([message.sender], hub.snapshot(*key))
        if message.kind == "wake":
            if message.sender:
                self.residents.came_through(actor, message.sender)
            if message.turn is None or not self.residents.deliver(
                actor, message.epoch, message.inbox, message.turn
            ):
                # Beside the others: a query for each would hold up all that comes behind.
                self._keep(self._look(key))

    async def _look(self, key: Key) -> None:
        try:
            await self.residents.look_into_inbox(key)
        except AgentRayError as error:
            log.warning("wake_failed", session=key[1], error=str(error))


async def _cannot_launch(tenant: str, session_id: str) -> None:
    del tenant, session_id
