"""The door as one ASGI application: find the route, run it, and answer every error."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from agentray.clock import Clock, SystemClock
from agentray.config.settings import Settings
from agentray.errors import AgentRayError
from agentray.http import errors
from agentray.http.answers import Answers
from agentray.http.door import (
    Admission,
    ChatModels,
    Door,
    EmbeddingModels,
    Healths,
    Metrics,
    ModelNames,
)
from agentray.http.exchange import ClientGoneError, Exchange
from agentray.http.openapi import describe
from agentray.http.routes import REFUSALS, ROUTES
from agentray.http.routing import Router
from agentray.http.sse import Watchdog
from agentray.sessions.base import Sessions
from agentray.storage.batches import BatchBook, FileStore
from agentray.telemetry.logging import get_logger

__all__ = ["build_http_app"]

log = get_logger(__name__)

# Each may fill the disk with a file, and waits for one of few connections to the store.
_UPLOADS = 4


class Gauge(Protocol):
    """What a gauge of Prometheus' client is here."""

    def set_function(self, f: Callable[[], float]) -> None: ...


def build_http_app(
    *,
    sessions: Sessions,
    models: ChatModels,
    embeddings: EmbeddingModels,
    files: FileStore,
    batches: BatchBook,
    catalog: ModelNames,
    settings: Settings,
    metrics: Metrics,
    model_health: Healths = dict,
    completions: Admission | None = None,
    open_streams: Gauge | None = None,
    draining: asyncio.Event | None = None,
    clock: Clock | None = None,
) -> ASGIApp:
    """Return the application that serves all routes for this process's sessions.

    ``metrics`` returns what ``/metrics`` answers, or awaits it; ``model_health`` returns how each
    model is; ``completions`` bounds the calls of models without a session; ``open_streams`` is to
    show how many streams there are. When ``draining`` is set, tails of sessions end with a cursor;
    streams of turns go on to their end.
    """
    draining = draining or asyncio.Event()
    clock = clock or SystemClock()
    watchdog = Watchdog(settings.http, draining)
    if open_streams is not None:
        open_streams.set_function(lambda: len(watchdog))
    door = Door(
        sessions=sessions,
        models=models,
        embeddings=embeddings,
        files=files,
        batches=batches,
        catalog=catalog,
        agents=settings.agents,
        settings=settings.http,
        batch=settings.batch,
        watchdog=watchdog,
        answers=Answers(clock),
        # A completion costs a host about what a turn does: a call of a model that goes through it.
        completions=completions
        or Admission("calls of models", settings.sessions.max_running_turns),
        uploads=Admission("uploads", _UPLOADS),
        draining=draining,
        metrics=metrics,
        model_health=model_health,
        clock=clock,
        openapi=msgspec.json.encode(describe(ROUTES)),
    )
    return _Application(door, Router(ROUTES, REFUSALS))


class _Application:
    def __init__(self, door: Door, router: Router[Door]) -> None:
        self._door = door
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _other(scope, receive, send)
            return
        stall_s = self._door.settings.stream_write_timeout_s
        exchange = Exchange(scope, receive, send, stall_s=stall_s)
        try:
            raw_path: bytes | None = scope.get("raw_path")
            path = scope["path"] if raw_path is None else raw_path.decode("latin-1")
            route, exchange.params = self._router.find(scope["method"], path)
            await route.endpoint(self._door, exchange)
        except AgentRayError as error:
            await _refuse(exchange, error)
        except ClientGoneError:
            pass
        except Exception:
            # The outer wall: whatever it is, it is logged and the client is answered.
            failure = uuid.uuid4().hex
            log.exception("request_broke", failure=failure, path=scope["path"][:200])
            message = f"an unexpected error; the log of this host knows more of {failure}"
            await _refuse(exchange, AgentRayError(message, failure=failure))


async def _refuse(exchange: Exchange, error: AgentRayError) -> None:
    if exchange.started:
        # Half an answer cannot become an error: the connection is closed, and that tells it.
        log.warning("answer_broken_off", code=error.code, error=error.message)
        return
    status = errors.status(error)
    if status >= 500 and error.code != AgentRayError.code:  # that one is in the log already
        log.warning("request_failed", code=error.code, error=error.message, status=status)
    await exchange.reply(errors.describe(error), status=status, headers=errors.headers(error))


async def _other(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what is no request: there is nothing to start or stop, and no websocket here."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1000})
        return
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
