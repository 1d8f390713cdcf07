"""Decide what the simulator answers: the script in the prompt, else the conversation itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any

import msgspec

__all__ = [
    "Answer",
    "ChatMessage",
    "ChatRequest",
    "Script",
    "ScriptError",
    "ScriptedTool",
    "find_script",
    "plan_answer",
    "prompt_tokens",
    "split_text",
]

FILLER = ("the", "patient", "actor", "keeps", "its", "journal", "in", "order", "and")

_SCRIPT_LINE = re.compile(r"^[ \t]*!sim[ \t]+(\{.*)$", re.MULTILINE)
# Linear on any input: each character can match in one way only.
_WORD = re.compile(r"\S+\s*|\s+")
_NAME_TOLD = re.compile(r"\b(?:my name is|i am called)\s+(?!what\b|not\b)([\w'-]+)", re.IGNORECASE)
_NAME_ASKED = re.compile(
    r"\bwhat(?:'s|’s| is| was) my name\b|\bmy name ?\?|\bwho am i\b|\bremember my name\b",
    re.IGNORECASE,
)
_ARGUMENT_CHARS = 16
_CACHED_CHARS = 4096

_encode = msgspec.json.encode


class ScriptError(ValueError):
    """A script that cannot be followed; the message says what is wrong with it."""


class ScriptedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool call to ask for; arguments given as a string are sent as they stand, JSON or not."""

    name: str
    arguments: dict[str, Any] | str = {}


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one answer looks like. Unset parts come from the simulator's profile.

    ``tokens`` is the number of streamed chunks, ``fail_after`` the number of chunks of one call
    after which the stream breaks off (with an error of ``status``, if that is given too), ``on``
    the only model that the script holds for.
    """

    text: str | None = None
    tokens: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    tps: Annotated[float, msgspec.Meta(gt=0)] | None = None
    ttft_ms: Annotated[float, msgspec.Meta(ge=0)] | None = None
    tools: tuple[ScriptedTool, ...] = ()
    parallel: bool = False
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] | None = None
    fail_after: Annotated[int, msgspec.Meta(ge=0)] | None = None
    on: str | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; parts other than text count for nothing."""

    type: str = "text"
    text: str = ""


class ChatMessage(msgspec.Struct, frozen=True):
    """What the simulator reads of a chat message."""

    role: str
    content: str | list[ContentPart] | None = None
    # Raw or None would be None alone to msgspec.
    tool_calls: msgspec.Raw = msgspec.Raw()

    @property
    def text(self) -> str:
        """The content as plain text."""
        content = self.content
        if isinstance(content, str):
            return content
        return "".join(part.text for part in content) if content else ""


