"""Put a streamed chat answer together from the raw bytes of its server-sent events."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agentray.errors import ModelError, ModelUnavailableError
from agentray.events import ToolCall, Usage
from agentray.models.refusals import refusal_in_answer

__all__ = ["ChatStream"]

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ANSWER_CHARS = 16 * 1024 * 1024
MOST_CHARS_PER_TOKEN = 32
SLACK_CHARS = 1_000


class _FunctionDelta(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolDelta(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _FunctionDelta | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    # Two names for a model's thoughts: they are progress, but no text of the answer.
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: list[_ToolDelta] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Chunk)


@dataclass(slots=True)
class _Call:
    call_id: str
    name: str = ""
    arguments: list[str] = field(default_factory=list[str])


class ChatStream:
    """Takes the bytes of one stream as they come, cut anywhere, and knows when it is whole.

    ``model`` is named in errors. With ``may_be_empty`` an answer without text and calls is one:
    a text that is continued can turn out to have been complete. ``secret`` is cut out of what
    the endpoint says in errors. An answer that goes on far behind ``max_tokens`` is cut there, as
    one that reached its limit.
    """

    def __init__(
        self,
        model: str,
        *,
        may_be_empty: bool = False,
        secret: str | None = None,
        max_tokens: int | None = None,
    ):
        self.started = False
        """The model has produced something."""
        self.done = False
        """The end of the stream was seen; what comes behind it is ignored."""
        self.finish_reason: str | None = None
        self.usage = Usage()
        self.chunks = 0
        """Chunks that were read, so that comments that keep a connection open do not count."""
        self._model = model
        self._may_be_empty = may_be_empty
        self._secret = secret
        self._rest = b""
        self._has_text = False
        # What no tokenizer makes of so few tokens; what it came to is not known while it streams.
        self._room = MAX_ANSWER_CHARS
        if max_tokens is not None:
            self._room = min(self._room, max_tokens * MOST_CHARS_PER_TOKEN + SLACK_CHARS)
        self._calls: dict[int, _Call] = {}

    def feed(self, data: bytes) -> str:
        """Take the next bytes and return the text that they bring.

        Raises:
            ModelUnavailableError: what came is no event stream of a chat answer.
            ModelError: the endpoint reports an error; also ``ModelRateLimitedError``.
        """
        if self.done:
            return ""
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE_BYTES:
            raise self._malformed("a line is too long")
        texts: list[str] = []
        for line in lines:
            if line.startswith(b"data:"):
                # The mark of the end is no JSON; no chunk is as short.
                if len(line) < 20 and line[5:].strip() == b"[DONE]":
                    self.done = True
                    break
                self._take(line[5:], texts)
            elif line not in (b"", b"\r") and not line.startswith(
                (b":", b"event", b"id", b"retry")
            ):
                raise self._malformed("a line is no event")
        if not texts:
            return ""
        self._has_text = True
        text = "".join(texts)
        self._room -= len(text)
        if self._room < 0:
            # It was asked to stop long ago.
            text = text[: self._room]
            self.finish_reason, self.done = "length", True
        return text

    def finish(self) -> tuple[ToolCall, ...]:
        """Return the tool calls of the whole answer; to be called when the stream is over.

        Raises:
            ModelUnavailableError: the answer is not whole, or there is none.
            ModelError: the answer was withheld by the endpoint's content filter.
        """
        if self.finish_reason is None:
            raise ModelUnavailableError(
                f"model {self._model!r} closed the stream before the answer was whole",
                model=self._model,
            )
        calls = tuple(
            ToolCall(call_id=call.call_id, name=call.name, arguments="".join(call.arguments))
            for _, call in sorted(self._calls.items())
        )
        if not all(call.name for call in calls):
            raise self._malformed("a tool call has no name")
        if not calls and not self._has_text and not self._may_be_empty:
            if self.finish_reason == "content_filter":
                raise ModelError(
                    f"the content filter of model {self._model!r} withheld the answer",
                    model=self._model,
                    upstream_code="content_filter",
                )
            raise ModelUnavailableError(
                f"model {self._model!r} gave an empty answer", model=self._model, empty=True
            )
        return calls

    @property
    def calls_tools(self) -> bool:
        """Whether a tool call has begun, whole or not."""
        return bool(self._calls)

    def _take(self, payload: bytes, texts: list[str]) -> None:
        try:
            chunk = _decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._malformed("an event is no chunk of a chat answer") from error
        if chunk.error:
            raise refusal_in_answer(
                self._model, msgspec.json.encode({"error": chunk.error}), self._secret
            )
        self.chunks += 1
        if chunk.usage is not None:
            self.usage = _usage(chunk.usage)
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.index != 0:
            return
        delta = choice.delta
        if delta is not None:
            text = delta.content or delta.refusal
            if text:
                texts.append(text)
                self.started = True
            elif delta.tool_calls:
                self.started = True
                for part in delta.tool_calls:
                    self._take_call(part)
            elif delta.reasoning_content or delta.reasoning:
                self.started = True
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason
            self.started = True

    def _take_call(self, part: _ToolDelta) -> None:
        calls = self._calls
        index = part.index
        if index is None:
            # Some endpoints leave the index out: then a new id begins a new call.
            last = max(calls, default=-1)
            begins = last < 0 or (part.id is not None and part.id != calls[last].call_id)
            index = last + begins
        call = calls.get(index)
        if call is None:
            call = calls[index] = _Call(part.id or f"call_{uuid.uuid4().hex}")
        if part.function is not None:
            call.name = part.function.name or call.name
            if part.function.arguments:
                call.arguments.append(part.function.arguments)
                self._room -= len(part.function.arguments)
                if self._room < 0:
                    raise self._malformed("a tool call is longer than was asked for")

    def _malformed(self, what: str) -> ModelUnavailableError:
        return ModelUnavailableError(
            f"the stream of model {self._model!r} is malformed: {what}", model=self._model
        )


def _usage(usage: _Usage) -> Usage:
    details = usage.prompt_tokens_details
    return Usage(
        input_tokens=usage.prompt_tokens or 0,
        output_tokens=usage.completion_tokens or 0,
        cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
    )
