"""Judge a streamed response as a strict client would: is it well formed, and what does it say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

__all__ = ["ResponseStream", "message_texts"]

_TERMINAL = {"response.completed", "response.failed", "response.incomplete", "error"}
_TEXT = "response.output_text."

_decode = msgspec.json.Decoder(dict[str, Any]).decode


def message_texts(output: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the text and the status of each message of a response, by the message's id."""
    return {
        item["id"]: ("".join(part.get("text", "") for part in item["content"]), item["status"])
        for item in output
        if item["type"] == "message"
    }


@dataclass(slots=True)
class _Item:
    """A message as the client puts it together."""

    parts: list[str] = field(default_factory=list)
    status: str = "in_progress"

    @property
    def text(self) -> str:
        return "".join(self.parts)


class ResponseStream:
    """Takes the bytes of a stream as they come; ``problems`` says what is wrong with it.

    ``gap_s`` is the longest time between two events, ``first_text_at`` when the first text came,
    ``ended_at`` when the terminal event did.
    """

    def __init__(self, began: float) -> None:
        self.problems: list[str] = []
        self.response: dict[str, Any] = {}
        self.gap_s = 0.0
        self.first_text_at = 0.0
        self.ended_at = 0.0
        self._at = began
        self._rest = b""
        self._number = -1
        self._terminal = ""
        self._items: dict[str, _Item] = {}

    @property
    def id(self) -> str:
        return str(self.response.get("id", ""))

    @property
    def status(self) -> str:
        return str(self.response.get("status", "none"))

    def texts(self) -> dict[str, tuple[str, str]]:
        """Return what the client put together: text and status of each message, by its id."""
        return {item_id: (item.text, item.status) for item_id, item in self._items.items()}

    def feed(self, read: bytes, at: float) -> None:
        """Take what was read at a moment."""
        *frames, self._rest = (self._rest + read).split(b"\n\n")
        for frame in frames:
            if all(line.startswith(b":") for line in frame.split(b"\n")):
                continue  # a comment, which keeps the connection open
            self.gap_s = max(self.gap_s, at - self._at)
            self._at = at
            self._frame(frame)

    def close(self) -> None:
        """Say what is missing at the end of the stream."""
        if self._rest:
            self._wrong(f"the stream ends within a frame: {self._rest[:80]!r}")
        if not self._terminal:
            self._wrong("the stream ends without a terminal event")
        elif self._terminal != "error":
            told = message_texts(self.response.get("output", []))
            if told != self.texts():
                self._wrong(f"the last event tells {told}, the events before {self.texts()}")

    def _frame(self, frame: bytes) -> None:
        name, data = "", b""
        for line in frame.split(b"\n"):
            key, _, value = line.partition(b": ")
            if key == b"event":
                name = value.decode()
            elif key == b"data":
                data += value
            elif not line.startswith(b":"):
                self._wrong(f"a line that is neither event nor data: {line[:80]!r}")
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._wrong(f"a frame whose data is no JSON object: {frame[:80]!r}")
            return
        if event.get("type") != name:
            self._wrong(f"an event {name!r} of type {event.get('type')!r}")
        if self._terminal:
            self._wrong(f"{name} behind {self._terminal}")
        try:
            self._event(name, event)
        except (KeyError, TypeError) as error:
            self._wrong(f"{name}: {type(error).__name__}: {error}")

    def _event(self, name: str, event: dict[str, Any]) -> None:
        number = event["sequence_number"]
        if number <= self._number:
            self._wrong(f"{name} has number {number} behind {self._number}")
        self._number = number
        if name.startswith(_TEXT):
            self._text(name.removeprefix(_TEXT), event)
        elif name == "response.output_item.added":
            item = cast("dict[str, Any]", event["item"])
            if item["id"] in self._items:
                self._wrong(f"the item {item['id']} is added twice")
            self._items[item["id"]] = _Item()
        elif name == "response.output_item.done":
            told = message_texts([event["item"]])
            for item_id, (text, status) in told.items():
                item = self._open(item_id)
                if item.text != text:
                    self._wrong(f"the item {item_id} ends as {text!r}, not as {item.text!r}")
                item.status = status
        elif name in _TERMINAL:
            self._terminal = name
            self.ended_at = self._at
        if "response" in event:
            self.response = event["response"]

    def _text(self, what: str, event: dict[str, Any]) -> None:
        item = self._open(event["item_id"])
        if what == "delta":
            self.first_text_at = self.first_text_at or self._at
            item.parts.append(event["delta"])
        elif what == "done" and event["text"] != item.text:
            self._wrong(f"text is done as {event['text']!r}, not as {item.text!r}")

    def _open(self, item_id: str) -> _Item:
        item = self._items.setdefault(item_id, _Item(status="never added"))
        if item.status != "in_progress":
            self._wrong(f"the item {item_id} goes on although it is {item.status}")
        return item

    def _wrong(self, problem: str) -> None:
        self.problems.append(problem)
