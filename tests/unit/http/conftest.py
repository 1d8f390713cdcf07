"""A door over sessions in memory, and ways to ask it without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec
import pytest
from starlette.types import ASGIApp, Message

from agentray.clock import ManualClock
from agentray.config.settings import (
    AgentSettings,
    BatchSettings,
    HttpSettings,
    SessionsSettings,
    Settings,
)
from agentray.events import Route
from agentray.http.app import build_http_app
from agentray.models.completions import Completion
from tests.unit.http.memory import AT, MemorySessions
from tests.unit.http.memory_batches import MemoryBatches

DEADLINE_S = 10.0


class Models:
    """The names of models, and a model that says back what it was asked."""

    names: tuple[str, ...] = ("tiny", "org/large")

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.called = asyncio.Semaphore(0)
        self.ready = asyncio.Event()
        self.ready.set()

    def kind(self, name: str) -> Literal["chat", "embedding"]:
        return "embedding" if name.startswith("embedder") else "chat"

    async def embed_raw(self, model: str, body: Any) -> bytes:
        self.asked.append((model, msgspec.json.decode(msgspec.json.encode(body))))
        return b'{"object":"list","data":[]}'

    async def complete(
        self, model: str | None, body: Any, *, session_id: str | None = None, **how: Any
    ) -> Completion:
        picked = model or how.get("preferred") or "tiny"
        self.asked.append((picked, msgspec.json.decode(msgspec.json.encode(body))))
        self.called.release()
        await self.ready.wait()
        answer = b'{"object":"chat.completion","choices":[]}'
        return Completion(answer, picked, Route("answer", [picked], "the only one"))


@dataclass
class Client:
    """A client that the test makes read, stop reading and hang up."""

    app: ASGIApp
    sent: list[Message] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    reads: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def open(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> asyncio.Task[None]:
        """Send a request; what comes back is in ``sent``."""
        self.reads.set()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        bodies = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for message in bodies:
                return message
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await self.reads.wait()
            self.sent.append(message)
            self.changed.set()

        return asyncio.create_task(self._run(scope, receive, send))

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def whole(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False

    async def until(self, text: str) -> None:
        """Wait until this was received."""
        async with asyncio.timeout(DEADLINE_S):
            while text not in self.text:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
def sessions() -> MemorySessions:
    return MemorySessions()


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture
def batches() -> MemoryBatches:
    return MemoryBatches()


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock that begins when all turns in memory were made and done."""
    return ManualClock(AT)


@pytest.fixture
def draining() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
def http_settings() -> HttpSettings:
    return HttpSettings(max_body_bytes=2_000, keepalive_s=30.0, stream_write_timeout_s=30.0)


@pytest.fixture
def app(
    sessions: MemorySessions,
    models: Models,
    batches: MemoryBatches,
    draining: asyncio.Event,
    http_settings: HttpSettings,
    clock: ManualClock,
) -> ASGIApp:
    return build_http_app(
        sessions=sessions,
        models=models,
        embeddings=models,
        files=batches,
        batches=batches,
        catalog=models,
        settings=Settings(
            http=http_settings,
            sessions=SessionsSettings(max_running_turns=2),
            batch=BatchSettings(max_file_bytes=1_000_000),
            agents={
                "assistant": AgentSettings(instructions="Be brief.", temperature=0.5),
                "critic": AgentSettings(model="org/large", instructions=""),
            },
        ),
        metrics=lambda: b"up 1\n",
        draining=draining,
        clock=clock,
    )


@pytest.fixture
async def http(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        yield client


@pytest.fixture
def client(app: ASGIApp) -> Client:
    return Client(app)
