"""The floor: one hand-written process that does a turn's work with nothing of agentray or Ray.

It is the yardstick: what a very good engineer writes in an afternoon when sessions need not
survive anything but a restart. uvicorn, uvloop and Starlette in front, aiohttp to the model,
PostgreSQL by group commit (an acceptance is durable before anything is shown, a result before
its end is shown), one write to Redis a turn, the history in this process's memory.

What it leaves out is what agentray is for: owners and fences, recovery, resuming, queues,
cancellation, idempotency, budgets, tools, limits, more than one process.

``python -m benchmarks.floor --port P --postgres URL --redis URL --model-url URL``
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import uvicorn
from psycopg import AsyncConnection
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from yarl import URL

WINDOW_TURNS = 20
_SYSTEM = b'{"role":"system","content":"You are a helpful assistant."}'
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
_START = {"type": "http.response.start", "status": 200, "headers": _SSE}
_TABLE = (
    "CREATE TABLE IF NOT EXISTS floor_events (session_id text, seq bigint, body text,"
    " PRIMARY KEY (session_id, seq))"
)
_INSERT = "INSERT INTO floor_events SELECT * FROM unnest(%s::text[], %s::bigint[], %s::text[])"
_encode = msgspec.json.Encoder().encode


class TurnBody(msgspec.Struct):
    input: str


class ChunkDelta(msgspec.Struct):
    content: str = ""


class Choice(msgspec.Struct):
    delta: ChunkDelta
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None


_body = msgspec.json.Decoder(TurnBody)
_chunk = msgspec.json.Decoder(Chunk)


class Session:
    """One conversation: its last turns as JSON messages, ready for the next prompt."""

    __slots__ = ("lock", "seq", "window")

    def __init__(self) -> None:
        self.seq = 0
        self.window: deque[bytes] = deque(maxlen=WINDOW_TURNS)
        self.lock = asyncio.Lock()


class Journal:
    """Group commit: what arrives while a batch is written is the next batch."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection
        self._queue: list[tuple[str, int, str, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def append(self, session_id: str, seq: int, event: dict[str, Any]) -> None:
        """Return when the event is on disk."""
        landed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((session_id, seq, _encode(event).decode(), landed))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        await landed

    async def _write(self) -> None:
        while self._queue:
            batch, self._queue = self._queue, []
            ids, seqs, bodies, landed = map(list, zip(*batch, strict=True))
            try:
                await self._connection.execute(_INSERT, [ids, seqs, bodies])
            except Exception as error:  # noqa: BLE001 - handed to the turns that wait
                for future in landed:
                    future.set_exception(error)
            else:
                for future in landed:
                    future.set_result(None)


class Cache:
    """The newest turn of each session, to Redis, in one pipeline at a time."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._queue: list[tuple[str, bytes]] = []
        self._writing: asyncio.Task[None] | None = None

    def save(self, session_id: str, turn: bytes) -> None:
        self._queue.append((session_id, turn))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while self._queue:
            batch, self._queue = self._queue, []
            pipe = self._redis.pipeline(transaction=False)
            for session_id, turn in batch:
                key = f"floor:{session_id}"
                pipe.rpush(key, turn)
                pipe.ltrim(key, -WINDOW_TURNS, -1)
                pipe.expire(key, 86_400)
            await pipe.execute()


class Floor:
    """The service: ``POST /v1/sessions/{id}/turns`` with ``{"input": …}`` streams the answer."""

    def __init__(self, postgres: str, redis: str, model_url: str) -> None:
        self._postgres, self._redis = postgres, redis
        self._url = URL(model_url + "/chat/completions")
        self._sessions: dict[str, Session] = {}

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        connection = await AsyncConnection.connect(
            self._postgres, autocommit=True, prepare_threshold=0
        )
        redis = Redis.from_url(self._redis)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
        async with (
            connection,
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=60),
                headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                skip_auto_headers=("User-Agent", "Accept"),
            ) as http,
        ):
            await connection.execute(_TABLE)
            self._journal, self._cache, self._http = Journal(connection), Cache(redis), http
            gc.collect()
            gc.freeze()
            yield
            await redis.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session_id: str = scope["path_params"]["session_id"]
        said = _body.decode(await Request(scope, receive).body()).input
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = Session()
        async with session.lock:
            await self._turn(session_id, session, said, send)

    async def _turn(self, session_id: str, session: Session, said: str, send: Send) -> None:
        seq = session.seq + 1
        session.seq += 2
        event = {"type": "turn.accepted", "seq": seq, "input": said}
        await self._journal.append(session_id, seq, event)
        message = _encode({"role": "user", "content": said})
        text, usage = await self._answer(session_id, session, message, send)
        turn = message + b"," + _encode({"role": "assistant", "content": text})
        session.window.append(turn)
        event = {
            "type": "turn.finished",
            "seq": seq + 1,
            "status": "completed",
            "text": text,
            "usage": usage,
        }
        await self._journal.append(session_id, seq + 1, event)
        self._cache.save(session_id, turn)
        frame = b"event: turn.finished\ndata: %b\n\n" % _encode(event)
        await send({"type": "http.response.body", "body": frame})

    async def _answer(
        self, session_id: str, session: Session, message: bytes, send: Send
    ) -> tuple[str, Usage | None]:
        """Call the model and pass its text on as it comes: a frame a chunk, a write a read."""
        messages = b",".join((_SYSTEM, *session.window, message))
        body = (
            b'{"model":"simulator","messages":[%b],"stream":true,'
            b'"stream_options":{"include_usage":true}}' % messages
        )
        parts: list[str] = []
        usage: Usage | None = None
        finished = started = False
        rest = b""
        async with self._http.post(
            self._url, data=body, headers={"x-session-id": session_id}
        ) as response:
            response.raise_for_status()
            async for read in response.content.iter_any():
                *events, rest = (rest + read).split(b"\n\n") if rest else read.split(b"\n\n")
                frames: list[bytes] = []
                for event in events:
                    if event == b"data: [DONE]":
                        continue
                    chunk = _chunk.decode(event[6:])
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        finished = finished or choice.finish_reason is not None
                        if text := choice.delta.content:
                            parts.append(text)
                            frames.append(
                                b'event: model.delta\ndata: {"type":"model.delta","text":%b}\n\n'
                                % _encode(text)
                            )
                if frames:
                    if not started:
                        # Not earlier: headers of their own would be a write of their own.
                        started = True
                        await send(_START)
                    await send(
                        {
                            "type": "http.response.body",
                            "body": b"".join(frames),
                            "more_body": True,
                        }
                    )
        if not (finished and started):
            raise RuntimeError("the model's answer broke off")
        return "".join(parts), usage


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    for name in ("--postgres", "--redis", "--model-url"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    floor = Floor(given.postgres, given.redis, given.model_url)
    route = Route("/v1/sessions/{session_id}/turns", floor, methods=["POST"])
    app = Starlette(routes=[route], lifespan=floor.lifespan)
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=given.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        # What these do costs and tells nothing here.
        proxy_headers=False,
        server_header=False,
        date_header=False,
    )


if __name__ == "__main__":
    main()
