"""One answer of the simulator on its way out: token by token, against a schedule."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec

from agentray.config.settings import SimulatorSettings
from agentray.models.simulator_script import Answer, ChatRequest, Script, plan_answer

__all__ = [
    "Call",
    "ClientGoneError",
    "Pauses",
    "Receive",
    "RefusedError",
    "Send",
    "scripted_failure",
    "send_json",
]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# What is due within this time is sent with what is due now: shorter sleeps cost more than the
# precision is worth.
LEAD_S = 0.001

_JSON_HEADER = (b"content-type", b"application/json")
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
_CHUNK_END = b',"logprobs":null,"finish_reason":null}]}\n\n'

_encode = msgspec.json.encode


class RefusedError(Exception):
    """A request that is answered with an error of OpenAI's shape."""

    def __init__(
        self, status: int, message: str, code: str, *, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        kind = "invalid_request_error" if status < 429 else "server_error"
        if status == 429:
            kind = "rate_limit_error"
        self.body = _encode(
            {"error": {"message": message, "type": kind, "param": None, "code": code}}
        )


class ClientGoneError(Exception):
    """The client hung up before it had its answer."""


class Pauses:
    """Sleeps that end early, with ``ClientGoneError``, when the client hangs up."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def sleep_until(self, when: float) -> None:
        """Return at the loop's time ``when``."""
        # Watching for the hang-up costs a task, so the first sleep begins it.
        if self._watch is None:
            self._watch = self._loop.create_task(self._until_gone())
        if not self._watch.done():
            self._waiter = self._loop.create_future()
            timer = self._loop.call_at(when, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        if self._watch.done():
            raise ClientGoneError

    def close(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.cancel()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Call:
    """One answer on its way out, token by token against a schedule."""

    def __init__(
        self,
        name: str,
        request: ChatRequest,
        script: Script | None,
        limit: int,
        settings: SimulatorSettings,
    ) -> None:
        self._request = request
        self._id = f'"chatcmpl-{name}"'.encode()
        self._plan: Answer = plan_answer(request, script, "call_" + name)
        planned = len(self._plan.deltas)
        self._count = min(planned, limit)
        if planned > limit:
            self._finish_reason = b'"length"'
        else:
            self._finish_reason = b'"tool_calls"' if self._plan.calls else b'"stop"'
        self._broken: RefusedError | None = None
        self._error_is_sent = False
        fail_after = script.fail_after if script else None
        if script and fail_after is not None and fail_after <= self._count:
            self._count = fail_after
            self._broken = scripted_failure(script.status or 500)
            self._error_is_sent = script.status is not None
        ttft_ms = script.ttft_ms if script else None
        self.ttft_s = (settings.ttft_ms if ttft_ms is None else ttft_ms) / 1000
        self._tps = (script.tps if script else None) or settings.tps
        self.first_at = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    async def stream(self, send: Send, pauses: Pauses) -> None:
        """Send the answer as server-sent events; all chunks that are due go in one write."""
        head = self._head(b"chat.completion.chunk") + b'"choices":[{"index":0,"delta":'
        head = b"data: " + head
        between = _CHUNK_END + head
        deltas = self._plan.deltas
        count = self._count
        sent = 0
        begun = False
        while True:
            due = self._due()
            parts = list(deltas[sent : max(due, 0)])
            if sent == 0 and parts:
                parts[0] = b'{"role":"assistant",' + parts[0][1:]
            body = head + between.join(parts) + _CHUNK_END if parts else b""
            sent = max(sent, due)
            done = sent >= count and due >= 0
            if done:
                body += self._stream_end(head)
            if body or done:
                if not begun:
                    begun = True
                    await send(
                        {"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS}
                    )
                await send({"type": "http.response.body", "body": body, "more_body": not done})
            if done:
                return
            await pauses.sleep_until(self.first_at + sent / self._tps)

    async def answer(self, send: Send, pauses: Pauses) -> None:
        """Send the answer as one JSON document when its last token is due."""
        if self._due() < self._count:
            await pauses.sleep_until(self.first_at + max(self._count - 1, 0) / self._tps)
        if self._broken is not None:
            raise self._broken
        calls = self._plan.calls
        if calls:
            message = b'{"role":"assistant","content":null'
            if self._count == len(self._plan.deltas):
                message += b',"tool_calls":[' + b",".join(calls) + b"]"
        else:
            text = "".join(self._plan.pieces[: self._count])
            message = b'{"role":"assistant","content":' + _encode(text)
        body = (
            self._head(b"chat.completion")
            + b'"choices":[{"index":0,"message":'
            + message
            + b'},"logprobs":null,"finish_reason":'
            + self._finish_reason
            + b'}],"usage":'
            + self._usage()
            + b"}"
        )
        await send_json(send, 200, body)

    def _due(self) -> int:
        """Return how many tokens are to be out by now; -1 before the time of the first."""
        lead = asyncio.get_running_loop().time() + LEAD_S - self.first_at
        if lead < 0:
            return -1
        ready = lead * self._tps
        return self._count if ready >= self._count else int(ready) + 1

    def _head(self, kind: bytes) -> bytes:
        return b'{"id":%b,"object":"%b","created":%d,"model":%b,' % (
            self._id,
            kind,
            int(time.time()),
            _encode(self._request.model),
        )

    def _stream_end(self, head: bytes) -> bytes:
        if self._broken is not None:
            # A stream that breaks off just ends; only a client that looks for the end can tell.
            return b"data: " + self._broken.body + b"\n\n" if self._error_is_sent else b""
        end = head + b'{},"logprobs":null,"finish_reason":' + self._finish_reason + b"}]}\n\n"
        options = self._request.stream_options
        if options is not None and options.include_usage:
            start = self._head(b"chat.completion.chunk")
            end += b"data: " + start + b'"choices":[],"usage":' + self._usage() + b"}\n\n"
        return end + b"data: [DONE]\n\n"

    def _usage(self) -> bytes:
        return (
            b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
            b'"prompt_tokens_details":{"cached_tokens":%d}}'
        ) % (
            self.prompt_tokens,
            self._count,
            self.prompt_tokens + self._count,
            self.cached_tokens,
        )


def scripted_failure(status: int) -> RefusedError:
    return RefusedError(
        status,
        "scripted failure",
        "rate_limit_exceeded" if status == 429 else "scripted_failure",
        retry_after_s=1 if status == 429 else None,
    )


async def send_json(
    send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [_JSON_HEADER, length, *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})
