"""Drive a service with closed-loop clients, in a process of its own, and check every answer.

``python -m benchmarks.load`` reads a round as JSON from a line of standard input, connects its
clients, says so, waits for a line, runs, and writes what it measured. ``Generator`` is the other
end. Clients that are no plain HTTP (``openai``, Python handles) serve the same protocol with
``serve``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import msgspec

from benchmarks.answers import Checker, WrongAnswerError, checker

__all__ = ["DRIVER_ENVIRON", "Client", "Generator", "Measured", "Round", "Turn", "now", "serve"]

DRIVER_ENVIRON = {
    # What a Ray driver needs to find a head that `agentray up` started.
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_MAX_ERRORS = 50
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
    """How long clients ask: ``turns`` are those of each client, ``seconds`` bound it too."""

    kind: str
    address: str
    clients: list[Client]
    seconds: float = 600.0
    turns: int | None = None
    timeout_s: float = 30.0


class Measured(msgspec.Struct, frozen=True):
    """What a round brought. Throughput counts the turns that ended within the round's time."""

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


async def _drive(turns: Sequence[Turn], spec: Round) -> Measured:
    ms: list[float] = []
    first_ms: list[float] = []
    errors: list[str] = []
    began = now()
    end = began + spec.seconds
    in_time = 0
    last = began

    async def client(turn: Turn) -> None:
        nonlocal in_time, last
        left = spec.turns if spec.turns is not None else sys.maxsize
        while left > 0 and (started := now()) < end and len(errors) < _MAX_ERRORS:
            left -= 1
            try:
                async with asyncio.timeout(spec.timeout_s):
                    first = await turn()
            except (WrongAnswerError, OSError, TimeoutError) as error:
                errors.append(f"{type(error).__name__}: {error}"[:500])
                continue
            last = now()
            in_time += last <= end
            ms.append(round((last - started) * 1000, 4))
            first_ms.append(round((first - started) * 1000, 4))

    cpu_s = time.process_time()
    async with asyncio.TaskGroup() as group:
        for turn in turns:
            group.create_task(client(turn))
    cpu_s = time.process_time() - cpu_s
    # Bounded by number, it is over when the last turn is.
    span_s = (last if spec.turns is not None and last < end else end) - began
    rate = in_time / span_s if span_s > 0 else 0.0
    return Measured(len(ms), span_s, rate, ms, first_ms, cpu_s, errors)


def serve(connect: Connect, run: Callable[[Any], Any]) -> None:
    """Serve rounds from standard input until it ends; ``run`` runs a coroutine."""
    decoder = msgspec.json.Decoder(Round)

    async def one(line: bytes) -> Measured:
        spec = decoder.decode(line)
        async with connect(spec) as turns:
            gc.collect()
            _answer(b"connected")
            sys.stdin.buffer.readline()
            return await _drive(turns, spec)

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


class _HttpClient(asyncio.Protocol):
    """One keep-alive connection that sends the same request again and again."""

    def __init__(self, client: Client, spec: Round, check: Checker) -> None:
        self._expect = client.expect
        self._marker = b'"content"' if spec.kind == "chat" else b'"text"'
        self._check = check
        body = client.body.encode()
        headers = {
            "host": spec.address,
            "content-type": "application/json",
            **client.headers,
            "content-length": str(len(body)),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._request = f"POST {client.path} HTTP/1.1\r\n{lines}\r\n".encode() + body
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

    async def turn(self, address: tuple[str, int]) -> float:
        if self._transport is None:
            await self.connect(*address)
        assert self._transport is not None
        self._received = b""
        self._body_at = 0
        self._first = 0.0
        self._ended = self._loop.create_future()
        self._transport.write(self._request)
        try:
            await self._ended
        except asyncio.CancelledError:
            self._transport.abort()
            raise
        body = self._received[self._body_at :]
        self._check(body if self._length is not None else _unchunked(body), self._expect)
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


@asynccontextmanager
async def _http(spec: Round) -> Any:
    host, _, port = spec.address.rpartition(":")
    address = (host, int(port))
    check = checker(spec.kind)
    clients = [_HttpClient(client, spec, check) for client in spec.clients]
    try:
        for client in clients:
            await client.connect(*address)

        def turn_of(client: _HttpClient) -> Turn:
            return lambda: client.turn(address)

        yield [turn_of(client) for client in clients]
    finally:
        for client in clients:
            client.close()


def main() -> None:
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        serve(_http, uvloop.run)


if __name__ == "__main__":
    main()
