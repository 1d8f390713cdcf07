"""Assemble what the model is shown: instructions, the last turns, the current turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from agentray.events import Message, ToolCall

__all__ = [
    "answer_fragment",
    "assemble",
    "input_fragment",
    "instructions_fragment",
    "join",
    "tool_calls_fragment",
    "tool_result_fragment",
]

_encode = msgspec.json.Encoder().encode


def join(fragments: Iterable[bytes]) -> bytes:
    """Return fragments of a JSON array (elements without its brackets) as one fragment."""
    return b",".join(fragment for fragment in fragments if fragment)


def instructions_fragment(text: str) -> bytes:
    """Return the system message, or nothing for no instructions."""
    return b'{"role":"system","content":' + _encode(text) + b"}" if text else b""


def input_fragment(messages: Sequence[Message]) -> bytes:
    """Return a caller's messages as they are shown to the model."""
    return b",".join(_encode(message) for message in messages)


def answer_fragment(text: str) -> bytes:
    """Return an answer of the model."""
    return b'{"role":"assistant","content":' + _encode(text) + b"}"


def tool_calls_fragment(text: str, calls: Sequence[ToolCall]) -> bytes:
    """Return an answer of the model that asks for tools."""
    wire = [
        {
            "id": call.call_id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]
    content = _encode(text) if text else b"null"
    return b'{"role":"assistant","content":' + content + b',"tool_calls":' + _encode(wire) + b"}"


def tool_result_fragment(call_id: str, output: str) -> bytes:
    """Return the result of a tool call."""
    return (
        b'{"role":"tool","tool_call_id":' + _encode(call_id) + b',"content":' + _encode(output)
    ) + b"}"


def assemble(
    instructions: str, past: Sequence[bytes], current: Sequence[bytes], unfinished: str = ""
) -> bytes:
    """Return the messages of a call as one fragment, stable parts first.

    ``past`` and ``current`` are fragments. ``unfinished`` is text that the model is to continue.
    """
    return join(
        [
            instructions_fragment(instructions),
            *past,
            *current,
            answer_fragment(unfinished) if unfinished else b"",
        ]
    )
