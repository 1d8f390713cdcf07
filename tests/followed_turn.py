"""A client that gets a whole streamed turn, whatever breaks: it resumes with its cursor."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import pairwise
from typing import Any, Literal

import aiohttp

__all__ = ["BrokenOffError", "FollowedTurn", "echo", "read_events", "script"]

_PAUSE_S = 0.1


class BrokenOffError(Exception):
    """A stream that ended before its turn, or a refusal that says to come back."""


def script(
    text: str = "",
    *,
    tokens: int | None = None,
    tps: float | None = None,
    ttft_ms: float | None = None,
    tools: list[dict[str, Any]] | None = None,
    parallel: bool = False,
) -> str:
    """Return an input that tells the simulator what to answer."""
    fields = {
        "text": text,
        "tokens": tokens,
        "tps": tps,
        "ttft_ms": ttft_ms,
        "tools": tools,
        "parallel": parallel or None,
    }
    return "!sim " + json.dumps({key: value for key, value in fields.items() if value is not None})


def echo(text: str, delay_s: float = 0.0) -> dict[str, Any]:
    """Return a call of the echo tool for :func:`script`."""
    return {"name": "echo", "arguments": {"text": text, "delay_s": delay_s}}


async def read_events(
    response: aiohttp.ClientResponse,
) -> AsyncGenerator[tuple[str, str, dict[str, Any]]]:
    """Yield (id, name, data) of the server-sent events of an answer."""
    cursor = name = ""
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("id: "):
            cursor = line[4:]
        elif line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield cursor, name, json.loads(line[6:])


class FollowedTurn:
    """One turn: accepted with an idempotency key, streamed, taken up again after each break.

    ``route`` is ours (``turns``) or OpenAI's (``responses``). With ``background`` the turn is
    accepted first and followed then. ``events`` has every event that came, in order, once each
    or the check fails; ``breaks`` says what broke and when. With ``tail_may_be_lost`` a voided
    attempt may have less text than was streamed: its owner and Redis died together.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        session_id: str,
        input: str,
        *,
        route: Literal["turns", "responses"] = "turns",
        background: bool = False,
        timeout_s: float = 90.0,
        tail_may_be_lost: bool = False,
    ) -> None:
        self._http = http
        self._url = url
        self.session_id = session_id
        self.input = input
        self.route = route
        self.background = background
        self._deadline = time.monotonic() + timeout_s
        self._tail_may_be_lost = tail_may_be_lost
        self._key = uuid.uuid4().hex
        self._cursor = ""
        self.turn_id = ""
        self.events: list[dict[str, Any]] = []
        self.breaks: list[str] = []
        self.text_so_far = 0
        self.done = False

    async def run(self) -> FollowedTurn:
        """Return when the turn has ended, and everything about the stream was checked."""
        while not self.done:
            try:
                async with asyncio.timeout(max(0.1, self._deadline - time.monotonic())):
                    await (self._resume() if self.turn_id else self._begin())
            except (aiohttp.ClientError, OSError, BrokenOffError) as error:
                if time.monotonic() > self._deadline:
                    raise AssertionError(f"{self} did not end: {self.breaks[-5:]}") from error
                self.breaks.append(f"{time.time():.2f} {type(error).__name__}: {error}")
                await asyncio.sleep(_PAUSE_S)
        self.check()
        return self

    def __str__(self) -> str:
        seqs = [event.get("seq", event.get("sequence_number")) for event in self.events[-3:]]
        return f"turn {self.turn_id or '(not accepted)'} of {self.session_id}, last {seqs}"

    # Getting it

    async def _begin(self) -> None:
        body: dict[str, Any] = {"input": self.input}
        body["background" if self.background else "stream"] = True
        if self.route == "turns":
            path = f"/v1/sessions/{self.session_id}/turns"
        else:
            path, body["conversation"] = "/v1/responses", self.session_id
        headers = {"Idempotency-Key": self._key}
        async with self._http.post(self._url + path, json=body, headers=headers) as response:
            await self._accept(response)
            if self.background:
                self.turn_id = (await response.json())["id"]
            else:
                named = "x-agentray-turn-id" if self.route == "turns" else "x-agentray-response-id"
                self.turn_id = response.headers[named]
                await self._read(response)

    async def _resume(self) -> None:
        if self.route == "turns":
            path = f"/v1/sessions/{self.session_id}/events?turn_id={self.turn_id}"
            path += f"&after={self._cursor or 0}"
        else:
            path = f"/v1/responses/{self.turn_id}?stream=true"
            path += f"&starting_after={self._cursor}" if self._cursor else ""
        headers = {"Accept": "text/event-stream"}
        async with self._http.get(self._url + path, headers=headers) as response:
            await self._accept(response)
            await self._read(response)

    async def _accept(self, response: aiohttp.ClientResponse) -> None:
        if response.status in (200, 202):
            return
        said = f"{response.status} {(await response.text())[:300]}"
        if response.status in (502, 503, 504):
            raise BrokenOffError(said)
        raise AssertionError(f"{self}: {said}")

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        async with aclosing(read_events(response)) as stream:
            async for cursor, name, data in stream:
                if name == "error":
                    raise BrokenOffError(str(data))
                number = str(data["sequence_number"]) if self.route == "responses" else cursor
                self._cursor = number
                self.events.append(data)
                kind = data["type"]
                if kind in ("model.delta", "response.output_text.delta"):
                    self.text_so_far += len(data["text" if kind == "model.delta" else "delta"])
                if kind == "turn.finished" or kind in _RESPONSE_ENDS:
                    self.done = True
                    return
        raise BrokenOffError("the stream ended before its turn")

    # Checking it

    @property
    def text(self) -> str:
        """The answer, from what was streamed alone."""
        return (self._native_texts() if self.route == "turns" else self._response_texts())[-1]

    @property
    def status(self) -> str:
        last = self.events[-1]
        return last["status"] if self.route == "turns" else last["response"]["status"]

    def check(self) -> None:
        """Assert that each event came once, in order, and that the deltas are the texts."""
        if self.route == "turns":
            seqs = [event["seq"] for event in self.events if event["type"] != "model.delta"]
            assert seqs == list(range(seqs[0], seqs[0] + len(seqs))), f"{self}: {seqs}"
            assert self.events[0]["type"] == "turn.accepted", self.events[0]
            assert {event["turn_id"] for event in self.events} == {self.turn_id}
            self._native_texts()
        else:
            numbers = [event["sequence_number"] for event in self.events]
            assert all(a < b for a, b in pairwise(numbers)), f"{self}: {numbers}"
            assert self.events[0]["type"] == "response.created", self.events[0]
            self._response_texts()

    def _native_texts(self) -> list[str]:
        """Return the text of each step, and assert that its deltas put together are it."""
        texts: list[str] = []
        streamed, called = "", 0
        for event in self.events:
            kind = event["type"]
            if kind == "model.called":
                assert event.get("continued_from", 0) == len(streamed), f"{self}: {event}"
                called = event["seq"]
            elif kind == "model.delta":
                assert event["seq"] == called, f"{self}: {event} after {called}"
                streamed += event["text"]
                assert event["offset"] == len(streamed), f"{self}: {event} at {len(streamed)}"
            elif kind in ("model.finished", "model.voided", "model.failed"):
                text = event.get("text", "")
                if self._tail_may_be_lost and kind == "model.voided":
                    streamed = streamed[: len(text)]
                assert streamed == text, f"{self}: streamed {streamed!r}, event has {text!r}"
                if not event.get("continues"):
                    texts.append(text)
                    streamed = ""
        return texts or [""]

    def _response_texts(self) -> list[str]:
        """Return the text of each message, and assert that its deltas put together are it."""
        streamed: dict[str, str] = {}
        for event in self.events:
            if event["type"] == "response.output_text.delta":
                streamed[event["item_id"]] = streamed.get(event["item_id"], "") + event["delta"]
            elif event["type"] == "response.output_text.done":
                assert streamed.get(event["item_id"], "") == event["text"], f"{self}: {event}"
        output = self.events[-1]["response"]["output"]
        messages = [item for item in output if item["type"] == "message"]
        texts = ["".join(part["text"] for part in item["content"]) for item in messages]
        assert [streamed.get(item["id"], "") for item in messages] == texts, f"{self}: {output}"
        return texts or [""]


_RESPONSE_ENDS = ("response.completed", "response.failed", "response.incomplete")
