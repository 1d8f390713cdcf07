"""Let a session host run batches: through its own door, and only while it has little to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import httpx
import msgspec
from starlette.types import ASGIApp

from agentray.clock import SystemClock
from agentray.config.settings import Settings
from agentray.http.door import Admission, ModelNames
from agentray.models.batch import BatchRunner, Call, Reply
from agentray.models.refusals import retry_after_s
from agentray.sessions.process import OwnerProcess
from agentray.storage.postgres_batches import PostgresBatches

__all__ = ["SpareCalls", "build_runner", "is_idle", "models_of", "through_door"]

_NO_ROOM = b'{"error":{"message":"no model that may answer has room","code":"overloaded"}}'


def build_runner(
    process: OwnerProcess, app: ASGIApp, store: PostgresBatches, completions: Admission
) -> BatchRunner:
    """Return the runner of a host whose door is ``app``."""
    settings, clock = process.settings, SystemClock()

    def spare_s(path: str, body: bytes) -> float:
        names = models_of(settings, process.catalog, path, body)
        share = settings.batch.idle_share
        return min((process.router.spare_s(name, share) for name in names), default=0.0)

    calls = SpareCalls(through_door(app, clock.now), spare_s)

    def idle() -> bool:
        return not process.stopping.is_set() and is_idle(
            settings,
            turns=process.residents.running,
            # Those of batches are at the door, too.
            completions=completions.running - calls.running,
        )

    return BatchRunner(
        store=store,
        call=calls,
        idle=idle,
        settings=settings.batch,
        name=process.ownership.owner_id,
        clock=clock,
    )


def is_idle(settings: Settings, *, turns: int, completions: int) -> bool:
    """Return whether a host with so much to do for others has capacity for batches."""
    share = settings.batch.idle_share * settings.sessions.max_running_turns
    limit = min(share, settings.batch.idle_turns)
    return turns < limit and completions < limit


class _Asked(msgspec.Struct):
    model: str | None = None


_asked = msgspec.json.Decoder(_Asked)


def models_of(settings: Settings, catalog: ModelNames, path: str, body: bytes) -> Sequence[str]:
    """Return the models one of which will answer a request; none if it is to be refused."""
    try:
        name = _asked.decode(body).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    embeds = path.endswith("/embeddings")
    kind = "embedding" if embeds else "chat"
    known = [model for model in catalog.names if catalog.kind(model) == kind]
    if embeds:
        return known[:1] if name is None else [name]
    if name in settings.agents:
        return settings.agents[name].models or known
    return known if name is None else [name]


class SpareCalls:
    """Makes calls, and counts them, that begin only while a model has room for what can wait.

    ``spare_s`` returns after how many seconds a request may be made; 0 for now.
    """

    def __init__(self, call: Call, spare_s: Callable[[str, bytes], float]) -> None:
        self._call = call
        self._spare_s = spare_s
        self.running = 0
        """Calls that are being made now."""

    async def __call__(self, path: str, body: bytes) -> Reply:
        wait_s = self._spare_s(path, body)
        if wait_s:
            return Reply(429, _NO_ROOM, wait_s)
        self.running += 1
        try:
            return await self._call(path, body)
        finally:
            self.running -= 1


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
