"""The naive design on Ray: one actor, hence one process, for each session, behind Ray Serve.

A fair one: the actors are started beforehand, keep their history in memory, hold their own
connections open, and journal as the floor does: an acceptance and a result are durable before
they are shown, and Redis gets one write a turn. A Serve deployment, one replica for each core,
passes a request on to its session's actor and streams back what the actor yields.

An actor yields each chunk of the model as it is, the way such a design is written; with
``"gather": true`` in the body it yields what came in one read as one item, which is kinder to
Ray.

``python -m benchmarks.actor_per_session`` puts all that on a running Ray cluster, says ``ready``,
and takes it off again at the end of its standard input. Killed, it takes the actors with it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, cast

import aiohttp
import msgspec
from psycopg import AsyncConnection
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from benchmarks.floor import Chunk, Usage

__all__ = ["NaiveSession", "Sessions", "actor_name"]

WINDOW_TURNS = 20
NAMESPACE = "benchmarks"
PREFIX = "/actors"
_SYSTEM = b'{"role":"system","content":"You are a helpful assistant."}'
_TABLE = (
    "CREATE TABLE IF NOT EXISTS naive_events (session_id text, seq bigint, body text,"
    " PRIMARY KEY (session_id, seq))"
)
_encode = msgspec.json.encode
_chunk = msgspec.json.Decoder(Chunk)


def actor_name(number: int) -> str:
    """Return the name of a session's actor."""
    return f"naive-session-{number}"


class NaiveSession:
    """One session in a process of its own: the class of the actor."""

    def __init__(self, session_id: str, postgres: str, redis: str, model_url: str) -> None:
        self._id = session_id
        self._postgres, self._redis_url = postgres, redis
        self._url = model_url + "/chat/completions"
        self._seq = 0
        self._window: deque[bytes] = deque(maxlen=WINDOW_TURNS)
        self._busy = asyncio.Lock()
        self._connection: AsyncConnection[Any] | None = None

    async def start(self) -> None:
        """Open what stays open, and begin behind what the journal has."""
        self._redis = Redis.from_url(self._redis_url)
        self._http = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), headers={"Content-Type": "application/json"}
        )
        self._connection = await AsyncConnection.connect(
            self._postgres, autocommit=True, prepare_threshold=0
        )
        cursor = await self._connection.execute(
            "SELECT coalesce(max(seq), 0) FROM naive_events WHERE session_id = %s", [self._id]
        )
        row = await cursor.fetchone()
        self._seq = row[0] if row else 0

    async def turn(self, said: str, gather: bool) -> AsyncIterator[bytes]:
        """Run a turn and yield its events as they are to be sent."""
        async with self._busy:
            await self._append({"type": "turn.accepted", "input": said})
            message = _encode({"role": "user", "content": said})
            parts: list[str] = []
            usage: Usage | None = None
            async for chunks in self._answer(message):
                frames: list[bytes] = []
                for chunk in chunks:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        if text := choice.delta.content:
                            parts.append(text)
                            data = _encode({"type": "model.delta", "text": text})
                            frames.append(b"event: model.delta\ndata: %b\n\n" % data)
                if gather and frames:
                    yield b"".join(frames)
                elif frames:
                    for frame in frames:
                        yield frame
            text = "".join(parts)
            turn = message + b"," + _encode({"role": "assistant", "content": text})
            self._window.append(turn)
            event = {"type": "turn.finished", "status": "completed", "text": text, "usage": usage}
            await self._append(event)
            await self._save(turn)
            yield b"event: turn.finished\ndata: %b\n\n" % _encode(event)

    async def _answer(self, message: bytes) -> AsyncIterator[list[Chunk]]:
        messages = b",".join((_SYSTEM, *self._window, message))
        body = (
            b'{"model":"simulator","messages":[%b],"stream":true,'
            b'"stream_options":{"include_usage":true}}' % messages
        )
        rest = b""
        headers = {"x-session-id": self._id}
        async with self._http.post(self._url, data=body, headers=headers) as response:
            response.raise_for_status()
            async for read in response.content.iter_any():
                *events, rest = (rest + read).split(b"\n\n")
                yield [_chunk.decode(event[6:]) for event in events if event != b"data: [DONE]"]

    async def _append(self, event: dict[str, Any]) -> None:
        assert self._connection is not None
        self._seq += 1
        await self._connection.execute(
            "INSERT INTO naive_events VALUES (%s, %s, %s)",
            [self._id, self._seq, _encode(event).decode()],
        )

    async def _save(self, turn: bytes) -> None:
        pipe = self._redis.pipeline(transaction=False)
        key = f"naive:{self._id}"
        pipe.rpush(key, turn)
        pipe.ltrim(key, -WINDOW_TURNS, -1)
        pipe.expire(key, 86_400)
        await pipe.execute()


_actors: dict[str, Any] = {}


async def _turn(request: Request) -> StreamingResponse:
    """Find the session's actor, and stream what it yields."""
    name: str = request.path_params["name"]
    body = await request.json()
    actor = _actors.get(name)
    if actor is None:
        import ray

        actor = _actors[name] = cast(Any, ray).get_actor(name, namespace=NAMESPACE)
    turn = actor.turn.options(num_returns="streaming")
    items = turn.remote(body["input"], body.get("gather", False))
    return StreamingResponse(_values(items), media_type="text/event-stream")


api = Starlette(routes=[Route("/sessions/{name}/turns", _turn, methods=["POST"])])


class Sessions:
    """The deployment: ``api`` in as many processes as there are cores."""


async def _values(items: Any) -> AsyncIterator[bytes]:
    async for reference in items:
        yield await reference


async def _make_table(postgres: str) -> None:
    async with await AsyncConnection.connect(postgres, autocommit=True) as connection:
        await connection.execute(_TABLE)


def _start_actors(count: int, *stores: str) -> list[Any]:
    import ray

    # By reference: Ray would pickle classes of __main__ by value.
    from benchmarks.actor_per_session import NaiveSession as Session

    make: Any = cast(Any, ray).remote(num_cpus=0)(Session)
    actors = [
        make.options(name=actor_name(i), namespace=NAMESPACE).remote(actor_name(i), *stores)
        for i in range(count)
    ]
    cast(Any, ray).get([actor.start.remote() for actor in actors])
    return actors


def main() -> None:
    """Put it on the cluster; take it off at the end of standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--address", "--postgres", "--redis", "--model-url"):
        parser.add_argument(name, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--replicas", type=int, default=2)
    given = parser.parse_args()
    import ray
    from ray import serve

    untyped, untyped_serve = cast(Any, ray), cast(Any, serve)
    untyped.init(
        address=given.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False
    )
    asyncio.run(_make_table(given.postgres))
    actors = _start_actors(given.count, given.postgres, given.redis, given.model_url)
    from benchmarks.actor_per_session import Sessions as Front
    from benchmarks.actor_per_session import api as front_api

    deployment = untyped_serve.deployment(
        num_replicas=given.replicas,
        max_ongoing_requests=1_000,
        ray_actor_options={"num_cpus": 0},
    )(untyped_serve.ingress(front_api)(Front))
    untyped_serve.run(deployment.bind(), name="actors", route_prefix=PREFIX)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    untyped_serve.delete("actors")
    for actor in actors:
        untyped.kill(actor)


if __name__ == "__main__":
    main()