class StreamOptions(msgspec.Struct, frozen=True):
    """What a caller may ask of a stream."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct, frozen=True):
    """What the simulator reads of a request to ``/v1/chat/completions``."""

    model: str
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    continue_final_message: bool = False


class Answer(msgspec.Struct, frozen=True):
    """An answer as its tokens: ``pieces`` of text or of arguments, and each one's chat delta.

    ``calls`` are the tool calls as a message that is not streamed has them.
    """

    pieces: tuple[str, ...] = ()
    deltas: tuple[bytes, ...] = ()
    calls: tuple[bytes, ...] = ()


def find_script(messages: Sequence[ChatMessage], model: str) -> Script | None:
    """Return the first script in the last user message that holds for ``model``, if any.

    Raises:
        ScriptError: a line with a script is not valid.
    """
    for message in reversed(messages):
        if message.role == "user":
            text = message.text
            if "!sim" in text:
                for line in _SCRIPT_LINE.findall(text):
                    script = _parse_script(line)
                    if script.on is None or script.on == model:
                        return script
            break
    return None


@lru_cache(maxsize=256)
def _parse_script(line: str) -> Script:
    try:
        return msgspec.json.decode(line, type=Script)
    except msgspec.DecodeError as error:
        raise ScriptError(f"the !sim script cannot be followed: {error}") from error


def plan_answer(request: ChatRequest, script: Script | None, call_id: str) -> Answer:
    """Return the whole answer to a request; the same request always gets the same text.

    With ``continue_final_message`` the answer is what is missing behind the last message.
    ``call_id`` begins the ids of tool calls.
    """
    messages = request.messages
    said = ""
    if request.continue_final_message and messages[-1].role == "assistant":
        said = messages[-1].text
        messages = messages[:-1]
    results = _tool_results(messages)
    if script is not None and script.tools:
        if not script.parallel and len(results) < len(script.tools):
            return _tool_answer(script.tools[len(results) : len(results) + 1], call_id)
        if script.parallel and not results:
            return _tool_answer(script.tools, call_id)
    text, tokens = _text(messages, script, results)
    cacheable = len(text) <= _CACHED_CHARS and (tokens or 0) <= _CACHED_CHARS
    if script is not None and cacheable and not said:
        return _cached_answer(text, tokens)
    pieces = split_text(text, tokens)
    return _text_answer(_behind(pieces, said) if said else pieces)


def _text(
    messages: Sequence[ChatMessage], script: Script | None, results: Sequence[str]
) -> tuple[str, int | None]:
    if script is None:
        return _plain_text(messages, results), None
    if script.text is not None:
        return script.text.replace("{tool_results}", ", ".join(results)), script.tokens
    if script.tokens is not None:
        return "", script.tokens
    return _plain_text(messages, results), None


def _plain_text(messages: Sequence[ChatMessage], results: Sequence[str]) -> str:
    said = [_SCRIPT_LINE.sub("", m.text).strip() for m in messages if m.role == "user"]
    if not said:
        return "Hello! Say something, and I will answer."
    if results:
        return f"The tools answered: {', '.join(results)}."
    last = said[-1]
    if told := _NAME_TOLD.search(last):
        return f"Nice to meet you, {told[1]}. Ask me for your name whenever you like."
    if _NAME_ASKED.search(last):
        for text in reversed(said):
            if told := _NAME_TOLD.search(text):
                return f"Your name is {told[1]}."
        return "You have not told me your name yet."
    shown = last if len(last) <= 400 else last[:400] + "…"
    count = "the first message" if len(said) == 1 else f"message {len(said)}"
    return f"You said: {shown}\nThat is {count} of yours that I see here. I am a simulator."


def _tool_results(messages: Sequence[ChatMessage]) -> list[str]:
    # Only what follows the last user message belongs to the turn that is being answered.
    results: list[str] = []
    for message in reversed(messages):
        if message.role == "user":
            break
        if message.role == "tool":
            results.append(message.text)
    return results[::-1]


def split_text(text: str, tokens: int | None) -> tuple[str, ...]:
    """Return the text in ``tokens`` pieces, or word by word where the number is not given.

    The pieces together are the text; only a text of fewer characters than ``tokens`` is padded.
    """
    words = tuple(_WORD.findall(text))
    if tokens is None or len(words) == tokens:
        return words
    if len(text) >= tokens:
        cuts = [len(text) * i // tokens for i in range(tokens + 1)]
        return tuple(text[a:b] for a, b in pairwise(cuts))
    padding = (
        (" " if words or i else "") + FILLER[i % len(FILLER)] for i in range(tokens - len(words))
    )
    return (*words, *padding)


def _behind(pieces: tuple[str, ...], said: str) -> tuple[str, ...]:
    """Return the pieces behind ``said``; if that is not how they begin, all of them."""
    if not "".join(pieces).startswith(said):
        return pieces
    at = len(said)
    for i, piece in enumerate(pieces):
        if at < len(piece):
            return (piece[at:], *pieces[i + 1 :])
        at -= len(piece)
    return ()


def _text_answer(pieces: tuple[str, ...]) -> Answer:
    return Answer(
        pieces=pieces, deltas=tuple(b'{"content":' + _encode(piece) + b"}" for piece in pieces)
    )


@lru_cache(maxsize=256)
def _cached_answer(text: str, tokens: int | None) -> Answer:
    return _text_answer(split_text(text, tokens))


def _tool_answer(tools: Sequence[ScriptedTool], call_id: str) -> Answer:
    pieces: list[str] = []
    deltas: list[bytes] = []
    calls: list[bytes] = []
    for index, tool in enumerate(tools):
        arguments = tool.arguments
        if not isinstance(arguments, str):
            arguments = _encode(arguments).decode()
        call: dict[str, Any] = {
            "id": f"{call_id}_{index}",
            "type": "function",
            "function": {"name": tool.name, "arguments": arguments},
        }
        calls.append(_encode(call))
        head = {**call, "index": index, "function": {"name": tool.name, "arguments": ""}}
        pieces.append("")
        deltas.append(_encode({"tool_calls": [head]}))
        for start in range(0, len(arguments), _ARGUMENT_CHARS):
            piece = arguments[start : start + _ARGUMENT_CHARS]
            pieces.append(piece)
            part = {"index": index, "function": {"arguments": piece}}
            deltas.append(_encode({"tool_calls": [part]}))
    return Answer(pieces=tuple(pieces), deltas=tuple(deltas), calls=tuple(calls))


def prompt_tokens(message: ChatMessage) -> int:
    """Return the tokens of one message of a prompt: 4 for its frame, one per 4 characters."""
    content = message.content
    length = len(content) if isinstance(content, str) else len(message.text)
    length += len(memoryview(message.tool_calls))
    return 4 + (length + 3) // 4
