"""Drive a service with closed-loop clients, in a process of its own, and check every answer.

``python -m benchmarks.load`` reads a round as JSON from a line of standard input, connects its
clients, says so, waits for a line, runs, and writes what it measured. ``Generator`` is the other
end. Clients that are no plain HTTP (``openai``, Python handles) serve the same protocol with
``serve``; so does ``open_load``, whose requests keep to a schedule.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import msgspec

from benchmarks.answers import WrongAnswerError, checker

__all__ = [
    "DRIVER_ENVIRON",
    "MAX_ERRORS",
    "Client",
    "Generator",
    "Measured",
    "Round",
    "Turn",
    "drive",
    "http",
    "now",
    "serve",
]

DRIVER_ENVIRON = {
    # What a Ray driver needs to find a head that `agentray up` started.
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
MAX_ERRORS = 50
"""Failed turns after which a round is given up."""
_CONNECT_S = 120.0
_LIMIT = 64 * 1024 * 1024

# uvloop's own time goes by milliseconds.
now = time.perf_counter


class Client(msgspec.Struct, frozen=True):
    """What one client asks again and again: with each turn, the answer that has to come.

    Plain HTTP clients use path, headers and body; others what they need of it.
    """

    expect: str
    session: str = ""
    path: str = ""
    body: str = ""
    headers: dict[str, str] = {}


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """How long clients ask: ``turns`` are those of each client, ``seconds`` bound it too.

    With ``together``, that many ask at the same time: a client begins when the one before it has
    had its turns. With ``rate``, so many turns a second begin on a schedule, whoever of the
    clients is free; only ``open_load`` knows that.
    """

    kind: str
    address: str
    clients: list[Client]
    seconds: float = 600.0
    turns: int | None = None
    together: int | None = None
    rate: float | None = None
    timeout_s: float = 30.0

    @property
    def lanes(self) -> int:
        """How many clients ask at the same time: client ``i`` is in lane ``i % lanes``."""
        return min(self.together or len(self.clients), len(self.clients))


class Measured(msgspec.Struct, frozen=True):
    """What a round brought. ``seconds`` ends with the last turn: each client finishes its own.

    Latencies come in the order of the turns' ends.
    """

    turns: int
    seconds: float
    throughput: float
    ms: list[float]
    first_ms: list[float]
    cpu_s: float
    errors: list[str] = []


Turn = Callable[[], Awaitable[float]]
"""Runs a turn to its end, checks it, and returns when its first text came, by ``now``."""

Connect = Callable[[Round], AbstractAsyncContextManager[Sequence[Turn]]]
Drive = Callable[[Sequence[Turn], Round], Awaitable[Measured]]


async def drive(turns: Sequence[Turn], spec: Round) -> Measured:
    """Let each client ask again as soon as it has its answer."""
    ms: list[float] = []
    first_ms: list[float] = []
    errors: list[str] = []
    began = now()
    end = began + spec.seconds
    last = began

    async def lane(turns: Sequence[Turn]) -> None:
        for turn in turns:
            await client(turn)

    async def client(turn: Turn) -> None:
        nonlocal last
        left = spec.turns if spec.turns is not None else sys.maxsize
        while left > 0 and (started := now()) < end and len(errors) < MAX_ERRORS:
            left -= 1
            try:
                async with asyncio.timeout(spec.timeout_s):
                    first = await turn()
            except (WrongAnswerError, OSError, TimeoutError) as error:
                errors.append(f"{type(error).__name__}: {error}"[:500])
                continue
            last = now()
            ms.append(round((last - started) * 1000, 4))
            first_ms.append(round((first - started) * 1000, 4))

    cpu_s = time.process_time()
    async with asyncio.TaskGroup() as group:
        for number in range(spec.lanes):
            group.create_task(lane(turns[number :: spec.lanes]))
    cpu_s = time.process_time() - cpu_s
    # To the last turn's end, not to the round's: with turns as long as the round, what happened
    # to end in time would say little.
    span_s = max(last - began, 1e-9)
    return Measured(len(ms), span_s, len(ms) / span_s, ms, first_ms, cpu_s, errors)


def serve(connect: Connect, run: Callable[[Any], Any], driven: Drive = drive) -> None:
    """Serve rounds from standard input until it ends; ``run`` runs a coroutine."""
    decoder = msgspec.json.Decoder(Round)

    async def one(line: bytes) -> Measured:
        spec = decoder.decode(line)
        async with connect(spec) as turns:
            gc.collect()
            _answer(b"connected")
            sys.stdin.buffer.readline()
            return await driven(turns, spec)

    while line := sys.stdin.buffer.readline():
        try:
            _answer(msgspec.json.encode(run(one(line))))
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            _answer(b"failed " + f"{type(error).__name__}: {error}".replace("\n", " ").encode())


def _answer(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


class Generator:
    """A process that drives load; ``module`` is one that calls ``serve``."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, module: str = "benchmarks.load", *args: str) -> Generator:
        """Start it; it does nothing before the first round."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *args),
            stdin=PIPE,
            stdout=PIPE,
            limit=_LIMIT,
            env={**os.environ, **DRIVER_ENVIRON},
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(
        self,
        spec: Round,
        *,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Run a round; ``before`` and ``after`` are called right around it, with all connected.

        Raises:
            RuntimeError: it could not be run at all.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(msgspec.json.encode(spec) + b"\n")
        async with asyncio.timeout(_CONNECT_S):
            await self._expect(b"connected")
        before()
        stdin.write(b"go\n")
        async with asyncio.timeout(spec.seconds + 2 * spec.timeout_s):
            line = await stdout.readline()
        after()
        if not line.startswith(b"{"):
            raise RuntimeError(f"the load generator: {line.decode() or 'ended'}")
        return msgspec.json.decode(line, type=Measured)

    async def _expect(self, word: bytes) -> None:
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).strip()
        if line != word:
            raise RuntimeError(f"the load generator: {line.decode() or 'ended'}")

    async def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


# Plain HTTP


class _Connection(asyncio.Protocol):
    """A keep-alive connection for one request after the other."""

    def __init__(self, spec: Round) -> None:
        self._check = checker(spec.kind)
        self._marker = b'"content"' if spec.kind in ("chat", "completion") else b'"text"'
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._body_at = 0
        self._length: int | None = None
        self._first = 0.0
        self._ended: asyncio.Future[None] | None = None

    async def connect(self, host: str, port: int) -> None:
        await self._loop.create_connection(lambda: self, host, port)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def turn(self, address: tuple[str, int], request: bytes, expect: str) -> float:
        if self._transport is None:
            await self.connect(*address)
        assert self._transport is not None
        self._received = b""
        self._body_at = 0
        self._first = 0.0
        self._ended = self._loop.create_future()
        self._transport.write(request)
        try:
            await self._ended
        except asyncio.CancelledError:
            self._transport.abort()
            raise
        body = self._received[self._body_at :]
        self._check(body if self._length is not None else _unchunked(body), expect)
        return self._first

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        if not self._body_at and not self._read_head():
            return
        if not self._first and self._body_at < len(self._received) and self._marker in data:
            self._first = now()
        if self._length is None:
            # No text of ours has such an end of a chunk within.
            done = self._received.endswith(b"\r\n0\r\n\r\n")
        else:
            done = len(self._received) - self._body_at >= self._length
        if done and self._ended is not None and not self._ended.done():
            self._first = self._first or now()
            self._ended.set_result(None)

    def _read_head(self) -> bool:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._received[:end].lower()
        self._body_at = end + 4
        at = head.find(b"\r\ncontent-length:")
        self._length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else None
        if not self._received.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")):
            self._fail(WrongAnswerError(self._received[:400].decode(errors="replace")))
            return False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(exc if isinstance(exc, OSError) else ConnectionResetError("closed in a turn"))

    def _fail(self, error: Exception) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
            self.close()


def _unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size


def _request(client: Client, address: str) -> bytes:
    body = client.body.encode()
    headers = {
        "host": address,
        "content-type": "application/json",
        **client.headers,
        "content-length": str(len(body)),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {client.path} HTTP/1.1\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def http(spec: Round) -> AsyncIterator[Sequence[Turn]]:
    """Connect a round's clients over plain HTTP."""
    host, _, port = spec.address.rpartition(":")
    address = (host, int(port))
    connections = [_Connection(spec) for _ in range(spec.lanes)]

    def turn_of(number: int, client: Client) -> Turn:
        connection = connections[number % spec.lanes]
        request = _request(client, spec.address)
        return lambda: connection.turn(address, request, client.expect)

    try:
        for connection in connections:
            await connection.connect(*address)
        yield [turn_of(number, client) for number, client in enumerate(spec.clients)]
    finally:
        for connection in connections:
            connection.close()


def main() -> None:
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        serve(http, uvloop.run)


if __name__ == "__main__":
    main()
