"""Let a session host run batches: through its own door, and only while it has little to do."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from starlette.types import ASGIApp

from agentray.clock import SystemClock
from agentray.config.settings import Settings
from agentray.http.door import Admission
from agentray.models.batch import BatchRunner, Call, Reply
from agentray.models.refusals import retry_after_s
from agentray.sessions.process import OwnerProcess
from agentray.storage.postgres_batches import PostgresBatches

__all__ = ["build_runner", "is_idle", "through_door"]


def build_runner(
    process: OwnerProcess, app: ASGIApp, store: PostgresBatches, completions: Admission
) -> BatchRunner:
    """Return the runner of a host whose door is ``app``."""
    clock = SystemClock()

    def idle() -> bool:
        return not process.stopping.is_set() and is_idle(
            process.settings,
            turns=process.residents.running,
            completions=completions.running - runner.running,
        )

    runner = BatchRunner(
        store=store,
        call=through_door(app, clock.now),
        idle=idle,
        settings=process.settings.batch,
        name=process.ownership.owner_id,
        clock=clock,
    )
    return runner


def is_idle(settings: Settings, *, turns: int, completions: int) -> bool:
    """Return whether a host with so much to do for others has capacity for batches."""
    limit = settings.batch.idle_share * settings.sessions.max_running_turns
    return turns < limit and completions < limit


def through_door(app: ASGIApp, now: Callable[[], float]) -> Call:
    """Return a call that asks ``app`` in this process: a line of a batch is answered, checked and
    refused as the same request of a client is."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None)  # noqa: S113 - whoever answers has deadlines

    # Nothing is to be closed: there are no connections.
    async def call(path: str, body: bytes) -> Reply:
        answer = await client.post(path, content=body, headers={"content-type": "application/json"})
        wait_s = retry_after_s(answer.headers.get("retry-after"), now())
        return Reply(answer.status_code, answer.content, wait_s)

    return call
