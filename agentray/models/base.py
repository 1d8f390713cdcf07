"""What a session asks of a model: one streamed call, in OpenAI's chat protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from agentray.events import Route, ToolCall, Usage

__all__ = ["Bill", "ModelCaller", "ModelHealth", "ModelProgress", "ModelRequest"]


class Bill:
    """What calls cost that neither an answer nor an error tells of, because they were given up: in
    US dollars. Whoever makes a request reads it when the stream is closed."""

    __slots__ = ("cost",)

    def __init__(self) -> None:
        self.cost = 0.0

    def take(self) -> float:
        """Return the cost, for the caller to account for; nothing is left."""
        cost, self.cost = self.cost, 0.0
        return cost


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call. ``messages`` and ``tools`` are JSON already: the elements of the array, joined
    by commas, without its brackets, so that a long history is never encoded again.

    ``timeout_s`` is what is left of the step's time. ``check`` looks at a whole answer, its new
    text and its tool calls, and returns what is wrong with it. ``patient`` calls wait some
    seconds for an endpoint that nobody answers at; those that have another model to go to do not.
    ``cache`` allows (or forbids) an answer that was given to an equal call before. ``bill`` gets
    what calls cost that are given up.
    """

    model: str
    messages: bytes
    tenant: str = "default"
    route: Route | None = None
    timeout_s: float | None = None
    check: Callable[[str, tuple[ToolCall, ...]], str | None] | None = None
    patient: bool = True
    cache: bool | None = None
    bill: Bill | None = None
    output_schema: bytes | None = None
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
    last item of a call that ended well; ``tool_calls`` and ``usage`` are complete there. So are
    ``model``, set where it was not the one that was asked for, ``cost`` in US dollars,
    ``cached``, and ``problem``: what the request's check found wrong.
    """

    text: str = ""
    finish_reason: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = Usage()
    model: str | None = None
    cost: float = 0.0
    cached: bool = False
    problem: str | None = None


class ModelHealth(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether a model can be called, and if not, why."""

    healthy: bool
    reason: str | None = None


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
                stalled, closed early, malformed; with ``out_of_time`` where the request's own time
                ended it, which says nothing of the model.
            ModelContextLengthError: prompt and answer do not fit its context window.
            ModelError: any other refusal, with ``status``.

        What a lost call cost, where that is known, is in the error's ``cost``.
        """
        ...
