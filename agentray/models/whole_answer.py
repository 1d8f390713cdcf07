"""Check an answer that has come to its end: whether it is one, and whether it says anything."""

from __future__ import annotations

from typing import Any

import msgspec

from agentray.errors import ModelError, ModelUnavailableError

__all__ = ["check_end", "is_completion", "is_embeddings", "is_error"]

# How servers end an answer that they could not bring to its end.
_BROKE = frozenset({"error", "abort", "aborted"})
# Also what is nested too deeply to be read.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Message(msgspec.Struct):
    """All that can be an answer, or a part of one."""

    content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None
    reasoning: Any = None
    reasoning_content: Any = None

    def says_something(self) -> bool:
        return any(getattr(self, name) for name in self.__struct_fields__)


class _Choice(msgspec.Struct):
    message: _Message | None = None
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Embedding(msgspec.Struct):
    embedding: msgspec.Raw


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


_completion = msgspec.json.Decoder(_Completion)
_embeddings = msgspec.json.Decoder(_Embeddings)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def check_end(model: str, finish_reason: str | None, *, said: bool) -> None:
    """Check how an answer ended; ``said`` tells whether there is anything in it.

    One that has nothing because its limit was reached is whole: its thoughts took all of it.

    Raises:
        ModelUnavailableError: the endpoint broke the answer off, or it is empty.
        ModelError: the answer was withheld by the endpoint's content filter.
    """
    if finish_reason in _BROKE:
        raise ModelUnavailableError(
            f"model {model!r} broke its answer off: {finish_reason}", model=model
        )
    if said or finish_reason == "length":
        return
    if finish_reason == "content_filter":
        raise ModelError(
            f"the content filter of model {model!r} withheld the answer",
            model=model,
            upstream_code="content_filter",
        )
    raise ModelUnavailableError(f"model {model!r} gave an empty answer", model=model, empty=True)


def is_completion(model: str, body: bytes) -> bool:
    """Return whether JSON is a chat completion, and check how that ended.

    Of several choices one that says something is enough.

    Raises:
        ModelError: as ``check_end``.
    """
    try:
        choices = _completion.decode(body).choices
    except _UNREADABLE:
        return False
    said = any(choice.message is not None and choice.message.says_something() for choice in choices)
    for choice in choices:
        check_end(model, choice.finish_reason, said=said)
    return bool(choices)


def is_embeddings(body: bytes) -> bool:
    """Return whether JSON is an answer of embeddings."""
    try:
        return bool(_embeddings.decode(body).data)
    except _UNREADABLE:
        return False


def is_error(body: bytes) -> bool:
    """Return whether JSON is what servers say instead of an answer."""
    try:
        found = _object.decode(body)
    except _UNREADABLE:
        return False
    return "error" in found or "detail" in found or bytes(found.get("object", b"")) == b'"error"'
