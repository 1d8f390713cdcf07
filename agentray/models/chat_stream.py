"""Put a streamed chat answer together from the raw bytes of its server-sent events."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agentray.errors import ModelUnavailableError
from agentray.events import ToolCall, Usage
from agentray.models.refusals import refusal_in_answer
from agentray.models.usage import usage_in
from agentray.models.whole_answer import check_end

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
    # What only those read to whom a stream is passed on as it came.
    function_call: Any = None
    audio: Any = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
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
    a text that is continued can turn out to have been complete. With ``passed_on`` thoughts, audio
    and functions of the old form are an answer, too: whoever gets the stream may use them.
    ``secret`` is cut out of what the endpoint says in errors. An answer that goes on far behind
    ``max_tokens`` is cut there, as one that reached its limit.
    """

    def __init__(
        self,
        model: str,
        *,
        may_be_empty: bool = False,
        passed_on: bool = False,
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
        self._passed_on = passed_on
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
            ModelError: as ``check_end``.
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
        said = bool(calls) or self._has_text or self._may_be_empty
        check_end(self._model, self.finish_reason, said=said)
        return calls

    @property
    def calls_tools(self) -> bool:
        """Whether a tool call has begun, whole or not."""
        return bool(self._calls)

    def _take(self, payload: bytes, texts: list[str]) -> None:
        try:
            chunk = _decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._malformed("an event is no chunk of a chat answer") from error
        if chunk.error:
            raise refusal_in_answer(
                self._model, msgspec.json.encode({"error": chunk.error}), self._secret
            )
        choices = chunk.choices
        if choices and choices[0].finish_reason:
            # Here and not at the end: whoever gets the stream must not see it end well.
            check_end(self._model, choices[0].finish_reason, said=True)
        self.chunks += 1
        if chunk.usage is not None:
            self.usage = usage_in(chunk.usage)
        if not choices:
            return
        choice = choices[0]
        delta = choice.delta
        if choice.index != 0:
            # Whoever asked for several has an answer if one of them is.
            self._has_text |= self._passed_on and delta is not None and bool(delta.content)
            return
        if delta is not None:
            text = delta.content or delta.refusal
            if text:
                texts.append(text)
                self.started = True
            elif delta.tool_calls:
                self.started = True
                for part in delta.tool_calls:
                    self._take_call(part)
            elif delta.reasoning_content or delta.reasoning or delta.function_call or delta.audio:
                self.started = True
                self._has_text |= self._passed_on
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
