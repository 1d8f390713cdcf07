"""Owner processes in one event loop, on real stores and the real simulator; and how they die."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import psycopg
import uvicorn

from agentray.config.settings import (
    AgentSettings,
    PostgresSettings,
    RedisSettings,
    SessionsSettings,
    Settings,
    SimulatorSettings,
)
from agentray.events import Message, ModelCalled, TurnFinished, TurnOptions
from agentray.models.simulator import Simulator
from agentray.sessions.base import Cursor, Delta, IfBusy, StreamItem, TurnInfo, item_cursor
from agentray.sessions.process import OwnerProcess
from tests.journal import Journal
from tests.services import Services

__all__ = ["TENANT", "Owners", "Reader", "SimulatorServer", "send"]

TENANT = "default"


class SimulatorServer:
    """The simulator behind a socket, in a thread of its own."""

    def __init__(self) -> None:
        config = uvicorn.Config(
            cast(Any, Simulator(SimulatorSettings(tps=1e6))),
            host="127.0.0.1",
            port=0,
            log_level="error",
            lifespan="off",
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="simulator")
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "the simulator does not start"
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/models"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


class Owners:
    """Makes owners, and ends those that are left."""

    def __init__(
        self,
        services: Services,
        simulator: SimulatorServer,
        *,
        models: dict[str, Any] | None = None,
        agent: dict[str, Any] | None = None,
        **sessions: Any,
    ) -> None:
        fields = {"beat_s": 0.15, "term_s": 1.0, "sweep_s": 0.1, "window_turns": 3, "drain_s": 5.0}
        self.settings = Settings.model_validate(
            {
                "postgres": PostgresSettings.model_validate({"url": services.postgres.url}),
                "redis": RedisSettings.model_validate({"url": services.redis.url}),
                "sessions": SessionsSettings.model_validate({**fields, **sessions}),
                "models": models or {},
                "agents": {"assistant": AgentSettings(**{"instructions": "", **(agent or {})})},
            }
        )
        self._services = services
        self._simulator = simulator
        self._owners: list[OwnerProcess] = []

    async def start(self) -> OwnerProcess:
        owner = OwnerProcess(
            self.settings,
            models_url=self._simulator.url,
            placement="shared",
            address=f"owner {len(self._owners)}",
            launch_dedicated=_launch_nothing,
        )
        await owner.start()
        self._owners.append(owner)
        return owner

    async def stop(self) -> None:
        for owner in self._owners:
            await owner.stop()

    async def die(self, owner: OwnerProcess) -> None:
        """End an owner as kill -9 does, but for the loop it shares with the living: its tasks go
        no further, its connections are cut, and it says goodbye to nobody."""
        parts = cast(Any, owner)
        self._owners.remove(owner)
        parts._stopped = True
        running = [actor.task for actor in parts.residents._actors.values() if actor.task]
        parts._journal._stopped = True
        tasks = [*parts._tasks, *running, parts._journal._task, parts._tails._task]
        tasks += [parts.redis._saver, *parts._beside]
        tasks = [task for task in tasks if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        await owner.following.close()
        await owner.store.close()
        await owner.redis.close()
        await parts._cache.close()
        await parts._answers.close()
        await parts._client.close()

    def journal(self, session_id: str) -> Journal:
        """Return what PostgreSQL has of a session."""
        with psycopg.connect(self._services.postgres.url, autocommit=True) as connection:
            return Journal.read(
                lambda statement, *params: connection.execute(
                    statement.encode(), params
                ).fetchall(),
                session_id,
            )


async def _launch_nothing(tenant: str, session_id: str) -> None:
    raise AssertionError(f"session {session_id} of {tenant} is not dedicated")


async def send(
    owner: OwnerProcess,
    session_id: str,
    text: str,
    *,
    if_busy: IfBusy = "enqueue",
    key: str | None = None,
    after_turn: str | None = None,
    options: TurnOptions = TurnOptions(),
) -> TurnInfo:
    """Have a message accepted, through an owner."""
    return await owner.sessions.submit(
        TENANT,
        session_id,
        [Message("user", text)],
        if_busy=if_busy,
        idempotency_key=key,
        after_turn=after_turn,
        options=options,
    )


class Reader:
    """Follows a turn, or a session without end, through one owner, and checks what it is told.

    Each event comes once and in order; text joins without a seam, behind its model.called.
    """

    def __init__(
        self,
        owner: OwnerProcess,
        session_id: str,
        turn_id: str | None = None,
        *,
        after: Cursor = Cursor(0),
    ) -> None:
        self.batches: list[list[StreamItem]] = []
        self.cursor: Cursor | None = None
        self.error: BaseException | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(
            self._read(owner, session_id, turn_id, after)
        )

    @property
    def items(self) -> list[StreamItem]:
        return [item for batch in self.batches for item in batch]

    @property
    def deltas(self) -> list[Delta]:
        return [item for item in self.items if isinstance(item, Delta)]

    @property
    def text(self) -> str:
        """The text of the last step that was streamed."""
        text = ""
        for item in self.items:
            if isinstance(item, ModelCalled) and not item.continued_from:
                text = ""
            elif isinstance(item, Delta):
                text += item.text
        return text

    @property
    def finished(self) -> TurnFinished | None:
        ends = [item for item in self.items if isinstance(item, TurnFinished)]
        return ends[-1] if ends else None

    def of(self, kind: type[Any]) -> list[Any]:
        return [item for item in self.items if isinstance(item, kind)]

    async def _read(
        self, owner: OwnerProcess, session_id: str, turn_id: str | None, after: Cursor
    ) -> None:
        try:
            async for batch in owner.sessions.follow(
                TENANT, session_id, turn_id=turn_id, after=after
            ):
                self._take(batch)
                self._changed.set()
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.error = error
        finally:
            self._changed.set()

    def _take(self, batch: Sequence[StreamItem]) -> None:
        for item in batch:
            if self.cursor is not None:
                behind = item_cursor(item, self.cursor)
                if isinstance(item, Delta):
                    assert item.offset - len(item.text) == self.cursor.offset, "text with a seam"
                else:
                    assert item.seq == self.cursor.seq + 1, f"{item} behind {self.cursor}"
                self.cursor = behind
            else:
                self.cursor = item_cursor(item, Cursor(0))
        self.batches.append(list(batch))

    async def until(self, condition: Callable[[Reader], object], what: str) -> None:
        """Return when the condition holds of what was read."""
        try:
            async with asyncio.timeout(20):
                while not condition(self):
                    assert not self._task.done(), f"it ended before {what}: {self.error!r}"
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within 20 s: {what}; read {self.items[-5:]}") from None

    async def to_the_end(self) -> Reader:
        """Return when the turn has ended, or the session."""
        await asyncio.wait([self._task], timeout=30)
        assert self._task.done(), f"no end after {self.items[-3:]}"
        if isinstance(self.error, AssertionError):
            raise self.error
        return self

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
