"""Model servers that misbehave on purpose: each says exactly what a test makes it say."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = [
    "CLOSE",
    "COMMENT",
    "DONE",
    "END",
    "HANG",
    "SSE",
    "Endpoint",
    "Speaks",
    "Steps",
    "answer",
    "calls",
    "error_body",
    "event",
    "in_turn",
    "part",
    "response",
    "script",
    "self_signed",
    "speaking",
]

Steps = list[bytes | float]

Speaks = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Endpoint:
    """A server that reads each request whole and then speaks as it is told."""

    def __init__(self, speaks: Speaks) -> None:
        self._speaks = speaks
        self.connections = 0
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.url = ""

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """What was asked, request by request."""
        return [json.loads(body) for _, body in self.requests]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")[1:]
                pairs = [line.split(": ", 1) for line in lines if line]
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers["content-length"]))
                self.requests.append((headers, body))
                await self._speaks(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def speaking(speaks: Speaks, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Endpoint]:
    """Serve what ``speaks`` says, until the test is over."""
    endpoint = Endpoint(speaks)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(endpoint.serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    endpoint.url = (
        f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    )
    try:
        yield endpoint
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def response(status: int, body: bytes, kind: str = "application/json", **headers: str) -> Steps:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
    head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return [head.encode() + b"\r\n" + body]


SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def part(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(text: str = "", finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return part(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")


DONE = part(b"data: [DONE]\n\n")
COMMENT = part(b": still here\n\n")
HANG = 3600.0
CLOSE = -1.0


def script(steps: Steps) -> Speaks:
    """Speak bytes, pause for seconds, or close the connection."""

    async def speaks(writer: asyncio.StreamWriter) -> None:
        for step in steps:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif step == CLOSE:
                raise ConnectionError
            else:
                await asyncio.sleep(step)

    return speaks


def error_body(**error: Any) -> bytes:
    return json.dumps({"error": error}).encode()


def answer(*pieces: str, finish: str = "stop", usage: dict[str, int] | None = None) -> Steps:
    """Return a whole answer, as it should be."""
    steps: Steps = [SSE, *map(event, pieces), event("", finish)]
    if usage is not None:
        chunk = {"choices": [], "usage": usage}
        steps.append(part(b"data: " + json.dumps(chunk).encode() + b"\n\n"))
    return [*steps, DONE, END]


def calls(name: str, arguments: str) -> Steps:
    """Return an answer that asks for a tool; ``arguments`` are sent as they stand."""
    function = {"name": name, "arguments": arguments}
    delta = {"tool_calls": [{"index": 0, "id": "call_1", "function": function}]}
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": "tool_calls"}]}
    return [SSE, part(b"data: " + json.dumps(chunk).encode() + b"\n\n"), DONE, END]


def in_turn(*scripts: Steps) -> Speaks:
    """Speak one script after the other, one a request; the last one from then on."""
    left = list(scripts)

    async def speaks(writer: asyncio.StreamWriter) -> None:
        steps = left.pop(0) if len(left) > 1 else left[0]
        await script(steps)(writer)

    return speaks


def self_signed(folder: Path) -> ssl.SSLContext:
    """Return the TLS of a server whose certificate nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context
