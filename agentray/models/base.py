"""What a session asks of a model: one streamed call, in OpenAI's chat protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from agentray.events import ToolCall, Usage

__all__ = ["ModelCaller", "ModelProgress", "ModelRequest"]


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call. ``messages`` and ``tools`` are JSON already: the elements of the array, joined
    by commas, without its brackets, so that a long history is never encoded again."""

    model: str
    messages: bytes
    tools: bytes | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    session_id: str | None = None
    continue_text: bool = False
    """The last message is an unfinished answer that the model is to go on with."""


class ModelProgress(msgspec.Struct, frozen=True):
    """What one read from the wire brought: text that is new, and on the last one the rest.

    Text of all chunks of one read comes in one piece. ``finish_reason`` is set on exactly the
    last item of a call that ended well; ``tool_calls`` and ``usage`` are complete there.
    """

    text: str = ""
    finish_reason: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = Usage()


class ModelCaller(Protocol):
    """Calls models by their name in the catalog."""

    def stream(self, request: ModelRequest) -> AsyncIterator[ModelProgress]:
        """Call and yield progress until the answer is whole.

        Closing the iterator ends the call and frees its connection. An answer that is neither
        whole nor an error does not exist: a stream that closes early raises.

        Raises:
            ModelNotFoundError: no such model in the catalog.
            ModelRateLimitedError: 429; with ``retry_after_s`` where the endpoint named one.
            ModelUnavailableError: unreachable (with ``unreached``), 5xx (with ``status``),
                stalled, closed early, malformed.
            ModelError: any other refusal, with ``status``.
        """
        ...
