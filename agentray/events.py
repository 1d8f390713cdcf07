"""The events of a session's journal: what happened, in order, as deltas and references.

An event as JSON has ``seq`` (gap-free from 1 within its session), ``type``, ``turn_id``, ``at``
(seconds since the epoch) and its own fields.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

__all__ = [
    "AnyEvent",
    "Event",
    "Message",
    "ModelCalled",
    "ModelFailed",
    "ModelFinished",
    "ModelVoided",
    "Route",
    "StepKind",
    "ToolCall",
    "ToolCalled",
    "ToolFinished",
    "TurnAccepted",
    "TurnError",
    "TurnFinished",
    "TurnOptions",
    "TurnResumed",
    "TurnStatus",
    "Usage",
    "decode_event",
    "encode_event",
]

TurnStatus = Literal["completed", "failed", "cancelled", "incomplete"]
StepKind = Literal["plan", "tool_follow_up", "summarise", "format", "answer"]
"""What a model step is for: to plan a use of tools, to go on behind their results, to summarise,
to bring something into a form, or to answer."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a caller's input, in the shape of OpenAI's chat messages.

    ``content`` is text, or a list of chat content parts (``text`` and ``image_url``).
    """

    role: str
    content: str | list[dict[str, Any]]


class ToolCall(msgspec.Struct, frozen=True):
    """A tool call that a model asked for; ``arguments`` is the model's JSON text as it came."""

    call_id: str
    name: str
    arguments: str


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens as the model reported them; ``cached_tokens`` is a part of ``input_tokens``."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
        )


class Route(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a model was called: ``candidates`` came into question, in the order of preference.

    ``held_out`` says that chance took the large tier, to compare it with the small one. ``hedge``
    is the model that is called as well if no first token comes in time.
    """

    kind: StepKind
    candidates: list[str]
    reason: str
    held_out: bool = False
    hedge: str | None = None


class TurnOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a caller may set for one turn; ``None`` leaves it to the agent.

    ``model`` is forced: no other one is called. ``output_schema`` is a JSON schema that the
    answer has to follow, ``output_form`` what its caller says of it besides: ``name``,
    ``description`` and ``strict``, as OpenAI has them.
    """

    model: str | None = None
    output_schema: dict[str, Any] | None = None
    output_form: dict[str, Any] = {}
    instructions: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    background: bool = False
    metadata: dict[str, str] = {}


class TurnError(msgspec.Struct, frozen=True):
    """Why a turn failed or stopped early: a stable code and a sentence."""

    code: str
    message: str


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """What every event has."""

    seq: int
    turn_id: str
    at: float


class TurnAccepted(Event, frozen=True, tag="turn.accepted"):
    """A turn begins: its input became a part of the session's history."""

    input: list[Message]
    agent: str
    options: TurnOptions = TurnOptions()


class TurnResumed(Event, frozen=True, tag="turn.resumed"):
    """A new owner took an unfinished turn over; ``phase`` is where the last owner left it."""

    phase: Literal["accepted", "model", "streaming", "tools", "finishing"]
    epoch: int
    owner: str


class ModelCalled(Event, frozen=True, tag="model.called"):
    """A model call began.

    ``attempt`` counts the calls of one step from 1. With ``continued_from`` the call continues
    the text of the voided attempt before it: that many characters were already streamed.
    ``route`` tells why it is this model.
    """

    step: int
    attempt: int
    model: str
    continued_from: int = 0
    route: Route | None = None


class ModelVoided(Event, frozen=True, tag="model.voided"):
    """An attempt ended without an answer; ``text`` is what of it had been streamed.

    With ``continues`` the next attempt goes on after ``text``; otherwise the item that was being
    streamed is closed as incomplete and the next attempt begins a new one. With ``escalates`` its
    answer failed its checks, and the next tier is to try. ``unsent``: the model was left alone just
    then, and no call was made. ``model`` is set where it was not the
    one that was called first; ``cost`` is what was spent, in US dollars, as far as that is known.
    """

    step: int
    attempt: int
    reason: str
    text: str = ""
    continues: bool = False
    escalates: bool = False
    unsent: bool = False
    model: str | None = None
    cost: float = 0.0


class ModelFinished(Event, frozen=True, tag="model.finished"):
    """A model answered. ``text`` is the whole text of the step, continued parts included.

    ``model`` is set where it was not the one that was called first, ``cached`` where the answer
    is one that was given to an equal call before. ``cost`` is in US dollars.
    """

    step: int
    attempt: int
    text: str
    finish_reason: str
    tool_calls: list[ToolCall] = []
    usage: Usage = Usage()
    model: str | None = None
    cached: bool = False
    cost: float = 0.0


class ModelFailed(Event, frozen=True, tag="model.failed"):
    """A model call failed for good; ``text`` is what of it had been streamed."""

    step: int
    attempt: int
    error: TurnError
    text: str = ""
    cost: float = 0.0


class ToolCalled(Event, frozen=True, tag="tool.called"):
    """A tool call is about to be dispatched. A retry after a crash is a second such event."""

    call_id: str
    name: str
    arguments: str
    attempt: int = 1


class ToolFinished(Event, frozen=True, tag="tool.finished"):
    """A tool call is settled; ``unknown`` means that a crash hid its outcome.

    ``reason`` says in a word why it failed (timeout, memory, refused, …). ``cpu_s`` and
    ``memory_bytes`` (at its peak) are what a sandboxed call used, ``took_s`` is the time from its
    dispatch to here. ``cached``: the result is that of an equal call.
    """

    call_id: str
    name: str
    status: Literal["ok", "error", "unknown"]
    output: str
    reason: str = ""
    took_s: float = 0.0
    cpu_s: float = 0.0
    memory_bytes: int = 0
    cached: bool = False


class TurnFinished(Event, frozen=True, tag="turn.finished"):
    """The terminal event of a turn: exactly one follows each ``turn.accepted``.

    ``cost`` is that of all its model calls, lost ones included, in US dollars.
    """

    status: TurnStatus
    usage: Usage = Usage()
    error: TurnError | None = None
    cost: float = 0.0


AnyEvent = (
    TurnAccepted
    | TurnResumed
    | ModelCalled
    | ModelVoided
    | ModelFinished
    | ModelFailed
    | ToolCalled
    | ToolFinished
    | TurnFinished
)

EVENT_TYPES: tuple[str, ...] = tuple(str(cls.__struct_config__.tag) for cls in get_args(AnyEvent))

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def encode_event(event: AnyEvent) -> bytes:
    """Return the event as JSON."""
    return _encoder.encode(event)


def decode_event(body: bytes | str) -> AnyEvent:
    """Return the event of a JSON text.

    Raises:
        msgspec.ValidationError: if it is none of the known events.
    """
    return _decoder.decode(body)
